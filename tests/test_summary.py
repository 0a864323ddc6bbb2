"""What a person reads at the end of a run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from medsynth import store
from medsynth.config import Study
from medsynth.privacy.audit.finding import Control, Finding
from medsynth.summary import print_findings, summary


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name, details in (
        ("cohort", {"patients": 9, "quarantined": {"no_label": 2, "non_finite": 1}}),
        ("synthetic", {"pairs": 4}),
    ):
        with store.create(tmp_path / name, name, "digest") as folder:
            folder.finish("private", details=details)
    dice = {"mean": 0.81, "ci95": [0.79, 0.83], "n_patients": 3}
    report = {"dice": {"real_only": dice}, "floor": {"mean": 0.6}, "epsilon": 7.9921, "delta": 1e-4, "unit": "patient"}
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text(json.dumps(report))
    return tmp_path


def test_it_counts_and_says_what_it_cost(tiny_study: Study, run: Path) -> None:
    text = summary(tiny_study, run)
    for expected in (
        "patients in",
        "3  (no_label 2, non_finite 1)",
        "7.993 at delta 0.0001, unit patient",
        "0.810  (95 %",
    ):
        assert expected in text


def test_the_command_that_opens_mlflow_is_fit_for_a_shell(tiny_study: Study, run: Path) -> None:
    spaced = run.rename(run.with_name("a patient's $(folder)"))
    (line,) = [line for line in summary(tiny_study, spaced).splitlines() if line.startswith("MLflow")]
    words = shlex.split(line)
    assert words == ["MLflow", "mlflow", "ui", "--backend-store-uri", f"sqlite:///{spaced / 'mlflow' / 'mlflow.db'}"]


def test_a_study_without_privacy_is_called_so(tiny_study: Study, run: Path) -> None:
    privacy = tiny_study.privacy.model_copy(update={"epsilon": float("inf")})
    assert "NOT PRIVATE" in summary(tiny_study.model_copy(update={"privacy": privacy}), run)


def test_the_skill_of_the_pairs_is_told_where_it_was_measured(tiny_study: Study, run: Path) -> None:
    assert "skill synthetic only" not in summary(tiny_study, run)
    path = run / "report" / "report.json"
    report = json.loads(path.read_text())
    report["dice"]["synthetic_only"] = {**report["dice"]["real_only"], "mean": 0.7, "skill": 0.476}
    path.write_text(json.dumps(report))
    assert "skill synthetic only  0.48 " in summary(tiny_study, run)


def test_what_an_audit_shows_is_said_once_and_of_what(capsys: pytest.CaptureFixture[str]) -> None:
    def finding(subject: str, shows: str) -> Finding:
        control = Control("leaky", 1.0, True)
        return Finding("step", subject, "area", 0.5, 0.4, 0.6, 0.6, "pass", True, (control,), shows, True)

    print_findings([finding("masks", "Little."), finding("denoiser", "Little."), finding("drafts", "Less.")])
    printed = capsys.readouterr().out
    assert "step of masks, denoiser: Little." in printed and "step of drafts: Less." in printed
    assert printed.count("Little.") == 1
