"""Are synthetic images nearer to training patients than other patients are: a sanity check, no privacy statement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CELLS = {2: 24, 3: 12}  # longest axis of the pooled space by rank: coarse enough to ignore noise
_NEAR_PERCENTILE = 5.0


@dataclass(frozen=True)
class Nearness:
    """Distances to the nearest training image, root mean square over the pooled cells (unit: standard deviations).

    Attributes:
        synthetic: one a synthetic image.
        held_out: one a held-out patient's image, the yardstick.
    """

    synthetic: np.ndarray
    held_out: np.ndarray

    @property
    def median_ratio(self) -> float:
        """Median distance of synthetic images over that of held-out images; well below 1 hints at copies."""
        return float(np.median(self.synthetic) / max(float(np.median(self.held_out)), 1e-12))

    @property
    def nearer_than_held_out(self) -> float:
        """Share of synthetic images nearer than the 5th percentile of held-out ones; 0.05 is expected of strangers."""
        return float(np.mean(self.synthetic < np.percentile(self.held_out, _NEAR_PERCENTILE)))


def nearness(train: Tensor, held_out: Tensor, synthetic: Tensor) -> Nearness:
    """Measure how near synthetic and held-out images are to their nearest training image.

    Args:
        train: training images ``(image, channel, *spatial)``.
        held_out: held-out patients' images, same shape.
        synthetic: synthetic images, same shape.
    """
    known = coarse(train)
    return Nearness(_nearest(coarse(synthetic), known), _nearest(coarse(held_out), known))


def coarse(images: Tensor) -> Tensor:
    """Return images pooled to few cells and brought to zero mean, unit spread each: ``(image, cell)``.

    Args:
        images: ``(image, channel, *spatial)``.
    """
    rank = images.ndim - 2
    longest = max(images.shape[2:])
    cells: Any = tuple(max(1, round(size * min(1.0, _CELLS[rank] / longest))) for size in images.shape[2:])
    pool = nn.AdaptiveAvgPool2d(cells) if rank == 2 else nn.AdaptiveAvgPool3d(cells)
    flat: Tensor = pool(images).flatten(1)
    return (flat - flat.mean(dim=1, keepdim=True)) / flat.std(dim=1, keepdim=True).clamp_min(1e-6)


def _nearest(queries: Tensor, known: Tensor) -> np.ndarray:
    distances = torch.cdist(queries, known).min(dim=1).values / known.shape[1] ** 0.5
    return np.asarray(distances.double().numpy())
