"""The whole road on a small phantom hospital: no network, nothing of a patient left behind, finished stages skipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medsynth import config, store
from medsynth.config import Study
from medsynth.errors import StoreError, VerificationError
from medsynth.imaging.phantom_hospital import FAMILY_NAME, FIRST_NAMES, INSTITUTION, LABELS, write_hospital
from medsynth.release.verify import verify
from medsynth.study import STAGES, run_study

pytestmark = pytest.mark.endtoend
PLANTED = [FAMILY_NAME, INSTITUTION, *(name for name in FIRST_NAMES if len(name) > 4)]


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "hospital"
    write_hospital(folder, patients=12, seed=0)
    return folder


@pytest.fixture(scope="module")
def study(tiny_settings: dict[str, Any]) -> Study:
    grid = {
        **tiny_settings["grid"],
        "spatial_dims": 3,
        "shape": [24, 32, 24],
        "spacing_mm": [2, 2, 2],
        "labels": LABELS,
        "release_shape_range": [[20, 24], [24, 32], [20, 24]],
    }
    train = {**tiny_settings["train"], "appearance": {"coefficients": [2, 2, 2]}}
    privacy = {**tiny_settings["privacy"], "entropy": "os", "delta": 1e-3}
    changes = {"grid": grid, "train": train, "privacy": privacy, "masks": {"coefficients": [3, 3, 3]}}
    return config.parse({**tiny_settings, **changes, "ingest": {"test_fraction": 0.3}, "name": "road"})


@pytest.fixture(scope="module")
def finished(hospital: Path, study: Study, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    run = tmp_path_factory.mktemp("runs") / "road"
    run_study(study, hospital, run)
    yield run


def test_every_stage_is_finished_and_the_release_verifies(finished: Path) -> None:
    assert all(store.is_done(finished / stage.folder) for stage in STAGES)
    report = verify(finished / "release")
    assert report.ok, report.failures
    assert 0 < report.claim["epsilon"] <= 8


def test_only_releasable_folders_lie_between_the_cohort_and_the_release(finished: Path) -> None:
    kinds = {stage.folder: store.read_manifest(finished / stage.folder).sensitivity for stage in STAGES}
    assert kinds["cohort"] == "private" and kinds["segmenter"] == kinds["report"] == "internal"
    assert all(kinds[name] in ("public", "released") for name in ("autoencoder", "masks", "generator", "synthetic"))
    assert kinds["certificate"] == kinds["release"] == "released"


def test_planted_names_appear_nowhere_in_the_run(finished: Path, hospital: Path) -> None:
    def holding(folder: Path) -> set[str]:
        files = [path for path in folder.rglob("*") if path.is_file()]
        return {name for name in PLANTED for path in files if name.encode() in path.read_bytes()}

    assert holding(hospital) >= {FAMILY_NAME, INSTITUTION}, "the search itself finds nothing"
    assert holding(finished) == set()
    assert [path for path in finished.rglob("*") for name in PLANTED if name in path.name] == []


def test_a_finished_run_is_skipped_and_a_changed_one_refused(finished: Path, study: Study, hospital: Path) -> None:
    before = {stage.folder: store.read_manifest(finished / stage.folder).digest for stage in STAGES}
    run_study(study, hospital, finished)
    assert {stage.folder: store.read_manifest(finished / stage.folder).digest for stage in STAGES} == before
    changed = study.model_copy(update={"synthesise": study.synthesise.model_copy(update={"pairs": 5})})
    with pytest.raises(StoreError, match="synthetic"):
        run_study(changed, hospital, finished)


def test_a_lost_last_stage_is_made_again_without_network(
    finished: Path, study: Study, hospital: Path, blocked_network: list[str]
) -> None:
    import shutil

    for folder in ("synthetic", "segmenter", "report", "certificate", "release"):
        shutil.rmtree(finished / folder)
    run_study(study, hospital, finished)
    assert verify(finished / "release").ok
    assert blocked_network == []


def test_a_changed_byte_fails_verification(finished: Path) -> None:
    image = next((finished / "release" / "nifti" / "imagesTr").iterdir())
    original = image.read_bytes()
    image.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    try:
        with pytest.raises(VerificationError, match="was changed"):
            verify(finished / "release").require()
    finally:
        image.write_bytes(original)
