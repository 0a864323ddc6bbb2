"""Fitting the denoiser on values that need no protection (phantoms; patients in a study without privacy)."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from medsynth.config import Train
from medsynth.diffusion.objective import noise_rows, row_loss
from medsynth.models.denoiser import Denoiser

Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]
"""Return one batch: clean latents and encoded label maps."""

Report = Callable[[int, float], None]
"""Receive the step and the loss."""

_GRADIENT_BOUND = 1.0
_WARM_UP = 0.15  # share of the steps in which the rate rises


def open_ema(model: nn.Module, decay: float) -> EMAModel:
    """Return an exponential moving average of ``model``'s trainable parameters that warms up (Karras et al. 2024)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return EMAModel(parameters, decay=decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)


def fit(
    model: Denoiser,
    draw: Draw,
    steps: Iterable[int],
    total: int,
    learning_rate: float,
    settings: Train,
    generator: torch.Generator,
    report: Report,
) -> None:
    """Train ``model`` in place by AdamW with a one-cycle rate and leave it with its averaged weights.

    Args:
        model: the denoiser.
        draw: gives the batches.
        steps: step numbers (a progress bar around a range).
        total: how many they are.
        learning_rate: the peak.
        settings: noise schedule, mask dropout, EMA decay.
        generator: randomness of batches, noise levels and noise.
        report: called at every step.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(total, 2), pct_start=_WARM_UP)
    ema = open_ema(model, settings.ema_decay)
    model.train()
    for step in steps:
        latents, masks = draw(generator)
        batch = noise_rows(latents, masks, model.preconditioning, settings.mask_dropout, generator)
        loss = row_loss(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _GRADIENT_BOUND)
        optimizer.step()
        rate.step()
        ema.step(parameters)
        report(step, float(loss.detach()))
    ema.copy_to(parameters)
