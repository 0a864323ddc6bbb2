"""Payloads of every kind of grid: grey and colour, 2D and 3D, with and without a spacing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from medsynth import store
from medsynth.config import Export, Grid
from medsynth.errors import CertificationError
from medsynth.imaging.cohort import Pair
from medsynth.release.payload import write_payload

LABELS = {0: "background", 1: "polyp"}
PHOTO = Grid(spatial_dims=2, shape=(16, 12), channels=3, modality="ES", labels=LABELS)
SLICE = Grid(spatial_dims=2, shape=(16, 12), spacing_mm=(2, 0.5), labels=LABELS)
VOLUME = Grid(spatial_dims=3, shape=(8, 6, 4), spacing_mm=(1, 2, 3), modality="CT", labels=LABELS)


def pair_of(grid: Grid, name: str = "a") -> Pair:
    random = np.random.default_rng(0)
    label = np.zeros(grid.shape, np.uint8)
    label[2:5, 1:4] = 1
    return Pair(name, random.uniform(-1, 1, (grid.channels, *grid.shape)).astype(np.float32), label)


@pytest.mark.parametrize("grid", [PHOTO, SLICE, VOLUME], ids=["photo", "slice", "volume"])
def test_every_format_holds_the_pair(tmp_path: Path, grid: Grid) -> None:
    import pydicom

    pair = pair_of(grid)
    assert write_payload(tmp_path, [pair], grid, Export(formats=("nifti", "dicom", "png"))) == 1
    image = nibabel.load(tmp_path / "nifti/imagesTr/synthetic_0001.nii.gz")
    label = nibabel.load(tmp_path / "nifti/labelsTr/synthetic_0001.nii.gz")
    assert label.shape == (*grid.shape, 1)[:3]
    assert image.shape == label.shape + ((3,) if grid.channels == 3 else ())
    np.testing.assert_array_equal(np.asarray(label.dataobj).reshape(grid.shape), pair.label)
    dataset = json.loads((tmp_path / "nifti/dataset.json").read_text())
    assert len(dataset["modality"]) == grid.channels
    files = sorted((tmp_path / "dicom/synthetic_0001").rglob("*.dcm"))
    assert all(pydicom.dcmread(path)[0x0008, 0x001C].value == "YES" for path in files)
    assert (tmp_path / "png").exists() == (grid.spatial_dims == 2)


def test_photographs_become_secondary_captures_and_upright_pictures(tmp_path: Path) -> None:
    import pydicom

    pair = pair_of(PHOTO)
    write_payload(tmp_path, [pair], PHOTO, Export(formats=("dicom", "png")))
    series = pydicom.dcmread(next((tmp_path / "dicom").rglob("image/*.dcm")))
    assert series.SOPClassUID == "1.2.840.10008.5.1.4.1.1.7"
    picture = np.asarray(Image.open(tmp_path / "png/images/synthetic_0001.png"))
    assert picture.shape == (12, 16, 3)
    np.testing.assert_allclose(picture.transpose(2, 1, 0) / 127.5 - 1, pair.image, atol=0.005)
    mask = np.asarray(Image.open(tmp_path / "png/labels/synthetic_0001.png"))
    np.testing.assert_array_equal(mask.T, pair.label)
    np.testing.assert_array_equal(picture, series.pixel_array)


def test_picture_of_a_slice_faces_as_its_dicom_does(tmp_path: Path) -> None:
    import pydicom

    write_payload(tmp_path, [pair_of(SLICE)], SLICE, Export(formats=("dicom", "png")))
    picture = np.asarray(Image.open(tmp_path / "png/images/synthetic_0001.png")).astype(float)
    pixels = pydicom.dcmread(next((tmp_path / "dicom").rglob("image/*.dcm"))).pixel_array
    np.testing.assert_allclose(picture / 255, pixels / 1000, atol=0.003)


def test_only_so_many_pairs_become_dicom(tmp_path: Path) -> None:
    pairs = [pair_of(VOLUME, name) for name in "abc"]
    write_payload(tmp_path, pairs, VOLUME, Export(dicom_pairs=2))
    assert sorted(path.name for path in (tmp_path / "dicom").iterdir()) == ["synthetic_0001", "synthetic_0002"]
    assert len(list((tmp_path / "nifti/imagesTr").iterdir())) == 3


@pytest.mark.parametrize(
    ("grid", "formats", "written"),
    [(VOLUME, ("dicom",), 3), (VOLUME, ("dicom", "png"), 3), (SLICE, ("dicom",), 3), (SLICE, ("dicom", "png"), 1)],
)
def test_dicom_holds_all_pairs_where_no_other_format_does(
    tmp_path: Path, grid: Grid, formats: tuple[Any, ...], written: int
) -> None:
    pairs = [pair_of(grid, name) for name in "abc"]
    assert write_payload(tmp_path, pairs, grid, Export(formats=formats, dicom_pairs=1)) == 3
    assert len(list((tmp_path / "dicom").iterdir())) == written


def test_pitfall_20_names_of_pairs_do_not_leave(tmp_path: Path) -> None:
    write_payload(tmp_path, [pair_of(VOLUME, "DOE^JANE")], VOLUME, Export())
    assert not any("DOE" in path.name or b"DOE" in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_nifti_bytes_depend_on_the_voxels_only(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_payload(tmp_path / name, [pair_of(VOLUME)], VOLUME, Export(formats=("nifti",)))
    assert store.digest_tree(tmp_path / "a") == store.digest_tree(tmp_path / "b")


def _not_finite(pair: Pair) -> Pair:
    image = pair.image.copy()
    image.flat[0] = np.nan
    return Pair(pair.name, image, pair.label)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "no pair"),
        ([_not_finite(pair_of(VOLUME))], "not finite"),
        ([Pair("a", pair_of(VOLUME).image, np.zeros((2, 2, 2), np.uint8))], "different size"),
    ],
)
def test_broken_pairs_are_refused(tmp_path: Path, pairs: list[Any], message: str) -> None:
    with pytest.raises(CertificationError, match=message):
        write_payload(tmp_path, pairs, VOLUME, Export(formats=("nifti",)))
