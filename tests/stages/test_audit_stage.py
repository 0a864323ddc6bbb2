"""Stage audit: green on an honest study, red on a broken one, and it stands between a run and its certificate."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from medsynth import config, logs, store, study
from medsynth.config import Study
from medsynth.errors import CertificationError, StoreError
from medsynth.imaging.cohort import Patient
from medsynth.metrics.membership import attack
from medsynth.privacy.audit.finding import Control, Finding, refusals
from medsynth.privacy.gradients_unit import UnitBackend
from medsynth.privacy.mechanism import GaussianSum
from medsynth.release.audits import read_findings
from medsynth.stages import (
    audit,
    audit_generator,
    audit_mechanisms,
    audit_results,
    certify,
    report_page,
    synthesise,
    train,
)
from medsynth.stages.audit_results import Sides, allowed_area, audit_pairs
from medsynth.store import Manifest
from medsynth.tracking import Tracker

QUICK = {"repeats": 50_000, "canaries": 1000, "bootstrap": 100}


def two_sides(cohort: Path, held_out: int) -> None:
    """Move the last patients of a cohort to the test side (its manifest does not look into cases.csv)."""
    path = cohort / "cases.csv"
    rows = list(csv.reader(path.read_text().splitlines()))
    for row in rows[-held_out:]:
        row[2] = "test"
    with path.open("w", newline="") as handle:
        csv.writer(handle).writerows(rows)


def finished(
    settings: dict[str, Any], before_training: Any, root: Path, **sections: Any
) -> tuple[Study, dict[str, Path]]:
    tiny = config.parse({**settings, "audit": {**QUICK, **sections.pop("audit", {})}, **sections})
    inputs = before_training(tiny, root, range(20))
    two_sides(inputs["cohort"], 10)
    inputs["synthetic"] = root / "synthetic"
    train.run(tiny, inputs, inputs["generator"], Tracker())
    synthesise.run(tiny, inputs, inputs["synthetic"], Tracker())
    return tiny, inputs


def found(tiny: Study, inputs: dict[str, Path], out: Path) -> dict[tuple[str, str], Finding]:
    manifest = audit.run(tiny, inputs, out, Tracker())
    assert manifest.sensitivity == "internal" and set(manifest.parents) >= {"cohort", "synthetic", "generator"}
    return {(one.audit, one.subject): one for one in read_findings(out)}


@pytest.mark.slow
def test_every_audit_runs_beside_a_control_that_is_caught(
    tiny_settings: dict[str, Any], before_training: Any, tmp_path: Path
) -> None:
    tiny, inputs = finished(tiny_settings, before_training, tmp_path)
    findings = found(tiny, inputs, tmp_path / "audit")
    assert set(findings) == {
        *(("record-replay", name) for name in ("masks", "appearance", "denoiser")),
        ("per-unit gradients", "denoiser"),
        *(("distributional step", name) for name in ("appearance", "denoiser")),
        ("one run with canaries", "denoiser"),
        *(("membership inference", name) for name in ("generator", "drafts")),
        *(("membership inference", f"synthetic {name}") for name in ("images", "label maps")),
        *(("copy detection", f"synthetic {name}") for name in ("images", "label maps")),
    }
    assert {key: one.verdict for key, one in findings.items() if one.verdict in ("broken", "fail")} == {}
    assert refusals(list(findings.values())) == []
    text = (tmp_path / "audit" / "findings.json").read_text()
    assert "patient-0" not in text and str(tmp_path) not in text and "NaN" not in text
    for number, stage in enumerate(study.STAGES):
        if stage.verb == "audit":
            made = {"ingest", "encode", "masks", "train", "synthesise"}
            assert {earlier.verb for earlier in study.STAGES[:number]} >= made


def test_a_stage_that_forgets_its_clip_is_red(
    tiny_settings: dict[str, Any], before_training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    only = dict.fromkeys(("gradients", "step", "one_run", "generator", "pairs"), False)
    unit = {**tiny_settings["train"], "backend": "unit"}  # whose clip goes missing below
    tiny, inputs = finished(tiny_settings, before_training, tmp_path, audit=only, train=unit)
    release = GaussianSum.release

    def unclipped(self: GaussianSum, units: Any, entropy: Any) -> Any:
        return release(self, (), entropy) + 1e6 * sum(units) / self.denominator

    with monkeypatch.context() as patch:
        patch.setattr(GaussianSum, "release", unclipped)
        assert found(tiny, inputs, tmp_path / "one")[("record-replay", "masks")].verdict == "fail"
    clipped = UnitBackend.clipped_sum
    with monkeypatch.context() as patch:
        patch.setattr(UnitBackend, "clipped_sum", lambda self, batches: clipped(self.at(1e9), batches))
        red = found(tiny, inputs, tmp_path / "two")[("record-replay", "denoiser")]
    assert red.verdict == "fail" and red.value > 10 and refusals([red])


def test_a_study_without_privacy_has_no_mechanism_to_audit(
    tiny_settings: dict[str, Any], before_training: Any, tmp_path: Path
) -> None:
    privacy = {**tiny_settings["privacy"], "epsilon": float("inf")}
    tiny, inputs = finished(tiny_settings, before_training, tmp_path, privacy=privacy, name="tiny-nonprivate")
    audits = {name for name, _ in found(tiny, inputs, tmp_path / "audit")}
    assert audits == {"membership inference", "copy detection"}


def test_what_is_switched_off_does_not_run(tiny_settings: dict[str, Any], before_training: Any, tmp_path: Path) -> None:
    off = dict.fromkeys(("record_replay", "gradients", "one_run", "generator", "pairs"), False)
    tiny, inputs = finished(tiny_settings, before_training, tmp_path, audit=off)
    assert {name for name, _ in found(tiny, inputs, tmp_path / "audit")} == {"distributional step"}


def phantoms(count: int, seed: int) -> list[Patient]:
    from medsynth.imaging.phantom import phantom_pairs

    space = config.Grid(spatial_dims=2, shape=(16, 16), labels={0: "background", 1: "organ"})
    images, labels = map(torch.from_numpy, phantom_pairs(space, count, seed))
    return [Patient("", image[None], label[None]) for image, label in zip(images, labels, strict=True)]


def pairs_of(people: Sequence[Patient]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([person.images for person in people]), torch.cat([person.labels for person in people])


@pytest.mark.parametrize(
    ("steps", "start", "drafts", "attacked"),
    [
        (0, 0, True, ["drafts"]),  # an untaught denoiser knows nobody: an attack on it would always pass
        (2, 0, True, ["generator", "drafts"]),  # whoever gets the generator gets what it was taught, used or not
        (0, 0.5, True, ["generator", "drafts"]),
        (2, 1, False, ["generator"]),
    ],
)
def test_what_knows_patients_is_attacked(
    steps: int,
    start: float,
    drafts: bool,
    attacked: list[str],
    tiny_settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {**tiny_settings, "audit": QUICK}
    settings["train"] = {**tiny_settings["train"], "steps": steps}
    tiny = config.parse({**settings, "synthesise": {**tiny_settings.get("synthesise", {}), "start": start}})
    apart, alike = (np.arange(9.0) + 100, np.arange(9.0)), (np.arange(9.0), np.arange(9.0))
    for name, scores in {"familiar": alike, "alike": apart, "overfitted_scores": apart, "copied_scores": alike}.items():
        monkeypatch.setattr(audit_generator, name, lambda *_, scores=scores: scores)
    built: Any = SimpleNamespace(dresser=object() if drafts else None)
    found = list(audit_generator.audit_generator(tiny, built, Sides([], []), 0.9, torch.device("cpu")))
    assert [finding.subject for finding, _ in found] == attacked
    verdicts = {finding.subject: finding.verdict for finding, _ in found}
    assert verdicts.items() <= {"generator": "pass", "drafts": "broken"}.items()


def test_pairs_that_copy_their_patients_are_red_and_fresh_pairs_are_not(tiny_settings: dict[str, Any]) -> None:
    tiny = config.parse({**tiny_settings, "audit": QUICK})
    people = phantoms(60, 0)
    sides = Sides(people[:30], people[30:])
    red = {one.subject + one.audit: one for one in audit_pairs(tiny, *pairs_of(people[:20]), sides, 1.0)}
    green = {one.subject + one.audit: one for one in audit_pairs(tiny, *pairs_of(phantoms(40, 1)), sides, 1.0)}
    assert {one.verdict for one in red.values()} == {"fail"} and "fail" not in {one.verdict for one in green.values()}
    assert "broken" not in {one.verdict for one in green.values()}
    copied = [one for one in red.values() if one.audit == "copy detection"]
    assert len(refusals(copied)) == 2, "copies stop a release whatever its epsilon"
    recognised = [one for one in red.values() if one.audit == "membership inference"]
    assert refusals(recognised) == [], "below what the claim allows it is a warning"
    strict = list(audit_pairs(tiny, *pairs_of(people[:30]), sides, allowed_area([(0.1, 1e-4)])))
    assert len(refusals([one for one in strict if one.audit == "membership inference"])) == 2


def test_strangers_of_an_honest_study_are_not_told_apart_by_chance(tiny_settings: dict[str, Any]) -> None:
    tiny, bound, stopped, doubted = config.parse({**tiny_settings, "audit": QUICK}), allowed_area([(0.05, 1e-5)]), 0, 0
    rng = np.random.default_rng(0)
    control = attack(np.ones(20), np.zeros(20), 10, rng)
    for _ in range(300):
        scores = rng.normal(size=12), rng.normal(size=12)
        found = audit_results.judge_membership(tiny, "x", scores, control, bound, "x", "x")
        doubted, stopped = doubted + (found.verdict == "fail"), stopped + bool(refusals([found]))
    assert doubted > 3 and stopped == 0


def test_a_study_that_gives_every_patient_away_is_stopped(tiny_settings: dict[str, Any]) -> None:
    tiny, rng = config.parse({**tiny_settings, "audit": QUICK}), np.random.default_rng(0)
    control = attack(np.ones(20), np.zeros(20), 10, rng)
    apart = np.arange(25.0) + 100, np.arange(35.0)
    found = [audit_results.judge_membership(tiny, "x", apart, control, bound, "x", "x") for bound in (0.7, 0.95, 1.0)]
    assert {one.verdict for one in found} == {"fail"} and [bool(refusals([one])) for one in found] == [1, 0, 0]


def test_the_log_tells_no_value_that_was_measured_on_patients(
    tiny_study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = _Refused.one("pass")
    monkeypatch.setattr(audit, "_findings", lambda *_: iter([one, replace(one, reads_patients=True, subject="y")]))
    inputs, told = {"ledger": tmp_path / "ledger.jsonl"}, dict[str, Any]()
    inputs["ledger"].write_bytes(b"")
    for name in study.BY_VERB["audit"].reads:
        with store.create(tmp_path / name, name, "0" * 64) as folder:
            folder.finish("released")
        inputs[name] = tmp_path / name
    monkeypatch.setattr(logs, "say", lambda text, **values: told.update({text: values}))
    audit.run(tiny_study, inputs, tmp_path / "audit", Tracker())
    assert told["audit: step of x"] == {"verdict": "pass", "value": 2.0}
    assert told["audit: step of y"] == {"verdict": "pass"}


def test_the_area_that_epsilon_allows() -> None:
    assert allowed_area([(0.0, 0.0)]) == pytest.approx(0.5, abs=1e-3)
    assert 0.52 < allowed_area([(0.1, 1e-4)]) < 0.53 and allowed_area([(8.0, 1e-4)]) > 0.99
    assert allowed_area([(float("inf"), 1e-4)]) == pytest.approx(1.0, abs=1e-3)
    assert allowed_area([(8.0, 1e-4), (1.0, 0.2)]) < allowed_area([(1.0, 0.2)]) + 1e-9 < 0.9


def test_hostile_patients_are_hostile() -> None:
    nan, huge, many = audit_mechanisms.hostile_patients(phantoms(1, 0)[0])
    assert torch.isnan(nan.images).all() and huge.images.max() >= 1e6 and len(many.images) == 4
    assert huge.labels.all() and nan.labels.float().mean() == pytest.approx(0.5)


class _Refused:
    """A run whose audit is stored by hand."""

    def __init__(self, root: Path, tiny: Study, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self.findings = root, [self.one("pass")]

        def run(config: Study, inputs: Any, out: Path, tracker: Tracker) -> Manifest:
            folders = {name: inputs[name] for name in study.BY_VERB["audit"].reads}
            with store.create(out, "audit", study.config_digest(config, "audit"), folders) as folder:
                audit.write_findings(self.findings, folder.path)
                (folder.path / "nonce").write_text(str(np.random.default_rng().random()))
                return folder.finish("internal")

        monkeypatch.setattr(audit, "run", run)
        for name in study.BY_VERB["audit"].reads:
            with store.create(root / name, name, "0" * 64) as folder:
                folder.finish("released")
        (root / study.STUDY).write_text(config.dump(tiny))

    @staticmethod
    def one(outcome: str) -> Finding:
        control = (Control("no clip", 9.0, True),)
        return Finding("step", "x", "epsilon", 2.0, 2.0, 3.0, 1.0, outcome, True, control, "", False)  # type: ignore[arg-type]  # the outcome is a parameter


def test_only_a_red_repetition_is_kept(tiny_study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "open_tracker", lambda *_: Tracker().stage("study"))
    run = _Refused(tmp_path, tiny_study, monkeypatch)
    study.audit_again(tmp_path)
    first = store.read_manifest(tmp_path / "audit").digest
    study.audit_again(tmp_path)
    assert store.read_manifest(tmp_path / "audit").digest == first
    run.findings = [run.one("fail")]
    assert refusals(study.audit_again(tmp_path))
    assert read_findings(tmp_path / "audit")[0].outcome == "fail"
    assert not list(tmp_path.glob(".audit*"))


def test_a_run_without_its_study_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"holds no study\.yaml"):
        study.audit_again(tmp_path)


def test_a_red_audit_stops_the_certificate(
    tiny_settings: dict[str, Any], before_training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    off = dict.fromkeys(("record_replay", "gradients", "one_run", "generator", "pairs"), False)
    tiny, inputs = finished(tiny_settings, before_training, tmp_path, audit=off)
    audit.run(tiny, inputs, tmp_path / "audit", Tracker())
    text = json.loads((tmp_path / "audit" / "findings.json").read_text())
    caught = [{**control, "caught": True} for control in text["findings"][0]["controls"]]  # 20,000 runs may miss one
    text["findings"][0] |= {"low": 99.0, "outcome": "fail", "controls": caught}
    (tmp_path / "audit" / "findings.json").write_text(json.dumps(text))
    more = {"audit": tmp_path / "audit", "keys": tmp_path / "keys"}
    with pytest.raises(CertificationError, match=r"audit 'distributional step' of '\w+' failed.*at least 99"):
        certify.run(tiny, {**inputs, **more}, tmp_path / "certificate", Tracker())
    (tmp_path / "audit" / "findings.json").write_text('{"findings": []}')
    with pytest.raises(CertificationError, match="no audit of the mechanisms was run"):
        certify.run(tiny, {**inputs, **more}, tmp_path / "certificate", Tracker())


def test_the_report_shows_every_audit_beside_its_control_and_says_what_was_missed() -> None:
    missed = Control("half the <noise>", 1.0, False)
    table = report_page._audits(
        [_Refused.one("pass").to_json(), replace(_Refused.one("pass"), controls=(missed,)).to_json()]
    )
    assert "caught: no clip" in table and "<b>MISSED</b>: half the &lt;noise&gt;" in table
    assert '<span class="pass">pass</span>' in table and '<span class="fail">broken</span>' in table
    assert report_page._audits([]) == ""
