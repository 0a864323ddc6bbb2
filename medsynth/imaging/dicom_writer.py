"""DICOM image series and segmentations, written from arrays: marked synthetic, or plain for the phantom hospital.

Images are single-frame MR or CT Image Storage, or Secondary Capture for photographs and anything without a geometry
(PS3.3 A.4, A.3, A.8); labels are BINARY Segmentations (PS3.3 A.51). What is marked synthetic carries only public
constants and fresh identifiers in its header, as PS3.3 C.12.1 (Synthetic Data, Contributing Equipment) and C.7.1.1
(Patient Identity Removed) describe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
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
GREY_LEVELS = 1000
"""Released grey images hold 0 to 1000 for the range -1 to 1, and their window shows all of it."""
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


def write_segmentation(
    path: Path,
    label: npt.NDArray[np.integer],
    series: Sequence[Dataset],
    names: Mapping[int, str],
    *,
    uids: UidSource = fresh_uid,
) -> Dataset:
    """Write a label map as one BINARY Segmentation that references its image series.

    Args:
        path: the file.
        label: (X, Y, Z) or (X, Y) label values, on the voxels of the image that :func:`write_series` wrote.
        series: what :func:`write_series` returned.
        names: label value to name; 0 may be named and is not written.
        uids: where UIDs come from.

    Raises:
        InputError: unnamed label values, a shape unlike the series, or label values with gaps.
    """
    values = sorted(value for value in names if value != 0)
    if values != list(range(1, len(values) + 1)):
        raise InputError(f"segments must be numbered 1, 2, ... without gaps, not {values}")
    unknown = sorted({int(value) for value in np.unique(label)} - {0, *values})
    if unknown:
        raise InputError(f"label values {unknown} have no name")
    frames = np.moveaxis(np.atleast_3d(label), (0, 1, 2), (2, 1, 0)).astype(np.uint8)
    if frames.shape != (len(series), series[0].Rows, series[0].Columns):
        raise InputError(f"label of shape {label.shape} does not lie on the voxels of its image series")
    dataset = _segmentation(frames, series, [names[value] for value in values], uids)
    _finish_segmentation(dataset, series[0], uids)
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset.save_as(path, enforce_file_format=True)
    return dataset


def write_pair_dicom(
    folder: Path,
    image: npt.NDArray[np.floating],
    label: npt.NDArray[np.integer],
    spacing_mm: tuple[float, ...] | None,
    labels: Mapping[int, str],
    patient_id: str,
    modality: str,
    certified: bool = True,
) -> None:
    """Write one synthetic pair to ``folder/<patient_id>/image/*.dcm`` and ``folder/<patient_id>/seg.dcm``.

    Args:
        folder: the release's DICOM folder.
        image: (channel, *spatial) in [-1, 1], one or three channels, axes RAS+.
        label: (*spatial) label values.
        spacing_mm: voxel size an axis; None: a photograph without geometry.
        labels: label value to name.
        patient_id: synthetic identifier.
        modality: MR, CT, ES, US or OT.
        certified: whether the header may say that no single patient stands behind the image.

    Raises:
        InputError: shapes that do not fit each other, or a colour volume.
    """
    if image.shape[1:] != label.shape:
        raise InputError(f"image of shape {image.shape} and label of shape {label.shape} do not fit each other")
    if len(image) == 3 and label.ndim != 2:
        raise InputError("colour volumes cannot be written as DICOM: use 2D or one channel")
    if spacing_mm is None and label.ndim != 2:
        raise InputError("a volume needs spacing_mm to be written as DICOM")
    voxels, affine = _quantised(image), None
    if spacing_mm is not None:
        # Columns run to the patient's left and rows to the back, as every viewer expects.
        affine = _centred_affine(label.shape, spacing_mm) @ np.diag([-1.0, -1.0, 1.0, 1.0])
        affine[:3, 3] *= np.array([-1, -1, 1])
        voxels, label = voxels[::-1, ::-1], label[::-1, ::-1]
    meta = SeriesMeta(
        modality,
        patient_id,
        f"Synthetic^{patient_id}",
        method=DEIDENTIFICATION_METHOD if certified else UNCERTIFIED_METHOD,
        colour=len(image) == 3,
        window=None if len(image) == 3 else (GREY_LEVELS // 2, GREY_LEVELS),
        description="Synthetic",
    )
    series = write_series(folder / patient_id / "image", voxels, affine, meta)
    write_segmentation(folder / patient_id / "seg.dcm", label, series, labels)


def _quantised(image: npt.NDArray[np.floating]) -> npt.NDArray[Any]:
    unit = np.clip((image.astype(np.float64) + 1) / 2, 0, 1)
    if len(image) == 3:
        return np.moveaxis(np.rint(unit * 255), 0, -1).astype(np.uint8)
    return np.rint(unit[0] * GREY_LEVELS).astype(np.uint16)


def _centred_affine(shape: tuple[int, ...], spacing_mm: tuple[float, ...]) -> npt.NDArray[np.float64]:
    """Return the RAS+ affine with the volume's centre at 0; a 2D image gets a slice 1 mm thick."""
    spacing = np.array([*spacing_mm, 1.0][:3])
    size = np.array([*shape, 1][:3])
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -spacing * (size - 1) / 2
    return affine


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


def _segmentation(
    frames: npt.NDArray[np.uint8], series: Sequence[Dataset], names: Sequence[str], uids: UidSource
) -> Dataset:
    import highdicom
    from pydicom.sr.codedict import codes

    synthetic = series[0].get("SyntheticData") == "YES"
    algorithm = highdicom.AlgorithmIdentificationSequence(
        "medsynth", codes.DCM.ArtificialIntelligence, __version__, source="medsynth"
    )
    descriptions = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:64],
            segmented_property_category=codes.SCT.AnatomicalStructure,
            segmented_property_type=codes.SCT.AnatomicalStructure,
            algorithm_type="AUTOMATIC" if synthetic else "MANUAL",
            algorithm_identification=algorithm if synthetic else None,
        )
        for number, name in enumerate(names, start=1)
    ]
    return highdicom.seg.Segmentation(
        source_images=list(series),
        pixel_array=frames,
        segmentation_type="BINARY",
        segment_descriptions=descriptions,
        series_instance_uid=uids(),
        series_number=int(series[0].SeriesNumber) + 100,
        sop_instance_uid=uids(),
        instance_number=1,
        manufacturer=str(series[0].Manufacturer),
        manufacturer_model_name=str(series[0].ManufacturerModelName),
        software_versions=__version__,
        device_serial_number="1",
        content_label="SEGMENTATION",
        content_creator_name=None,
        series_description="Segmentation",
    )


def _finish_segmentation(dataset: Dataset, image: Dataset, uids: UidSource) -> None:
    """Replace what highdicom filled in from the clock, and mark the object as its image is marked."""
    dataset.SpecificCharacterSet = "ISO_IR 192"
    dataset.ContentDate, dataset.ContentTime = image.ContentDate, image.ContentTime
    for keyword in ("InstanceCreationDate", "InstanceCreationTime", "SeriesDate", "SeriesTime"):
        if keyword in dataset:
            delattr(dataset, keyword)
    organisation = uids()
    for item in dataset.get("DimensionOrganizationSequence", []):
        item.DimensionOrganizationUID = organisation
    for item in dataset.get("DimensionIndexSequence", []):
        item.DimensionOrganizationUID = organisation
    if "FrameOfReferenceUID" not in image:
        dataset.PatientOrientation = ""
    if image.get("SyntheticData") == "YES":
        mark_synthetic(dataset, image.DeidentificationMethod)
