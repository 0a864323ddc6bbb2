"""What the latent codec alone costs: how well it gives held-out patients back, and how large their latents are."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.metrics.regression import SSIMMetric
from torch import Tensor

from medsynth.imaging.cohort import Patient
from medsynth.metrics.overlap import known_mean, patient_dice, patient_means
from medsynth.models.autoencoder import Codec, load_codec

_RECORDS = 32  # that show the codec's error
_WINDOW = 5  # voxels of the SSIM window: the usual 11 does not fit small volumes


def codec_quality(
    patients: Sequence[Patient], folder: Path, networks: Sequence[Callable[[Tensor], Tensor]], classes: int
) -> dict[str, Any]:
    """Return what reconstruction loses and how the latents are scaled; internal.

    Args:
        patients: held-out ones; the first few dozen records are taken.
        folder: stage folder ``autoencoder``.
        networks: segmentation networks that real patients trained; their Dice on reconstructions is what an image
            generator in this latent space could reach at best.
        classes: labels, the background included.

    Returns:
        ``mae`` and ``psnr_db`` (peak to peak 2), ``ssim``, ``dice`` of the networks on ``originals`` and
        ``reconstructions`` (None without networks), and ``latents``: ``std`` over all channels, and ``low`` and
        ``high`` of the single ones, each as a multiple of what the denoiser is built for.
    """
    chosen: list[Patient] = []
    for patient in patients:
        if chosen and sum(len(one.images) for one in chosen) >= _RECORDS:
            break
        chosen.append(patient)
    codec = load_codec(folder)
    images = torch.cat([patient.images for patient in chosen])
    latents = codec.encode(images)
    again = codec.decode(latents)
    error = again - images
    mean_square = max(float(error.square().mean()), 1e-12)
    return {
        "mae": float(error.abs().mean()),
        "psnr_db": 10 * math.log10(4 / mean_square),
        "ssim": _similarity(images, again),
        "dice": _dice(chosen, again, networks, classes) if networks else None,
        "latents": _latents(codec, latents),
    }


def _similarity(images: Tensor, others: Tensor) -> float:
    window = min(_WINDOW, *images.shape[2:])
    metric = SSIMMetric(spatial_dims=images.ndim - 2, data_range=2.0, win_size=window, kernel_sigma=1.0)
    return float(torch.as_tensor(metric(images, others)).mean())


def _dice(
    patients: Sequence[Patient], again: Tensor, networks: Sequence[Callable[[Tensor], Tensor]], classes: int
) -> dict[str, float]:
    truth = [patient.labels for patient in patients]
    parts = {
        "originals": [patient.images for patient in patients],
        "reconstructions": list(again.split([len(patient.images) for patient in patients])),
    }
    found = {}
    for name, images in parts.items():
        tables = [patient_dice([network(one) for one in images], truth, classes) for network in networks]
        found[name] = float(known_mean(patient_means(known_mean(np.stack(tables), axis=0)), axis=0))
    return found


def _latents(codec: Codec, latents: Tensor) -> dict[str, float]:
    axes = [0, *range(2, latents.ndim)]
    spread, public = latents.std(axes), codec.spread.to(latents)
    ratio = spread / public.clamp(min=1e-6)
    overall = spread.square().mean().sqrt() / public.square().mean().sqrt()
    return {"std": float(overall), "low": float(ratio.min()), "high": float(ratio.max())}
