"""DICOM image series, written from arrays: marked synthetic, or plain for the phantom hospital.

Images are single-frame MR or CT Image Storage, or Secondary Capture for photographs and anything without a geometry
(PS3.3 A.4, A.3, A.8). What is marked synthetic carries only public constants and fresh identifiers in its header, as
PS3.3 C.12.1 (Synthetic Data, Contributing Equipment) and C.7.1.1 (Patient Identity Removed) describe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid
from pydicom.valuerep import format_number_as_ds

from medsynth import __version__
from medsynth.errors import InputError

UidSource = Callable[[], str]

MR_STORAGE = "1.2.840.10008.5.1.4.1.1.4"
CT_STORAGE = "1.2.840.10008.5.1.4.1.1.2"
SECONDARY_CAPTURE_STORAGE = "1.2.840.10008.5.1.4.1.1.7"
PUBLIC_DATE = "20000101"
"""Stands where the standard demands a date: the same for every synthetic object."""
PUBLIC_TIME = "000000"
SYNTHESIZING_EQUIPMENT = ("109100", "DCM", "Synthesizing Equipment")
DEIDENTIFICATION_METHOD = "Synthetic data: not derived from one patient"
UNCERTIFIED_METHOD = "Synthetic data without privacy promise: may resemble patients"
"""Stands for :data:`DEIDENTIFICATION_METHOD` where no certificate bounds what was learnt from one patient."""
# A slice axis further off the plane's normal than this (sine of the angle) cannot be written as parallel slices.
_SHEAR_TOLERANCE = 1e-3
_IMPLEMENTATION_UID = UID("2.25.163515029032595267068457056412078418081")


def fresh_uid() -> str:
    """Return a UID from the operating system's entropy (PS3.5 B.2, UUID derived)."""
    return str(generate_uid(prefix=None))


def seeded_uids(name: str) -> UidSource:
    """Return a source of UIDs that repeats itself for the same ``name``: for phantoms, never for a release."""
    count = 0

    def following() -> str:
        nonlocal count
        count += 1
        return f"2.25.{int.from_bytes(hashlib.sha256(f'{name}/{count}'.encode()).digest()[:16], 'big')}"

    return following


@dataclass(frozen=True)
class SeriesMeta:
    """What the header of a series says besides the pixels.

    ``synthetic`` objects carry no date, institution, sex or birth date, whatever the fields say.
    """

    modality: str
    patient_id: str
    patient_name: str
    synthetic: bool = True
    method: str = DEIDENTIFICATION_METHOD
    colour: bool = False
    window: tuple[int, int] | None = None  # centre and width in stored values, PS3.3 C.11.2.1.2
    description: str = ""
    series_number: int = 1
    study_uid: str | None = None
    study_date: str = ""
    study_time: str = ""
    birth_date: str = ""
    sex: str = ""
    institution: str = ""
    manufacturer: str = "medsynth"
    model: str = "medsynth"
    uids: UidSource = fresh_uid


def write_series(
    folder: Path, image: npt.NDArray[Any], affine_ras: npt.NDArray[np.floating] | None, meta: SeriesMeta
) -> list[Dataset]:
    """Write an image as one file a slice, ``00001.dcm`` onwards.

    Args:
        folder: made if missing.
        image: (X, Y, Z) or (X, Y) grey, (X, Y, 3) with ``meta.colour``; uint8, uint16 or int16; the first axis becomes
            the columns, the second the rows, the third the slices.
        affine_ras: 4 x 4 from voxel indices to RAS+ mm; None: no geometry, a Secondary Capture of one frame.
        meta: the rest of the header.

    Returns:
        the data sets in the order of the slices.

    Raises:
        InputError: shape, type or affine cannot be written.
    """
    planes = _planes(image, meta.colour)
    if affine_ras is None and len(planes) > 1:
        raise InputError(f"{len(planes)} slices without an affine: a geometry is needed to order them")
    geometry = [None] * len(planes) if affine_ras is None else list(_plane_geometry(affine_ras, len(planes)))
    frame_uid = None if affine_ras is None else meta.uids()
    common = _common(meta, meta.study_uid or meta.uids(), meta.uids(), frame_uid)
    folder.mkdir(parents=True, exist_ok=True)
    series = []
    for number, (plane, where) in enumerate(zip(planes, geometry, strict=True), start=1):
        dataset = _instance(common, meta, number, where)
        _set_pixels(dataset, plane)
        _save(dataset, folder / f"{number:05d}.dcm")
        series.append(dataset)
    return series


def _planes(image: npt.NDArray[Any], colour: bool) -> list[npt.NDArray[Any]]:
    """Split an image into (rows, columns[, 3]) planes."""
    if image.dtype not in (np.dtype(np.uint8), np.dtype(np.uint16), np.dtype(np.int16)):
        raise InputError(f"pixels of type {image.dtype} cannot be written: use uint8, uint16 or int16")
    if colour:
        if image.ndim != 3 or image.shape[-1] != 3 or image.dtype != np.uint8:
            raise InputError(f"colour needs uint8 of shape (X, Y, 3), not {image.dtype} of {image.shape}")
        return [np.swapaxes(image, 0, 1)]
    if image.ndim not in (2, 3):
        raise InputError(f"an image of shape {image.shape} is neither (X, Y) nor (X, Y, Z)")
    return [plane.T for plane in np.moveaxis(np.atleast_3d(image), 2, 0)]


def _plane_geometry(affine_ras: npt.NDArray[np.floating], slices: int) -> Iterator[Dataset]:
    """Yield the Image Plane attributes of each slice (PS3.3 C.7.6.2), in LPS mm."""
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ np.asarray(affine_ras, np.float64)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if affine.shape != (4, 4) or not np.isfinite(affine).all() or (spacing <= 0).any():
        raise InputError("the affine is not a finite, invertible 4 x 4 matrix")
    across, down, through = (affine[:3, :3] / spacing).T
    shears = (abs(across @ down), float(np.linalg.norm(np.cross(np.cross(across, down), through))))
    if max(shears) > _SHEAR_TOLERANCE:
        raise InputError("the affine is sheared: DICOM planes need perpendicular axes, resample the image first")
    for index in range(slices):
        plane = Dataset()
        plane.ImagePositionPatient = _decimal(affine[:3, 2] * index + affine[:3, 3])
        plane.ImageOrientationPatient = _decimal([*across, *down])
        plane.PixelSpacing = _decimal([spacing[1], spacing[0]])
        plane.SliceThickness = _decimal([spacing[2]])[0]
        yield plane


def _decimal(values: Any) -> list[str]:
    # + 0.0 turns -0.0 into 0.0, which some readers print with its sign.
    return [format_number_as_ds(float(value) + 0.0) for value in values]


def _common(meta: SeriesMeta, study_uid: str, series_uid: str, frame_uid: str | None) -> Dataset:
    """Build what all instances of a series share: patient, study, series and equipment modules."""
    plain = not meta.synthetic
    dataset = Dataset()
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.PatientName, dataset.PatientID = meta.patient_name, meta.patient_id
    dataset.PatientBirthDate, dataset.PatientSex = (meta.birth_date, meta.sex) if plain else ("", "")
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID = study_uid, series_uid
    dataset.StudyDate, dataset.StudyTime = (meta.study_date, meta.study_time) if plain else ("", "")
    dataset.StudyID, dataset.AccessionNumber, dataset.ReferringPhysicianName = "1", "", ""
    dataset.Modality, dataset.SeriesNumber = meta.modality, meta.series_number
    dataset.SeriesDescription, dataset.Laterality = meta.description, ""
    dataset.Manufacturer, dataset.ManufacturerModelName = meta.manufacturer, meta.model
    dataset.SoftwareVersions = __version__
    if plain and meta.institution:
        dataset.InstitutionName = meta.institution
    if frame_uid is not None:
        dataset.FrameOfReferenceUID, dataset.PositionReferenceIndicator = frame_uid, ""
    if meta.synthetic:
        mark_synthetic(dataset, meta.method)
    return dataset


def mark_synthetic(dataset: Dataset, method: str) -> None:
    """Set the attributes that say that an object is synthetic, and by what ``method`` (see the module's text)."""
    from highdicom import ContributingEquipment
    from highdicom.sr import CodedConcept

    dataset.SyntheticData = "YES"
    dataset.PatientIdentityRemoved = "YES"
    dataset.DeidentificationMethod = method
    dataset.BurnedInAnnotation = "NO"
    equipment = ContributingEquipment(
        "medsynth",
        CodedConcept(*SYNTHESIZING_EQUIPMENT),
        manufacturer_model_name="medsynth",
        software_versions=__version__,
    )
    dataset.ContributingEquipmentSequence = [equipment]


def _instance(common: Dataset, meta: SeriesMeta, number: int, geometry: Dataset | None) -> Dataset:
    """Build the header of one slice."""
    dataset = Dataset()
    dataset.update(common)
    storage = {"MR": MR_STORAGE, "CT": CT_STORAGE}.get(meta.modality, SECONDARY_CAPTURE_STORAGE)
    if geometry is None or meta.colour:
        storage = SECONDARY_CAPTURE_STORAGE
    dataset.SOPClassUID, dataset.SOPInstanceUID = storage, meta.uids()
    dataset.InstanceNumber = number
    dataset.ContentDate = PUBLIC_DATE if meta.synthetic else meta.study_date
    dataset.ContentTime = PUBLIC_TIME if meta.synthetic else meta.study_time
    origin = ["DERIVED", "SECONDARY"] if meta.synthetic else ["ORIGINAL", "PRIMARY"]
    if storage == MR_STORAGE:
        dataset.ImageType = [*origin, "OTHER"]
        dataset.ScanningSequence, dataset.SequenceVariant, dataset.ScanOptions = "GR", "NONE", ""
        dataset.MRAcquisitionType = "3D"
        dataset.RepetitionTime = dataset.EchoTime = dataset.EchoTrainLength = None
    elif storage == CT_STORAGE:
        dataset.ImageType = [*origin, "AXIAL"]
        dataset.KVP, dataset.AcquisitionNumber = None, None
        dataset.RescaleIntercept, dataset.RescaleSlope, dataset.RescaleType = "0", "1", "US"
    else:
        dataset.ImageType, dataset.ConversionType = origin, "SYN" if meta.synthetic else "WSD"
        dataset.PatientOrientation = ""
    if meta.window is not None:
        dataset.WindowCenter, dataset.WindowWidth = meta.window
    if geometry is not None:
        dataset.PatientPosition = "HFS"
        dataset.update(geometry)
    return dataset


def _set_pixels(dataset: Dataset, plane: npt.NDArray[Any]) -> None:
    bits = plane.dtype.itemsize * 8
    dataset.Rows, dataset.Columns = plane.shape[:2]
    dataset.SamplesPerPixel = 3 if plane.ndim == 3 else 1
    dataset.PhotometricInterpretation = "RGB" if plane.ndim == 3 else "MONOCHROME2"
    if plane.ndim == 3:
        dataset.PlanarConfiguration = 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(plane.dtype.kind == "i")
    raw = np.ascontiguousarray(plane, plane.dtype.newbyteorder("<")).tobytes()
    dataset.add_new(0x7FE00010, "OW" if bits > 8 else "OB", raw + b"\0" * (len(raw) % 2))


def _save(dataset: Dataset, path: Path) -> None:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = dataset.SOPClassUID, dataset.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.ImplementationClassUID = _IMPLEMENTATION_UID
    dataset.file_meta = meta
    dataset.save_as(path, enforce_file_format=True)
