"""DICOM in: series are built into volumes by highdicom, behind a MONAI ``ImageReader``; pictures stay single.

MONAI's own reader sorts by Instance Number, which scrambles volumes silently; highdicom orders slices by Image
Position (Patient) (0020,0032) along the normal of Image Orientation (Patient) (0020,0037), PS3.3 C.7.6.2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import highdicom as hd
import numpy as np
import pydicom
from monai.data.image_reader import ImageReader
from scipy import ndimage

from medsynth.config import Grid
from medsynth.imaging.dicom_series import is_picture
from medsynth.imaging.refusal import CaseRefused

PIXEL_SPACINGS = ("PixelSpacing", "ImagerPixelSpacing", "NominalScannedPixelSpacing")
"""Where a picture may say the size of its pixels, mm, rows first: at the patient, at the detector (PS3.3 10.7.1.3)."""
GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "FrameOfReferenceUID")
ORIENTATION_TOLERANCE = 1e-4
"""Direction cosines are often written to 6 digits and rounded slice by slice."""


@dataclass(frozen=True)
class Volume:
    """An image in world coordinates, or a picture.

    Attributes:
        array: voxels (X, Y, Z) or (X, Y, Z, 3) float32; X runs along columns, Y along rows, Z along slices. A picture
            has no Z.
        affine: 4 x 4, voxel index to RAS+ mm; of a picture, the sizes of its pixels alone.
        frame_of_reference: Frame of Reference UID (0020,0052).
    """

    array: np.ndarray
    affine: np.ndarray
    frame_of_reference: str


def _read_datasets(files: Sequence[Path]) -> list[pydicom.Dataset]:
    try:
        return [pydicom.dcmread(path) for path in files]
    except Exception as error:  # damaged objects make pydicom raise nearly anything
        raise CaseRefused("truncated_dicom") from error


def _volume(datasets: Sequence[pydicom.Dataset]) -> Volume:
    multiframe = any(int(ds.get("NumberOfFrames") or 1) > 1 for ds in datasets)
    if multiframe and len(datasets) > 1:
        raise CaseRefused("multiple_frames")
    if not multiframe:
        _check_geometry(datasets)
    _check_pixels(datasets)
    try:
        if multiframe:
            image = hd.Image.from_dataset(datasets[0])
            volume = image.get_volume(dtype=np.float32)
        else:
            volume = hd.get_volume_from_series(datasets, dtype=np.float32, orientation_tol=ORIENTATION_TOLERANCE)
    except Exception as error:  # highdicom's refusals share no class
        raise CaseRefused("multiple_frames" if multiframe else "irregular_geometry") from error
    return _as_ras(volume)


def _picture(dataset: pydicom.Dataset) -> Volume:
    """Return a picture as a viewer shows it (MONOCHROME1 inverted, palettes applied), but without its window."""
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise CaseRefused("multiple_frames")
    _check_pixels([dataset])
    try:
        frame = hd.Image.from_dataset(dataset).get_frame(
            1,
            dtype=np.float32,
            apply_real_world_transform=False,
            apply_presentation_lut=False,
            apply_icc_profile=False,
        )
    except Exception as error:  # highdicom's refusals share no class
        raise CaseRefused("unreadable_file") from error
    # By this alone: viewers do, and other elements that speak of an inversion contradict it now and then.
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        frame = frame.max() + frame.min() - frame
    shown = _shown(dataset)
    if not shown.all() and shown.any():
        frame = np.where(shown, frame, frame[shown].min())
    return Volume(np.swapaxes(frame, 0, 1), np.diag([*_pixel_size(dataset), 1.0, 1.0]), "")


def _shown(dataset: pydicom.Dataset) -> np.ndarray:
    """Return which pixels are no padding (PS3.3 C.7.5.1.1.2)."""
    stored = dataset.pixel_array
    padding = dataset.get("PixelPaddingValue")
    if padding is None or stored.ndim != 2:
        return np.ones(stored.shape[:2], dtype=bool)
    low, high = sorted((int(padding), int(dataset.get("PixelPaddingRangeLimit", padding))))
    return cast(np.ndarray, (stored < low) | (stored > high))


def is_deep(path: Path) -> bool:
    """Whether an instance that was read stores more than 8 bits a value."""
    return int(pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["BitsAllocated"]).BitsAllocated) > 8


def _pixel_size(dataset: pydicom.Dataset) -> tuple[float, float]:
    """Return the width and height of a pixel, mm; NaN where the header does not say."""
    for keyword in PIXEL_SPACINGS:
        spacing = np.atleast_1d(np.asarray(dataset.get(keyword) or [], dtype=np.float64))
        if spacing.shape == (2,) and (spacing > 0).all():
            return float(spacing[1]), float(spacing[0])
    return math.nan, math.nan


def _check_geometry(datasets: Sequence[pydicom.Dataset]) -> None:
    """Refuse, with the right reason, what highdicom would refuse as "not regularly spaced"."""
    if any(not ds.get(keyword) for ds in datasets for keyword in GEOMETRY):
        raise CaseRefused("no_geometry")
    if len(datasets) == 1:
        return

    def regular(missing: bool = False, duplicate: bool = False) -> bool:
        try:
            spacing, _ = hd.spatial.get_series_volume_positions(
                datasets,
                orientation_tol=ORIENTATION_TOLERANCE,
                allow_missing_positions=missing,
                allow_duplicate_positions=duplicate,
            )
        except ValueError:
            return False
        return spacing is not None

    if regular():
        return
    if regular(missing=True):
        raise CaseRefused("missing_slice")
    if regular(duplicate=True):
        raise CaseRefused("multiple_frames")
    raise CaseRefused("irregular_geometry")


def _check_pixels(datasets: Sequence[pydicom.Dataset]) -> None:
    try:
        shapes = {ds.pixel_array.shape for ds in datasets}
    except Exception as error:  # missing, short or undecodable pixel data
        raise CaseRefused("truncated_dicom") from error
    if len(shapes) != 1:
        raise CaseRefused("irregular_geometry")


def _as_ras(volume: Any) -> Volume:
    """Turn highdicom's (slice, row, column) in LPS+ into (column, row, slice) in RAS+."""
    to_ras = np.diag([-1.0, -1.0, 1.0, 1.0])
    affine = to_ras @ np.asarray(volume.affine, dtype=np.float64)
    return Volume(
        array=np.moveaxis(np.asarray(volume.array, dtype=np.float32), (0, 1, 2), (2, 1, 0)),
        affine=affine[:, [2, 1, 0, 3]],
        frame_of_reference=str(volume.frame_of_reference_uid or ""),
    )


class HighdicomReader(ImageReader):
    """MONAI reader of one DICOM series, given as its list of files (for ``monai.transforms.LoadImage``)."""

    def verify_suffix(self, filename: Any) -> bool:
        """Whether the path(s) may be DICOM: instances often have no suffix, so everything may."""
        return True

    def read(self, data: Any, **kwargs: Any) -> list[pydicom.Dataset]:
        """Read the instances of a series.

        Args:
            data: the paths of all of its instances, in any order; or one path, of a multi-frame object.
        """
        return _read_datasets([Path(p) for p in data] if isinstance(data, (list, tuple)) else [Path(data)])

    def get_data(self, img: list[pydicom.Dataset]) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the voxels (X, Y, Z[, 3]) and MONAI metadata with the RAS+ affine; no header value is passed on.

        A picture has pixels (X, Y[, 3]), and NaN in its affine where the size of its pixels is not known.
        """
        single = len(img) == 1 and is_picture(img[0])
        volume, axes = (_picture(img[0]), 2) if single else (_volume(img), 3)
        meta = {
            "affine": volume.affine,
            "original_affine": volume.affine.copy(),
            "space": "RAS",
            "spatial_shape": np.asarray(volume.array.shape[:axes]),
            "original_channel_dim": -1 if volume.array.ndim > axes else float("nan"),
        }
        return volume.array, meta


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
        CaseRefused: unreadable, too large, unknown label, overlap of different labels, or foreground outside of the
            image.
    """
    return _painted(
        (
            (value, _onto(segment, shape, affine))
            for dataset in _read_datasets(files)
            for value, segment in _segments(dataset, grid, max_voxels)
        ),
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
        (found for dataset in _read_datasets(files) for found in _frames_of(dataset, shape, picture, grid, max_voxels)),
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
    try:
        if (dataset.Columns, dataset.Rows) != tuple(shape):
            raise CaseRefused("shape_mismatch")
        _prepare_frames(dataset, picture)
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
    except CaseRefused:
        raise
    except Exception as error:  # highdicom's refusals share no class
        raise CaseRefused("unplaced_mask") from error
    return [(value, frames[..., channel].T > 0) for value, channel in _foreground(source, frames, grid)]


def _prepare_frames(dataset: pydicom.Dataset, picture: str) -> None:
    """Let highdicom read what other programs write, and refuse frames that do not lie on the picture.

    Raises:
        CaseRefused: no frame names the picture as its source, or one says that its pixels lie elsewhere.
    """
    shared = list(dataset.get("SharedFunctionalGroupsSequence") or [])
    for group in (*shared, *dataset.PerFrameFunctionalGroupsSequence):
        # highdicom writes those of a picture without a slice's thickness, and then cannot read them.
        group.pop("PixelMeasuresSequence", None)
    told = [group.DerivationImageSequence for group in shared if "DerivationImageSequence" in group]
    placed = set()
    for frame in dataset.PerFrameFunctionalGroupsSequence:
        if told and "DerivationImageSequence" not in frame:
            frame.DerivationImageSequence = told[0]
        derivations = frame.get("DerivationImageSequence") or []
        sources = [item for derived in derivations for item in derived.get("SourceImageSequence") or []]
        placed |= {
            str(item.get("SpatialLocationsPreserved") or "YES")
            for item in sources
            if item.get("ReferencedSOPInstanceUID") == picture
        }
    if placed != {"YES"}:
        raise CaseRefused("unplaced_mask")


def _segments(dataset: pydicom.Dataset, grid: Grid, max_voxels: int) -> list[tuple[int, Volume]]:
    try:
        source = hd.seg.Segmentation.from_dataset(dataset)
        numbers = [int(n) for n in source.segment_numbers]
        # Empty frames may be left out: two far from each other span a volume that the header does not show.
        if (space := source.get_volume_geometry()) and math.prod(space.spatial_shape) * len(numbers) > max_voxels:
            raise CaseRefused("too_large")
        volume = source.get_volume(combine_segments=False, segment_numbers=numbers, rescale_fractional=False)
    except CaseRefused:
        raise
    except Exception as error:  # highdicom's refusals share no class
        raise CaseRefused("unreadable_file") from error
    return [
        (value, _as_ras(volume.with_array(volume.array[..., channel])))
        for value, channel in _foreground(source, volume.array, grid)
    ]


def _foreground(source: Any, array: np.ndarray, grid: Grid) -> list[tuple[int, int]]:
    """Return label and channel of the segments that mark anything, background left out.

    Args:
        source: the segmentation.
        array: (..., segment) its segments in their order.
        grid: names the labels.
    """
    found = []
    for channel, number in enumerate(int(n) for n in source.segment_numbers):
        name = str(source.get_segment_description(number).get("SegmentLabel", ""))
        if array[..., channel].any() and (value := label_value(name, number, grid)):
            found.append((value, channel))
    return found


def _onto(segment: Volume, shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """Return the segment's foreground on the voxels of ``affine`` by nearest neighbour."""
    to_segment = np.linalg.inv(segment.affine) @ affine
    inside = np.argwhere(segment.array > 0)
    to_image = np.linalg.inv(to_segment)
    positions = inside @ to_image[:3, :3].T + to_image[:3, 3]
    # one voxel of slack: a finer segmentation may reach past the centre of the outermost voxels
    if np.any(positions < -1) or np.any(positions > np.asarray(shape)):
        raise CaseRefused("shape_mismatch")
    pulled = ndimage.affine_transform(
        (segment.array > 0).astype(np.uint8),
        to_segment[:3, :3],
        to_segment[:3, 3],
        output_shape=tuple(shape),
        order=0,
        mode="grid-constant",  # "constant" drops border voxels at coordinates like -1e-12
    )
    return cast(np.ndarray, pulled > 0)
