"""Label maps as BINARY DICOM Segmentations (PS3.3 A.51) beside their image series, marked as the series is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset

from medsynth import __version__
from medsynth.errors import InputError
from medsynth.imaging.dicom_writer import UidSource, fresh_uid, mark_synthetic


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
