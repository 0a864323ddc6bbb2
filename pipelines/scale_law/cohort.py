"""Phantom patients that differ from the public phantoms in one fixed way, so that there is something to learn.

Public phantoms have random contrasts. These patients have a bright organ with stripes beside two dark decoys of the
same shapes: only who has learnt how the organ looks can tell which of the three it is.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from medsynth import logs
from medsynth.config import Grid
from medsynth.imaging.phantom import Floats, Labels, acquire, paint, sample_label_maps, scale, smooth_field
from medsynth.randomness import derive_seed, generator

GRID = Grid(
    spatial_dims=2,
    shape=(32, 32),
    spacing_mm=(2.0, 2.0),
    channels=1,
    modality="MR",
    labels={0: "background", 1: "organ"},
)
_ORGAN, _DECOYS = 2, (3, 4)  # tissues 0 and 1 lie around them
_MEANS = np.array([0.45, 0.52, 0.72, 0.25, 0.25])
_SPREADS = np.array([0.03, 0.03, 0.03, 0.03, 0.03])
_BETWEEN_PATIENTS = 0.03  # standard deviation of a tissue's mean
_STRIPES = 0.1
_PERIOD = 5.0  # pixels
_GREY = 255.0


def patient_image(label: Labels, seed: int, index: int) -> Floats:
    """Return the image of patient ``index``, (channel, *spatial) in [-1, 1]."""
    rng = generator(seed, "scale-law", "image", index)
    tissues = (smooth_field(rng, label.shape, 5) > 0).astype(np.int64)
    for value in _DECOYS:
        decoy = sample_label_maps(GRID, 1, derive_seed(seed, "scale-law", "decoy", value, index))[0]
        tissues[decoy > 0] = value
    tissues[label > 0] = _ORGAN
    means = _MEANS + rng.normal(0, _BETWEEN_PATIENTS, len(_MEANS))
    image = paint(tissues, means, _SPREADS, rng)
    wave = _STRIPES * np.sin(2 * np.pi * (np.arange(label.shape[0]) / _PERIOD + rng.random()))
    image = image + np.where(tissues == _ORGAN, wave[:, None], 0.0).astype(np.float32)
    return scale(acquire(image, rng, noise=0.02, blur_voxels=0.5)[None], GRID.intensity_percentiles)


def patients(count: int, seed: int, kept: Path) -> tuple[Tensor, Tensor]:
    """Return images (patient, channel, *spatial) in [-1, 1] and labels of the first ``count`` patients.

    Args:
        count: patients.
        seed: of the cohort.
        kept: file that holds patients of an earlier call; written again when there are too few in it.
    """
    found = load_file(kept) if kept.is_file() else {"images": torch.zeros(0), "labels": torch.zeros(0)}
    if len(found["labels"]) < count:
        images = np.empty((count, 1, *GRID.shape), np.uint8)
        labels = np.empty((count, *GRID.shape), np.uint8)
        for index in logs.progress(range(count), "drawing phantom patients", count):
            labels[index] = sample_label_maps(GRID, 1, derive_seed(seed, "scale-law", "label", index))[0]
            images[index] = np.rint((patient_image(labels[index], seed, index) + 1) / 2 * _GREY)
        found = {"images": torch.from_numpy(images), "labels": torch.from_numpy(labels)}
        kept.parent.mkdir(parents=True, exist_ok=True)
        scratch = kept.with_suffix(".partial")
        save_file(found, scratch)
        scratch.replace(kept)
    return found["images"][:count].float() / _GREY * 2 - 1, found["labels"][:count]
