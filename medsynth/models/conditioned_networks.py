"""How a label map reaches the denoising network: beside its input, in its norms, or as tokens that it attends to."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medsynth.config import Train

_OCTAVES = 4  # the finest wave is a quarter of an axis long: its sine and cosine tell apart the places within it
_PATCH = 2  # latent positions an axis that one token stands for
_SPADE_THINNER = 4  # SPADE's inner layers beside the network's first: its size stays near that of the other two


def open_network(latent_channels: int, mask_channels: int, spatial_dims: int, settings: Train) -> nn.Module:
    """Return MONAI's diffusion U-Net with fresh weights, made for ``settings.conditioning``.

    - ``concat``: the encoded map is more channels of the input (Rombach et al. 2022, section 3.3).
    - ``spade``: it scales and shifts the norms of the upward path, and is seen nowhere else (Park et al. 2019, eq. 1).
    - ``cross_attention``: ``attention_levels`` (or the deepest) and the middle attend to :class:`MaskTokens` (Rombach
      et al. 2022, section 3.3). The input also holds :func:`position_codes`: tokens are asked for by their place.

    Args:
        latent_channels: channels of the latent.
        mask_channels: channels of the encoded label map.
        spatial_dims: 2 or 3.
        settings: conditioning, widths and depths.
    """
    from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet
    from monai.networks.nets.spade_diffusion_model_unet import SPADEDiffusionModelUNet

    levels = len(settings.channels)
    sizes: dict[str, Any] = {
        "spatial_dims": spatial_dims,
        "out_channels": latent_channels,
        "channels": settings.channels,
        "num_res_blocks": settings.res_blocks,
        "attention_levels": settings.attention_levels or (False,) * levels,
        "norm_num_groups": settings.norm_groups,
        "num_head_channels": settings.head_channels,
    }
    match settings.conditioning:
        case "concat":
            return DiffusionModelUNet(in_channels=latent_channels + mask_channels, **sizes)
        case "spade":
            inner = max(1, settings.channels[0] // _SPADE_THINNER)
            sizes |= {"label_nc": mask_channels, "spade_intermediate_channels": inner}
            return SPADEDiffusionModelUNet(in_channels=latent_channels, **sizes)
        case "cross_attention":
            sizes |= {"with_conditioning": True, "cross_attention_dim": settings.channels[-1]}
            sizes["attention_levels"] = settings.attention_levels or (False,) * (levels - 1) + (True,)
            return DiffusionModelUNet(in_channels=latent_channels + code_channels(spatial_dims), **sizes)


class MaskTokens(nn.Module):
    """Encoded label maps as tokens: each a linear map of a patch of latent positions, of their mask and their place.

    Unlike a mean over the patch this loses no band of the mask (Dosovitskiy et al. 2021, section 3.1). A dropped mask
    leaves tokens of places alone.

    Args:
        mask_channels: channels of the encoded label map.
        width: of a token.
        spatial_dims: 2 or 3.
    """

    def __init__(self, mask_channels: int, width: int, spatial_dims: int) -> None:
        super().__init__()
        kind = (nn.Conv2d, nn.Conv3d)[spatial_dims - 2]
        self.patch = kind(mask_channels + code_channels(spatial_dims), width, _PATCH, stride=_PATCH)

    def forward(self, mask: Float[Tensor, "batch mask *small"]) -> Float[Tensor, "batch token width"]:
        """Return the tokens of encoded label maps."""
        return cast(Tensor, self.patch(with_places(mask))).flatten(2).transpose(1, 2)


def with_places(values: Float[Tensor, "batch channel *small"]) -> Float[Tensor, "batch placed *small"]:
    """Return ``values`` followed by :func:`position_codes`."""
    codes = position_codes(tuple(values.shape[2:])).to(values)
    return torch.cat([values, codes.expand(len(values), *codes.shape)], dim=1)


def position_codes(shape: tuple[int, ...]) -> Float[Tensor, "code *small"]:
    """Return sines and cosines of the place of each latent position: public constants, the same for every image.

    Source: Vaswani et al. (2017), section 3.5; octaves as in Mildenhall et al. (2020), eq. 4.
    """
    places = torch.meshgrid(*((torch.arange(size, dtype=torch.float64) + 0.5) / size for size in shape), indexing="ij")
    angles = torch.stack([2**octave * math.pi * place for place in places for octave in range(_OCTAVES)])
    return torch.cat([angles.sin(), angles.cos()])


def code_channels(spatial_dims: int) -> int:
    """Return the channels of :func:`position_codes`."""
    return 2 * _OCTAVES * spatial_dims
