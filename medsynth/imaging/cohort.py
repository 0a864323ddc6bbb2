"""Patients and pairs on the study's grid, as NIfTI on disk.

Layout of an array in a file: 3D (X, Y, Z), 2D (X, Y, record); colour adds a last axis of 3. Labels are the same
without colour. These files are our own, so that plain nibabel reads them; the hospital's go through MONAI.
"""

from __future__ import annotations

import csv
import gzip
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from medsynth.config import Grid
from medsynth.errors import InputError, StoreError
from medsynth.files import replace_bytes

CASES_FILE = "cases.csv"
CASE_COLUMNS = ("case_id", "patient_id", "split", "source", "records", "labelled", "content")
DRAWN = "drawn"
"""Folder of the label maps that images were rendered for, where networks labelled the pairs anew."""
GREY_LEVELS = 1000
COLOUR_LEVELS = 255
_COMPRESSION = 4  # half the time of gzip's default for 2 % more bytes
_SUFFIX = ".nii.gz"


@dataclass(frozen=True)
class Patient:
    """All records of one person.

    Attributes:
        patient_id: pseudonym.
        images: (record, channel, *spatial) float32 in [-1, 1].
        labels: (record, *spatial) uint8.
    """

    patient_id: str
    images: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class Pair:
    """One synthetic image and its label map, at its own (cropped) size.

    Attributes:
        name: file name without suffix.
        image: (channel, *spatial) float32 in [-1, 1].
        label: (*spatial) uint8.
        drawn: (*spatial) uint8, what the image was rendered for, where networks labelled it anew; None: ``label``.
    """

    name: str
    image: np.ndarray
    label: np.ndarray
    drawn: np.ndarray | None = None


def write_case(cohort: Path, case_id: str, images: torch.Tensor, labels: torch.Tensor, grid: Grid) -> None:
    """Write one case of a cohort.

    Args:
        cohort: the folder; ``images/`` and ``labels/`` are made below it.
        case_id: file name without suffix.
        images: (record, channel, *grid.shape) float32 in [-1, 1]; one record in 3D.
        labels: (record, *grid.shape) uint8.
        grid: spacing and shape.
    """
    array, mask = images.numpy(), labels.numpy()
    if grid.spatial_dims == 2:
        stored, label = np.moveaxis(array, (0, 1), (2, 3)), np.moveaxis(mask, 0, 2)
    else:
        stored, label = np.moveaxis(array[0], 0, 3), mask[0]
    stored = stored if grid.channels > 1 else stored[..., 0]
    _write(cohort / "images" / f"{case_id}{_SUFFIX}", stored.astype(np.float32), grid)
    _write(cohort / "labels" / f"{case_id}{_SUFFIX}", label.astype(np.uint8), grid)


def load_patients(cohort: Path, grid: Grid, split: str, *, labelled_only: bool = True) -> list[Patient]:
    """Read the patients of one split, all cases of a person together, sorted by pseudonym.

    Args:
        cohort: finished cohort folder.
        grid: the grid that the cohort was made on.
        split: ``"train"`` or ``"test"``.
        labelled_only: leave out cases that came without a mask.

    Raises:
        StoreError: the folder is unreadable, or was made on another grid.
    """
    cases: dict[str, list[str]] = {}
    for row in read_cases(cohort):
        if row["split"] == split and (row["labelled"] == "true" or not labelled_only):
            cases.setdefault(row["patient_id"], []).append(row["case_id"])
    return [_patient(cohort, grid, person, sorted(cases[person])) for person in sorted(cases)]


def read_cases(cohort: Path) -> list[dict[str, str]]:
    """Return the rows of ``cases.csv``.

    Raises:
        StoreError: there is none.
    """
    try:
        with (cohort / CASES_FILE).open(newline="", encoding="utf-8") as handle:
            return list(csv.DictReader(handle))
    except OSError:
        raise StoreError("the cohort folder has no readable cases.csv: run ingest again") from None


def _patient(cohort: Path, grid: Grid, person: str, cases: list[str]) -> Patient:
    images, labels = [], []
    for case in cases:
        image = _read(cohort / "images" / f"{case}{_SUFFIX}")
        label = _read(cohort / "labels" / f"{case}{_SUFFIX}")
        image = image[..., None] if grid.channels == 1 else image
        if grid.spatial_dims == 2:
            image, label = np.moveaxis(image, (2, 3), (0, 1)), np.moveaxis(label, 2, 0)
        else:
            image, label = np.moveaxis(image, 3, 0)[None], label[None]
        if label.shape[1:] != grid.shape or image.shape[2:] != grid.shape:
            raise StoreError("the cohort was made on another grid than grid.shape: run ingest again")
        images.append(torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32)))
        labels.append(torch.from_numpy(np.ascontiguousarray(label, dtype=np.uint8)))
    return Patient(person, torch.cat(images), torch.cat(labels))


def write_pair(folder: Path, pair: Pair, grid: Grid) -> None:
    """Write ``folder/images/<name>.nii.gz`` and ``folder/labels/<name>.nii.gz``, each in one step (temp + rename).

    Where networks labelled the image, what it was drawn for goes to ``folder/drawn/<name>.nii.gz``.
    Intensities are stored as int16 from 0 to 1000 (grey) or uint8 from 0 to 255 (colour); the affine is the grid's
    spacing about a centre at 0, RAS+, so that headers carry nothing but public constants.
    """
    unit = (np.clip(pair.image.astype(np.float64), -1, 1) + 1) / 2
    if grid.channels == 1:
        stored = np.rint(unit[0] * GREY_LEVELS).astype(np.int16)
    else:
        stored = np.moveaxis(np.rint(unit * COLOUR_LEVELS).astype(np.uint8), 0, -1)
    flat = grid.spatial_dims == 2
    arrays = {"images": np.expand_dims(stored, 2) if flat else stored}
    for kind, label in (("labels", pair.label), (DRAWN, pair.drawn)):
        if label is not None:
            arrays[kind] = label.astype(np.uint8)[..., None] if flat else label.astype(np.uint8)
    for kind, array in arrays.items():
        _write(folder / kind / f"{pair.name}{_SUFFIX}", array, grid, durable=True)


def read_pairs(folder: Path, labels: str = "labels") -> Iterator[Pair]:
    """Yield the pairs of a folder sorted by name, at their own size.

    Args:
        folder: written by :func:`write_pair`.
        labels: the folder in it that the label maps are taken from.

    Raises:
        StoreError: an image without a label or an unreadable file.
    """
    for path in sorted((folder / "images").glob(f"*{_SUFFIX}")):
        if path.name.startswith("."):
            continue  # a write that was cut off
        stored, label = _read(path), _read(folder / labels / path.name)
        colour = stored.ndim == label.ndim + 1
        if label.shape[-1] == 1:
            stored, label = stored[:, :, 0], label[..., 0]
        image = np.moveaxis(stored, -1, 0) if colour else stored[None]
        levels = COLOUR_LEVELS if colour else GREY_LEVELS
        scaled = (image.astype(np.float32) / levels * 2 - 1).astype(np.float32)
        yield Pair(path.name.removesuffix(_SUFFIX), scaled, np.ascontiguousarray(label, dtype=np.uint8))


def load_pairs(
    folder: Path, grid: Grid, labels: str = "labels", count: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Read pairs of a folder and bring them to the grid by the transforms that patients went through.

    Args:
        folder: written by :func:`write_pair`.
        grid: the study's.
        labels: the folder in it that the label maps are taken from.
        count: how many, the first by name; None: all.

    Returns:
        images (pair, channel, *grid.shape) float32 in [-1, 1] and labels (pair, *grid.shape) uint8, sorted by name.

    Raises:
        InputError: there is no pair.
    """
    from medsynth.imaging.transforms import pair_to_grid

    pairs = itertools.islice(read_pairs(folder, labels), count)
    found = [pair_to_grid(torch.from_numpy(p.image), torch.from_numpy(p.label), grid) for p in pairs]
    if not found:
        raise InputError("no image and label pairs in the folder: run synthesise first")
    return torch.stack([image for image, _ in found]), torch.stack([label for _, label in found])


def _affine(shape: tuple[int, ...], grid: Grid) -> np.ndarray:
    spacing = np.ones(3)
    spacing[: grid.spatial_dims] = grid.spacing_mm or (1.0,) * grid.spatial_dims
    sizes = np.array([*shape[: grid.spatial_dims], 1, 1][:3])
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -spacing * (sizes - 1) / 2
    return affine


def _write(path: Path, array: np.ndarray, grid: Grid, *, durable: bool = False) -> None:
    nifti = nib.Nifti1Image(array, _affine(array.shape, grid))
    nifti.header.set_xyzt_units("mm")
    data = gzip.compress(nifti.to_bytes(), compresslevel=_COMPRESSION, mtime=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(path, data, durable=durable)


def _read(path: Path) -> np.ndarray:
    try:
        nifti = nib.Nifti1Image.from_bytes(gzip.decompress(path.read_bytes()))
        return np.asarray(nifti.dataobj)
    except (OSError, EOFError, ValueError, nib.filebasedimages.ImageFileError) as error:
        raise StoreError("an image or label of the folder cannot be read: run its stage again") from error
