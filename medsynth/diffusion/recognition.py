"""How well a denoiser knows a patient: its error on noised latents beside the error of the best linear guess."""

from __future__ import annotations

import torch
from torch import Tensor

from medsynth.models.denoiser import Denoiser

_LEVELS = (0.15, 0.3, 0.45, 0.6, 0.75)  # of the noise steps: clear of the ends, where all patients look alike
_DRAWS = 2


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
    preconditioning = model.preconditioning
    shape = (1, *latents.shape[1:])
    ratios = []
    for number, level in enumerate(level for level in _LEVELS for _ in range(_DRAWS)):
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed + number)).to(latents.device)
        steps = torch.full((len(latents),), int(level * len(preconditioning.signal)), device=latents.device)
        signal = preconditioning.signal[steps].view(-1, *(1,) * (latents.ndim - 1))
        sigma = (1 - signal.square()).sqrt()
        noisy, target = signal * latents + sigma * noise, signal * noise - sigma * latents
        scale, (_, skip, _) = preconditioning.error_scale(steps), preconditioning(steps)
        errors = [((guess - target) * scale).square().mean() for guess in (model(noisy, steps, masks), skip * noisy)]
        ratios.append(torch.log(errors[0] / errors[1]))
    return -float(torch.stack(ratios).mean())
