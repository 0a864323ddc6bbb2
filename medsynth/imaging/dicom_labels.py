"""DICOM segmentations in: SEG objects (PS3.3 A.51) as label maps, on an image's voxels or a picture's pixels."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, cast

import highdicom as hd
import numpy as np
import pydicom
from scipy import ndimage

from medsynth.config import Grid
from medsynth.imaging.dicom import read_datasets, to_ras
from medsynth.imaging.refusal import CaseRefused, refusing

_PARALLEL = 1e-3  # of the cosine between two directions
_THICKER = 1.5  # a slice that is thicker than so many of the image's slices was not drawn on them
_AS_THICK = 0.1  # by which thickness and distance of slices differ that leave no room between them


def label_value(name: str, number: int, grid: Grid) -> int:
    """Return the grid's label of a segment: by its name (any case), by its number where it has no name.

    Numbers say nothing where names are declared: another hospital's first structure is not ours.

    Raises:
        CaseRefused: the grid does not name it.
    """
    for value, known in grid.labels.items():
        if known.casefold() == name.strip().casefold():
            return value
    if not name.strip() and number in grid.labels:
        return number
    raise CaseRefused("unknown_label")


def read_segmentation(
    files: Sequence[Path], shape: Sequence[int], affine: np.ndarray, grid: Grid, max_voxels: int
) -> np.ndarray:
    """Bring segmentation objects onto an image's voxels, through world coordinates.

    Args:
        files: SEG objects of one image series.
        shape: (X, Y, Z) of the image.
        affine: 4 x 4 of the image, voxel to RAS+ mm.
        grid: names the labels.
        max_voxels: largest volume of all segments together.

    Returns:
        Labels (X, Y, Z) uint8.

    Raises:
        CaseRefused: unreadable, too large, slices left out of which nobody says where they lie, unknown label, overlap
            of different labels, or foreground outside of the image.
    """
    return _painted(
        (found for dataset in read_datasets(files) for found in _segments(dataset, shape, affine, grid, max_voxels)),
        shape,
    )


def read_picture_segmentation(
    files: Sequence[Path], shape: Sequence[int], picture: str, grid: Grid, max_voxels: int
) -> np.ndarray:
    """Return what segmentation objects say of one picture, by the image that each frame names as its source.

    Args:
        files: SEG objects that refer to the picture.
        shape: (X, Y) of the picture.
        picture: its SOP Instance UID.
        grid: names the labels.
        max_voxels: most pixels of all segments together.

    Returns:
        Labels (X, Y) uint8.

    Raises:
        CaseRefused: unreadable, too large, unknown label, overlap of different labels, another size, or frames that
            name no image.
    """
    return _painted(
        (found for dataset in read_datasets(files) for found in _frames_of(dataset, shape, picture, grid, max_voxels)),
        shape,
    )


def _painted(segments: Iterable[tuple[int, np.ndarray]], shape: Sequence[int]) -> np.ndarray:
    labels = np.zeros(tuple(shape), dtype=np.uint8)
    for value, mask in segments:
        if np.any(mask & (labels > 0) & (labels != value)):
            raise CaseRefused("overlapping_labels")
        labels[mask] = value
    return labels


def _frames_of(
    dataset: pydicom.Dataset, shape: Sequence[int], picture: str, grid: Grid, max_voxels: int
) -> list[tuple[int, np.ndarray]]:
    with refusing("unplaced_mask"):
        if (dataset.Columns, dataset.Rows) != tuple(shape):
            raise CaseRefused("shape_mismatch")
        _spell_out_sources(dataset)
        _require_preserved(dataset, picture)
        source = hd.seg.Segmentation.from_dataset(dataset)
        numbers = [int(n) for n in source.segment_numbers]
        if math.prod(shape) * len(numbers) > max_voxels:
            raise CaseRefused("too_large")
        frames = source.get_pixels_by_source_instance(
            [picture],
            numbers,
            ignore_spatial_locations=True,
            assert_missing_frames_are_empty=True,
            rescale_fractional=False,
            skip_overlap_checks=True,
        )[0]
        marked = _marked(source, frames)
    return [(value, marked[..., channel].T) for value, channel in _foreground(source, marked, grid)]


def _spell_out_sources(dataset: pydicom.Dataset) -> None:
    """Let highdicom read what other programs write: each frame says itself which image it lies on."""
    shared = list(dataset.get("SharedFunctionalGroupsSequence") or [])
    told = [group.DerivationImageSequence for group in shared if "DerivationImageSequence" in group]
    for group in (*shared, *dataset.PerFrameFunctionalGroupsSequence):
        # highdicom writes those of a picture without a slice's thickness, and then cannot read them.
        group.pop("PixelMeasuresSequence", None)
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        if told and "DerivationImageSequence" not in frame:
            frame.DerivationImageSequence = told[0]


def _require_preserved(dataset: pydicom.Dataset, picture: str) -> None:
    """Refuse frames that do not lie on the picture, pixel on pixel.

    Raises:
        CaseRefused: no frame names the picture as its source, or one says that its pixels lie elsewhere.
    """
    derivations = [
        derived
        for frame in dataset.PerFrameFunctionalGroupsSequence
        for derived in frame.get("DerivationImageSequence") or []
    ]
    placed = {
        str(item.get("SpatialLocationsPreserved") or "YES")
        for derived in derivations
        for item in derived.get("SourceImageSequence") or []
        if item.get("ReferencedSOPInstanceUID") == picture
    }
    if placed != {"YES"}:
        raise CaseRefused("unplaced_mask")


def _segments(
    dataset: pydicom.Dataset, shape: Sequence[int], affine: np.ndarray, grid: Grid, max_voxels: int
) -> list[tuple[int, np.ndarray]]:
    with refusing("unreadable_file"):
        source = _regular(dataset, affine)
        numbers = [int(n) for n in source.segment_numbers]
        # Empty frames may be left out: two far from each other span a volume that the header does not show.
        if (space := source.get_volume_geometry()) and math.prod(space.spatial_shape) * len(numbers) > max_voxels:
            raise CaseRefused("too_large")
        volume = source.get_volume(combine_segments=False, segment_numbers=numbers, rescale_fractional=False)
        marked = _marked(source, volume.array)
        found = [
            (value, *to_ras(volume.with_array(marked[..., channel])))
            for value, channel in _foreground(source, marked, grid)
        ]
    return [(value, _onto(mask, placed, shape, affine)) for value, mask, placed in found]


def _regular(dataset: pydicom.Dataset, affine: np.ndarray) -> Any:
    """Return a segmentation with slices as far from each other as the image's, where it does not say how far.

    Frames that mark nothing may be left out. The smallest distance between those that are there, which highdicom takes
    where Spacing Between Slices (0018,0088) is absent, is then too large, and what lies in between would be marked.

    Raises:
        CaseRefused: slices are left out, and the image's do not tell where.
    """
    groups = [*(dataset.get("SharedFunctionalGroupsSequence") or []), *dataset.PerFrameFunctionalGroupsSequence]
    measures = [part for group in groups for part in group.get("PixelMeasuresSequence") or []]
    planes = [part for group in groups for part in group.get("PlaneOrientationSequence") or []]
    as_written = hd.seg.Segmentation.from_dataset(dataset)
    if all("SpacingBetweenSlices" in part for part in measures) or len(dataset.PerFrameFunctionalGroupsSequence) == 1:
        return as_written
    whole = as_written.get_volume_geometry(allow_missing_positions=False)
    closest = whole or as_written.get_volume_geometry()
    spacing = _spacing_along(planes[0].ImageOrientationPatient, affine) if planes else None
    if spacing and closest:
        distance = closest.spacing_between_slices
        thickness = max(float(part.get("SliceThickness") or 0) for part in measures)
        if min(distance, thickness) < _THICKER * spacing:  # drawn on the image's slices
            for part in measures:
                part.SpacingBetweenSlices = spacing
            spaced = hd.seg.Segmentation.from_dataset(dataset)
            if spaced.get_volume_geometry() is not None:
                return spaced
        elif not math.isclose(thickness, distance, rel_tol=_AS_THICK):
            raise CaseRefused("sparse_mask")  # thick slices of its own, or some of many that overlap
    if whole is None:
        raise CaseRefused("sparse_mask")
    return as_written


def _spacing_along(orientation: Sequence[float], affine: np.ndarray) -> float | None:
    """Return how far an image's slices lie apart along the normal of a plane, mm; None where none are parallel to it.

    Args:
        orientation: Image Orientation (Patient), LPS+.
        affine: 4 x 4, voxel to RAS+ mm.
    """
    cosines = np.asarray(orientation, dtype=np.float64)
    normal = np.cross(cosines[:3], cosines[3:]) * [-1, -1, 1]
    steps = np.linalg.norm(affine[:3, :3], axis=0)
    along = np.abs(normal @ affine[:3, :3]) / steps
    axis = int(np.argmax(along))
    return float(steps[axis]) if along[axis] > 1 - _PARALLEL else None


def _marked(source: Any, array: np.ndarray) -> np.ndarray:
    """Return where segments are; of probabilities and shares (PS3.3 C.8.20.2.3), where they are a half or more."""
    if source.segmentation_type == hd.seg.SegmentationTypeValues.FRACTIONAL:
        return cast(np.ndarray, 2 * array.astype(np.uint16) >= int(source.MaximumFractionalValue))
    return array > 0


def _foreground(source: Any, marked: np.ndarray, grid: Grid) -> list[tuple[int, int]]:
    """Return label and channel of the segments that mark anything, background left out.

    Args:
        source: the segmentation.
        marked: (..., segment) its segments in their order.
        grid: names the labels.
    """
    found = []
    for channel, number in enumerate(int(n) for n in source.segment_numbers):
        name = str(source.get_segment_description(number).get("SegmentLabel", ""))
        if marked[..., channel].any() and (value := label_value(name, number, grid)):
            found.append((value, channel))
    return found


def _onto(mask: np.ndarray, placed: np.ndarray, shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """Return a mask (X, Y, Z) of affine ``placed`` on the voxels of ``affine`` by nearest neighbour."""
    to_mask = np.linalg.inv(placed) @ affine
    to_image = np.linalg.inv(to_mask)
    for first in np.flatnonzero(mask.any(axis=(1, 2))):  # slice by slice: places take more memory than voxels
        others = np.argwhere(mask[first])
        positions = first * to_image[:3, 0] + others @ to_image[:3, 1:3].T + to_image[:3, 3]
        # one voxel of slack: a finer segmentation may reach past the centre of the outermost voxels
        if np.any(positions < -1) or np.any(positions > np.asarray(shape)):
            raise CaseRefused("shape_mismatch")
    pulled = ndimage.affine_transform(
        mask.astype(np.uint8),
        to_mask[:3, :3],
        to_mask[:3, 3],
        output_shape=tuple(shape),
        order=0,
        mode="grid-constant",  # "constant" drops border voxels at coordinates like -1e-12
    )
    return cast(np.ndarray, pulled > 0)
