"""DICOM in: series are found by their headers and built into volumes by highdicom, behind a MONAI ``ImageReader``.

MONAI's own reader sorts by Instance Number, which scrambles volumes silently; highdicom orders slices by Image
Position (Patient) (0020,0032) along the normal of Image Orientation (Patient) (0020,0037), PS3.3 C.7.6.2.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import highdicom as hd
import numpy as np
import pydicom
from monai.data.image_reader import ImageReader
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_partial
from pydicom.tag import BaseTag
from pydicom.uid import UID, MediaStorageDirectoryStorage
from scipy import ndimage

from medsynth.config import Grid
from medsynth.imaging.refusal import CaseRefused
from medsynth.imaging.tree import files_below

SEGMENTATION_CLASSES = frozenset({"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"})
"""Segmentation Storage and Label Map Segmentation Storage, PS3.4 B.5."""
GEOMETRY = ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "FrameOfReferenceUID")
ORIENTATION_TOLERANCE = 1e-4
"""Direction cosines are often written to 6 digits and rounded slice by slice."""
SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})
_EXTENT = ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel")
_HEADER_TAGS = [
    "SOPClassUID",
    "SeriesInstanceUID",
    "PatientID",
    "FrameOfReferenceUID",
    "ReferencedSeriesSequence",
    "SyntheticData",
    *_EXTENT,
]
_PATIENT_ID = 0x00100020
_SERIES_INSTANCE_UID = 0x0020000E


@dataclass(frozen=True)
class Volume:
    """An image in world coordinates.

    Attributes:
        array: voxels (X, Y, Z) or (X, Y, Z, 3) float32; X runs along columns, Y along rows, Z along slices.
        affine: 4 x 4, voxel index to RAS+ mm.
        frame_of_reference: Frame of Reference UID (0020,0052).
    """

    array: np.ndarray
    affine: np.ndarray
    frame_of_reference: str


@dataclass(frozen=True)
class Series:
    """The files of one Series Instance UID (0020,000E), sorted by path.

    Attributes:
        files: the instances.
        patient: Patient ID (0010,0020), "" where absent.
        frame_of_reference: Frame of Reference UID, "" where absent.
        voxels: what the pixels unfold to by their headers, voxels times channels.
        referenced_series: Series Instance UIDs that a segmentation refers to.
        synthetic: it says of itself that no patient was imaged (0008,001C).
        suspect: a broken file names this series, or this patient and no series: the series may be incomplete.
    """

    uid: str
    files: tuple[Path, ...]
    patient: str
    is_segmentation: bool
    frame_of_reference: str
    voxels: int
    referenced_series: tuple[str, ...] = ()
    synthetic: bool = False
    suspect: bool = False


@dataclass(frozen=True)
class Findings:
    """What lies below a folder: series with pixels, DICOM files whose header is broken, and closed folders."""

    images: tuple[Series, ...]
    segmentations: tuple[Series, ...]
    unreadable: tuple[Path, ...]
    closed: tuple[Path, ...] = ()


@dataclass(frozen=True)
class _Owner:
    """Whose a broken file is, as far as its header still says: "" where it does not."""

    patient: str = ""
    uid: str = ""

    def owns(self, uid: str, patient: str) -> bool:
        """Whether the file may be a part of a series.

        The folder must not count: in a flat export one patient's broken file would decide about all others, which the
        sensitivity of the mechanisms does not cover.
        """
        return bool(self.uid or self.patient) and self.uid in ("", uid) and self.patient in ("", patient)


def find_series(folder: Path) -> Findings:
    """Read the headers of all files below ``folder`` and group them by Series Instance UID.

    Files that are no DICOM (and do not claim to be by their name), directories and objects without pixels are passed
    over.
    """
    groups: dict[str, list[tuple[Path, pydicom.Dataset]]] = defaultdict(list)
    unreadable: list[Path] = []
    closed: list[Path] = []
    for path in sorted(p for p in files_below(folder, closed) if not p.name.startswith(".")):
        header = _read_header(path)
        if header is None:
            unreadable.append(path)
        elif header.get("SeriesInstanceUID") and "Rows" in header:
            groups[str(header.SeriesInstanceUID)].append((path, header))
    broken = {_owner(path) for path in unreadable}
    series = [_series(uid, members, broken) for uid, members in sorted(groups.items())]
    return Findings(
        images=tuple(s for s in series if not s.is_segmentation),
        segmentations=tuple(s for s in series if s.is_segmentation),
        unreadable=tuple(unreadable),
        closed=tuple(sorted(closed)),
    )


def _read_header(path: Path) -> pydicom.Dataset | None:
    """Return the header, an empty one for a file that is no DICOM image, or None for one that is broken."""
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=list(_HEADER_TAGS))
    except InvalidDicomError:
        return None if path.suffix.lower() in SUFFIXES else pydicom.Dataset()
    except Exception:  # a damaged header makes pydicom raise nearly anything
        return None
    if header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        return pydicom.Dataset()
    cut_short = "Rows" not in header and _promises_pixels(str(header.get("SOPClassUID", "")))
    return header if header.get("SeriesInstanceUID") and not cut_short else None


def _promises_pixels(sop_class: str) -> bool:
    return sop_class in SEGMENTATION_CLASSES or UID(sop_class).name.endswith("Image Storage")


def _owner(path: Path) -> _Owner:
    """Read patient and series from what is left of a header; elements come in the order of their tags (PS3.5 7.1)."""
    last = 0

    def past_series(tag: BaseTag, vr: str | None, length: int) -> bool:
        nonlocal last
        last = max(last, int(tag))
        return last > _SERIES_INSTANCE_UID

    try:
        with path.open("rb") as handle:
            header = read_partial(handle, stop_when=past_series, force=True)
        # The last element may be cut short, and a part of an identifier can be somebody else's.
        patient = patient_of(header) if last > _PATIENT_ID else ""
        return _Owner(patient, str(header.get("SeriesInstanceUID") or "") if last > _SERIES_INSTANCE_UID else "")
    except Exception:  # a damaged header makes pydicom raise nearly anything
        return _Owner()


def _series(uid: str, members: Sequence[tuple[Path, pydicom.Dataset]], broken: Iterable[_Owner]) -> Series:
    header = members[0][1]
    patients = {patient_of(h) for _, h in members}
    patient = patients.pop() if len(patients) == 1 else ""
    references = header.get("ReferencedSeriesSequence") or []
    return Series(
        uid=uid,
        files=tuple(path for path, _ in members),
        patient=patient,
        is_segmentation=header.get("SOPClassUID") in SEGMENTATION_CLASSES,
        frame_of_reference=str(header.get("FrameOfReferenceUID", "") or ""),
        voxels=sum(_voxels(h) for _, h in members),
        referenced_series=tuple(str(item.get("SeriesInstanceUID", "")) for item in references),
        synthetic=any(str(h.get("SyntheticData") or "").upper() == "YES" for _, h in members),
        suspect=any(owner.owns(uid, patient) for owner in broken),
    )


def _voxels(header: pydicom.Dataset) -> int:
    try:
        return math.prod(int(header.get(keyword) or 1) for keyword in _EXTENT)
    except Exception:  # as above; what is no number now will be none for the reader, which refuses it
        return 0


def patient_of(header: pydicom.Dataset) -> str:
    """Return the person: Patient ID (0010,0020); "" where absent.

    Whatever its issuer: often only some files of a person name one. Two people with one identifier count as one, which
    protects both.
    """
    return str(header.get("PatientID") or "").strip()


def image_of(segmentation: Series, images: Iterable[Series]) -> Series | None:
    """Return the image series that a segmentation belongs to, or None where it is missing or ambiguous.

    Referenced Series Sequence (0008,1115) decides; without a match, the only series of the same patient in the same
    frame of reference.
    """
    images = tuple(images)
    for series in images:
        if series.uid in segmentation.referenced_series:
            return series
    frame = segmentation.frame_of_reference
    near = [s for s in images if frame and s.frame_of_reference == frame and s.patient == segmentation.patient]
    return near[0] if len(near) == 1 else None


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
        """Return the voxels (X, Y, Z[, 3]) and MONAI metadata with the RAS+ affine; no header value is passed on."""
        volume = _volume(img)
        meta = {
            "affine": volume.affine,
            "original_affine": volume.affine.copy(),
            "space": "RAS",
            "spatial_shape": np.asarray(volume.array.shape[:3]),
            "original_channel_dim": -1 if volume.array.ndim == 4 else float("nan"),
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
    labels = np.zeros(tuple(shape), dtype=np.uint8)
    for dataset in _read_datasets(files):
        for value, segment in _segments(dataset, grid, max_voxels):
            mask = _onto(segment, labels.shape, affine)
            if np.any(mask & (labels > 0) & (labels != value)):
                raise CaseRefused("overlapping_labels")
            labels[mask] = value
    return labels


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
    found = []
    for channel, number in enumerate(numbers):
        name = str(source.get_segment_description(number).get("SegmentLabel", ""))
        one = _as_ras(volume.with_array(volume.array[..., channel]))
        if one.array.any():
            found.append((label_value(name, number, grid), one))
    return [(value, one) for value, one in found if value != 0]


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
