"""A denoiser of a few thousand weights, for tests of gradients."""

from __future__ import annotations

from typing import Any

from torch import nn


def small_denoiser(dims: int, **more: Any) -> nn.Module:
    """Return a MONAI network from 3 channels and a time step to 2 channels, on axes of 4 and more."""
    from monai.networks.nets import DiffusionModelUNet

    return DiffusionModelUNet(
        spatial_dims=dims,
        in_channels=3,
        out_channels=2,
        channels=(4, 8),
        attention_levels=(False, True),
        num_res_blocks=1,
        norm_num_groups=4,
        num_head_channels=4,
        **more,
    )


def awake(model: nn.Module) -> nn.Module:
    """Give zero-initialised layers values: they would hide the gradients of those before them."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.train()
