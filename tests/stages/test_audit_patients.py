"""On real patients: an overfitted generator without privacy is caught, one of the same code at epsilon 8 is not."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from medsynth import config, study
from medsynth.config import Study
from medsynth.privacy.audit.finding import Finding
from medsynth.release.audits import read_findings
from medsynth.tracking import Tracker

CONFIGS = Path(__file__).parents[2] / "pipelines" / "audit_demonstration"
PATIENTS = 40
SMALL = {
    "grid.shape": [16, 20, 16],
    "grid.spacing_mm": [3.0, 3.0, 3.0],
    "grid.release_shape_range": [[14, 16], [16, 20], [14, 16]],
    "grid.release_margin": 3,
    # What reads no patient is tested elsewhere.
    "audit.step": False,
    "audit.one_run": False,
    "segment.channels": [8, 16],  # trained elsewhere; more levels do not fit the grid
    "synthesise.pairs": 80,
    "synthesise.batch_size": 20,
    "synthesise.steps": 20,
    "compute.threads": 1,
}
OVERFITTED = {"train.steps": 1800}
PRIVATE = {"train.pretrain_steps": 150, "train.pretrain_phantoms": 60, "train.steps": 15, "train.draws": 1}


def audited(plan: Study, source: Path, run: Path) -> dict[tuple[str, str], Finding]:
    for verb in ("ingest", "encode", "masks", "train", "synthesise", "audit"):
        study.run_verb(plan, verb, source, run)
    return {(one.audit, one.subject): one for one in read_findings(run / "audit")}


@pytest.mark.realdata
def test_memorisation_is_found_without_privacy_and_not_at_epsilon_8(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study, "open_tracker", lambda *_: Tracker().stage("study"))
    source = tmp_path / "hospital"
    runpy.run_path(str(CONFIGS / "first_patients.py"))["main"](real_data / "hippocampus", source, PATIENTS)
    plans = {
        name: config.load(CONFIGS / f"{name}.yaml", {**SMALL, **changes})
        for name, changes in (("overfitted-nonprivate", OVERFITTED), ("private", PRIVATE))
    }
    red = audited(plans["overfitted-nonprivate"], source, tmp_path / "overfitted")
    green = audited(plans["private"], source, tmp_path / "private")
    generator, pairs = ("membership inference", "generator"), ("membership inference", "synthetic images")
    copied = ("copy detection", "synthetic images")
    figures = {key: (one.value, one.low, one.high, one.allowed) for key, one in {**red, **green}.items()}
    assert red[generator].low > 0.9 and red[generator].verdict == "fail", figures
    # Some 16 patients on each side leave the attack on the pairs a wide interval; the copies are plain.
    assert red[pairs].value > 0.6 and red[copied].verdict == "fail", figures
    # Above what any attack can reach at epsilon 8, so that the same audit would refute that claim.
    assert red[generator].low > 0.93
    assert "broken" not in {one.verdict for one in (*red.values(), *green.values())}
    assert "fail" not in {one.verdict for one in green.values()}, figures
