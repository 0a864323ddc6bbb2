"""How far predicted surfaces lie from annotated ones: surface Dice at a tolerance, and the 95 % Hausdorff distance."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from monai.metrics.hausdorff_distance import compute_hausdorff_distance
from monai.metrics.surface_dice import compute_surface_dice
from torch import Tensor

from medsynth.metrics.overlap import known_mean

_PERCENTILE = 95.0


@dataclass(frozen=True)
class Surfaces:
    """Distances of surfaces by patient and label, ``(patient, classes - 1)``; NaN where a label is in neither map.

    Attributes:
        dice: share of both surfaces that lies within the tolerance of the other one.
        hd95: 95 % Hausdorff distance in the unit of the spacing.
    """

    dice: np.ndarray
    hd95: np.ndarray


def patient_surfaces(
    predicted: Sequence[Tensor], truth: Sequence[Tensor], classes: int, spacing: Sequence[float], tolerance: float
) -> Surfaces:
    """Measure the surfaces of each patient and label, the mean over those records that have the label.

    Source: Nikolov et al. 2021 (surface Dice) and Huttenlocher et al. 1993, both by MONAI, whose surface is the voxels
    at the border of a label. A label that only one of the maps has scores 0, and a distance of the whole diagonal.

    Args:
        predicted: labels of each patient, ``(record, *spatial)``.
        truth: the same from the annotators.
        classes: labels, background included.
        spacing: size of a voxel along each axis, mm (or 1 for pixels).
        tolerance: distance up to which surfaces agree, in the unit of the spacing.
    """
    rows = [_patient(p, t, classes, spacing, tolerance) for p, t in zip(predicted, truth, strict=True)]
    tables = np.stack(rows) if rows else np.zeros((0, 2, classes - 1))
    return Surfaces(tables[:, 0], tables[:, 1])


def _patient(predicted: Tensor, truth: Tensor, classes: int, spacing: Sequence[float], tolerance: float) -> np.ndarray:
    """Return ``(2, classes - 1)``: surface Dice and distance of one patient."""
    found = [
        [_surface(got == label, wanted == label, spacing, tolerance) for label in range(1, classes)]
        for got, wanted in zip(predicted, truth, strict=True)
    ]
    return np.asarray(known_mean(np.array(found), axis=0).T)


def _surface(got: Tensor, wanted: Tensor, spacing: Sequence[float], tolerance: float) -> tuple[float, float]:
    # MONAI warns of empty maps and returns infinity, which no mean survives.
    if not got.any() and not wanted.any():
        return math.nan, math.nan
    if not got.any() or not wanted.any():
        return 0.0, math.dist([0.0] * got.ndim, [(n - 1) * mm for n, mm in zip(got.shape, spacing, strict=True)])
    maps = got[None, None].float(), wanted[None, None].float()
    space = list(spacing)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # MONAI 1.6 calls itself with an argument that it deprecates
        dice = compute_surface_dice(*maps, [tolerance], include_background=True, spacing=space)
        far = compute_hausdorff_distance(*maps, include_background=True, percentile=_PERCENTILE, spacing=space)
    return float(dice), float(far)
