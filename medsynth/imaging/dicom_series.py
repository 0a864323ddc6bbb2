"""Which DICOM series lie below a folder, by their headers alone, and which images a segmentation belongs to."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_partial
from pydicom.tag import BaseTag
from pydicom.uid import UID, MediaStorageDirectoryStorage

from medsynth.imaging.tree import files_below

SEGMENTATION_CLASSES = frozenset({"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"})
"""Segmentation Storage and Label Map Segmentation Storage, PS3.4 B.5."""
PICTURE_CLASSES = frozenset(
    f"1.2.840.10008.5.1.4.1.1.{number}"
    for number in (
        "1",  # Computed Radiography
        "1.1",  # Digital X-Ray, for presentation and for processing; so the next four
        "1.1.1",
        "1.2",  # Digital Mammography
        "1.2.1",
        "1.3",  # Digital Intra-Oral X-Ray
        "1.3.1",
        "6.1",  # Ultrasound
        "7",  # Secondary Capture
        "12.1",  # X-Ray Angiography
        "12.2",  # X-Ray Radiofluoroscopy
        "77.1.1",  # VL Endoscopic
        "77.1.2",  # VL Microscopic
        "77.1.4",  # VL Photographic
        "77.1.5.1",  # Ophthalmic Photography, 8 and 16 bit
        "77.1.5.2",
        "77.1.7",  # Dermoscopic Photography
    )
)
"""Images that need no position in the patient (PS3.4 B.5): without one, each instance is a picture of its own."""
SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})
_EXTENT = ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel")
_HEADER_TAGS = [
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "PatientID",
    "FrameOfReferenceUID",
    "ImagePositionPatient",
    "ReferencedSeriesSequence",
    "SyntheticData",
    *_EXTENT,
]
_PATIENT_ID = 0x00100020
_SERIES_INSTANCE_UID = 0x0020000E


@dataclass(frozen=True)
class Series:
    """The files of one Series Instance UID (0020,000E), sorted by path; or one of them, if each is a picture.

    Attributes:
        files: the instances.
        patient: Patient ID (0010,0020), "" where absent.
        frame_of_reference: Frame of Reference UID, "" where absent.
        voxels: what the pixels unfold to by their headers, voxels times channels.
        picture: SOP Instance UID of the only file, where it lies nowhere in the patient (:data:`PICTURE_CLASSES`).
        referenced_series: Series Instance UIDs that a segmentation refers to.
        referenced_instances: SOP Instance UIDs that it refers to.
        synthetic: it says of itself that no patient was imaged (0008,001C).
        suspect: a broken file names this series, or this patient and no series: the series may be incomplete.
    """

    uid: str
    files: tuple[Path, ...]
    patient: str
    is_segmentation: bool
    frame_of_reference: str
    voxels: int
    picture: str = ""
    referenced_series: tuple[str, ...] = ()
    referenced_instances: frozenset[str] = frozenset()
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
    series = [part for uid, members in sorted(groups.items()) for part in _parts(uid, members, broken)]
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


def _parts(uid: str, members: Sequence[tuple[Path, pydicom.Dataset]], broken: Iterable[_Owner]) -> Iterable[Series]:
    """Return the series, or each of its instances if they are pictures; two patients in it are nobody's."""
    patients = {patient_of(header) for _, header in members}
    patient = patients.pop() if len(patients) == 1 else ""
    if all(is_picture(header) for _, header in members):
        return [_series(uid, [member], patient, broken, str(member[1].SOPInstanceUID)) for member in members]
    return [_series(uid, members, patient, broken)]


def is_picture(header: pydicom.Dataset) -> bool:
    """Whether an instance is an image of its own, that lies nowhere in the patient: an X-ray, a photograph."""
    known = header.get("SOPClassUID") in PICTURE_CLASSES and header.get("SOPInstanceUID")
    return bool(known) and not header.get("ImagePositionPatient")


def _series(
    uid: str,
    members: Sequence[tuple[Path, pydicom.Dataset]],
    patient: str,
    broken: Iterable[_Owner],
    picture: str = "",
) -> Series:
    header = members[0][1]
    references = header.get("ReferencedSeriesSequence") or []
    instances = (item for reference in references for item in reference.get("ReferencedInstanceSequence") or [])
    return Series(
        uid=uid,
        files=tuple(path for path, _ in members),
        patient=patient,
        is_segmentation=header.get("SOPClassUID") in SEGMENTATION_CLASSES,
        frame_of_reference=str(header.get("FrameOfReferenceUID", "") or ""),
        voxels=sum(_voxels(h) for _, h in members),
        picture=picture,
        referenced_series=tuple(str(item.get("SeriesInstanceUID", "")) for item in references),
        referenced_instances=frozenset(str(item.get("ReferencedSOPInstanceUID", "")) for item in instances),
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


def images_of(segmentation: Series, images: Iterable[Series]) -> tuple[Series, ...]:
    """Return the volume, or the pictures, that a segmentation belongs to; none where they are missing or ambiguous.

    Referenced Series Sequence (0008,1115) decides; without a match, the only volume of the same patient in the same
    frame of reference.
    """
    images = tuple(images)
    named = [series for series in images if series.uid in segmentation.referenced_series]
    if pictures := tuple(series for series in named if series.picture in segmentation.referenced_instances):
        return pictures
    if named:
        return (named[0],) if len(named) == 1 or not named[0].picture else ()
    frame = segmentation.frame_of_reference
    near = [s for s in images if frame and s.frame_of_reference == frame and s.patient == segmentation.patient]
    return tuple(near) if len(near) == 1 else ()
