"""The codec: the wavelet loses nothing, the constants are what they say, a saved codec is the same codec."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from medsynth.config import Encode, Grid
from medsynth.errors import StoreError
from medsynth.imaging.phantom import phantom_pairs
from medsynth.models.autoencoder import SETTINGS, HaarTransform, build_codec, load_codec, save_codec


def grid(rank: int, channels: int = 1, size: int = 16) -> Grid:
    return Grid(
        spatial_dims=2 if rank == 2 else 3,
        shape=(size,) * rank,
        spacing_mm=(1.0,) * rank,
        channels=3 if channels == 3 else 1,
        labels={0: "none", 1: "organ"},
    )


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("levels", [1, 2, 3])
@pytest.mark.parametrize(("rank", "channels"), [(2, 1), (2, 3), (3, 1), (3, 3)])
def test_the_wavelet_is_orthonormal_and_has_an_exact_inverse(rank: int, channels: int, levels: int) -> None:
    haar = HaarTransform(rank, levels)
    images = noise(2, channels, *(16, 8, 24)[:rank])
    bands = haar(images)
    assert bands.shape == (2, channels * 2 ** (rank * levels), *(n // 2**levels for n in images.shape[2:]))
    torch.testing.assert_close(bands.square().sum(), images.square().sum())
    torch.testing.assert_close(haar.inverse(bands), images)


@pytest.mark.parametrize("rank", [2, 3])
def test_the_first_band_is_the_block_mean_and_colours_stay_apart(rank: int) -> None:
    haar = HaarTransform(rank, 1)
    images = noise(1, 3, *(8,) * rank)
    pool = torch.nn.functional.avg_pool2d if rank == 2 else torch.nn.functional.avg_pool3d
    torch.testing.assert_close(haar(images)[:, :: haar.bands], pool(images, 2) * 2 ** (rank / 2))
    one = images.clone()
    one[:, 1:] = 0
    assert haar(one)[:, haar.bands :].abs().max() == 0


@pytest.mark.parametrize(("rank", "channels"), [(2, 1), (2, 3), (3, 1)])
def test_calibrated_latents_have_no_mean_and_the_spread_that_the_codec_states(rank: int, channels: int) -> None:
    where = grid(rank, channels)
    phantoms = torch.from_numpy(phantom_pairs(where, 24, 0)[0])
    codec = build_codec(where, Encode(levels=2))
    codec.calibrate(phantoms)
    latents = codec.encode(phantoms)
    axes = [0, *range(2, latents.ndim)]
    assert latents.mean(axes).abs().max() < 1e-3
    torch.testing.assert_close(latents.std(axes), codec.spread, rtol=0.02, atol=0.02)
    assert codec.spread[0] > codec.spread[-1], "coarse bands lead"
    torch.testing.assert_close(codec.decode(latents), phantoms, atol=1e-5, rtol=0)


def test_bands_that_phantoms_do_not_fill_do_not_blow_up() -> None:
    codec = build_codec(grid(2), Encode(levels=1))
    codec.calibrate(torch.ones(4, 1, 16, 16) * torch.linspace(-1, 1, 4).view(4, 1, 1, 1))  # no edges at all
    latents = codec.encode(noise(4, 1, 16, 16))
    assert torch.isfinite(latents).all() and latents.abs().max() < 200


def test_encoding_does_not_depend_on_how_many_come_together() -> None:
    codec = build_codec(grid(2), Encode(levels=1))
    images = noise(40, 1, 16, 16)
    torch.testing.assert_close(codec.encode(images)[17:18], codec.encode(images[17:18]))


@pytest.mark.parametrize("rank", [2, 3])
def test_a_kl_codec_keeps_shapes_and_survives_the_disk(rank: int, tmp_path: Path) -> None:
    where = grid(rank)
    settings = Encode(codec="kl", levels=1, channels=(8, 8), latent_channels=2)
    torch.manual_seed(0)
    codec = build_codec(where, settings).eval()
    images = noise(3, 1, *where.shape)
    codec.calibrate(images)
    latents = codec.encode(images)
    assert latents.shape == (3, 2, *(8,) * rank)
    decoded = codec.decode(latents)
    assert decoded.shape == images.shape and decoded.abs().max() <= 1
    save_codec(codec, where, settings, tmp_path)
    again = load_codec(tmp_path)
    assert torch.equal(again.encode(images), latents) and torch.equal(again.decode(latents), decoded)
    assert not any(p.requires_grad for p in again.parameters()) and not again.training


def test_a_wavelet_codec_survives_the_disk(tmp_path: Path) -> None:
    where, settings = grid(2, 3), Encode(levels=2)
    codec = build_codec(where, settings)
    codec.calibrate(torch.from_numpy(np.asarray(phantom_pairs(where, 8, 0)[0])))
    save_codec(codec, where, settings, tmp_path)
    again = load_codec(tmp_path)
    images = noise(2, 3, 16, 16)
    assert torch.equal(again.encode(images), codec.encode(images))
    assert torch.equal(again.spread, codec.spread)


@pytest.mark.parametrize("damage", ["empty", "text"])
def test_a_folder_without_a_codec_is_said(damage: str, tmp_path: Path) -> None:
    if damage == "text":
        (tmp_path / SETTINGS).write_text("{")
    with pytest.raises(StoreError, match="medsynth encode"):
        load_codec(tmp_path)
