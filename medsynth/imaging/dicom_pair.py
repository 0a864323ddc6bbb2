"""A synthetic image and its label map as DICOM: quantised, placed around the origin, marked synthetic."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from medsynth.errors import InputError
from medsynth.imaging.dicom_segmentation import write_segmentation
from medsynth.imaging.dicom_writer import DEIDENTIFICATION_METHOD, UNCERTIFIED_METHOD, SeriesMeta, write_series

GREY_LEVELS = 1000
"""Released grey images hold 0 to 1000 for the range -1 to 1, and their window shows all of it."""


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
