"""Sampling: from label maps and seeds to latents, with any of diffusers' schedulers and any rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medsynth.config import Train
from medsynth.diffusion.objective import in_precision

Scheduler = Literal["ddpm", "ddim", "pndm", "dpm-solver++", "unipc"]


def sampling_schedule(name: Scheduler, settings: Train) -> Any:
    """Return diffusers' scheduler ``name`` for the forward process of ``settings``.

    Sources: DDPM (Ho et al. 2020), DDIM (Song et al. 2021), PNDM (Liu et al. 2022), DPM-Solver++ (Lu et al. 2022),
    UniPC (Zhao et al. 2023).
    """
    import diffusers

    forward = {
        "num_train_timesteps": settings.noise_steps,
        "beta_schedule": settings.beta_schedule,
        "prediction_type": "v_prediction",
    }
    # Steps are spaced so that sampling starts from pure noise (Lin et al. 2024, section 3.3).
    trailing = {**forward, "timestep_spacing": "trailing"}
    match name:
        case "ddpm":
            return diffusers.DDPMScheduler(**trailing, clip_sample=False)
        case "ddim":
            return diffusers.DDIMScheduler(**trailing, clip_sample=False, set_alpha_to_one=True)
        case "pndm":
            return diffusers.PNDMScheduler(**trailing, skip_prk_steps=True, set_alpha_to_one=True)
        case "dpm-solver++":
            return diffusers.DPMSolverMultistepScheduler(**trailing, algorithm_type="dpmsolver++")
        case "unipc":
            return diffusers.UniPCMultistepScheduler(**trailing)


@torch.no_grad()
def sample_latents(
    model: nn.Module,
    masks: Float[Tensor, "batch mask *small"],
    latent_channels: int,
    seeds: Sequence[int],
    settings: Train,
    scheduler: Scheduler,
    steps: int,
    guidance: float = 1.0,
    drafts: Float[Tensor, "batch latent *small"] | None = None,
    start: float = 1.0,
) -> Float[Tensor, "batch latent *small"]:
    """Return one latent a mask and seed; each row depends on its own seed alone.

    Args:
        model: the denoiser.
        masks: encoded label maps.
        latent_channels: channels of a latent.
        seeds: one a row.
        settings: the forward process that the denoiser was trained with, and the precision.
        scheduler: which of diffusers' schedulers.
        steps: number of denoising steps.
        guidance: 1 follows the conditional model; above 1 is classifier-free guidance (Ho and Salimans 2022, eq. 6).
        drafts: latents to begin from when ``start`` is below 1.
        start: share of the noise steps that drafts are noised by before they are denoised (Meng et al. 2022, SDEdit).
    """
    schedule = sampling_schedule(scheduler, settings)
    schedule.set_timesteps(steps)
    streams = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (latent_channels, *masks.shape[2:])
    latents = torch.stack([torch.randn(shape, generator=stream) for stream in streams]).to(masks.device)
    latents = latents * schedule.init_noise_sigma
    timesteps = schedule.timesteps
    if drafts is not None and start < 1:
        skipped = int((timesteps >= start * settings.noise_steps).sum())
        timesteps = timesteps[skipped:]
        if not len(timesteps):
            return drafts
        if hasattr(schedule, "set_begin_index"):  # solvers of several steps keep count
            schedule.set_begin_index(skipped)
        latents = schedule.add_noise(drafts, latents, timesteps[:1].repeat(len(drafts)))
    # DDPM draws noise at every step: row by row, so that a row does not depend on its neighbours.
    extra = {"generator": streams} if scheduler == "ddpm" else {}
    for step in timesteps:
        with in_precision(settings, masks.device):
            prediction = _predict(model, schedule.scale_model_input(latents, step), int(step), masks, guidance)
        latents = schedule.step(prediction, step, latents, **extra).prev_sample
    return latents


def _predict(model: nn.Module, noisy: Tensor, step: int, masks: Tensor, guidance: float) -> Tensor:
    steps = torch.full((len(noisy),), step, dtype=torch.long, device=noisy.device)
    conditional: Tensor = model(noisy, steps, masks)
    if guidance == 1.0:
        return conditional
    free: Tensor = model(noisy, steps, torch.zeros_like(masks))
    return free + guidance * (conditional - free)
