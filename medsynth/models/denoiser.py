"""The mask-conditioned latent denoiser: MONAI's diffusion U-Net with the label map concatenated."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from medsynth.config import Train


class Denoiser(nn.Module):
    """Predict noise, velocity or the clean latent from a noisy latent, a step and a label map.

    Source: Ho et al. (2020) for the network's task, Rombach et al. (2022) for latents and concatenation.

    Args:
        spatial_dims: 2 or 3.
        latent_channels: channels of the latent.
        mask_channels: channels of the encoded label map (see :mod:`medsynth.diffusion.conditioning`).
        settings: widths and depths.
    """

    def __init__(self, spatial_dims: int, latent_channels: int, mask_channels: int, settings: Train) -> None:
        super().__init__()
        from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet

        levels = len(settings.channels)
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
        """Return the prediction for each noisy latent."""
        import torch

        prediction: Tensor = self.network(torch.cat([noisy, mask], dim=1), steps)
        return prediction
