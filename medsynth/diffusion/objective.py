"""The training objective: one noise level a row, the velocity as target, the weighted squared error a row."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

    from medsynth.config import Train
    from medsynth.models.denoiser import Preconditioning

Batch = dict[str, Tensor]


def training_schedule(settings: Train) -> DDPMScheduler:
    """Return the forward process (Ho et al. 2020, eq. 4) with the configured noise schedule."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=settings.noise_steps,
        beta_schedule=settings.beta_schedule,
        prediction_type="v_prediction",
        clip_sample=False,
    )


def in_precision(settings: Train, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which the network multiplies as ``train.precision`` says; losses are float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bfloat16")


def noise_rows(
    latents: Float[Tensor, "row latent *small"],
    masks: Float[Tensor, "row mask *small"],
    preconditioning: Preconditioning,
    mask_dropout: float,
    generator: torch.Generator,
) -> Batch:
    """Draw a step and a noise for each row and return what :func:`row_loss` needs.

    Args:
        latents: clean latents.
        masks: encoded label maps.
        preconditioning: noise schedule and channel spreads.
        mask_dropout: rate at which a row's mask is replaced by zeros (Ho and Salimans 2022).
        generator: source of steps, noise and dropped masks (not privacy noise).
    """
    rows, device = len(latents), latents.device
    steps = torch.randint(0, len(preconditioning.signal), (rows,), generator=generator).to(device)
    noise = torch.randn(latents.shape, generator=generator).to(device)
    kept = (torch.rand(rows, generator=generator) >= mask_dropout).to(device)
    ones = (rows, *(1,) * (latents.ndim - 1))
    signal = preconditioning.signal.to(device)[steps].view(ones)
    sigma = (1 - signal.square()).sqrt()
    return {
        "noisy": signal * latents + sigma * noise,
        "steps": steps,
        "mask": masks * kept.view(ones),
        "target": signal * noise - sigma * latents,
        "scale": preconditioning.error_scale(steps.to(preconditioning.signal.device)).to(device),
    }


def row_loss(model: nn.Module, batch: Batch) -> Float[Tensor, " row"]:
    """Return the weighted mean squared error of each row's velocity (Salimans and Ho 2022, eq. 6 and appendix D)."""
    prediction = model(batch["noisy"], batch["steps"], batch["mask"])
    error = (prediction - batch["target"]) * batch["scale"]
    return cast(Tensor, error.square().flatten(1).mean(1))
