"""Findings stand between a run and its certificate, and only their names leave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from medsynth import store
from medsynth.errors import StoreError
from medsynth.privacy.audit.finding import Control, Finding
from medsynth.release.audits import FINDINGS, left_out, read_findings, refusals, summary, unaudited


def finding(**changes: object) -> Finding:
    values = {
        "audit": "distributional step",
        "subject": "denoiser",
        "measures": "epsilon of one step",
        "value": 0.7,
        "low": 0.7,
        "high": float("inf"),
        "allowed": 1.5,
        "outcome": "pass",
        "blocks": True,
        "controls": (Control("no clip", 4.0, True),),
        "shows": "x",
        "reads_patients": False,
    }
    return Finding(**{**values, **changes})  # type: ignore[arg-type]  # a table of any fields


def audited(root: Path, *findings: Finding) -> tuple[Path, str]:
    with store.create(root / "synthetic", "synthesise", "0" * 64) as folder:
        folder.finish("released")
    with store.create(root / "audit", "audit", "0" * 64, {"synthetic": root / "synthetic"}) as folder:
        text = json.dumps({"findings": [one.to_json() for one in findings]}, allow_nan=False)
        (folder.path / FINDINGS).write_text(text)
        folder.finish("internal")
    return root / "audit", store.read_manifest(root / "synthetic").digest


def test_a_bound_above_the_claim_refuses(tmp_path: Path) -> None:
    red = finding(outcome="fail", low=2.5, value=2.5)
    assert "at least 2.5, allowed is 1.5" in refusals(*audited(tmp_path, finding(), red))[0]


def test_an_audit_that_missed_its_control_refuses(tmp_path: Path) -> None:
    broken = finding(controls=(Control("no clip", 4.0, True), Control("half the noise", 1.0, False)))
    assert "did not catch its positive control (half the noise)" in refusals(*audited(tmp_path, broken))[0]


def test_green_audits_of_these_pairs_do_not_refuse_and_those_of_others_do(tmp_path: Path) -> None:
    folder, digest = audited(tmp_path, finding(), finding(outcome="cannot say"))
    assert refusals(folder, digest) == []
    assert "other synthetic pairs" in refusals(folder, "1" * 64)[0]


def test_no_certificate_without_an_audit_of_the_mechanisms(tmp_path: Path) -> None:
    only = finding(audit="copy detection", reads_patients=True)
    folder, _ = audited(tmp_path / "one", only)
    assert "no audit of the mechanisms was run" in unaudited(folder)[0]
    assert unaudited(audited(tmp_path / "two", only, finding())[0]) == []


def test_which_audits_are_signed_tells_nothing_of_the_cohort(tmp_path: Path) -> None:
    """With one patient held back those of results are left out: the study has to say so, or there is no certificate."""
    mechanisms = finding(), finding(audit="record-replay", reads_patients=True)
    folder, _ = audited(tmp_path / "one", *mechanisms)
    assert "two patients on each side" in left_out(folder)[0]
    folder, _ = audited(tmp_path / "two", *mechanisms, finding(audit="copy detection", reads_patients=True))
    assert left_out(folder) == []


def test_an_audit_that_did_not_finish_or_cannot_be_read_is_no_pass(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not finished"):
        read_findings(tmp_path / "audit")
    folder, _ = audited(tmp_path, finding())
    (folder / FINDINGS).write_text('{"findings": [{"audit": "x"}]}')
    with pytest.raises(StoreError, match="no readable findings"):
        read_findings(folder)


def test_what_was_measured_on_patients_is_not_signed() -> None:
    signed = summary([finding(), finding(audit="copy detection", reads_patients=True, outcome="fail", value=0.93)])
    assert signed == [
        {"audit": "distributional step", "subject": "denoiser", "verdict": "pass"},
        {"audit": "copy detection", "subject": "denoiser"},
    ]
