"""Augmentation of training pairs: strong, by MONAI transforms, as a site with few patients would try first; mirrors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.transforms.compose import Compose
from monai.transforms.intensity.dictionary import (
    RandAdjustContrastd,
    RandBiasFieldd,
    RandGaussianNoised,
    RandGaussianSmoothd,
    RandHistogramShiftd,
    RandScaleIntensityd,
    RandShiftIntensityd,
)
from monai.transforms.spatial.dictionary import RandAffined, RandGridDistortiond, RandSimulateLowResolutiond
from torch import Tensor

_BOTH = ("image", "label")
_MODES: Any = ("bilinear", "nearest")
_TURN_RAD, _SHEAR, _SCALE, _SHIFT_VOXELS = 0.5, 0.1, 0.25, 4
_CELLS, _DISTORTION = 5, 0.25  # of a grid whose knots move by that share of a cell
_WIDTH = (0.4, 1.2)  # blur, voxels
_SEEDS = 2**32  # MONAI's random states are numpy's

Augmentation = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def strong_augmentation(spatial_dims: int, seed: int) -> Augmentation:
    """Return what changes one pair after another: pose, shape, contrast, bias field, resolution, blur and noise.

    The families of nnU-Net (Isensee et al. 2021, supplementary note 4), with bias fields and bent grids added; no
    flips, because left is not right in a patient.

    Args:
        spatial_dims: 2 or 3.
        seed: of everything random.

    Returns:
        From an image ``(channel, *spatial)`` in [-1, 1] and labels ``(*spatial)`` to the same, changed; intensities
        may leave the range a little.
    """
    changes = Compose([*_moves(spatial_dims), *_intensities(spatial_dims)])
    changes.set_random_state(seed % _SEEDS)

    def change(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        # Gamma and bias fields are meant for intensities from 0 on.
        pair: Any = changes({"image": (image + 1) / 2, "label": label[None].float()})
        moved = torch.as_tensor(pair["label"]).as_subclass(torch.Tensor)[0].round().to(label.dtype)
        return 2 * torch.as_tensor(pair["image"]).as_subclass(torch.Tensor).float() - 1, moved

    return change


def mirrored(image: Tensor, label: Tensor, random: torch.Generator, *, turned: bool) -> tuple[Tensor, Tensor]:
    """Return a pair as one of its mirror images, all as likely.

    Args:
        image: ``(channel, *spatial)``.
        label: ``(*spatial)``.
        random: the stream to draw from.
        turned: planes are turned by quarters, too; for squares of square pixels.
    """
    rank = label.ndim
    coins = torch.randint(0, 2, (rank + 1,), generator=random).tolist()
    axes = [axis - rank for axis in range(rank) if coins[axis]]
    image, label = image.flip(axes), label.flip(axes)
    if turned and rank == 2 and coins[rank]:
        image, label = image.transpose(-1, -2), label.transpose(-1, -2)
    return image, label


def _moves(dims: int) -> list[Any]:
    turns: Any = (_TURN_RAD,) * (1 if dims == 2 else 3)
    affine = RandAffined(
        _BOTH,
        prob=0.9,
        rotate_range=turns,
        shear_range=(_SHEAR,) * (dims * (dims - 1)),
        translate_range=(_SHIFT_VOXELS,) * dims,
        scale_range=(_SCALE,) * dims,
        mode=_MODES,
        padding_mode="border",
    )
    bent = RandGridDistortiond(
        _BOTH, num_cells=_CELLS, prob=0.3, distort_limit=_DISTORTION, mode=_MODES, padding_mode="border"
    )
    return [affine, bent]


def _intensities(dims: int) -> list[Any]:
    only = _BOTH[:1]
    widths: dict[str, Any] = {f"sigma_{axis}": _WIDTH for axis in "xyz"[:dims]}
    return [
        RandBiasFieldd(only, degree=3, coeff_range=(0.0, 0.2), prob=0.3),
        RandHistogramShiftd(only, num_control_points=(4, 8), prob=0.3),
        RandAdjustContrastd(only, prob=0.5, gamma=(0.6, 1.6)),
        RandScaleIntensityd(only, factors=0.25, prob=0.5),
        RandShiftIntensityd(only, offsets=0.1, prob=0.5),
        RandSimulateLowResolutiond(
            only, prob=0.25, zoom_range=(0.5, 1.0), upsample_mode="bilinear" if dims == 2 else "trilinear"
        ),
        RandGaussianSmoothd(only, prob=0.2, **widths),
        RandGaussianNoised(only, prob=0.5, std=0.08),
    ]
