"""The mask-conditioned latent denoiser: one of MONAI's diffusion U-Nets, preconditioned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from medsynth.config import Train
from medsynth.models.conditioned_networks import MaskTokens, open_network, with_places


class Preconditioning(nn.Module):
    """What a linear denoiser knows already, so that the network learns only the rest.

    For a latent channel of spread ``s``, noisy ``x_t = a x + b e`` with ``a^2 + b^2 = 1`` and velocity
    ``v = a e - b x``, the best linear estimate of ``v`` is ``a b (1 - s^2) / (a^2 s^2 + b^2) x_t`` and leaves a
    standard deviation of ``s / sqrt(a^2 s^2 + b^2)`` (Karras et al. 2022, section 5, carried over to velocity and to
    one spread a channel). Coarse wavelet bands spread wider than fine ones, so they emerge first and weigh more.

    Args:
        signal: (noise step,) a of each noise step.
        spread: (latent channel,) standard deviation of each channel: public, or without privacy patients'.
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

    Source: Ho et al. (2020) for the task, Rombach et al. (2022) for latents; how the label map reaches the network:
    :func:`medsynth.models.conditioned_networks.open_network`.

    Args:
        preconditioning: noise schedule and channel spreads.
        latent_channels: channels of the latent.
        mask_channels: channels of the encoded label map (see :mod:`medsynth.diffusion.conditioning`).
        spatial_dims: 2 or 3.
        settings: conditioning, widths and depths.
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
        self.preconditioning = preconditioning
        self.conditioning = settings.conditioning
        self.network = open_network(latent_channels, mask_channels, spatial_dims, settings)
        if settings.conditioning == "cross_attention":
            self.tokens = MaskTokens(mask_channels, settings.channels[-1], spatial_dims)

    def forward(
        self,
        noisy: Float[Tensor, "batch latent *small"],
        steps: Int[Tensor, " batch"],
        mask: Float[Tensor, "batch mask *small"],
    ) -> Float[Tensor, "batch latent *small"]:
        """Return the velocity of each noisy latent; a mask of zeros is the dropped mask."""
        scaled, skip, output = self.preconditioning(steps)
        velocity: Tensor = skip * noisy + output * self._rest(noisy * scaled, steps, mask)
        return velocity

    def _rest(self, scaled: Tensor, steps: Tensor, mask: Tensor) -> Tensor:
        """Return what the network adds to the best linear guess."""
        rest: Tensor
        match self.conditioning:
            case "concat":
                rest = self.network(torch.cat([scaled, mask], dim=1), steps)
            case "spade":
                rest = self.network(scaled, steps, seg=mask)
            case "cross_attention":
                rest = self.network(with_places(scaled), steps, context=self.tokens(mask))
        return rest
