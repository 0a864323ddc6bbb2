"""Which DICOM series lie below a folder, by their headers alone, and which images a segmentation belongs to."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pydicom
from pydicom.errors import InvalidDicomError
from pydicom.filereader import read_partial
from pydicom.tag import BaseTag
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
)

from medsynth.imaging.refusal import CaseRefused
from medsynth.imaging.tree import files_below

SEGMENTATION_CLASSES = frozenset({"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"})
"""Segmentation Storage and Label Map Segmentation Storage, PS3.4 B.5."""
_STORAGE = "1.2.840.10008.5.1.4.1.1."
PICTURE_CLASSES = frozenset(
    f"{_STORAGE}{number}"
    for number in (
        "1",  # Computed Radiography
        "1.1",  # Digital X-Ray, for presentation and for processing; so the next four
        "1.1.1",
        "1.2",  # Digital Mammography
        "1.2.1",
        "1.3",  # Digital Intra-Oral X-Ray
        "1.3.1",
        "3",  # Ultrasound Multi-frame (stills come in it, too), retired and not
        "3.1",
        "6",  # Ultrasound, retired and not
        "6.1",
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
"""Images that lie nowhere in the patient (PS3.4 B.5): each instance is a picture of its own, as viewers show it."""
CAPTURE_CLASSES = frozenset(f"{_STORAGE}{number}" for number in ("7", "7.1", "7.2", "7.3", "7.4"))
"""Secondary Capture, which is a picture unless it has a position."""
SUFFIXES = frozenset({".dcm", ".dicom", ".ima"})
_EXTENT = ("Rows", "Columns", "NumberOfFrames", "SamplesPerPixel")
_FRAME_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_HEADER_TAGS = [
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "PatientID",
    "FrameOfReferenceUID",
    "ImagePositionPatient",
    "PhotometricInterpretation",
    "ReferencedSeriesSequence",
    "SyntheticData",
    *_FRAME_GROUPS,
    *_EXTENT,
]
_PREAMBLE, _MAGIC = 128, b"DICM"  # PS3.10 section 7.1
_PATIENT_ID = 0x00100020
_SERIES_INSTANCE_UID = 0x0020000E


@dataclass(frozen=True)
class Series:
    """The files of one Series Instance UID (0020,000E), sorted by path; of pictures and segmentations, one of them.

    Attributes:
        files: the instances.
        patient: Patient ID (0010,0020), "" where absent.
        frame_of_reference: Frame of Reference UID, "" where absent.
        voxels: what the pixels unfold to by their headers, voxels times channels.
        picture: SOP Instance UID of the only file, where it lies nowhere in the patient (:data:`PICTURE_CLASSES`).
        disputed: another file with other bytes says that it is this picture.
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
    disputed: bool = False
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


@dataclass(frozen=True)
class _Header:
    """What discovery needs of one file; an empty ``series`` says that it is no DICOM image."""

    series: str = ""
    sop_class: str = ""
    instance: str = ""
    patient: str = ""
    frame_of_reference: str = ""
    placed: bool = False
    voxels: int = 0
    synthetic: bool = False
    referenced_series: tuple[str, ...] = ()
    referenced_instances: frozenset[str] = frozenset()

    @property
    def picture(self) -> str:
        """SOP Instance UID of an image that lies nowhere in the patient, "" for all others."""
        return self.instance if _is_picture(self.sop_class, self.placed) else ""


def find_series(folder: Path) -> Findings:
    """Read the headers of all files below ``folder`` and group them by Series Instance UID.

    Files that are no DICOM (and do not claim to be by their name), directories and objects without pixels are passed
    over.
    """
    groups: dict[str, list[tuple[Path, _Header]]] = defaultdict(list)
    unreadable: list[Path] = []
    closed: list[Path] = []
    for path in sorted(p for p in files_below(folder, closed) if not p.name.startswith(".")):
        header = _read_header(path)
        if header is None:
            unreadable.append(path)
        elif header.series:
            groups[header.series].append((path, header))
    broken = {_owner(path) for path in unreadable}
    series = [part for _, members in sorted(groups.items()) for part in _parts(members, broken)]
    return Findings(
        images=tuple(_each_once([s for s in series if not s.is_segmentation])),
        segmentations=tuple(s for s in series if s.is_segmentation),
        unreadable=tuple(unreadable),
        closed=tuple(sorted(closed)),
    )


def _read_header(path: Path) -> _Header | None:
    """Return the header, an empty one for a file that is no DICOM image, or None for one that is broken."""
    try:
        return _header(read_instance(path, stop_before_pixels=True, specific_tags=list(_HEADER_TAGS)))
    except InvalidDicomError:
        return None if path.suffix.lower() in SUFFIXES else _Header()
    except Exception:  # a damaged header makes pydicom raise nearly anything, some of it when a value is looked at
        return None


def read_instance(path: Path, **how: Any) -> pydicom.Dataset:
    """Read an instance, as :func:`pydicom.dcmread` does; also one without preamble and meta information.

    Raises:
        InvalidDicomError: it is no DICOM, or names no series.
        CaseRefused: its pixels are compressed, and it does not say how.
    """
    try:
        return pydicom.dcmread(path, **how)
    except InvalidDicomError:
        if not _owner(path).uid:
            raise
    dataset = pydicom.dcmread(path, force=True, **how)
    if "TransferSyntaxUID" in dataset.file_meta:
        return dataset
    if "PixelData" in dataset and dataset["PixelData"].is_undefined_length:
        raise CaseRefused("no_decoder")
    implicit, little = dataset.original_encoding
    plain = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else plain
    return dataset


def _header(dataset: pydicom.Dataset) -> _Header | None:
    if dataset.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
        return _Header()
    sop_class, series = str(dataset.get("SOPClassUID", "")), str(dataset.get("SeriesInstanceUID") or "")
    if not series or ("Rows" not in dataset and _promises_pixels(sop_class)):
        return None
    if "Rows" not in dataset or not (_promises_pixels(sop_class) or _is_unknown(sop_class)):
        return _Header()
    references = list(dataset.get("ReferencedSeriesSequence") or [])
    instances = [item for reference in references for item in reference.get("ReferencedInstanceSequence") or []]
    found = _Header(
        series=series,
        sop_class=sop_class,
        instance=str(dataset.get("SOPInstanceUID") or ""),
        patient=patient_of(dataset),
        frame_of_reference=str(dataset.get("FrameOfReferenceUID", "") or ""),
        placed=_placed(dataset),
        voxels=_voxels(dataset),
        synthetic=str(dataset.get("SyntheticData") or "").upper() == "YES",
        referenced_series=tuple(str(item.get("SeriesInstanceUID") or "") for item in references),
        referenced_instances=frozenset(str(item.get("ReferencedSOPInstanceUID") or "") for item in instances) - {""},
    )
    return found if found.instance or not _is_picture(sop_class, found.placed) else None


def _promises_pixels(sop_class: str) -> bool:
    name = UID(sop_class).name  # "Enhanced US Volume Storage" is the only image whose class is not called one
    return sop_class in SEGMENTATION_CLASSES or "Image Storage" in name or name.endswith("Volume Storage")


def _is_unknown(sop_class: str) -> bool:
    """Whether nobody knows what an object is: a dose or a map of parameters has pixels, too, and is no image."""
    return not sop_class or UID(sop_class).name == sop_class


def _owner(path: Path) -> _Owner:
    """Read patient and series from what is left of a header; elements come in the order of their tags (PS3.5 7.1)."""
    last = 0

    def past_series(tag: BaseTag, vr: str | None, length: int) -> bool:
        nonlocal last
        last = max(last, int(tag))
        return last > _SERIES_INSTANCE_UID

    try:
        with path.open("rb") as handle:
            start = handle.read(_PREAMBLE + len(_MAGIC))
            if start.startswith(bytes(4)) and not start.endswith(_MAGIC):
                return _Owner()  # zeros are no header, and pydicom would read them to the end as empty elements
            handle.seek(0)
            header = read_partial(handle, stop_when=past_series, force=True)
        # The last element may be cut short, and a part of an identifier can be somebody else's.
        patient = patient_of(header) if last > _PATIENT_ID else ""
        return _Owner(patient, str(header.get("SeriesInstanceUID") or "") if last > _SERIES_INSTANCE_UID else "")
    except Exception:  # a damaged header makes pydicom raise nearly anything
        return _Owner()


def _parts(members: Sequence[tuple[Path, _Header]], broken: Iterable[_Owner]) -> Iterable[Series]:
    """Return what one Series Instance UID holds: each picture and segmentation by itself, the rest as one volume."""
    volume = []
    for path, header in members:
        if header.sop_class in SEGMENTATION_CLASSES or header.picture:
            yield _series([(path, header)], broken)
        else:
            volume.append((path, header))
    if volume:
        yield _series(list(_without_copies(volume)), broken)


def _without_copies(members: Sequence[tuple[Path, _Header]]) -> Iterator[tuple[Path, _Header]]:
    """Yield the files of a volume, one that came twice once."""
    copies: dict[tuple[str, str], list[Path]] = defaultdict(list)
    for path, header in members:
        copies[header.instance, header.patient].append(path)
    for path, header in members:
        first = copies[header.instance, header.patient][0]
        if path == first or not header.instance or _digest(path) != _digest(first):
            yield path, header


def _series(members: Sequence[tuple[Path, _Header]], broken: Iterable[_Owner]) -> Series:
    """Return files as one series; two patients in it are nobody's."""
    first = members[0][1]
    patients = {header.patient for _, header in members}
    patient = patients.pop() if len(patients) == 1 else ""
    return Series(
        uid=first.series,
        files=tuple(path for path, _ in members),
        patient=patient,
        is_segmentation=first.sop_class in SEGMENTATION_CLASSES,
        frame_of_reference=first.frame_of_reference,
        voxels=sum(header.voxels for _, header in members),
        picture=first.picture,
        referenced_series=first.referenced_series,
        referenced_instances=first.referenced_instances,
        synthetic=any(header.synthetic for _, header in members),
        suspect=any(owner.owns(first.series, patient) for owner in broken),
    )


def _each_once(images: Sequence[Series]) -> Iterator[Series]:
    """Yield the images: a picture that came twice once, one that different files claim to be as disputed.

    Only among a patient's own: what another patient's files say must not decide about them.
    """
    copies: dict[tuple[str, str], list[Series]] = defaultdict(list)
    for series in images:
        copies[series.picture, series.patient].append(series)
    for series in images:
        same = copies[series.picture, series.patient] if series.picture else [series]
        if len(same) == 1:
            yield series
        elif len({_digest(one.files[0]) for one in same}) > 1:
            yield replace(series, disputed=True)
        elif series is same[0]:
            yield series


def _digest(path: Path) -> bytes:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").digest()


def is_picture(dataset: pydicom.Dataset) -> bool:
    """Whether an instance is an image of its own, that lies nowhere in the patient: an X-ray, a photograph."""
    return _is_picture(str(dataset.get("SOPClassUID", "")), _placed(dataset))


def _placed(dataset: pydicom.Dataset) -> bool:
    """Whether an instance, or a frame of it, says where it lies in the patient."""
    groups = [group for keyword in _FRAME_GROUPS for group in dataset.get(keyword) or []]
    return bool(dataset.get("ImagePositionPatient")) or any("PlanePositionSequence" in group for group in groups)


def _is_picture(sop_class: str, placed: bool) -> bool:
    return sop_class in PICTURE_CLASSES or (sop_class in CAPTURE_CLASSES and not placed)


def _voxels(header: pydicom.Dataset) -> int:
    try:
        colours = 3 if header.get("PhotometricInterpretation") == "PALETTE COLOR" else 1
        return colours * math.prod(int(header.get(keyword) or 1) for keyword in _EXTENT)
    except Exception:  # as above; what is no number now will be none for the reader, which refuses it
        return 0


def patient_of(header: pydicom.Dataset) -> str:
    """Return the person: Patient ID (0010,0020); "" where absent.

    Whatever its issuer: often only some files of a person name one. Two people with one identifier count as one, which
    protects both.
    """
    return str(header.get("PatientID") or "").strip()


def images_of(segmentation: Series, images: Iterable[Series]) -> tuple[Series, ...]:
    """Return the volumes, or the pictures, that a segmentation belongs to, among those of its own patient.

    Referenced Series Sequence (0008,1115) decides: the volumes that it names in its own frame of reference, else the
    pictures. Without a match, the only volume in the same frame of reference. What another patient's files say must not
    decide.

    Raises:
        CaseRefused: there is none, it is ambiguous, another patient's is named, or it lies in another frame of
            reference.
    """
    images, frame = tuple(images), segmentation.frame_of_reference
    own = [series for series in images if series.patient == segmentation.patient]
    named = [series for series in own if series.uid in segmentation.referenced_series]
    if volumes := [series for series in named if not series.picture]:
        if near := [s for s in volumes if not (frame and s.frame_of_reference) or s.frame_of_reference == frame]:
            return tuple(near)
        raise CaseRefused("geometry_mismatch")
    if pictures := [series for series in own if series.picture in segmentation.referenced_instances]:
        return tuple(pictures)
    if named and segmentation.referenced_instances:
        raise CaseRefused("no_image")
    if len(found := named or [s for s in own if frame and s.frame_of_reference == frame]) == 1:
        return tuple(found)
    others = any(series.uid in segmentation.referenced_series for series in images if series not in own)
    raise CaseRefused("patient_mismatch" if others and not named else "no_image")
