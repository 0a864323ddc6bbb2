"""How well a generator knows a patient: by the error of its denoiser, and by how near its drafts come."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medsynth.diffusion.generator import Dresser
from medsynth.models.denoiser import Denoiser

_LEVELS = (0.15, 0.3, 0.45, 0.6, 0.75)  # of the noise steps: clear of the ends, where all patients look alike
_DRAWS = 2
_OPPOSITES = 2  # pairs of drafts a label map
_RECORDS = 8  # of one patient at most, evenly spaced: a video has hundreds
_FLAT = 1e-6  # least variance of an image in [-1, 1]


@torch.no_grad()
def familiarity(model: Denoiser, latents: Tensor, masks: Tensor, seed: int) -> float:
    """Return how familiar one patient is: minus the mean log of error / error of the linear guess.

    Noise levels and draws are the same for every patient; the linear guess (the preconditioning alone, which has seen
    nobody) takes out that some images are hard for any model. Mean over records, levels and draws, then one number.

    Args:
        model: the denoiser.
        latents: ``(record, latent, *small)`` of one patient.
        masks: ``(record, mask, *small)``.
        seed: of the noise.
    """
    preconditioning, device = model.preconditioning, latents.device
    ones = (1,) * (latents.ndim - 1)
    levels = [int(level * len(preconditioning.signal)) for level in _LEVELS for _ in range(_DRAWS)]
    streams = [torch.Generator().manual_seed(seed + number) for number in range(len(levels))]
    noise = torch.stack([torch.randn(latents.shape[1:], generator=stream) for stream in streams]).to(device)
    steps = torch.tensor(levels, device=device)
    signal = preconditioning.signal[steps].view(-1, *ones)
    sigma = (1 - signal.square()).sqrt()
    errors = torch.zeros(2, len(levels), device=device)
    for latent, mask in zip(latents, masks, strict=True):
        noisy, target = signal * latent + sigma * noise, signal * noise - sigma * latent
        scale, (_, skip, _) = preconditioning.error_scale(steps), preconditioning(steps)
        for row, guess in enumerate((model(noisy, steps, mask.expand(len(levels), *mask.shape)), skip * noisy)):
            errors[row] += ((guess - target) * scale).square().flatten(1).mean(1)
    return -float(torch.log(errors[0] / errors[1]).mean())


def resemblance(
    dresser: Dresser, images: NDArray[np.float32], labels: NDArray[np.integer], stream: Sequence[int]
) -> float:
    """Return how near drafts for a patient's own label maps come to the patient's images.

    Minus the mean log of the mean draft's squared error over the image's variance: that some images are hard for any
    statistics is taken out in part. What drafts show by chance would drown what they show of patients, so it is drawn
    in opposite pairs (Hammersley, Morton 1956), and for each patient anew. Records without foreground, which nothing is
    drafted for, are left out; 0 where none is left.

    Args:
        dresser: the released statistics.
        images: ``(record, channel, *spatial)`` in [-1, 1] of one patient.
        labels: ``(record, *spatial)``.
        stream: numbers that seed the drafts, of this patient alone.
    """
    shown = [at for at, label in enumerate(labels) if label.any()]
    found = []
    for at in shown[:: -(-len(shown) // _RECORDS) or 1]:
        label, image = labels[at].astype(np.uint8), images[at]
        seeds = [np.random.SeedSequence([*stream, at, pair]) for pair in range(_OPPOSITES)]
        drafts = [dresser.draft(label, kind(np.random.PCG64(seed))) for seed in seeds for kind in _SIGNS]
        error = np.square(image - np.mean(drafts, axis=0)).mean()
        found.append(-np.log((error + _FLAT) / (image.var() + _FLAT)))
    return float(np.mean(found)) if found else 0.0


class _Opposite(np.random.Generator):
    """A stream whose normal numbers lie opposite, on the other side of their mean."""

    def standard_normal(self, *given: Any, **named: Any) -> Any:
        """Return minus what the stream would."""
        return -super().standard_normal(*given, **named)

    def normal(self, loc: Any = 0.0, *given: Any, **named: Any) -> Any:
        """Return ``loc`` minus what the stream would add to it."""
        return 2 * loc - super().normal(loc, *given, **named)


_SIGNS = (np.random.Generator, _Opposite)
