"""The files of a release as they leave: NIfTI in the layout of the Medical Segmentation Decathlon, DICOM, PNG.

Every header value comes from the public configuration or is a constant; nothing is copied from an input file but
voxels of synthetic pairs.

Array layout: images ``channel *spatial`` in [-1, 1], labels ``*spatial``; axes RAS+ where the grid has a spacing.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from medsynth.config import Export, Grid
from medsynth.errors import CertificationError

GREY_LEVELS = 1000
"""Grey images are stored as whole numbers 0..1000: finer than any generator is exact, and small when packed."""
_MODALITY_NAMES = {"MR": "MRI", "CT": "CT", "ES": "endoscopy", "US": "ultrasound", "OT": "other"}
_COLOURS = ("red", "green", "blue")
_FASTEST_USEFUL = 6


class Pair(Protocol):
    """A synthetic image with its label map, as stage ``synthesise`` leaves it (no name: pairs are named anew)."""

    @property
    def image(self) -> npt.NDArray[np.float32]:
        """``channel *spatial`` in [-1, 1]."""

    @property
    def label(self) -> npt.NDArray[np.uint8]:
        """``*spatial`` label values."""


def write_payload(folder: Path, pairs: Iterable[Pair], grid: Grid, export: Export, *, certified: bool = False) -> int:
    """Write ``nifti/``, ``dicom/`` and ``png/`` (as ``export.formats`` asks) below ``folder``.

    Args:
        folder: existing folder that receives the formats.
        pairs: synthetic pairs at their native size; renamed ``synthetic_0001``, ``synthetic_0002``, ...
        grid: public spacing, label names and modality.
        export: formats, number of DICOM pairs (all where no other format holds them), names.
        certified: whether a certificate will stand behind the pairs; without one nothing says that no patient is shown.

    Returns:
        number of pairs written.

    Raises:
        CertificationError: there is no pair, or a voxel is not finite.
    """
    flat = grid.spatial_dims == 2
    # The card counts the pairs: one format at least holds all of them.
    elsewhere = "nifti" in export.formats or ("png" in export.formats and flat)
    names: list[str] = []
    for number, pair in enumerate(pairs, start=1):
        name = f"synthetic_{number:04d}"
        _refuse_broken(pair, name)
        if "nifti" in export.formats:
            _write_nifti(folder / "nifti", name, pair, grid)
        if "dicom" in export.formats and (number <= export.dicom_pairs or not elsewhere):
            _write_dicom(folder / "dicom", name, pair, grid, certified)
        if "png" in export.formats and flat:
            _write_png(folder / "png", name, pair, grid)
        names.append(name)
    if not names:
        raise CertificationError("the folder of stage 'synthesise' holds no pair: run it again")
    if "nifti" in export.formats:
        write_json(folder / "nifti" / "dataset.json", msd_dataset(names, grid, export, certified))
    return len(names)


def msd_dataset(names: list[str], grid: Grid, export: Export, certified: bool) -> dict[str, Any]:
    """Return ``dataset.json`` of the Medical Segmentation Decathlon layout (labels map a value to its name)."""
    modality = dict(enumerate(_COLOURS)) if grid.channels == 3 else {0: _MODALITY_NAMES[grid.modality]}
    shown = "no image shows a patient" if certified else "images may resemble patients of the cohort, see UNCERTIFIED"
    return {
        "name": export.dataset_name,
        "description": f"SYNTHETIC images with segmentations, made by medsynth; {shown}. See DATASET_CARD.md",
        "reference": "medsynth",
        "licence": export.licence,
        "release": "1.0",
        "tensorImageSize": "4D" if grid.channels > 1 else "3D",
        "modality": {str(index): name for index, name in modality.items()},
        "labels": {str(value): name for value, name in sorted(grid.labels.items())},
        "numTraining": len(names),
        "numTest": 0,
        "training": [{"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in names],
        "test": [],
    }


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value for people and machines: indented, UTF-8, one line feed at the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _refuse_broken(pair: Pair, name: str) -> None:
    if not np.isfinite(pair.image).all():
        raise CertificationError(f"pair {name} has voxels that are not finite: run stage 'synthesise' again")
    if pair.image.shape[1:] != pair.label.shape:
        raise CertificationError(f"pair {name} has an image and a label of different size")


def _write_nifti(folder: Path, name: str, pair: Pair, grid: Grid) -> None:
    missing_axes = 3 - grid.spatial_dims
    spacing = (*(grid.spacing_mm or (1.0,) * grid.spatial_dims), *(1.0,) * missing_axes)
    label = pair.label.reshape(pair.label.shape + (1,) * missing_axes).astype(np.uint8)
    levels = _levels(pair.image, GREY_LEVELS if grid.channels == 1 else 255)
    image = levels.reshape(levels.shape + (1,) * missing_axes)
    # NIfTI keeps further channels behind the three spatial axes
    image = image[0] if grid.channels == 1 else np.moveaxis(image, 0, -1)
    _save_nifti(folder / "imagesTr" / f"{name}.nii.gz", image.astype(np.int16), spacing)
    _save_nifti(folder / "labelsTr" / f"{name}.nii.gz", label, spacing)


def _save_nifti(path: Path, array: npt.NDArray[Any], spacing_mm: tuple[float, ...]) -> None:
    import nibabel

    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = [-(size - 1) / 2 * step for size, step in zip(array.shape[:3], spacing_mm, strict=True)]
    picture = nibabel.Nifti1Image(array, affine, dtype=array.dtype)
    picture.header.set_xyzt_units("mm", "sec")
    picture.header["descrip"] = b"synthetic (medsynth)"
    path.parent.mkdir(parents=True, exist_ok=True)
    # mtime 0: the same voxels give the same digest, and no date leaves with them
    path.write_bytes(gzip.compress(picture.to_bytes(), _FASTEST_USEFUL, mtime=0))


def _write_dicom(folder: Path, name: str, pair: Pair, grid: Grid, certified: bool) -> None:
    # highdicom is slow to import, and needed for this format only
    from medsynth.imaging.dicom_pair import write_pair_dicom

    write_pair_dicom(
        folder,
        pair.image,
        pair.label,
        spacing_mm=grid.spacing_mm,
        labels=grid.labels,
        patient_id=name,
        modality=grid.modality,
        certified=certified,
    )


def _write_png(folder: Path, name: str, pair: Pair, grid: Grid) -> None:
    from PIL import Image

    # arrays are (x, y), a picture has rows (y) first; anatomy is shown with the patient's left on the right
    facing = slice(None) if grid.spacing_mm is None else slice(None, None, -1)
    image = np.swapaxes(_levels(pair.image, 255)[:, facing, facing], 1, 2).astype(np.uint8)
    label = pair.label[facing, facing].T.astype(np.uint8)
    pixels = image[0] if image.shape[0] == 1 else np.moveaxis(image, 0, -1)
    for kind, array in (("images", pixels), ("labels", label)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(array)).save(folder / kind / f"{name}.png")


def _levels(image: npt.NDArray[np.float32], top: int) -> npt.NDArray[np.float64]:
    return np.round((np.clip(image.astype(np.float64), -1.0, 1.0) + 1.0) / 2.0 * top)
