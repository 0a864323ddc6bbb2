"""The training objective: one noise level a row, the denoiser's target, the squared error a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import DDPMScheduler

    from medsynth.config import Train

Batch = dict[str, Tensor]


def training_schedule(settings: Train) -> DDPMScheduler:
    """Return the forward process (Ho et al. 2020, eq. 4) with the configured noise schedule and prediction type."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        num_train_timesteps=settings.noise_steps,
        beta_schedule=settings.beta_schedule,
        prediction_type=settings.prediction,
        clip_sample=False,
    )


def noise_rows(
    latents: Float[Tensor, "row latent *small"],
    masks: Float[Tensor, "row mask *small"],
    schedule: DDPMScheduler,
    mask_dropout: float,
    generator: torch.Generator,
) -> Batch:
    """Draw a step and a noise for each row and return what :func:`row_loss` needs.

    Args:
        latents: clean latents.
        masks: encoded label maps.
        schedule: the forward process.
        mask_dropout: rate at which a row's mask is replaced by zeros (Ho and Salimans 2022).
        generator: source of steps, noise and dropped masks (not privacy noise).
    """
    rows = len(latents)
    device = latents.device
    count = int(schedule.config["num_train_timesteps"])
    steps = torch.randint(0, count, (rows,), generator=generator).to(device)
    noise = torch.randn(latents.shape, generator=generator).to(device)
    kept = (torch.rand(rows, generator=generator) >= mask_dropout).to(device)
    noisy = schedule.add_noise(latents, noise, cast(torch.IntTensor, steps))
    target = _target(schedule, latents, noise, steps)
    shape = (rows, *(1,) * (masks.ndim - 1))
    return {"noisy": noisy, "steps": steps, "mask": masks * kept.view(shape), "target": target}


def row_loss(model: nn.Module, batch: Batch) -> Float[Tensor, " row"]:
    """Return the mean squared error of each row (Ho et al. 2020, eq. 14; Salimans and Ho 2022 for velocity)."""
    prediction = model(batch["noisy"], batch["steps"], batch["mask"])
    return cast(Tensor, (prediction - batch["target"]).square().flatten(1).mean(1))


def _target(schedule: DDPMScheduler, latents: Tensor, noise: Tensor, steps: Int[Tensor, " row"]) -> Tensor:
    kind = schedule.config["prediction_type"]
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return latents
    return cast(Tensor, schedule.get_velocity(latents, noise, cast(torch.IntTensor, steps)))
