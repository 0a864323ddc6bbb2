"""A phantom hospital: a made-up cohort in DICOM and NIfTI, good and broken cases, to try everything on.

Every patient has an elongated, bent organ of two touching parts beside a bright ventricle, on its own voxel grid of
2 mm. Names and dates in the headers look like those of a hospital, so that tests can look for them downstream.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt

from medsynth.errors import InputError
from medsynth.imaging.dicom_segmentation import write_segmentation
from medsynth.imaging.dicom_writer import SeriesMeta, seeded_uids, write_series
from medsynth.imaging.phantom import Floats, Labels, acquire, paint, smooth_field
from medsynth.randomness import generator

LABELS = {0: "background", 1: "Anterior", 2: "Posterior"}
SPACING_MM = 2.0
SHAPE_RANGE = ((20, 26), (26, 32), (20, 26))
BROKEN = (
    "truncated DICOM",
    "missing slice",
    "NaN voxels",
    "empty mask",
    "image and mask of different shape",
    "constant image",
)
"""What is wrong with each broken patient; they come on top of the good ones."""
FIRST_NAMES = ("Alice", "Bruno", "Chiara", "Dmitri", "Elif", "Farid", "Grete", "Hana", "Ivo", "Jonna", "Kofi", "Lena")
FAMILY_NAME = "Phantom"
INSTITUTION = "Phantom General Hospital"

# Tissue indices behind the labels: white matter, two greys, ventricle, fluid far from the middle.
_MATTER, _GREY, _OTHER, _VENTRICLE, _FLUID = range(3, 8)
_MEANS = np.array([0.0, 0.55, 0.55, 0.34, 0.42, 0.27, 0.85, 0.10])
_SPREADS = np.array([0.0, 0.04, 0.04, 0.03, 0.05, 0.04, 0.03, 0.03])
# Index axes (first, second, slices) of an acquisition: axial, coronal, sagittal.
_PLANES = ((0, 1, 2), (0, 2, 1), (1, 2, 0))


@dataclass(frozen=True)
class Anatomy:
    """One person's organ: lengths in mm, bends in mm at the tips, angles in radians."""

    shape: tuple[int, int, int]
    half_length_mm: float
    radius_mm: float
    taper: float
    bend_mm: tuple[float, float]
    split: float
    angles: tuple[float, float, float]
    wobble: float


def write_hospital(out: Path, patients: int, seed: int) -> None:
    """Write a cohort: half of the patients as DICOM with SEG labels, half as NIfTI in the MSD layout.

    ``out/dicom/<PatientID>/<series>/*.dcm`` holds one or two scans a patient, each with a Segmentation beside it;
    ``out/nifti`` holds ``dataset.json``, ``imagesTr`` and ``labelsTr``. One broken case of each kind in
    :data:`BROKEN` is added, always with a patient of its own.

    Args:
        out: folder to make; must not exist or be empty.
        patients: good patients, at least 2.
        seed: the same seed writes the same voxels.

    Raises:
        InputError: fewer than 2 patients, or a folder that holds something.
    """
    if patients < 2:
        raise InputError(f"{patients} patients asked for: a phantom hospital needs at least 2")
    if out.exists() and any(out.iterdir()):
        raise InputError("the folder for the phantom hospital is not empty: name a new one")
    in_dicom = (patients + 1) // 2
    for index in range(in_dicom):
        _write_dicom_patient(out / "dicom", index, seed, scans=1 + index % 2)
    cases = []
    for index in range(in_dicom, patients):
        image, label = _scan(anatomy_of(seed, index), seed, index, 0)
        cases.append(_write_nifti_case(out / "nifti", f"phantom_{index:03d}", image, label))
    cases += _write_broken(out, patients, seed)
    _write_dataset_json(out / "nifti", cases)


def anatomy_of(seed: int, index: int) -> Anatomy:
    """Draw the organ of patient ``index``."""
    rng = generator(seed, "hospital", "anatomy", index)
    shape = tuple(int(rng.integers(low, high + 1)) for low, high in SHAPE_RANGE)
    half = SPACING_MM * shape[1] / 2
    return Anatomy(
        shape=(shape[0], shape[1], shape[2]),
        half_length_mm=float(rng.uniform(0.62, 0.80) * half),
        radius_mm=float(rng.uniform(7.0, 9.5)),
        taper=float(rng.uniform(0.25, 0.45)),
        bend_mm=(float(rng.uniform(2, 8)), float(rng.uniform(-6, 2))),
        split=float(rng.uniform(-0.1, 0.35)),
        angles=(float(rng.normal(0, 0.15)), float(rng.normal(0, 0.15)), float(rng.normal(0, 0.2))),
        wobble=float(rng.uniform(0.05, 0.15)),
    )


def patient_name(index: int) -> str:
    """Return the name in the headers of patient ``index``: a first name, and a middle initial once they run out."""
    turn, first = divmod(index, len(FIRST_NAMES))
    middle = f"^{chr(ord('A') + turn % 26)}" if turn else ""
    return f"{FAMILY_NAME}^{FIRST_NAMES[first]}{middle}"


def organ(anatomy: Anatomy, rng: np.random.Generator, shift_mm: npt.NDArray[np.floating]) -> tuple[Labels, Floats]:
    """Draw the label map of a person's organ, and the millimetres of every voxel in the organ's own frame.

    Args:
        anatomy: the person.
        rng: the surface's irregularity.
        shift_mm: where the middle of the organ lies off the middle of the volume, RAS.

    Returns:
        labels (X, Y, Z) with 1 in front and 2 behind, and coordinates (3, X, Y, Z): across, along, up.
    """
    axes = [SPACING_MM * (np.arange(size) - (size - 1) / 2) for size in anatomy.shape]
    world = np.stack(np.meshgrid(*axes, indexing="ij")) - shift_mm[:, None, None, None]
    local = np.tensordot(_rotation(anatomy.angles), world, axes=1).astype(np.float32)
    along = local[1] / anatomy.half_length_mm
    across = local[0] - anatomy.bend_mm[0] * (along**2 - 0.4)
    height = local[2] - anatomy.bend_mm[1] * (along**2 - 0.4)
    radius = (
        anatomy.radius_mm * (1 + anatomy.taper * along) * (1 + anatomy.wobble * smooth_field(rng, anatomy.shape, 6))
    )
    profile = np.sqrt(np.clip(1 - along**4, 0, None))
    inside = np.hypot(across, 1.15 * height) < radius * profile
    tilt = along + 0.01 * height - anatomy.split
    label = np.where(inside, np.where(tilt > 0, 1, 2), 0).astype(np.uint8)
    return label, np.stack([across, local[1], height])


def _scan(anatomy: Anatomy, seed: int, patient: int, scan: int) -> tuple[npt.NDArray[np.uint16], Labels]:
    """Return one scan of a person, intensities from 0 to the scanner's own maximum, and its labels."""
    rng = generator(seed, "hospital", "scan", patient, scan)
    label, place = organ(anatomy, generator(seed, "hospital", "surface", patient), rng.uniform(-2, 2, 3))
    tissues = _tissues(label, place, anatomy, generator(seed, "hospital", "tissues", patient))
    means = _MEANS + rng.normal(0, 0.025, len(_MEANS))
    means[2] = means[1] - rng.uniform(0.02, 0.08)
    image = acquire(paint(tissues, means, _SPREADS, rng), rng, noise=float(rng.uniform(0.015, 0.04)), blur_voxels=0.6)
    top = float(np.exp(rng.uniform(np.log(255), np.log(4000))))
    return np.rint(np.clip(image / image.max(), 0, 1) * top).astype(np.uint16), label


def _tissues(label: Labels, place: Floats, anatomy: Anatomy, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Lay matter, ventricle and fluid around the organ."""
    fields = np.stack([smooth_field(rng, label.shape, 6) + bias for bias in (0.6, 0.0, 0.0)])
    tissues = (fields.argmax(axis=0) + _MATTER).astype(np.uint8)
    across, along, height = place
    beside = anatomy.radius_mm * (1.9 + 0.15 * smooth_field(rng, label.shape, 6))
    ventricle = np.hypot((across - beside) / 5, (height - 6) / 8) ** 2 + (along / anatomy.half_length_mm) ** 2 < 1
    tissues[ventricle] = _VENTRICLE
    axes = [np.linspace(-1, 1, size, dtype=np.float32) for size in label.shape]
    off = np.linalg.norm(np.stack(np.meshgrid(*axes, indexing="ij")), axis=0)
    tissues[off > 1.25 + 0.12 * smooth_field(rng, label.shape, 6)] = _FLUID
    return np.where(label > 0, label, tissues).astype(np.uint8)


def _rotation(angles: tuple[float, float, float]) -> npt.NDArray[np.float64]:
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        turn = np.eye(3)
        first, second = [other for other in range(3) if other != axis]
        turn[first, first] = turn[second, second] = np.cos(angle)
        turn[first, second], turn[second, first] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix


def _affine(shape: tuple[int, ...], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    affine = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])
    affine[:3, 3] = np.round(rng.uniform(-20, 20, 3) - SPACING_MM * (np.array(shape) - 1) / 2, 1)
    return affine


def _write_dicom_patient(folder: Path, index: int, seed: int, scans: int) -> Path:
    """Write all scans of a patient; planes and header values differ between patients.

    Returns:
        the folder of the last image series.
    """
    anatomy, patient_id = anatomy_of(seed, index), f"PH{index:05d}"
    rng = generator(seed, "hospital", "header", index)
    uids = seeded_uids(f"medsynth phantom hospital/{seed}/{index}")
    person: dict[str, Any] = {
        "patient_id": patient_id,
        "patient_name": patient_name(index),
        "birth_date": f"{int(rng.integers(1940, 2000))}{int(rng.integers(1, 13)):02d}{int(rng.integers(1, 29)):02d}",
        "sex": str(rng.choice(["F", "M"])),
    }
    series_folder = folder
    for scan in range(scans):
        image, label = _scan(anatomy, seed, index, scan)
        meta = SeriesMeta(
            modality="MR",
            synthetic=False,
            description="T1 3D",
            series_number=scan + 2,
            study_date=f"{2015 + scan}{int(rng.integers(1, 13)):02d}{int(rng.integers(1, 29)):02d}",
            study_time=f"{int(rng.integers(7, 19)):02d}{int(rng.integers(0, 60)):02d}00",
            institution=INSTITUTION,
            manufacturer="Phantom Scanners",
            model="Phantom One",
            uids=uids,
            **person,
        )
        order = list(_PLANES[index % len(_PLANES)])
        affine = _affine(anatomy.shape, rng)
        image, label, affine = _as_acquired(image, label, affine, order)
        series_folder = folder / patient_id / f"scan{scan + 1}-T1"
        series = write_series(series_folder, image, affine, meta)
        write_segmentation(folder / patient_id / f"scan{scan + 1}-labels" / "seg.dcm", label, series, LABELS, uids=uids)
    return series_folder


def _as_acquired(
    image: npt.NDArray[np.uint16], label: Labels, affine: npt.NDArray[np.float64], order: list[int]
) -> tuple[npt.NDArray[np.uint16], Labels, npt.NDArray[np.float64]]:
    """Turn RAS arrays into the order of a scanner: columns to the left or back, rows to the back or feet."""
    turned = affine[:, [*order, 3]].copy()
    flips = []
    for position, axis in enumerate(order):
        flip = (axis, position) in ((0, 0), (1, 1), (2, 1), (1, 0))
        flips.append(slice(None, None, -1 if flip else 1))
        if flip:
            turned[:, 3] += turned[:, position] * (image.shape[axis] - 1)
            turned[:, position] *= -1
    return image.transpose(order)[tuple(flips)], label.transpose(order)[tuple(flips)], turned


def _write_nifti_case(
    folder: Path,
    name: str,
    image: npt.NDArray[Any],
    label: npt.NDArray[np.uint8],
) -> dict[str, str]:
    """Write one MSD case and return its entry for ``dataset.json``."""
    affine = np.diag([SPACING_MM, SPACING_MM, SPACING_MM, 1.0])
    stored = image if image.dtype.kind == "f" else image.astype(np.int16)
    for sub, array in (("imagesTr", stored), ("labelsTr", label)):
        (folder / sub).mkdir(parents=True, exist_ok=True)
        nifti = nib.Nifti1Image(array, affine)
        nifti.header.set_xyzt_units("mm")
        nib.save(nifti, folder / sub / f"{name}.nii.gz")
    return {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}


def _write_dataset_json(folder: Path, cases: list[dict[str, str]]) -> None:
    description = {
        "name": "PhantomHippocampus",
        "description": "Procedural phantoms of a bent organ in two parts: no patient is behind them",
        "reference": "medsynth phantom",
        "licence": "CC0-1.0",
        "release": "1.0",
        "tensorImageSize": "3D",
        "modality": {"0": "MRI"},
        "labels": {str(value): name for value, name in LABELS.items()},
        "numTraining": len(cases),
        "numTest": 0,
        "training": cases,
        "test": [],
    }
    (folder / "dataset.json").write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")


def _write_broken(out: Path, first: int, seed: int) -> list[dict[str, str]]:
    """Write one case of each kind in :data:`BROKEN`; returns the NIfTI ones."""
    truncated = sorted(_write_dicom_patient(out / "dicom", first, seed, scans=1).glob("*.dcm"))
    middle = truncated[len(truncated) // 2]
    middle.write_bytes(middle.read_bytes()[: middle.stat().st_size * 2 // 3])
    gapped = sorted(_write_dicom_patient(out / "dicom", first + 1, seed, scans=1).glob("*.dcm"))
    gapped[len(gapped) // 2].unlink()
    cases = []
    for index, damage in enumerate((_with_nan, _without_mask, _with_cut_mask, _constant), start=first + 2):
        image, label = damage(*_scan(anatomy_of(seed, index), seed, index, 0))
        cases.append(_write_nifti_case(out / "nifti", f"phantom_{index:03d}", image, label))
    return cases


def _with_nan(image: npt.NDArray[Any], label: Labels) -> tuple[npt.NDArray[Any], Labels]:
    spoilt = image.astype(np.float32)
    spoilt[4:8, 4:8, 4:8] = np.nan
    return spoilt, label


def _without_mask(image: npt.NDArray[Any], label: Labels) -> tuple[npt.NDArray[Any], Labels]:
    return image, np.zeros_like(label)


def _with_cut_mask(image: npt.NDArray[Any], label: Labels) -> tuple[npt.NDArray[Any], Labels]:
    return image, label[:, :-2]


def _constant(image: npt.NDArray[Any], label: Labels) -> tuple[npt.NDArray[Any], Labels]:
    return np.full_like(image, 100), label
