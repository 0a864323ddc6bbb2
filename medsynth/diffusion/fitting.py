"""Fitting the denoiser on values that need no protection."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from medsynth.config import Train
from medsynth.diffusion.objective import in_precision, noise_rows, row_loss
from medsynth.models import fitting
from medsynth.models.denoiser import Denoiser
from medsynth.models.fitting import Recipe, Report

Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]
"""Return one batch: clean latents and encoded label maps."""

_WARM_UP = 0.15


def open_ema(model: nn.Module, decay: float) -> EMAModel:
    """Return an exponential moving average of ``model``'s trainable parameters that warms up (Karras et al. 2024)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return EMAModel(parameters, decay=decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)


def fit(
    model: Denoiser,
    draw: Draw,
    what: str,
    steps: int,
    learning_rate: float,
    settings: Train,
    generator: torch.Generator,
    report: Report,
    keep: Path | None = None,
) -> None:
    """Train ``model`` in place and leave it with its averaged weights (:func:`medsynth.models.fitting.fit`).

    Args:
        model: the denoiser.
        draw: gives the batches.
        what: what the progress bar calls it.
        steps: how many.
        learning_rate: the peak.
        settings: noise schedule, mask dropout, EMA decay, precision.
        generator: randomness of batches, noise levels and noise.
        report: called after every step.
        keep: file in which an unfinished training is kept; see there.
    """

    def loss_of(stream: torch.Generator) -> Tensor:
        latents, masks = draw(stream)
        rows = noise_rows(latents, masks, model.preconditioning, settings.mask_dropout, stream)
        with in_precision(settings, latents.device):
            return row_loss(model, rows).mean()

    recipe, average = Recipe(steps, learning_rate, _WARM_UP), open_ema(model, settings.ema_decay)
    fitting.fit(model, loss_of, what, recipe, generator, report, average=average, keep=keep)
