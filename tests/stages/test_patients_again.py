"""Ingest: the same patients are recognised in another cohort, whatever its format, layout, names and grid."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from ingesting import AFFINE, picture, put_dicom, study

from medsynth import store
from medsynth.config import Study
from medsynth.errors import PrivacyError, StoreError
from medsynth.imaging.deidentify import REFERENCES_FILE, read_references
from medsynth.site import site_home
from medsynth.stages import ingest
from medsynth.stages.inputs import account_of
from medsynth.tracking import Tracker


def put_nifti(root: Path, name: str, seed: int, turned: bool = False) -> None:
    """Write a pair; turned: the same patient lies in the file with flipped and swapped axes."""
    for folder, array in zip(("images", "masks"), picture(seed), strict=True):
        (root / folder).mkdir(parents=True, exist_ok=True)
        image = nib.Nifti1Image(array, AFFINE)
        if turned:
            image = image.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
        nib.save(image, root / folder / f"{name}.nii.gz")


def cohort(source: Path, run: Path, settings: Study | None = None) -> Path:
    ingest.run(settings or study(), {"source": source}, run / "cohort", Tracker())
    return run


def put_people(root: Path, seeds: range, prefix: str = "case") -> Path:
    for seed in seeds:
        put_nifti(root, f"{prefix}_{seed:03d}", seed)
    return root


def test_dicom_and_turned_nifti_of_the_same_patients_share_an_account(tmp_path: Path) -> None:
    for seed in range(6):
        put_dicom(tmp_path / "dicom", f"P{seed}", seed)
        put_nifti(tmp_path / "nifti", f"other-{seed}", seed, turned=seed % 2 == 1)
    one = cohort(tmp_path / "dicom", tmp_path / "one")
    other = cohort(tmp_path / "nifti", tmp_path / "other", study(shape=[16, 16, 16]))
    pictures = read_references(other / "cohort").names
    assert len(pictures) == 6 and pictures <= read_references(one / "cohort").names
    assert account_of(one).id == account_of(other).id


def test_one_common_patient_is_enough(tmp_path: Path) -> None:
    one = cohort(put_people(tmp_path / "a", range(0, 6)), tmp_path / "one")
    other = cohort(put_people(tmp_path / "b", range(5, 11), "new"), tmp_path / "other")
    assert account_of(one).id == account_of(other).id


def test_equal_file_names_are_no_identity(tmp_path: Path) -> None:
    one = cohort(put_people(tmp_path / "a", range(0, 6)), tmp_path / "one")
    for seed in range(6):
        put_nifti(tmp_path / "b", f"case_{seed:03d}", 50 + seed)
    other = cohort(tmp_path / "b", tmp_path / "other")
    assert account_of(one).id != account_of(other).id


def test_a_patient_with_new_pictures_is_recognised_by_the_dicom_identifier(tmp_path: Path) -> None:
    for seed in range(6):
        put_dicom(tmp_path / "a", f"P{seed}", seed)
        put_dicom(tmp_path / "b", f"P{seed}", 80 + seed)
    one, other = (cohort(tmp_path / name, tmp_path / f"run-{name}") for name in "ab")
    assert account_of(one).id == account_of(other).id


def test_references_that_were_changed_are_refused(tmp_path: Path) -> None:
    run = cohort(put_people(tmp_path / "a", range(0, 6)), tmp_path / "one")
    path = run / "cohort" / REFERENCES_FILE
    path.chmod(0o600)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "0" * 64]) + "\n")
    with pytest.raises(StoreError, match="was changed since ingest"):
        account_of(run)


def test_references_hold_no_identifier_and_need_the_sites_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(6):
        put_dicom(tmp_path / "a", f"P{seed}", seed)
    one = cohort(tmp_path / "a", tmp_path / "one")
    text = (one / "cohort" / REFERENCES_FILE).read_text()
    with (one / "cohort" / "cases.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    assert not any(word in text for row in rows for word in (row["content"], row["patient_id"]))
    monkeypatch.setenv("MEDSYNTH_HOME", str(tmp_path / "another-home"))
    other = cohort(tmp_path / "a", tmp_path / "other")
    assert read_references(one / "cohort").names.isdisjoint(read_references(other / "cohort").names)
    with pytest.raises(PrivacyError, match="another MEDSYNTH_HOME"):
        account_of(one)


def test_a_home_that_cannot_be_written_stops_ingest_with_nothing_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MEDSYNTH_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(StoreError, match="MEDSYNTH_HOME"):
        cohort(put_people(tmp_path / "a", range(6)), tmp_path / "run")
    assert not (tmp_path / "run" / "cohort").exists()


def test_what_recognises_patients_stays_private(tmp_path: Path) -> None:
    run = cohort(put_people(tmp_path / "a", range(6)), tmp_path / "run")
    names = read_references(run / "cohort").names
    manifest = (run / "cohort" / "manifest.json").read_text()
    assert store.read_manifest(run / "cohort").sensitivity == "private"
    assert not any(name in manifest for name in names)
    assert (site_home() / "site.key").read_bytes().hex() not in manifest
