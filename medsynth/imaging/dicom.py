"""DICOM in: series are built into volumes by highdicom, behind a MONAI ``ImageReader``; pictures stay single.

MONAI's own reader sorts by Instance Number, which scrambles volumes silently; highdicom orders slices by Image
Position (Patient) (0020,0032) along the normal of Image Orientation (Patient) (0020,0037), PS3.3 C.7.6.2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import highdicom as hd
import numpy as np
import pydicom
from monai.data.image_reader import ImageReader
from pydicom.pixels.decoders.base import get_decoder

from medsynth.imaging.dicom_series import is_picture, read_instance
from medsynth.imaging.refusal import CaseRefused, refusing

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
    """

    array: np.ndarray
    affine: np.ndarray


def read_datasets(files: Sequence[Path]) -> list[pydicom.Dataset]:
    """Read whole instances.

    Raises:
        CaseRefused: one of them is damaged.
    """
    with refusing("truncated_dicom"):
        return [read_instance(path) for path in files]


def _volume(datasets: Sequence[pydicom.Dataset]) -> Volume:
    multiframe = any(_in_frames(ds) for ds in datasets)
    if multiframe and len(datasets) > 1:
        raise CaseRefused("multiple_frames")
    if not multiframe:
        _check_geometry(datasets)
    _check_pixels(datasets)

    def voxels(**how: Any) -> Any:
        if multiframe:
            return hd.Image.from_dataset(datasets[0]).get_volume(dtype=np.float32, **how)
        return hd.get_volume_from_series(datasets, dtype=np.float32, orientation_tol=ORIENTATION_TOLERANCE, **how)

    with refusing("multiple_frames" if multiframe else "irregular_geometry"):
        volume = voxels()
        if not all(_shown(ds).all() for ds in datasets):
            as_is = ("apply_real_world_transform", "apply_modality_transform", "apply_presentation_lut")
            stored = voxels(**dict.fromkeys(as_is, False)).array
            beside = [_beside(stored, padding) for padding in {_padding(ds) for ds in datasets}]  # of one, as a rule
            volume = volume.with_array(_unpadded(volume.array, np.logical_and.reduce(beside)))
        return Volume(*to_ras(volume))


def _in_frames(dataset: pydicom.Dataset) -> bool:
    """Whether an instance holds frames, and their geometry, rather than one slice."""
    geometry = dataset.get("PerFrameFunctionalGroupsSequence") and not dataset.get("ImagePositionPatient")
    return bool(geometry) or int(dataset.get("NumberOfFrames") or 1) > 1


def _picture(dataset: pydicom.Dataset) -> Volume:
    """Return a picture as a viewer shows it (MONOCHROME1 inverted, palettes applied), but without its window."""
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise CaseRefused("multiple_frames")
    _check_pixels([dataset])
    with refusing("unreadable_file"):
        frame = hd.Image.from_dataset(dataset).get_frame(
            1,
            dtype=np.float32,
            apply_real_world_transform=False,
            apply_presentation_lut=False,
            apply_icc_profile=False,
        )
    # By this alone: viewers do, and other elements that speak of an inversion contradict it now and then.
    if dataset.PhotometricInterpretation == "MONOCHROME1":
        frame = frame.max() + frame.min() - frame
    return Volume(np.swapaxes(_unpadded(frame, _shown(dataset)), 0, 1), np.diag([*_pixel_size(dataset), 1.0, 1.0]))


def _shown(dataset: pydicom.Dataset) -> np.ndarray:
    """Return which pixels as they are stored are no padding."""
    stored = dataset.pixel_array
    grey = str(dataset.get("PhotometricInterpretation", "")).startswith("MONOCHROME")
    return _beside(stored, _padding(dataset)) if grey else np.ones(stored.shape, dtype=bool)


def _padding(dataset: pydicom.Dataset) -> tuple[int, int] | None:
    """Return the lowest and the highest stored value that mark pixels which were never measured (C.7.5.1.1.2)."""
    first, limit = dataset.get("PixelPaddingValue"), dataset.get("PixelPaddingRangeLimit")
    if first is None:
        return None
    span = 2 ** int(dataset.BitsAllocated)
    lowest = -span // 2 if dataset.PixelRepresentation == 1 else 0
    # Signed values are often written as if they were none, and the other way around.
    low, high = sorted((int(first if end is None else end) - lowest) % span + lowest for end in (first, limit))
    return low, high


def _beside(stored: np.ndarray, padding: tuple[int, int] | None) -> np.ndarray:
    if padding is None:
        return np.ones(stored.shape, dtype=bool)
    return cast(np.ndarray, (stored < padding[0]) | (stored > padding[1]))


def _unpadded(array: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Return values with the smallest one that was measured in place of padding, which would set the contrast."""
    return array if shown.all() or not shown.any() else np.where(shown, array, array[shown].min())


def is_deep(path: Path) -> bool:
    """Whether an instance that was read stores more than 8 bits a value."""
    return int(read_instance(path, stop_before_pixels=True, specific_tags=["BitsAllocated"]).BitsAllocated) > 8


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
    if not all(_decodable(ds) for ds in datasets):
        raise CaseRefused("no_decoder")
    with refusing("truncated_dicom"):  # pixel data that are missing, short or damaged
        shapes = {ds.pixel_array.shape for ds in datasets}
    if len(shapes) != 1:
        raise CaseRefused("irregular_geometry")


def _decodable(dataset: pydicom.Dataset) -> bool:
    syntax = dataset.file_meta.get("TransferSyntaxUID")
    if syntax is None or not syntax.is_encapsulated:
        return True
    try:
        return bool(get_decoder(syntax).is_available)
    except NotImplementedError:  # nobody has one
        return False


def to_ras(volume: Any) -> tuple[np.ndarray, np.ndarray]:
    """Turn highdicom's (slice, row, column) in LPS+ into voxels (column, row, slice) and their affine to RAS+ mm."""
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(volume.affine, dtype=np.float64)
    return np.moveaxis(np.asarray(volume.array), (0, 1, 2), (2, 1, 0)), affine[:, [2, 1, 0, 3]]


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
        return read_datasets([Path(p) for p in data] if isinstance(data, (list, tuple)) else [Path(data)])

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
