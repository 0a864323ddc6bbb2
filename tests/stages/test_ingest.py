from __future__ import annotations

import errno
import gzip
import json
import os
import shutil
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pydicom
import pytest
import torch
from ingesting import AFFINE, LABELS, SHAPE, SIZE, ingested, picture, put_dicom, rows, study
from PIL import Image
from pydicom.uid import generate_uid

from medsynth import store
from medsynth.config import Study
from medsynth.errors import InputError, StoreError
from medsynth.imaging import dicom, loading, transforms
from medsynth.imaging.cohort import Pair, load_pairs, load_patients, read_pairs, write_pair
from medsynth.imaging.deidentify import explain, read_references
from medsynth.imaging.dicom import HighdicomReader
from medsynth.imaging.dicom_labels import label_value, read_segmentation
from medsynth.imaging.dicom_segmentation import write_segmentation
from medsynth.imaging.dicom_series import find_series
from medsynth.imaging.dicom_writer import SeriesMeta, write_series
from medsynth.imaging.layouts import discover
from medsynth.imaging.loading import load_case
from medsynth.imaging.refusal import CaseRefused
from medsynth.stages import ingest
from medsynth.tracking import Tracker

POLYP = {0: "background", 1: "polyp"}


def put_msd(root: Path, cases: dict[str, tuple[np.ndarray, np.ndarray]], names: Any = LABELS) -> None:
    for folder, index in (("imagesTr", 0), ("labelsTr", 1)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, arrays in cases.items():
            nib.save(nib.Nifti1Image(arrays[index], AFFINE), root / folder / f"{name}.nii.gz")
    entries = [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in cases]
    description = {"labels": {str(k): v for k, v in names.items()}, "training": entries}
    (root / "dataset.json").write_text(json.dumps(description))


def good(count: int, first: int = 0) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {f"case_{i:03d}": picture(i) for i in range(first, first + count)}


def cut_behind(path: Path, keyword: str, extra: int = 8) -> None:
    """Keep what comes up to the end of an element's value, and ``extra`` bytes (by default the next one's header)."""
    value = str(pydicom.dcmread(path)[keyword].value).encode()
    raw = path.read_bytes()
    path.write_bytes(raw[: raw.index(value, raw.index(b"Zyxwvut")) + len(value) + len(value) % 2 + extra])


def flat_export(tmp_path: Path, people: dict[str, int]) -> Path:
    """All files of all patients in one folder; names ``<person>-<00001 ... | seg>.dcm``."""
    flat = tmp_path / "flat"
    flat.mkdir()
    for person, seed in people.items():
        put_dicom(tmp_path / "tree", person, seed)
        for path in (tmp_path / "tree" / person).rglob("*.dcm"):
            shutil.move(path, flat / f"{person}-{path.name}")
    return flat


def series_by_patient(folder: Path) -> dict[str, bool]:
    """Return for each patient whether a broken file makes the image series suspect."""
    return {series.patient: series.suspect for series in find_series(folder).images}


def read_series(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Return voxels and affine of a series."""
    reader = HighdicomReader()
    array, meta = reader.get_data(reader.read(files))
    return array, meta["affine"]


def in_world(array: np.ndarray, affine: np.ndarray) -> dict[tuple[float, ...], float]:
    indices = np.argwhere(np.ones(array.shape, bool))
    points = np.round(indices @ affine[:3, :3].T + affine[:3, 3], 3)
    return dict(zip(map(tuple, points.tolist()), array.ravel().tolist(), strict=True))


def test_geometry_comes_from_positions_whatever_the_instance_numbers_say(tmp_path: Path) -> None:
    folder = put_dicom(tmp_path, "A", 0)
    numbers = np.random.default_rng(3).permutation(SHAPE[2])
    for path, number in zip(sorted(folder.iterdir()), numbers, strict=True):
        dataset = pydicom.dcmread(path)
        dataset.InstanceNumber = int(number) % 3
        dataset.save_as(path)
    assert in_world(*read_series(sorted(folder.iterdir(), reverse=True))) == in_world(picture(0)[0], AFFINE)


def test_segments_land_on_the_image_voxels(tmp_path: Path) -> None:
    folder = put_dicom(tmp_path, "A", 0)
    image, affine = read_series(list(folder.iterdir()))
    label = read_segmentation([tmp_path / "A/seg/seg.dcm"], image.shape, affine, study().grid, image.size * 2)
    assert in_world(label, affine) == in_world(picture(0)[1], AFFINE)


def test_dicom_and_nifti_of_the_same_scan_give_the_same_patient_voxels(tmp_path: Path) -> None:
    for index in range(4):
        put_dicom(tmp_path / "d", f"case_{index:03d}", index)
    put_msd(tmp_path / "n", good(4))
    for kind in "dn":
        assert ingested(study(), tmp_path / kind, tmp_path / f"out-{kind}") == []
    for split in ("train", "test"):
        pair = [load_patients(tmp_path / f"out-{kind}", study().grid, split) for kind in "dn"]
        voxels = [sorted(p.images.numpy().tobytes() + p.labels.numpy().tobytes() for p in each) for each in pair]
        assert voxels[0] == voxels[1] != []


def test_broken_dicom_is_quarantined_with_its_reason_and_can_be_found_again(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for index in range(6):
        put_dicom(source, f"P{index}", index)
    cut = sorted(put_dicom(source, "cut", 20).iterdir())[3]
    cut.write_bytes(cut.read_bytes()[:-50])
    sorted(put_dicom(source, "gap", 21).iterdir())[3].unlink()
    header = sorted(put_dicom(source, "header", 22).iterdir())[0]
    cut_behind(header, "SeriesInstanceUID")
    put_dicom(source, "bare", 23, labelled=False)
    for path in put_dicom(source, "nobody", 24).iterdir():
        dataset = pydicom.dcmread(path)
        dataset.PatientID = ""
        dataset.save_as(path)
    for path in put_dicom(source, "flat", 25).iterdir():
        dataset = pydicom.dcmread(path)
        del dataset.ImagePositionPatient
        dataset.save_as(path)
    reasons = ingested(study(), source, tmp_path / "out")
    assert set(reasons) == {
        "truncated_dicom",
        "missing_slice",
        "no_label",
        "no_patient_id",
        "no_geometry",
        "patient_mismatch",
    }
    assert reasons.count("truncated_dicom") == 3  # the cut series, the broken file, and the series beside it
    found = explain(tmp_path / "out", source)
    assert {row["ref"] for row in rows(tmp_path / "out" / "quarantine.csv")} == set(found)
    assert source / "gap" in [path.parent.parent for path in found.values()]


PEOPLE = {f"P{index}": index for index in range(6)}


def test_in_a_flat_folder_a_cut_file_condemns_its_own_series_alone(tmp_path: Path) -> None:
    flat = flat_export(tmp_path, {**PEOPLE, "P10": 10})
    cut_behind(flat / "P10-00001.dcm", "SeriesInstanceUID")  # an end slice: no gap would betray that it is missing
    assert series_by_patient(flat) == {**dict.fromkeys(PEOPLE, False), "P10": True}
    assert ingested(study(), flat, tmp_path / "out") == ["truncated_dicom"] * 2  # the file and its series
    kept = rows(tmp_path / "out" / "cases.csv")
    assert len(kept) == len(PEOPLE)
    for path in flat.glob("P10-*"):
        path.unlink()
    assert ingested(study(), flat, tmp_path / "without") == []
    assert {row["content"] for row in kept} == {row["content"] for row in rows(tmp_path / "without" / "cases.csv")}


def test_in_a_flat_folder_a_file_of_garbage_condemns_nobody(tmp_path: Path) -> None:
    flat = flat_export(tmp_path, PEOPLE)
    (flat / "P1-garbage.dcm").write_bytes(np.random.default_rng(0).bytes(4096))
    (flat / "P2-nothing.dcm").write_bytes(b"")
    (flat / "P3-00004.dcm").write_bytes(b"no header is left")
    assert ingested(study(), flat, tmp_path / "out") == ["missing_slice"] + ["truncated_dicom"] * 3
    assert len(rows(tmp_path / "out" / "cases.csv")) == len(PEOPLE) - 1
    found = explain(tmp_path / "out", flat)
    assert {"P1-garbage.dcm", "P2-nothing.dcm", "P3-00004.dcm"} <= {path.name for path in found.values()}


def test_a_file_cut_behind_its_patient_condemns_that_patient(tmp_path: Path) -> None:
    flat = flat_export(tmp_path, {"P1": 1, "P2": 2})
    cut_behind(flat / "P2-00001.dcm", "StudyInstanceUID")
    assert series_by_patient(flat) == {"P1": False, "P2": True}


def test_half_an_identifier_is_nobodys(tmp_path: Path) -> None:
    flat = flat_export(tmp_path, {"P1": 1, "P12": 2})
    cut_behind(flat / "P12-00001.dcm", "PatientID", extra=-2)  # "P12 " is left as "P1", but is not P1
    assert series_by_patient(flat) == {"P1": False, "P12": False}
    assert len(find_series(flat).unreadable) == 1


def test_pitfall_02_files_that_name_no_issuer_are_the_same_persons(tmp_path: Path) -> None:
    """The certificate says: Patient ID (0010,0020). Only some systems of a hospital add who issued it."""
    source = tmp_path / "in"
    for index in range(6):
        put_dicom(source / "first", f"person{index}", index)
    put_dicom(source / "second", "person0", 9)
    for path in (source / "second").rglob("*.dcm"):
        header = pydicom.dcmread(path)
        header.IssuerOfPatientID = "Ward 3"
        header.save_as(path)
    assert ingested(study(), source, tmp_path / "out") == []
    found = rows(tmp_path / "out" / "cases.csv")
    assert len(found) == 7 and len({row["patient_id"] for row in found}) == 6
    assert {series.patient for series in find_series(source).images} == {f"person{index}" for index in range(6)}


@pytest.mark.filterwarnings("ignore")  # as ingest does: pydicom warns of half an identifier
def test_wherever_a_file_is_cut_only_its_own_patient_is_touched(tmp_path: Path) -> None:
    flat = flat_export(tmp_path, {"P1": 1, "P12": 2})
    path = flat / "P12-00001.dcm"
    raw = path.read_bytes()
    condemned = []
    for length in range(0, raw.rindex(b"OW"), 7):
        path.write_bytes(raw[:length])
        findings = find_series(flat)
        series = {s.patient: s for s in findings.images}
        assert set(series) == {"P1", "P12"} and not series["P1"].suspect
        assert path in (*findings.unreadable, *series["P12"].files)
        condemned.append(series["P12"].suspect or path in series["P12"].files)
    assert condemned == sorted(condemned) and any(condemned)  # once the header says whose it is, it stays said


def test_a_broken_part_of_a_segmentation_condemns_its_image(tmp_path: Path) -> None:
    flat = flat_export(tmp_path, PEOPLE)
    shutil.copy(flat / "P2-seg.dcm", flat / "P2-seg-2.dcm")
    cut_behind(flat / "P2-seg-2.dcm", "SeriesInstanceUID")
    assert ingested(study(), flat, tmp_path / "out") == ["truncated_dicom"] * 2
    assert len(rows(tmp_path / "out" / "cases.csv")) == len(PEOPLE) - 1


def test_a_folder_that_may_not_be_read_is_told_and_links_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python's glob passes over both in silence, and so would patients be."""
    source = tmp_path / "in"
    for index in range(6):
        put_dicom(source, f"person{index}", index)
    put_dicom(tmp_path / "archive", "person6", 6)
    (source / "elsewhere").symlink_to(tmp_path / "archive")
    (source / "again").symlink_to(tmp_path / "archive" / "person6")
    (source / "person0" / "back").symlink_to(source)
    (source / "itself").symlink_to(source / "itself")
    scan = os.scandir

    def closed(path: Any) -> Any:
        if isinstance(path, Path) and path.name == "person3":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", closed)
    assert ingested(study(), source, tmp_path / "out") == ["unreadable_folder"]
    assert len(rows(tmp_path / "out" / "cases.csv")) == 6
    assert list(explain(tmp_path / "out", source).values()) == [source / "person3"]


def test_an_input_that_may_not_be_read_is_no_fault_of_the_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_msd(tmp_path / "in", good(3))
    (tmp_path / "in" / "dataset.json").unlink()

    listed = Path.iterdir

    def closed(folder: Path) -> Any:
        if folder.name == "imagesTr":
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", closed)
    with pytest.raises(InputError, match="right to read") as error:
        ingested(study(), tmp_path / "in", tmp_path / "out")
    assert str(tmp_path) not in str(error.value)


def test_two_series_in_one_folder_stay_two_series(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for index in range(5):
        put_dicom(source, f"P{index}", index)
    for path in put_dicom(source, "P8", 8).iterdir():
        shutil.copy(path, source / "P1" / "image" / f"other-{path.name}")
    shutil.rmtree(source / "P8" / "image")
    assert ingested(study(), source, tmp_path / "out") == []
    assert len(rows(tmp_path / "out" / "cases.csv")) == 6


def test_segmentation_without_references_is_paired_by_frame_of_reference(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for index in range(6):
        put_dicom(source, f"P{index}", index)
    path = source / "P2" / "seg" / "seg.dcm"
    dataset = pydicom.dcmread(path)
    dataset.ReferencedSeriesSequence[0].SeriesInstanceUID = generate_uid()
    dataset.save_as(path)
    assert ingested(study(), source, tmp_path / "out") == []


def test_secondary_capture_without_geometry_is_quarantined(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for index in range(6):
        put_dicom(source, f"P{index}", index)
    meta = SeriesMeta(modality="OT", patient_id="SC", patient_name="A^B", synthetic=False)
    write_series(source / "SC", picture(0)[0][:, :, 0], None, meta)
    assert ingested(study({"require_labels": False}), source, tmp_path / "out") == ["no_geometry"]


def test_broken_nifti_is_quarantined_with_its_reason(tmp_path: Path) -> None:
    image, label = picture(50)
    nan = image.astype(np.float32)
    nan[1, 1, 1] = np.nan
    bad = {
        "shape_mismatch": (picture(51)[0], label[:-1]),
        "unknown_label": (picture(52)[0], label * 3),
        "empty_label": (picture(53)[0], label * 0),
        "non_finite": (nan, label),
        "constant_image": (np.full_like(image, 7), label),
        "duplicate_content": picture(0),
        "unreadable_file": picture(54),
    }
    put_msd(tmp_path / "in", {**good(6), **{f"z_{reason}": arrays for reason, arrays in bad.items()}})
    (tmp_path / "in/imagesTr/z_unreadable_file.nii.gz").write_bytes(b"no gzip")
    assert ingested(study(), tmp_path / "in", tmp_path / "out") == sorted(bad)


def test_masks_of_nothing_countable_are_quarantined(tmp_path: Path) -> None:
    bad = {}
    for name, value in (("nan", np.nan), ("inf", np.inf), ("half", 1.5)):
        image, label = picture(60 + len(bad))
        bad[name] = image, np.where(label == 2, np.float32(value), label).astype(np.float32)
    put_msd(tmp_path / "in", {**good(6), **bad})
    assert ingested(study(), tmp_path / "in", tmp_path / "out") == ["non_finite", "non_finite", "unknown_label"]


def test_names_that_the_grid_does_not_know_are_not_read_as_numbers(tmp_path: Path) -> None:
    """Another hospital's first structure is not ours, and two of theirs may have the number of one of ours."""
    assert [label_value(name, 2, study().grid) for name in ("", " ", "ORGAN ")] == [2, 2, 1]
    for number in (1, 2, 3):
        with pytest.raises(CaseRefused, match="use the names that the input declares"):
            label_value("tail", number, study().grid)
    put_msd(tmp_path / "in", good(3), {0: "background", 1: "organ", 2: "tail"})
    with pytest.raises(InputError, match="3 x unknown_label"):
        ingested(study(), tmp_path / "in", tmp_path / "out")


def test_a_spacing_that_would_fill_the_memory_is_too_large(tmp_path: Path) -> None:
    wrong = {"case_000": (900.0, 900.0, 900.0), "case_001": (1e6, 1e6, 1e6), "case_002": (2.0, 2.0, 40.0)}
    put_msd(tmp_path / "in", good(9))
    for number, (name, spacing) in enumerate(wrong.items()):
        for array, folder in zip(picture(number), ("imagesTr", "labelsTr"), strict=True):
            nib.save(nib.Nifti1Image(array, np.diag([*spacing, 1.0])), tmp_path / "in" / folder / f"{name}.nii.gz")
    limit = {"max_voxels": 5 * SIZE}
    assert ingested(study(limit), tmp_path / "in", tmp_path / "out") == ["too_large"] * 3
    # Across slices nothing is resampled, whatever their distance.
    sliced = study(limit, spatial_dims=2, shape=[12, 12], spacing_mm=[2, 2], slice_axis="S")
    assert ingested(sliced, tmp_path / "in", tmp_path / "out-2d") == ["too_large"] * 2
    assert transforms.resampled_voxels((10, 12), np.diag([4.0, 4.0, 1.0, 1.0]), sliced.grid) == 4 * 120
    assert transforms.resampled_voxels((10, 12), None, sliced.grid) == 120


@pytest.mark.parametrize("layout", ["pairs", "nnunet"])
def test_a_mask_whose_image_is_missing_is_told(layout: str, tmp_path: Path) -> None:
    put_msd(tmp_path / "in", good(6))
    (tmp_path / "in/dataset.json").unlink()
    if layout == "pairs":
        for old, new in (("imagesTr", "images"), ("labelsTr", "masks")):
            (tmp_path / "in" / old).rename(tmp_path / "in" / new)
    masks = tmp_path / "in" / ("masks" if layout == "pairs" else "labelsTr")
    (masks / "case_000.nii.gz").rename(masks / "case_0oo.nii.gz")
    assert ingested(study({"layout": layout}), tmp_path / "in", tmp_path / "out") == ["no_image", "no_label"]


def test_images_that_share_a_mask_keep_it_and_a_mask_left_behind_is_nobodys_other_side(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for kind in ("images", "masks"):
            (tmp_path / split / kind).mkdir(parents=True)
    for path in ("train/images/a.png", "train/images/a.jpg", "train/masks/a.png", "test/images/b.png"):
        Image.new("L", (40, 30)).save(tmp_path / path)
    for path in ("test/masks/b.png", "train/masks/b.png"):  # its image was moved to test
        rng = np.random.default_rng(0)
        Image.fromarray((255 * (rng.random((30, 40)) > 0.5)).astype(np.uint8)).save(tmp_path / path)
    for path in ("train/images/a.png", "train/images/a.jpg", "test/images/b.png"):
        Image.fromarray(np.random.default_rng(len(path)).integers(0, 255, (30, 40)).astype(np.uint8)).save(
            tmp_path / path
        )
    shutil.copy(tmp_path / "train/masks/b.png", tmp_path / "train/masks/a.png")
    settings = study({"split": "folders"}, spatial_dims=2, shape=[20, 12], spacing_mm=None, labels=POLYP)
    cases = discover(tmp_path, settings.ingest)
    assert sorted(len(case.labels) for case in cases if case.refused is None) == [1, 1, 1]
    assert ingested(settings, tmp_path, tmp_path.with_name("out")) == ["no_image"]


def test_what_is_too_large_is_refused_by_its_header_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_dicom(tmp_path / "volumes/dicom", "D", 0)
    put_msd(tmp_path / "volumes/nifti", {"N": picture(1)})
    for folder in ("images", "masks"):
        (tmp_path / "pictures" / folder).mkdir(parents=True)
        Image.new("L", (40, 30)).save(tmp_path / "pictures" / folder / "R.png")
    settings = study({"max_voxels": SIZE - 1})
    cases = [case for name in ("volumes", "pictures") for case in discover(tmp_path / name, settings.ingest)]
    assert [case.source for case in cases] == ["dicom", "nifti", "raster"]
    monkeypatch.setattr(loading, "_read", lambda *_: pytest.fail("a file that is too large was read"))
    monkeypatch.setattr(dicom, "read_datasets", lambda *_: pytest.fail("a series that is too large was read"))
    for case in cases:
        with pytest.raises(CaseRefused) as refused:
            load_case(case, settings.grid, settings.ingest)
        assert refused.value.reason == "too_large"


def test_a_volume_at_the_limit_comes_in_and_one_above_is_quarantined(tmp_path: Path) -> None:
    wider = picture(30, (10, 12, 9))
    mask = np.zeros((99, 99, 99), np.uint8)
    put_msd(tmp_path / "n", {**good(6), "wider": wider, "mask": (picture(31)[0], mask)})
    nib.save(nib.Nifti2Image(picture(0)[0], AFFINE), tmp_path / "n/imagesTr/case_000.nii.gz")
    assert ingested(study({"max_voxels": SIZE}), tmp_path / "n", tmp_path / "out-n") == ["too_large"] * 2
    for index in range(6):
        put_dicom(tmp_path / "d", f"P{index}", index)
    meta = SeriesMeta(modality="MR", patient_id="W", patient_name="A^B", synthetic=False)
    write_series(tmp_path / "d/wider", wider[0], AFFINE, meta)
    assert ingested(study({"max_voxels": SIZE}), tmp_path / "d", tmp_path / "out-d") == ["too_large"]


def test_a_segmentation_of_frames_that_lie_far_apart_is_too_large(tmp_path: Path) -> None:
    for index in range(6):
        put_dicom(tmp_path / "d", f"P{index}", index)
    put_dicom(tmp_path / "d", "far", 30)
    path = tmp_path / "d/far/seg/seg.dcm"
    dataset = pydicom.dcmread(path)
    place = dataset.PerFrameFunctionalGroupsSequence[-1].PlanePositionSequence[0]
    place.ImagePositionPatient[2] += 2000.0
    dataset.save_as(path)
    assert ingested(study({"max_voxels": 2 * SIZE}), tmp_path / "d", tmp_path / "out") == ["too_large"]


@pytest.mark.parametrize("layout", ["empty", "nothing known", "all broken"])
def test_unusable_input_is_an_error_and_leaves_no_folder(tmp_path: Path, layout: str) -> None:
    source = tmp_path / "in"
    source.mkdir()
    if layout == "nothing known":
        (source / "note.txt").write_text("hello")
    if layout == "all broken":
        put_msd(source, {"a": (np.zeros(SHAPE, np.int16), picture(0)[1])})
    with pytest.raises(InputError):
        ingest.run(study(), {"source": source}, tmp_path / "out", Tracker())
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_unwritable_output_is_a_store_error(tmp_path: Path) -> None:
    put_msd(tmp_path / "in", good(6))
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError):
        ingest.run(study(), {"source": tmp_path / "in"}, tmp_path / "file" / "cohort", Tracker())


def test_one_sided_split_is_refused_with_advice(tmp_path: Path) -> None:
    put_msd(tmp_path / "in", good(3))
    with pytest.raises(InputError, match=r"ingest\.test_fraction"):
        ingest.run(study({"test_fraction": 0.0}), {"source": tmp_path / "in"}, tmp_path / "out", Tracker())


def test_what_nobody_foresaw_in_one_case_is_that_cases_fault_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_msd(tmp_path / "in", good(6))
    read = transforms.to_grid

    def stumbling(image: Any, *rest: Any) -> Any:
        if np.array_equal(image[0].numpy(), picture(2)[0]):
            raise error
        return read(image, *rest)

    monkeypatch.setattr(transforms, "to_grid", stumbling)
    error: Exception = KeyError("Zyxwvut^Planted")
    assert ingested(study(), tmp_path / "in", tmp_path / "out") == ["unforeseen"]
    (found,) = rows(tmp_path / "out" / "quarantine.csv")
    assert "unexpected KeyError in medsynth/stages/ingest.py" in found["message"] and "Zyxwvut" not in found["message"]
    error = OSError("Zyxwvut^Planted")
    assert ingested(study(), tmp_path / "in", tmp_path / "broken") == ["unreadable_file"]
    # A machine without memory is no patient's fault.
    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        with pytest.raises(type(error)):
            ingested(study(), tmp_path / "in", tmp_path / "again")


@pytest.mark.parametrize("sliced", [False, True])
def test_an_organ_that_the_grid_would_cut_is_quarantined(sliced: bool, tmp_path: Path) -> None:
    """Nobody would see it: held-out patients' masks are cut likewise, and the Dice is of what is left."""
    put_msd(tmp_path / "in", good(6))
    for number, where in enumerate((slice(12, 23), slice(9, 20), slice(13, 23))):  # the grid has 14 to 26 of 40
        image, label = np.random.default_rng(number).integers(0, 900, (40, 12, 8)), np.zeros((40, 12, 8), np.uint8)
        label[where, 3:9, 2:6] = 1
        for array, folder in ((image.astype(np.int16), "imagesTr"), (label, "labelsTr")):
            nib.save(nib.Nifti1Image(array, AFFINE), tmp_path / "in" / folder / f"case_00{number}.nii.gz")
    grid = {"spatial_dims": 2, "shape": [12, 12], "spacing_mm": [2, 2], "slice_axis": "S"} if sliced else {}
    assert ingested(study(**grid), tmp_path / "in", tmp_path / "out") == ["outside_grid"] * 2
    assert ingested(study({"min_kept_foreground": 0}, **grid), tmp_path / "in", tmp_path / "all") == []


def test_one_sided_splits_tell_what_was_refused(tmp_path: Path) -> None:
    put_msd(tmp_path / "in", {**good(1), "a": (np.zeros(SHAPE, np.int16), picture(0)[1])})
    with pytest.raises(InputError, match="1 were refused: 1 x constant_image"):
        ingested(study(), tmp_path / "in", tmp_path / "out")


def test_references_of_another_folder_are_told(tmp_path: Path) -> None:
    put_msd(tmp_path / "in", {**good(6), "a": (np.zeros(SHAPE, np.int16), picture(0)[1])})
    assert ingested(study(), tmp_path / "in", tmp_path / "out") == ["constant_image"]
    put_msd(tmp_path / "other", good(2))
    with pytest.raises(InputError, match="none of the 1 references"):
        explain(tmp_path / "out", tmp_path / "other")


def test_one_patient_is_told_that_two_are_needed(tmp_path: Path) -> None:
    put_msd(tmp_path / "in", good(1))
    with pytest.raises(InputError, match="at least two patients"):
        ingest.run(study(), {"source": tmp_path / "in"}, tmp_path / "out", Tracker())


def test_no_name_and_no_path_is_in_any_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "Qwertzuiop"
    for index in range(6):
        put_dicom(source, f"Hospitalid{index}", index)
    sorted(put_dicom(source, "Hospitalid9", 9).iterdir())[2].unlink()
    assert ingested(study(), source, tmp_path / "out") == ["missing_slice"]
    content = "".join(capfd.readouterr()).encode()
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            content += path.name.encode() + path.read_bytes()
            content += gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else b""
    for secret in (b"Zyxwvut", b"Planted", b"Hospitalid", b"Qwertzuiop"):
        assert secret not in content
    assert (tmp_path / "out" / "pseudonym.key").stat().st_mode & 0o777 == 0o600
    assert store.read_manifest(tmp_path / "out").sensitivity == "private"


def test_pitfall_02_the_same_pixels_under_another_name_are_refused(tmp_path: Path) -> None:
    put_msd(tmp_path / "in", {**good(6), "z_copy": picture(0)})
    for folder, array in zip(("imagesTr", "labelsTr"), picture(0), strict=True):  # stored the other way round
        turned = AFFINE @ np.diag([-1, 1, 1, 1])
        turned[:3, 3] = (AFFINE @ [SHAPE[0] - 1, 0, 0, 1])[:3]
        nib.save(nib.Nifti1Image(array[::-1], turned), tmp_path / "in" / folder / "z_copy.nii.gz")
    assert ingested(study(), tmp_path / "in", tmp_path / "out") == ["duplicate_content"]
    assert len(rows(tmp_path / "out" / "cases.csv")) == 6


def test_pitfall_11_a_patients_voxels_do_not_depend_on_others(tmp_path: Path) -> None:
    found = []
    image, label = picture(99)
    for more in ({}, {"a_bright": (image * 9, label)}):
        put_msd(tmp_path / f"in{len(more)}", {**more, **good(6)})
        ingested(study(), tmp_path / f"in{len(more)}", tmp_path / f"out{len(more)}")
        cases = {r["content"]: r["case_id"] for r in rows(tmp_path / f"out{len(more)}" / "cases.csv")}
        files = [(tmp_path / f"out{len(more)}" / "images" / f"{case}.nii.gz") for case in cases.values()]
        found.append(dict(zip(cases, (path.read_bytes() for path in files), strict=True)))
    assert len(found[1]) == 7 and found[0].items() <= found[1].items()


def test_adding_a_patient_moves_nobody(tmp_path: Path) -> None:
    splits = []
    for count in (8, 9):
        put_msd(tmp_path / f"in{count}", good(count))
        ingested(study(), tmp_path / f"in{count}", tmp_path / f"out{count}")
        splits.append({r["content"]: r["split"] for r in rows(tmp_path / f"out{count}" / "cases.csv")})
    assert splits[0].items() <= splits[1].items()


def test_linkage_rule_joins_the_scans_of_a_person(tmp_path: Path) -> None:
    put_msd(tmp_path / "in", {f"pat{i // 2}_scan{i % 2}": picture(i) for i in range(12)})
    settings = study({"patient_id_pattern": r"^(pat\d+)_"})
    assert ingested(settings, tmp_path / "in", tmp_path / "out") == []
    patients = [p for s in ("train", "test") for p in load_patients(tmp_path / "out", settings.grid, s)]
    assert [p.images.shape for p in patients] == [(2, 1, 12, 12, 12)] * 6


def test_nnunet_labels_are_matched_by_name(tmp_path: Path) -> None:
    source = tmp_path / "in"
    put_msd(
        source,
        {name: (image, np.where(label, 3 - label, 0).astype(np.uint8)) for name, (image, label) in good(6).items()},
    )
    for path in (source / "imagesTr").iterdir():
        path.rename(path.with_name(path.name.replace(".nii.gz", "_0000.nii.gz")))
    description = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "Lesion": 1, "Organ": 2}}
    (source / "dataset.json").write_text(json.dumps(description))
    assert ingested(study(), source, tmp_path / "out") == []
    label = load_patients(tmp_path / "out", study().grid, "train")[0].labels
    assert (int((label == 1).sum()), int((label == 2).sum())) == (4 * 4 * 3, 2 * 4)


def test_slices_of_a_volume_are_records_with_foreground(tmp_path: Path) -> None:
    put_msd(tmp_path / "in", good(6))
    settings = study(spatial_dims=2, shape=[12, 12], spacing_mm=[2, 2], slice_axis="S", max_slices=3)
    assert ingested(settings, tmp_path / "in", tmp_path / "out") == []
    patient = load_patients(tmp_path / "out", settings.grid, "train")[0]
    assert patient.images.shape == (3, 1, 12, 12) and patient.labels.shape == (3, 12, 12)
    assert bool((patient.labels.flatten(1) > 0).any(dim=1).all())


def test_photographs_keep_columns_first_and_folders_split(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 3), ("val", 2)):
        for kind in ("images", "masks"):
            (tmp_path / "in" / split / kind).mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 255, (20, 40, 3)).astype(np.uint8)  # 20 rows, 40 columns
            mask = np.zeros((20, 40), np.uint8)
            mask[:, 30:] = 250
            Image.fromarray(pixels).save(tmp_path / "in" / split / "images" / f"{split}{index}.png")
            Image.fromarray(mask).save(tmp_path / "in" / split / "masks" / f"{split}{index}.png")
    Image.fromarray(mask.T).save(tmp_path / "in" / "train" / "masks" / "train0.png")
    settings = study(
        {"split": "folders"},
        spatial_dims=2, shape=[20, 12], spacing_mm=None, channels=3, modality="ES", labels=POLYP,
    )  # fmt: skip
    assert ingested(settings, tmp_path / "in", tmp_path / "out") == ["shape_mismatch"]
    train, test = (load_patients(tmp_path / "out", settings.grid, s) for s in ("train", "test"))
    assert (len(train), len(test)) == (2, 2)
    assert train[0].images.shape == (1, 3, 20, 12)
    expected = np.zeros((20, 12), np.uint8)
    expected[15:] = 1
    assert np.array_equal(train[0].labels[0].numpy(), expected)


@pytest.mark.parametrize(("dims", "channels"), [(3, 1), (2, 1), (2, 3)])
def test_pairs_survive_the_disk_within_one_grey_level(tmp_path: Path, dims: int, channels: int) -> None:
    shape = [12] * dims
    grid = study(spatial_dims=dims, shape=shape, spacing_mm=[2] * dims, channels=channels).grid
    rng = np.random.default_rng(1)
    size = tuple(range(8, 8 + dims))
    pair = Pair(
        "a", rng.uniform(-1, 1, (channels, *size)).astype(np.float32), rng.integers(0, 3, size).astype(np.uint8)
    )
    write_pair(tmp_path, pair, grid)
    before = (tmp_path / "images" / "a.nii.gz").read_bytes()
    (back,) = read_pairs(tmp_path)
    assert np.abs(back.image - pair.image).max() <= (0.001 if channels == 1 else 1 / 255) + 1e-6
    assert np.array_equal(back.label, pair.label)
    write_pair(tmp_path, pair, grid)
    assert (tmp_path / "images" / "a.nii.gz").read_bytes() == before
    images, labels = load_pairs(tmp_path, grid)
    assert images.shape == (1, channels, *shape) and labels.shape == (1, *shape)


@pytest.mark.realdata
def test_real_series_come_in_where_their_headers_put_them(real_data: Path, tmp_path: Path) -> None:
    for folder in sorted((real_data / "dicom").glob("*/*")):
        files = sorted(folder.glob("*.dcm"))
        array, affine = read_series(files)
        inverse = np.linalg.inv(affine)
        for path in files:
            dataset = pydicom.dcmread(path)
            position, axes = (
                np.array(dataset.ImagePositionPatient, float),
                np.array(dataset.ImageOrientationPatient, float),
            )
            step = axes[:3] * float(dataset.PixelSpacing[1]) * 7 + axes[3:] * float(dataset.PixelSpacing[0]) * 5
            x, y, z = (inverse @ np.append((position + step) * [-1, -1, 1], 1))[:3]
            # millimetres in the headers are rounded, and slices lie within highdicom's 1 % of the spacing
            assert (x, y) == pytest.approx((7, 5), abs=0.05) and abs(z - round(z)) < 0.05
            slope, intercept = float(dataset.get("RescaleSlope", 1)), float(dataset.get("RescaleIntercept", 0))
            plane = dataset.pixel_array.T * slope + intercept
            assert np.allclose(array[..., round(z)], plane, rtol=1e-5, atol=1e-3)
    settings = study({"require_labels": False}, shape=[40, 56, 40], spacing_mm=[1, 1, 1])
    chosen = next(seed for seed in range(50) if _splits(settings, seed) == {"train", "test"})
    settings = settings.model_copy(update={"seed": chosen})
    assert ingested(settings, real_data / "dicom", tmp_path / "out") == []
    assert len(rows(tmp_path / "out" / "cases.csv")) == 4
    assert load_patients(tmp_path / "out", settings.grid, "train") == []
    assert len(load_patients(tmp_path / "out", settings.grid, "train", labelled_only=False)) == 1


def _splits(settings: Study, seed: int) -> set[str]:
    seeded = settings.model_copy(update={"seed": seed})
    return {ingest.split_of(person, seeded) for person in ("PGBM-002", "PGBM-006")}


@pytest.mark.realdata
def test_real_hippocampi_and_polyps_come_in(real_data: Path, tmp_path: Path) -> None:
    description = json.loads((real_data / "hippocampus" / "dataset.json").read_text())
    description["training"] = description["training"][:8]
    (tmp_path / "h").mkdir()
    (tmp_path / "h" / "dataset.json").write_text(json.dumps(description))
    for folder in ("imagesTr", "labelsTr"):
        (tmp_path / "h" / folder).symlink_to(real_data / "hippocampus" / folder)
    settings = study(shape=[48, 64, 48], spacing_mm=[1, 1, 1], labels={0: "background", 1: "Anterior", 2: "Posterior"})
    assert ingested(settings, tmp_path / "h", tmp_path / "out-h") == []
    for patient in load_patients(tmp_path / "out-h", settings.grid, "train"):
        source = patient.images
        assert (float(source.min()), float(source.max())) == (-1, 1) and set(patient.labels.unique().tolist()) == {
            0,
            1,
            2,
        }
    for split in ("train", "val"):
        for kind in ("images", "masks"):
            (tmp_path / "k" / split / kind).mkdir(parents=True)
            for path in sorted((real_data / "kvasir" / split / kind).iterdir())[:3]:
                (tmp_path / "k" / split / kind / path.name).symlink_to(path)
    polyps = study(
        {"split": "folders"},
        spatial_dims=2, shape=[64, 64], spacing_mm=None, channels=3, modality="ES", labels=POLYP,
    )  # fmt: skip
    assert ingested(polyps, tmp_path / "k", tmp_path / "out-k") == []
    assert len(load_patients(tmp_path / "out-k", polyps.grid, "test")) == 3


def put_photographs(root: Path, count: int, mode: str = "RGB") -> Path:
    rng = np.random.default_rng(8)
    for index in range(count):
        for folder in ("images", "masks"):
            (root / folder).mkdir(parents=True, exist_ok=True)
        mask = np.zeros((40, 30), np.uint8)
        mask[5:20, 8:22] = 255
        Image.fromarray(mask).save(root / "masks" / f"{index}.png")
        colour = Image.fromarray(rng.integers(0, 255, (40, 30, 3)).astype(np.uint8))
        colour.convert(mode).save(root / "images" / f"{index}.png")
    return root


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_a_site_knows_photographs_again_whatever_the_studys_channels(mode: str, tmp_path: Path) -> None:
    source = put_photographs(tmp_path / "in", 8, mode)
    known = []
    for channels in (1, 3):
        grid = {"spatial_dims": 2, "shape": [20, 16], "spacing_mm": None, "channels": channels, "labels": POLYP}
        assert ingested(study(**grid), source, tmp_path / f"out{channels}") == []
        known.append(read_references(tmp_path / f"out{channels}").names)
    assert known[0] == known[1] and len(known[0]) == 8


@pytest.mark.filterwarnings("ignore:NvImgCodec")
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_photographs_of_16_bits_keep_their_contrast(channels: int, tmp_path: Path) -> None:
    """Pillow's own conversion cuts them off at 255."""
    source = put_photographs(tmp_path / "in", 6)
    ramp = np.linspace(0, 60_000, 40 * 30).reshape(40, 30).astype(np.uint16)
    for path in (source / "images").iterdir():
        Image.fromarray(ramp + np.uint16(int(path.stem))).save(path)
    grid = study(spatial_dims=2, shape=[32, 40], spacing_mm=None, channels=channels, labels=POLYP).grid
    found = load_case(next(iter(discover(source, study().ingest))), grid, study().ingest)
    assert found.image.shape == (channels, 30, 40) and len(torch.unique(found.image)) == 1200
    placed, _ = transforms.to_grid(found.image, found.label, found.affine, grid)
    assert float((placed.abs() > 0.99).float().mean()) < 0.05


@pytest.mark.filterwarnings("ignore:NvImgCodec")
@pytest.mark.parametrize("kind", ["nifti", "dicom"])
def test_a_single_image_lies_as_its_geometry_says(kind: str, tmp_path: Path) -> None:
    """Columns towards the right and rows towards anterior, however it is stored; as releases are written."""
    image, label = np.zeros((12, 12, 1), np.int16), np.zeros((12, 12, 1), np.uint8)
    image[:] = np.arange(144).reshape(12, 12, 1)
    label[8:11, 1:3] = 1  # at high x and low y
    placed = []
    for number, axes in enumerate(("RAS", "LPS", "LAS", "PRS")):
        turn = nib.orientations.ornt_transform(
            nib.orientations.axcodes2ornt("RAS"), nib.orientations.axcodes2ornt(tuple(axes))
        )
        arrays = [nib.orientations.apply_orientation(array, turn) for array in (image, label)]
        affine = np.eye(4) @ nib.orientations.inv_ornt_aff(turn, image.shape)
        root = tmp_path / f"{number}"
        for person in range(3):
            if kind == "nifti":
                put_nifti_pair(root, f"case_{person}", arrays[0] + np.int16(person), arrays[1], affine)
            else:
                meta = SeriesMeta(modality="MR", patient_id=str(person), patient_name="X^Y", synthetic=False)
                series = write_series(root / f"{person}", arrays[0] + np.int16(person), affine, meta)
                write_segmentation(root / f"{person}" / "seg.dcm", arrays[1], series, LABELS)
        cases = discover(root, study().ingest)
        grid = study(spatial_dims=2, shape=[12, 12], spacing_mm=[1, 1]).grid
        loaded = load_case(cases[0], grid, study().ingest)
        placed.append(transforms.to_grid(loaded.image, loaded.label, loaded.affine, grid))
    for images, labels in placed:
        assert torch.equal(labels[0], torch.from_numpy(label[..., 0]))
        assert torch.equal(images, placed[0][0])


PHOTOGRAPH = {"spatial_dims": 2, "shape": [20, 16], "spacing_mm": None, "channels": 3, "labels": POLYP}


def label_maps(folder: Path, **grid: Any) -> list[np.ndarray]:
    """Return the ingested label maps, in no order that means something."""
    settings = study(**{**PHOTOGRAPH, **grid})
    return [p.labels[0].numpy() for s in ("train", "test") for p in load_patients(folder, settings.grid, s)]


@pytest.mark.filterwarnings("ignore:NvImgCodec")
@pytest.mark.parametrize("channels", [1, 3])
def test_what_a_picture_hides_under_transparent_pixels_is_not_read(tmp_path: Path, channels: int) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    seen = np.random.default_rng(0).integers(1, 255, (16, 16, 4)).astype(np.uint8)
    seen[..., 3] = 255
    seen[:4] = (200, 10, 90, 0)  # a name, say, that was painted over by making it transparent
    Image.fromarray(seen).save(tmp_path / "images" / "a.png")
    mask = np.zeros((16, 16, 4), np.uint8)
    mask[4:12, 4:12] = 255
    mask[:4] = (255, 255, 255, 0)
    Image.fromarray(mask).save(tmp_path / "masks" / "a.png")
    settings = study(spatial_dims=2, shape=[16, 16], spacing_mm=None, channels=channels, labels=POLYP)

    (case,) = discover(tmp_path, settings.ingest)
    found = load_case(case, settings.grid, settings.ingest)

    assert not found.image[:, :, :4].any() and not found.stored[:, :, :4].any()
    assert found.image[:, :, 4:].any()
    assert int(found.label.sum()) == 64 and not found.label[:, :4].any()


@pytest.mark.parametrize(
    ("colours", "foreground"),
    [
        pytest.param([[255] * 3, [0] * 3], 0, id="white is 0"),
        pytest.param([[0] * 3, [255] * 3], 1, id="white is 1"),
        pytest.param([[0, 0, 0], [128, 0, 0]], 1, id="label 1 is red"),
    ],
)
def test_black_and_white_in_a_palette_are_not_numbers_of_labels_but_indices_of_colours_are(
    colours: list[list[int]], foreground: int, tmp_path: Path
) -> None:
    """Pillow numbers black and white as it likes: white is often 0."""
    source = put_photographs(tmp_path / "in", 6)
    for path in (source / "masks").iterdir():
        white = np.asarray(Image.open(path)) > 0
        indexed = Image.fromarray(np.where(white, foreground, 1 - foreground).astype(np.uint8), "P")
        indexed.putpalette([value for colour in colours for value in colour])
        indexed.save(path)
    assert ingested(study(**PHOTOGRAPH), source, tmp_path / "out") == []
    assert all(0.1 < labels.mean() < 0.25 for labels in label_maps(tmp_path / "out"))


def test_photographs_come_in_as_every_viewer_turns_them(tmp_path: Path) -> None:
    source = put_photographs(tmp_path / "in", 6)
    for path in (source / "images").iterdir():
        upright = np.zeros((40, 30, 3), np.uint8)
        upright[5:20, 8:22] = 220 - 5 * int(path.stem)  # where the mask is
        exif = Image.Exif()
        exif[0x0112] = 6  # stored lying on its side: to be turned by a quarter clockwise
        Image.fromarray(np.rot90(upright)).save(path.with_suffix(".jpg"), exif=exif, quality=95)
        path.unlink()
    assert ingested(study(**PHOTOGRAPH), source, tmp_path / "out") == []
    for split in ("train", "test"):
        for patient in load_patients(tmp_path / "out", study(**PHOTOGRAPH).grid, split):
            bright = patient.images[0, 1] > 0
            assert float((bright == (patient.labels[0] > 0)).float().mean()) > 0.9


def test_names_decide_in_png_masks_too(tmp_path: Path) -> None:
    source = put_photographs(tmp_path / "in", 6)
    (source / "images").rename(source / "imagesTr")
    (source / "masks").rename(source / "labelsTr")
    for path in (source / "imagesTr").iterdir():
        path.rename(path.with_name(f"{path.stem}_0000.png"))
    for path in (source / "labelsTr").iterdir():
        mask = (np.asarray(Image.open(path)) > 0).astype(np.uint8)
        mask[0, 0] = 2
        Image.fromarray(mask).save(path)
    grid = {**PHOTOGRAPH, "labels": {0: "background", 1: "organ", 2: "lesion"}}
    for names, reasons in (({"Lesion": 1, "Organ": 2}, []), ({"Tumour": 1, "Organ": 2}, None)):
        (source / "dataset.json").write_text(json.dumps({"labels": {"background": 0, **names}}))
        if reasons is None:
            with pytest.raises(InputError, match="6 x unknown_label"):
                ingested(study(**grid), source, tmp_path / "other")
        else:
            assert ingested(study(**grid), source, tmp_path / "out") == reasons
            assert all((labels == 2).mean() > 0.1 > (labels == 1).mean() for labels in label_maps(tmp_path / "out"))


def test_of_several_masks_and_of_other_files_nothing_is_guessed(tmp_path: Path) -> None:
    source = put_photographs(tmp_path / "in", 8)
    (source / "labels").mkdir()
    shutil.copy(source / "masks" / "0.png", source / "labels" / "0.png")
    Image.open(source / "masks" / "1.png").save(source / "masks" / "1.bmp")
    Image.open(source / "images" / "2.png").save(source / "images" / "2.tif")
    (source / "images" / "2.png").unlink()
    pages = [Image.open(source / "images" / "3.png"), Image.open(source / "images" / "4.png")]
    pages[0].save(source / "images" / "3.tiff", save_all=True, append_images=pages[1:])
    (source / "images" / "3.png").unlink()
    (source / "images" / "more").mkdir()
    (source / "images" / "9.gif").write_bytes(b"GIF89a")
    (source / "images" / ".DS_Store").write_bytes(b"")
    wanted = ["multiple_frames", "several_masks", "several_masks", "unknown_kind", "unknown_kind"]
    assert ingested(study(**PHOTOGRAPH), source, tmp_path / "out") == wanted
    assert len(rows(tmp_path / "out" / "cases.csv")) == 5


def test_an_accent_is_one_letter_however_it_is_stored(tmp_path: Path) -> None:
    source = put_photographs(tmp_path / "in", 6)
    for number in range(6):
        (source / "images" / f"{number}.png").rename(source / "images" / f"caf\u00e9{number}.png")
        (source / "masks" / f"{number}.png").rename(source / "masks" / f"cafe\u0301{number}.png")
    assert ingested(study(**PHOTOGRAPH), source, tmp_path / "out") == []


def test_what_says_that_it_is_synthetic_is_no_patient(tmp_path: Path) -> None:
    for index in range(8):
        put_dicom(tmp_path / "in", f"person{index}", index)
    image, _ = picture(9)
    write_series(tmp_path / "in" / "released", image, AFFINE, SeriesMeta("MR", "pair_1", "Pair^1"))
    assert "synthetic" in ingested(study({"require_labels": False}), tmp_path / "in", tmp_path / "out")
    assert len(rows(tmp_path / "out" / "cases.csv")) == 8


def test_identifiers_that_differ_in_case_alone_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index, name in enumerate(("MRN-1", "mrn-1", "MRN-2", "MRN-3", "mrn-3", "MRN-4", "MRN-5")):
        put_dicom(tmp_path / "in" / str(index), name, index)
    assert ingested(study(), tmp_path / "in", tmp_path / "out") == []
    told = [json.loads(line) for line in capsys.readouterr().err.splitlines() if "differ in upper" in line]
    assert [line["more_than_one"] for line in told] == [2] and "mrn" not in str(told).lower()


def put_nifti_pair(root: Path, name: str, image: np.ndarray, label: np.ndarray, affine: np.ndarray) -> None:
    for folder, array in (("images", image), ("labels", label)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(array, affine), root / folder / f"{name}.nii.gz")
