"""What the codec loses is told apart from what it keeps, and latents from those that the denoiser is built for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from medsynth.config import Encode, Grid
from medsynth.imaging.cohort import Patient
from medsynth.imaging.phantom import phantom_pairs
from medsynth.models.autoencoder import Codec, build_codec, save_codec
from medsynth.stages.codec_quality import codec_quality


def grid(rank: int) -> Grid:
    labels = {0: "none", 1: "organ"}
    return Grid(spatial_dims=2 if rank == 2 else 3, shape=(16,) * rank, spacing_mm=(2.0,) * rank, labels=labels)


def saved(rank: int, folder: Path, codec: str, stretch: float = 1.0) -> Path:
    settings = Encode.model_validate({"codec": codec, "levels": 1, "channels": [8, 8]})
    torch.manual_seed(0)
    built: Codec = build_codec(grid(rank), settings)
    built.calibrate(torch.from_numpy(phantom_pairs(grid(rank), 16, 0)[0]))
    built.scale.mul_(stretch)
    folder.mkdir()
    save_codec(built, grid(rank), settings, folder)
    return folder


def patients(rank: int) -> list[Patient]:
    images, labels = map(torch.from_numpy, phantom_pairs(grid(rank), 6, 5))
    return [Patient(f"patient-{n}", images[n : n + 1], labels[n : n + 1]) for n in range(6)]


def demanding(images: torch.Tensor) -> torch.Tensor:
    """Stand for a network: it finds the organ of the images that it knows, and nothing in spoilt ones."""
    known = patients(images.ndim - 2)
    found = torch.zeros(images.shape[0], *images.shape[2:], dtype=torch.long)
    for row, image in enumerate(images):
        for patient in known:
            if (image - patient.images[0]).abs().max() < 1e-3:
                found[row] = patient.labels[0]
    return found


@pytest.mark.parametrize("rank", [2, 3])
def test_a_wavelet_loses_nothing_and_an_untrained_autoencoder_nearly_all(rank: int, tmp_path: Path) -> None:
    exact = codec_quality(patients(rank), saved(rank, tmp_path / "one", "wavelet"), [demanding], 2)
    lossy = codec_quality(patients(rank), saved(rank, tmp_path / "two", "kl"), [demanding], 2)
    assert exact["psnr_db"] > 60 > 30 > lossy["psnr_db"] and exact["ssim"] > 0.99 > 0.9 > lossy["ssim"]
    assert exact["dice"] == {"originals": 1.0, "reconstructions": 1.0}
    assert lossy["dice"] == {"originals": 1.0, "reconstructions": 0.0}
    assert codec_quality(patients(rank), tmp_path / "one", [], 2)["dice"] is None


def test_the_scale_of_latents_is_measured_against_what_the_denoiser_is_built_for(tmp_path: Path) -> None:
    right, wrong = (
        codec_quality(patients(2), saved(2, tmp_path / name, "wavelet", stretch), [], 2)["latents"]
        for name, stretch in (("right", 1.0), ("wrong", 0.25))
    )
    assert right["std"] == pytest.approx(1, abs=0.3) and right["low"] <= right["std"] <= right["high"]
    assert wrong["std"] == pytest.approx(4 * right["std"])
