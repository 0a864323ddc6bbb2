"""Every study that ships is valid, is named like its file, and says what it needs."""

from __future__ import annotations

from pathlib import Path

import pytest

from medsynth import config
from medsynth.privacy.budget import plan_budget

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
EXPECTED = {
    *("demo", "hippocampus-3d", "hippocampus-3d-nonprivate", "hippocampus-2d"),
    *("polyp-2d", "polyp-2d-nonprivate", "polyp-2d-quality-nonprivate"),
}


def test_the_studies_of_the_readme_ship() -> None:
    assert {path.stem for path in CONFIGS} >= EXPECTED


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_study_is_valid_and_named_like_its_file(path: Path) -> None:
    study = config.load(path)
    assert study.name == path.stem
    assert study.description
    assert config.parse(study.model_dump(mode="json")) == study


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_study_uses_real_entropy(path: Path) -> None:
    assert config.load(path).privacy.entropy == "os"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_header_names_data_and_hardware(path: Path) -> None:
    header = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any("Data" in line for line in header) and any("Hardware" in line for line in header)


@pytest.mark.parametrize("path", [p for p in CONFIGS if config.load(p).privacy.private], ids=lambda path: path.stem)
def test_promise_can_be_planned(path: Path) -> None:
    study = config.load(path)
    plan = plan_budget(study.privacy, study.train, study.masks)
    assert 0 < plan.epsilon <= study.privacy.epsilon
