"""Bring any image and its labels to the study's grid, by MONAI transforms that look at one image at a time.

Nothing is shared between patients: intensities are scaled by each image's own percentiles, and spacing and shape are
public constants. Photographs keep MONAI's axis order: axis 0 runs along columns (x), axis 1 along rows (y).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.data.meta_tensor import MetaTensor
from monai.transforms.croppad.array import ResizeWithPadOrCrop
from monai.transforms.intensity.array import ScaleIntensityRangePercentiles
from monai.transforms.spatial.array import Orientation, Resize, Spacing

from medsynth.config import Grid
from medsynth.imaging.refusal import CaseRefused

_AXES = {"R": 0, "A": 1, "S": 2}


def to_grid(
    image: torch.Tensor, label: torch.Tensor, affine: np.ndarray | None, grid: Grid, least_kept: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring one case to the grid: orientation, spacing (or size), intensities, then centre crop or edge padding.

    Args:
        image: (channel, *native) any real dtype and range.
        label: (*native) integers.
        affine: 4 x 4, voxel to RAS+ mm; None for a photograph (no orientation and no resampling to a spacing).
        grid: the target.
        least_kept: share of the foreground that must lie within the grid's shape, 0 to 1.

    Returns:
        images (record, channel, *shape) float32 in [-1, 1] and labels (record, *shape) uint8; one record, or one a
        slice where the grid slices volumes.

    Raises:
        CaseRefused: constant image, other axes or channels than the grid's, or too much of the foreground outside.
    """
    if image.shape[0] != grid.channels:
        raise CaseRefused("channel_mismatch")
    volume = image.ndim == 4
    if not volume and grid.spatial_dims == 3:
        raise CaseRefused("dimension_mismatch")
    if not volume or (grid.spatial_dims == 2 and grid.slice_axis is None):
        if volume and image.shape[-1] != 1:
            raise CaseRefused("dimension_mismatch")
        flat, mask = (image[..., 0], label[..., 0]) if volume else (image, label)
        planes = _in_plane(*_turned(flat, mask, affine), grid, least_kept)
        return planes[0][None], planes[1][None]
    images, labels = _orient(image, label, affine)
    if grid.spatial_dims == 3:
        placed, mask = _resample(images, labels, grid.spacing_mm, grid)
        fitted, inside = _fit(_scale(placed, grid), mask, grid.shape)
        _refuse_cut(mask, inside, least_kept)
        return fitted[None], inside
    return _slices(images, labels, grid, least_kept)


def resampled_voxels(size: Sequence[int], affine: np.ndarray | None, grid: Grid) -> float:
    """Return how many voxels a case has at the grid's spacing, before it is cropped or padded.

    Args:
        size: (*native) of its label map.
        affine: 4 x 4, voxel to RAS+ mm; None for a photograph.
        grid: the target; without a spacing the case is resized, and needs no more than it has.
    """
    if affine is None or grid.spacing_mm is None:
        return float(np.prod(size, dtype=float))
    columns = affine[:3, : len(size)]
    target = [*grid.spacing_mm, 0.0][: len(size)]  # 0: an axis that is not resampled
    if len(size) == 3 and (grid.spatial_dims == 3 or grid.slice_axis is not None):
        if grid.slice_axis is not None:
            target = list(grid.spacing_mm)
            target.insert(_AXES[grid.slice_axis], 0.0)
        target = [target[axis] for axis in np.abs(columns).argmax(0)]
    finer = [s / t if t > 0 else 1.0 for s, t in zip(np.linalg.norm(columns, axis=0), target, strict=True)]
    return float(np.prod(np.asarray(size, dtype=float) * finer))


def pair_to_grid(image: torch.Tensor, label: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring one pair that has the grid's spacing already (synthetic ones) to its intensities and shape.

    Args:
        image: (channel, *size); a constant one, which a bad generator may draw, keeps its value.
        label: (*size) integers.
        grid: the target; without a spacing the pair is resized.
    """
    plain, mask = image.float(), label[None].float()
    if grid.spacing_mm is None:
        plain, mask = _resize(plain, mask, grid.shape)
    try:
        plain = _scale(plain, grid)
    except CaseRefused:
        plain = plain.clamp(-1, 1)
    plain, mask = _fit(plain, mask, grid.shape)
    return plain, mask[0]


def _orient(image: torch.Tensor, label: torch.Tensor, affine: np.ndarray | None) -> tuple[MetaTensor, MetaTensor]:
    matrix = torch.as_tensor(np.eye(4) if affine is None else affine, dtype=torch.float64)
    turn = Orientation(axcodes="RAS", labels=(("L", "R"), ("P", "A"), ("I", "S")))
    turned: list[MetaTensor] = []
    for array in (image, label[None]):
        placed: Any = turn(MetaTensor(array.as_subclass(torch.Tensor).float(), affine=matrix))
        turned.append(placed)
    return turned[0], turned[1]


def _resample(
    image: MetaTensor, label: MetaTensor, spacing_mm: Sequence[float] | None, grid: Grid
) -> tuple[torch.Tensor, torch.Tensor]:
    """Resample a volume to ``spacing_mm`` (an axis at 0 keeps its own), or resize it to the grid's shape."""
    if spacing_mm is None:
        return _resize(image, label, grid.shape)
    spacing = Spacing(pixdim=tuple(spacing_mm), padding_mode="border")
    return spacing(image, mode="bilinear"), spacing(label, mode="nearest")


def _resize(image: torch.Tensor, label: torch.Tensor, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Resize by area where any axis shrinks (no aliasing), linearly where all grow; labels by nearest centre."""
    size = tuple(shape)
    shrinks = any(old > new for old, new in zip(image.shape[1:], size, strict=True))
    mode = "area" if shrinks else ("bilinear" if len(size) == 2 else "trilinear")
    return Resize(size, mode=mode)(image.float()), Resize(size, mode="nearest-exact")(label.float())


def _turned(
    image: torch.Tensor, label: torch.Tensor, affine: np.ndarray | None
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray | None]:
    """Return one 2D image, its label map and its spacing with both axes towards right, anterior or superior."""
    if affine is None:
        return image, label, None
    images, labels = _orient(image[..., None], label[..., None], affine)
    normal = int(nib.orientations.io_orientation(affine)[2, 0])
    spacing = np.delete(np.linalg.norm(np.asarray(images.affine)[:3, :3], axis=0), normal)
    return images.select(normal + 1, 0), labels[0].select(normal, 0), spacing


def _in_plane(
    image: torch.Tensor, label: torch.Tensor, spacing_mm: np.ndarray | None, grid: Grid, least_kept: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring one 2D image (channel, X, Y) to the grid; a photograph on a grid with a spacing keeps its pixels."""
    flat, labels = image.as_subclass(torch.Tensor).float(), label.as_subclass(torch.Tensor)[None].float()
    if grid.spacing_mm is None:
        flat, labels = _resize(flat, labels, grid.shape)
    elif spacing_mm is not None:
        ratio = spacing_mm / np.asarray(grid.spacing_mm)
        size = [max(1, round(n * r)) for n, r in zip(flat.shape[1:], ratio, strict=True)]
        flat, labels = _resize(flat, labels, size)
    flat, inside = _fit(_scale(flat, grid), labels, grid.shape)
    _refuse_cut(labels, inside, least_kept)
    return flat, inside[0]


def _slices(
    volume: MetaTensor, volume_label: MetaTensor, grid: Grid, least_kept: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut a RAS volume into evenly spaced slices; those with foreground where there are any."""
    axis = _AXES[grid.slice_axis or "S"]
    image: torch.Tensor = volume
    label: torch.Tensor = volume_label
    if grid.spacing_mm is not None:
        pixdim = list(grid.spacing_mm)
        pixdim.insert(axis, 0.0)  # MONAI keeps an axis whose spacing is not positive
        image, label = _resample(volume, volume_label, pixdim, grid)
    scaled = _scale(image, grid)
    planes = label.as_subclass(torch.Tensor)[0].movedim(axis, 0)
    filled = torch.nonzero(planes.flatten(1).any(dim=1)).flatten().tolist() or list(range(planes.shape[0]))
    chosen = [filled[i] for i in _evenly(len(filled), grid.max_slices)]
    images, labels, whole = [], [], []
    for index in chosen:
        flat, mask = scaled.select(axis + 1, index), planes[index][None]
        if grid.spacing_mm is None:
            flat, mask = _resize(flat, mask, grid.shape)
        flat, inside = _fit(flat, mask, grid.shape)
        images.append(flat)
        labels.append(inside[0])
        whole.append(mask)
    _refuse_cut(torch.stack(whole), torch.stack(labels), least_kept)
    return torch.stack(images), torch.stack(labels)


def _evenly(count: int, wanted: int) -> list[int]:
    """Return at most ``wanted`` distinct indices below ``count``, in the middles of equal parts."""
    wanted = min(count, wanted)
    return [int((part + 0.5) * count / wanted) for part in range(wanted)]


def _scale(image: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Scale one image so that its own percentiles become -1 and 1, and clip."""
    plain = image.as_subclass(torch.Tensor).float()
    low, high = np.percentile(plain.numpy(), grid.intensity_percentiles)
    if not high > low:
        raise CaseRefused("constant_image")
    scaled = ScaleIntensityRangePercentiles(*grid.intensity_percentiles, b_min=-1.0, b_max=1.0, clip=True)(plain)
    return torch.as_tensor(scaled).as_subclass(torch.Tensor).float()


def _refuse_cut(whole: torch.Tensor, inside: torch.Tensor, least_kept: float) -> None:
    """Refuse a case of whose foreground a smaller share than ``least_kept`` lies within the grid."""
    if int((inside > 0).sum()) < least_kept * int((whole > 0).sum()):
        raise CaseRefused("outside_grid")


def _fit(image: torch.Tensor, label: torch.Tensor, shape: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Centre crop or pad: the image by its edge, the label by background."""
    fitted = ResizeWithPadOrCrop(tuple(shape), mode="edge")(image.as_subclass(torch.Tensor))
    mask = ResizeWithPadOrCrop(tuple(shape), mode="constant", constant_values=0)(label.as_subclass(torch.Tensor))
    return (
        torch.as_tensor(fitted).as_subclass(torch.Tensor).float().contiguous(),
        torch.as_tensor(mask).as_subclass(torch.Tensor).round().to(torch.uint8).contiguous(),
    )
