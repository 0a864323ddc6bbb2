"""Does a synthetic image obey its label map, in the eyes of a network that was trained on real patients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from torch import Tensor

from medsynth.metrics.overlap import known_mean, patient_dice


def label_agreement(
    networks: Sequence[Callable[[Tensor], Tensor]], images: Tensor, labels: Tensor, classes: int
) -> np.ndarray:
    """Return the Dice between each pair's label map and what real-trained networks see in its image.

    Args:
        networks: images ``(pair, channel, *spatial)`` to labels ``(pair, *spatial)``; their Dice is averaged.
        images: synthetic images in [-1, 1].
        labels: the label maps they were made from, ``(pair, *spatial)``.
        classes: labels, background included.

    Returns:
        ``(pair, classes - 1)`` in [0, 1], NaN where a label is in neither.
    """
    truth = list(labels[:, None])
    tables = [patient_dice(list(network(images)[:, None]), truth, classes) for network in networks]
    return known_mean(np.stack(tables), axis=0)
