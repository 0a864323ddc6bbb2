"""The mask-conditioned latent denoiser: MONAI's diffusion U-Net with the label map concatenated, preconditioned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from medsynth.config import Train


class Preconditioning(nn.Module):
    """What a linear denoiser knows already, so that the network learns only the rest.

    For a latent channel of spread ``s``, noisy ``x_t = a x + b e`` with ``a^2 + b^2 = 1`` and velocity
    ``v = a e - b x``, the best linear estimate of ``v`` is ``a b (1 - s^2) / (a^2 s^2 + b^2) x_t`` and leaves a
    standard deviation of ``s / sqrt(a^2 s^2 + b^2)`` (Karras et al. 2022, section 5, carried over to velocity and to
    one spread a channel). Coarse wavelet bands spread wider than fine ones, so they emerge first and weigh more.

    Args:
        signal: (noise step,) a of each noise step.
        spread: (latent channel,) public standard deviation of each channel.
        spatial_dims: 2 or 3.
    """

    signal: Tensor
    spread: Tensor

    def __init__(self, signal: Tensor, spread: Sequence[float], spatial_dims: int) -> None:
        super().__init__()
        self.register_buffer("signal", signal)
        self.register_buffer("spread", torch.tensor(list(spread)).view(1, -1, *(1,) * spatial_dims))

    def forward(self, steps: Int[Tensor, " batch"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the factors of the input, of the skip and of the network's output, (batch, latent, \\*ones)."""
        a = self.signal[steps].view(-1, *(1,) * (self.spread.ndim - 1))
        square = (a * self.spread).square() + 1 - a.square()
        skip = a * (1 - a.square()).sqrt() * (1 - self.spread.square()) / square
        return square.rsqrt(), skip, self.spread * square.rsqrt()

    def error_scale(self, steps: Int[Tensor, " batch"]) -> Tensor:
        """Return by what a velocity's error is multiplied in the loss: unit output error, coarse bands first."""
        _, _, output = self(steps)
        return cast(Tensor, self.spread / self.spread.square().mean().sqrt() / output)


class Denoiser(nn.Module):
    """Predict the velocity (Salimans and Ho 2022) of a noisy latent from a noise step and a label map.

    Source: Ho et al. (2020) for the task, Rombach et al. (2022) for latents and conditioning by concatenation.

    Args:
        preconditioning: noise schedule and channel spreads.
        latent_channels: channels of the latent.
        mask_channels: channels of the encoded label map (see :mod:`medsynth.diffusion.conditioning`).
        spatial_dims: 2 or 3.
        settings: widths and depths.
    """

    def __init__(
        self,
        preconditioning: Preconditioning,
        latent_channels: int,
        mask_channels: int,
        spatial_dims: int,
        settings: Train,
    ) -> None:
        super().__init__()
        from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet

        levels = len(settings.channels)
        self.preconditioning = preconditioning
        self.network = DiffusionModelUNet(
            spatial_dims=spatial_dims,
            in_channels=latent_channels + mask_channels,
            out_channels=latent_channels,
            channels=settings.channels,
            num_res_blocks=settings.res_blocks,
            attention_levels=settings.attention_levels or (False,) * levels,
            norm_num_groups=settings.norm_groups,
            num_head_channels=settings.head_channels,
        )

    def forward(
        self,
        noisy: Float[Tensor, "batch latent *small"],
        steps: Int[Tensor, " batch"],
        mask: Float[Tensor, "batch mask *small"],
    ) -> Float[Tensor, "batch latent *small"]:
        """Return the velocity of each noisy latent."""
        scaled, skip, output = self.preconditioning(steps)
        rest: Tensor = self.network(torch.cat([noisy * scaled, mask], dim=1), steps)
        velocity: Tensor = skip * noisy + output * rest
        return velocity
