"""The latent codec: a fixed orthonormal wavelet or a KL autoencoder, behind one interface for any rank.

Three spaces are told apart: *images* ``(batch, channel, *spatial)`` in [-1, 1]; *raw latents*, what the transform or
the encoder gives; *latents*, raw latents brought to zero mean and a known spread a channel (unit on average) by public
constants that were measured on public phantoms.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medsynth.config import Encode, Grid
from medsynth.errors import StoreError

WEIGHTS = "autoencoder.safetensors"
SETTINGS = "autoencoder.json"
_CHUNK = 16  # images that pass the codec at once; bounds memory on large cohorts


class HaarTransform(nn.Module):
    """Orthonormal Haar wavelet packet of any rank: each level halves the axes and multiplies the channels by 2^rank.

    Source: Haar (1910); the packet form splits every band again (Coifman and Wickerhauser, 1992).
    """

    kernel: Tensor

    def __init__(self, spatial_dims: int, levels: int) -> None:
        super().__init__()
        step = np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2.0)
        axis: NDArray[np.floating] = np.ones((1, 1))
        for _ in range(levels):
            axis = np.kron(axis, step)
        kernel = axis
        for _ in range(spatial_dims - 1):
            kernel = np.kron(kernel, axis)
        size = 2**levels
        shaped = kernel.reshape(-1, 1, *(size,) * spatial_dims)
        self.register_buffer("kernel", torch.tensor(shaped, dtype=torch.float32), persistent=False)
        self.spatial_dims = spatial_dims
        self.size = size

    @property
    def bands(self) -> int:
        """Bands a channel: ``2^(rank * levels)``."""
        return self.kernel.shape[0]

    def forward(self, images: Float[Tensor, "batch channel *spatial"]) -> Float[Tensor, "batch bands *small"]:
        """Return the coefficients, ``channel * bands`` channels on axes ``2^levels`` times shorter."""
        channels = images.shape[1]
        conv = (nn.functional.conv2d, nn.functional.conv3d)[self.spatial_dims - 2]
        kernel = self.kernel.repeat(channels, *(1,) * (self.spatial_dims + 1))
        return conv(images, kernel, stride=self.size, groups=channels)

    def inverse(self, bands: Float[Tensor, "batch bands *small"]) -> Float[Tensor, "batch channel *spatial"]:
        """Return the images; the exact inverse, because the kernel is orthonormal."""
        channels = bands.shape[1] // self.bands
        conv = (nn.functional.conv_transpose2d, nn.functional.conv_transpose3d)[self.spatial_dims - 2]
        kernel = self.kernel.repeat(channels, *(1,) * (self.spatial_dims + 1))
        return conv(bands, kernel, stride=self.size, groups=channels)


class Codec(nn.Module):
    """Images to latents and back.

    Args:
        transform: network (or fixed transform) with ``encode`` to raw latents and ``decode`` back.
        channels: number of latent channels.
        factor: how many times shorter the latent's axes are.
    """

    mean: Tensor
    scale: Tensor
    spread: Tensor

    def __init__(self, transform: nn.Module, channels: int, factor: int, spatial_dims: int) -> None:
        super().__init__()
        self.transform = transform
        self.channels = channels
        self.factor = factor
        self.register_buffer("mean", torch.zeros(1, channels, *(1,) * spatial_dims))
        self.register_buffer("scale", torch.ones(1, channels, *(1,) * spatial_dims))
        self.register_buffer("spread", torch.ones(channels))

    def raw(self, images: Float[Tensor, "batch channel *spatial"]) -> Float[Tensor, "batch latent *small"]:
        """Return raw latents (the mean of the posterior for a KL autoencoder)."""
        if isinstance(self.transform, HaarTransform):
            return cast(Tensor, self.transform(images))
        mean, _ = self.transform.encode(images)  # type: ignore[operator]  # MONAI AutoencoderKL.encode
        return cast(Tensor, mean)

    @torch.no_grad()
    def encode(self, images: Float[Tensor, "batch channel *spatial"]) -> Float[Tensor, "batch latent *small"]:
        """Return latents of images in [-1, 1]."""
        parts = [(self.raw(chunk) - self.mean) / self.scale for chunk in images.split(_CHUNK)]
        return torch.cat(parts)

    @torch.no_grad()
    def decode(self, latents: Float[Tensor, "batch latent *small"]) -> Float[Tensor, "batch channel *spatial"]:
        """Return images, clipped to [-1, 1]."""
        raw = latents * self.scale + self.mean
        if isinstance(self.transform, HaarTransform):
            return self.transform.inverse(raw).clamp(-1, 1)
        parts = [self.transform.decode(chunk) for chunk in raw.split(_CHUNK)]  # type: ignore[operator]  # MONAI
        return torch.cat(parts).clamp(-1, 1)

    @torch.no_grad()
    def calibrate(self, phantoms: Float[Tensor, "batch channel *spatial"]) -> None:
        """Set the public constants that bring raw latents to zero mean and a known spread a channel.

        The spread is the square root of the raw one (unit on average): coarse bands keep a lead over fine ones, so
        that sampling settles the coarse image first, without a range that no noise schedule covers.

        Args:
            phantoms: public images only; patients here would leak (privacy pitfall 11).
        """
        raw = torch.cat([self.raw(chunk) for chunk in phantoms.split(_CHUNK)])
        axes = [0, *range(2, raw.ndim)]
        self.mean.copy_(raw.mean(axes, keepdim=True))
        raw_spread = raw.std(axes, keepdim=True)
        # A band that phantoms hardly fill would blow up whatever patients have there.
        raw_spread = raw_spread.clamp(min=0.02 * float(raw_spread.max()))
        spread = raw_spread.sqrt() / raw_spread.mean().sqrt()
        self.scale.copy_(raw_spread / spread)
        self.spread.copy_(spread.flatten())


def build_codec(grid: Grid, encode: Encode) -> Codec:
    """Return a new codec (KL: random weights; wavelet: nothing to learn)."""
    factor = 2**encode.levels
    if encode.codec == "wavelet":
        haar = HaarTransform(grid.spatial_dims, encode.levels)
        return Codec(haar, grid.channels * haar.bands, factor, grid.spatial_dims)
    from monai.networks.nets.autoencoderkl import AutoencoderKL

    network = AutoencoderKL(
        spatial_dims=grid.spatial_dims,
        in_channels=grid.channels,
        out_channels=grid.channels,
        channels=encode.channels,
        num_res_blocks=1,
        attention_levels=(False,) * len(encode.channels),
        latent_channels=encode.latent_channels,
        norm_num_groups=min(16, *encode.channels),
        with_encoder_nonlocal_attn=False,
        with_decoder_nonlocal_attn=False,
    )
    return Codec(network, encode.latent_channels, factor, grid.spatial_dims)


def save_codec(codec: Codec, grid: Grid, encode: Encode, folder: Path) -> None:
    """Write the codec's weights and settings into ``folder``."""
    save_file({k: v.contiguous() for k, v in codec.state_dict().items()}, folder / WEIGHTS)
    settings = {"grid": grid.model_dump(mode="json"), "encode": encode.model_dump(mode="json")}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def load_codec(folder: Path) -> Codec:
    """Read the codec that stage ``encode`` wrote, ready for inference.

    Raises:
        StoreError: the folder holds no codec.
    """
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
    except (OSError, json.JSONDecodeError) as error:
        raise StoreError("the autoencoder folder holds no codec: run `medsynth encode` again") from error
    codec = build_codec(Grid.model_validate(settings["grid"]), Encode.model_validate(settings["encode"]))
    codec.load_state_dict(weights)
    return codec.eval().requires_grad_(False)
