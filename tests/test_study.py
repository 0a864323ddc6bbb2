"""The study runner: finished stages are skipped, changed ones are refused, a kill costs only the stage in hand."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from medsynth import config, store, study
from medsynth.config import Study
from medsynth.errors import BudgetError, CertificationError, PrivacyError, StoreError
from medsynth.imaging.deidentify import REFERENCES_FILE, References, key_id, write_references
from medsynth.privacy.accounting import Event
from medsynth.privacy.ledger import Ledger
from medsynth.release import keys
from medsynth.site import signing_keys, site_key
from medsynth.stages.inputs import SECTIONS, account_of, config_digest, open_ledger, stage_inputs
from medsynth.store import Manifest
from medsynth.tracking import Tracker

PEOPLE = frozenset({"a1" * 32})
VERBS = [stage.verb for stage in study.STAGES]


@pytest.mark.parametrize("below", [".", "run", "a/../deep/run"])
def test_a_run_in_the_hospitals_folder_is_refused_before_anything_is_written(
    below: str, tiny_study: Study, tmp_path: Path
) -> None:
    """Its release would be read as patients the next time."""
    hospital = tmp_path / "hospital"
    (hospital / "a").mkdir(parents=True)
    for start in (
        lambda: study.run_study(tiny_study, hospital, hospital / below),
        lambda: study.run_verb(tiny_study, "ingest", hospital, hospital / below),
    ):
        with pytest.raises(StoreError, match="outside of --input"):
            start()
    assert [path.name for path in hospital.iterdir()] == ["a"]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Put stages that only write their manifest in place of the real ones; return the verbs that ran."""
    verbs: list[str] = []

    def module(name: str) -> SimpleNamespace:
        verb = name.rsplit(".", 1)[1]

        def run(config: Study, inputs: Mapping[str, Path], out: Path, tracker: Tracker) -> Manifest:
            real = {"certify": ("synthetic",), "export": ("certificate",)}  # of what they read, these are their parents
            parents = stage_inputs(inputs, *real.get(verb, study.BY_VERB[verb].reads))
            with store.create(out, verb, config_digest(config, verb), parents) as folder:
                if verb == "ingest":
                    write_references(folder.path, References(key_id(site_key()), PEOPLE))
                if verb == "audit":
                    (folder.path / "findings.json").write_text('{"findings": []}')
                (folder.path / "file").write_text(config_digest(config, verb))
                verbs.append(verb)
                return folder.finish("internal", details=_state(inputs) if verb == "certify" else None)

        return SimpleNamespace(run=run)

    monkeypatch.setattr(study, "importlib", SimpleNamespace(import_module=module))
    monkeypatch.setattr(study, "open_tracker", lambda *_: Tracker().stage("study"))
    return verbs


def _state(inputs: Mapping[str, Path]) -> dict[str, Any]:
    """What a certificate remembers of ledger and account."""
    ledger = open_ledger(inputs)
    assert ledger.account is not None
    return {"certified": True, "ledger": ledger.head, "account": ledger.account.others(ledger.entries()).state}


def changed(settings: dict[str, Any], section: str, **values: Any) -> Study:
    return config.parse({**settings, section: {**settings[section], **values}})


def test_every_stage_runs_once_and_in_an_order_that_has_its_inputs(
    tiny_study: Study, tmp_path: Path, ran: list[str]
) -> None:
    study.run_study(tiny_study, tmp_path / "source", tmp_path / "run")
    assert ran == VERBS
    made = {path.name for path in (tmp_path / "run").iterdir() if path.is_dir()}
    assert made == {stage.folder for stage in study.STAGES}
    for number, stage in enumerate(study.STAGES):
        assert set(stage.reads) <= {earlier.folder for earlier in study.STAGES[:number]}
    study.run_study(tiny_study, None, tmp_path / "run")
    assert ran == VERBS, "finished stages are skipped"


def test_time_and_memory_of_every_stage_are_kept(tiny_study: Study, tmp_path: Path, ran: list[str]) -> None:
    study.run_verb(tiny_study, "ingest", tmp_path / "source", tmp_path / "run")
    study.run_study(tiny_study, tmp_path / "source", tmp_path / "run")
    kept = json.loads((tmp_path / "run" / study.RESOURCES).read_text())
    assert list(kept) == VERBS, "a stage that is skipped keeps what it took"
    for stage in kept.values():
        assert stage["elapsed_s"] >= 0 and 0 < stage["peak_memory_gib"] < stage["machine_memory_gib"]


def test_every_stage_is_known_to_the_config_digest() -> None:
    assert set(SECTIONS) == set(VERBS)
    assert {name for names in SECTIONS.values() for name in names} <= set(Study.model_fields)


def test_what_only_costs_time_makes_nothing_stale(
    tiny_study: Study, tiny_settings: dict[str, Any], tmp_path: Path, ran: list[str]
) -> None:
    study.run_study(tiny_study, None, tmp_path / "run")
    study.run_study(changed(tiny_settings, "compute", threads=2, workers=2), None, tmp_path / "run")
    assert ran == VERBS


def test_a_changed_config_is_refused_and_replaced_only_when_told(
    tiny_study: Study, tiny_settings: dict[str, Any], tmp_path: Path, ran: list[str]
) -> None:
    study.run_study(tiny_study, None, tmp_path / "run")
    other = changed(tiny_settings, "synthesise", pairs=5)
    before = store.read_manifest(tmp_path / "run" / "synthetic")
    with pytest.raises(StoreError, match=r"'synthetic' was made from other settings: pass --replace"):
        study.run_study(other, None, tmp_path / "run")
    assert store.read_manifest(tmp_path / "run" / "synthetic") == before
    study.run_study(other, None, tmp_path / "run", replace=True)
    assert ran[len(VERBS) :] == [verb for verb in VERBS if verb in ("synthesise", *VERBS[VERBS.index("segment") :])]
    assert store.read_manifest(tmp_path / "run" / "synthetic").digest != before.digest


def test_a_stage_made_again_makes_what_rests_on_it_stale(
    tiny_study: Study, tiny_settings: dict[str, Any], tmp_path: Path, ran: list[str]
) -> None:
    study.run_study(tiny_study, None, tmp_path / "run")
    study.run_verb(changed(tiny_settings, "masks", band_voxels=3), "masks", None, tmp_path / "run", replace=True)
    with pytest.raises(StoreError, match="inputs"):
        study.run_verb(tiny_study, "synthesise", None, tmp_path / "run")


@pytest.mark.parametrize("verb", VERBS)
def test_a_killed_study_goes_on_at_the_stage_in_hand(
    verb: str, tiny_study: Study, tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = store.StageFolder.finish

    def killed(self: store.StageFolder, *args: Any, **more: Any) -> Manifest:
        if ran[-1] == verb:
            raise KeyboardInterrupt
        return finish(self, *args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(store.StageFolder, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            study.run_study(tiny_study, None, tmp_path / "run")
    assert not (tmp_path / "run" / study.BY_VERB[verb].folder).exists()
    study.run_study(tiny_study, None, tmp_path / "run")
    assert ran == [*VERBS[: VERBS.index(verb)], verb, *VERBS[VERBS.index(verb) :]]


def test_one_verb_needs_the_ones_before_it(tiny_study: Study, tmp_path: Path, ran: list[str]) -> None:
    with pytest.raises(StoreError, match="run the stage before it first"):
        study.run_verb(tiny_study, "masks", None, tmp_path / "run")
    study.run_verb(tiny_study, "ingest", None, tmp_path / "run")
    study.run_verb(tiny_study, "masks", None, tmp_path / "run")
    assert ran == ["ingest", "masks"]


def test_a_run_folder_that_cannot_be_made_is_a_store_error(tiny_study: Study, tmp_path: Path, ran: list[str]) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreError, match="cannot write the run folder"):
        study.run_study(tiny_study, None, tmp_path / "file" / "run")
    assert ran == []


def test_a_replacement_that_fails_leaves_the_finished_folder(
    tiny_study: Study, tiny_settings: dict[str, Any], tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study.run_study(tiny_study, None, tmp_path / "run")
    before = store.read_manifest(tmp_path / "run" / "masks")

    def fail(*_: Any) -> Manifest:
        raise BudgetError("nothing is left")

    monkeypatch.setattr(study, "importlib", SimpleNamespace(import_module=lambda _: SimpleNamespace(run=fail)))
    other = changed(tiny_settings, "masks", band_voxels=3)
    with pytest.raises(BudgetError):
        study.run_verb(other, "masks", None, tmp_path / "run", replace=True)
    assert store.read_manifest(tmp_path / "run" / "masks") == before


def _spend(run: Path, people: frozenset[str] = PEOPLE) -> Ledger:
    """Reserve in a run as its stages do; the run is made where there is none."""
    if not store.is_done(run / "cohort"):
        with store.create(run / "cohort", "ingest", "0" * 64) as folder:
            write_references(folder.path, References(key_id(site_key()), people))
            folder.finish("private")
    ledger = Ledger(run / "ledger.jsonl", account_of(run))
    ledger.reserve(
        "masks",
        [Event("gaussian", 9.0)],
        epsilon=8.0,
        delta=1e-4,
        noise_source="os",
        config_digest="c" * 64,
        parents={"cohort": store.read_manifest(run / "cohort").digest},
    )
    return ledger


@pytest.mark.parametrize("who", ["the run itself", "another run on its patients"])
def test_certify_runs_again_when_more_was_reserved_and_nothing_was_released(
    who: str, tiny_study: Study, tmp_path: Path, ran: list[str]
) -> None:
    run = tmp_path / "run"
    for verb in VERBS[:-1]:
        study.run_verb(tiny_study, verb, None, run)
    study.run_verb(tiny_study, "certify", None, run)
    assert ran == VERBS[:-1], "nothing was reserved since"
    _spend(run if who == "the run itself" else tmp_path / "other")
    study.run_verb(tiny_study, "certify", None, run)
    assert ran == [*VERBS[:-1], "certify"]
    study.run_verb(tiny_study, "certify", None, run)
    assert ran == [*VERBS[:-1], "certify"]


def test_a_released_certificate_is_kept_and_told_to_be_old(
    tiny_study: Study, tmp_path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    study.run_study(tiny_study, None, run)
    _spend(tmp_path / "other")
    study.run_study(tiny_study, None, run)
    assert ran == VERBS and "--replace certifies again" in capsys.readouterr().err
    study.run_verb(tiny_study, "certify", None, run, replace=True)
    assert ran == [*VERBS, "certify"]


RED = {
    **{"audit": "record-replay", "subject": "masks", "measures": "the change", "value": 9.0, "low": 9.0, "high": 9.0},
    **{"allowed": 1.0, "outcome": "fail", "blocks": True, "shows": "a change", "reads_patients": False},
    "controls": [{"name": "broken", "value": 9.0, "caught": True}],
}


def _audited_again(study_: Study, run: Path, findings: list[dict[str, Any]]) -> None:
    """Put findings in the place of the run's, as a repeated audit of the pairs that are there does."""
    parents = {name: run / name for name in study.BY_VERB["audit"].reads}
    shutil.rmtree(run / "audit")
    with store.create(run / "audit", "audit", config_digest(study_, "audit"), parents) as folder:
        (folder.path / "findings.json").write_text(json.dumps({"findings": findings}))
        folder.finish("internal")


@pytest.mark.parametrize("released", [True, False])
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("verb", ["run", "certify", "export"])
def test_nothing_goes_out_of_what_was_certified_before_an_audit_refused_it(
    verb: str, replace: bool, released: bool, tiny_study: Study, tmp_path: Path, ran: list[str]
) -> None:
    run = tmp_path / "run"
    study.run_study(tiny_study, None, run)
    if not released:
        shutil.rmtree(run / "release")
    _audited_again(tiny_study, run, [RED])
    with pytest.raises(CertificationError, match=r"tell whoever has it(.|\n)*'record-replay' of 'masks' failed"):
        if verb == "run":
            study.run_study(tiny_study, None, run, replace=replace)
        else:
            study.run_verb(tiny_study, verb, None, run, replace=replace)
    assert ran == VERBS and (run / "release").exists() == released


def test_audits_of_other_pairs_take_no_release_back(
    tiny_settings: dict[str, Any], tiny_study: Study, tmp_path: Path, ran: list[str]
) -> None:
    run = tmp_path / "run"
    study.run_study(tiny_study, None, run)
    other = changed(tiny_settings, "synthesise", pairs=9)
    study.run_verb(other, "synthesise", None, run, replace=True)
    study.run_verb(tiny_study, "export", None, run)
    _audited_again(other, run, [RED])
    study.run_verb(tiny_study, "export", None, run)
    assert ran == [*VERBS, "synthesise"]


def test_an_audit_that_refuses_what_promises_nothing_recalls_nothing(
    tiny_study: Study, tmp_path: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "_state", lambda _: {"certified": False})
    run = tmp_path / "run"
    study.run_study(tiny_study, None, run)
    _audited_again(tiny_study, run, [RED])
    study.run_verb(tiny_study, "export", None, run)
    assert ran == VERBS


def test_a_certificate_of_another_key_is_signed_again_only_when_told(
    tiny_study: Study, tmp_path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    keys.create(signing_keys())
    study.run_study(tiny_study, None, run)
    (run / "certificate" / "public.pem").write_bytes(keys.public(signing_keys()))
    study.run_verb(tiny_study, "certify", None, run, replace=True)
    assert ran == VERBS and "another key" not in capsys.readouterr().err
    keys.rotate(signing_keys(), stolen=True)
    study.run_verb(tiny_study, "certify", None, run)
    told = capsys.readouterr().err
    assert ran == VERBS and "another key than the active one signed the certificate: --replace certifies" in told
    _spend(tmp_path / "other")
    study.run_verb(tiny_study, "certify", None, run)
    told = capsys.readouterr().err
    assert ran == VERBS and "more was reserved" in told and "another key" in told
    study.run_verb(tiny_study, "certify", None, run, replace=True)
    assert ran == [*VERBS, "certify"]


def test_a_spend_on_other_patients_makes_nothing_old(tiny_study: Study, tmp_path: Path, ran: list[str]) -> None:
    for verb in VERBS[:-1]:
        study.run_verb(tiny_study, verb, None, tmp_path / "run")
    _spend(tmp_path / "other", frozenset({"b2" * 32}))
    study.run_verb(tiny_study, "certify", None, tmp_path / "run")
    assert ran == VERBS[:-1]


def test_a_ledger_of_another_cohort_stops_the_stage(tiny_study: Study, tmp_path: Path, ran: list[str]) -> None:
    study.run_verb(tiny_study, "ingest", None, tmp_path / "run")
    _spend(tmp_path / "other", frozenset({"b2" * 32}))
    (tmp_path / "run" / "ledger.jsonl").write_bytes((tmp_path / "other" / "ledger.jsonl").read_bytes())
    with pytest.raises(PrivacyError, match="another cohort"):
        study.run_verb(tiny_study, "masks", None, tmp_path / "run")
    assert ran == ["ingest"]


def test_a_cohort_without_references_is_ingested_again(tiny_study: Study, tmp_path: Path, ran: list[str]) -> None:
    study.run_verb(tiny_study, "ingest", None, tmp_path / "run")
    (tmp_path / "run" / "cohort" / REFERENCES_FILE).unlink()
    with pytest.raises(StoreError, match="run ingest again"):
        study.run_verb(tiny_study, "masks", None, tmp_path / "run")


@pytest.mark.parametrize(
    ("values", "promise"),
    [
        ({"entropy": "os"}, "At most epsilon 8 at delta 0.0001"),
        ({"entropy": "test_only"}, "Repeatable noise"),
        ({"epsilon": "inf"}, "WITHOUT privacy"),
    ],
)
def test_the_page_of_a_run_in_mlflow_says_what_it_promises(
    tiny_settings: dict[str, Any], values: dict[str, Any], promise: str
) -> None:
    name = {"name": "tiny-nonprivate"} if "epsilon" in values else {}
    text = study._description(changed({**tiny_settings, **name}, "privacy", **values))
    assert promise in text and ("At most" in text) == ("os" in values.values())


def test_studies_can_be_sorted_by_skill_and_agreement(tmp_path: Path) -> None:
    (tmp_path / "report").mkdir()
    dice = {"real_only": {"mean": 0.9, "skill": 1.0}, "synthetic_only": {"mean": 0.8, "skill": 0.5}}
    report = {"dice": dice, "floor": {"mean": 0.7}, "agreement": {"mean": 0.85}, "epsilon": 7.9921}
    for agreement in (report["agreement"], None):
        (tmp_path / "report" / "report.json").write_text(json.dumps({**report, "agreement": agreement}))
        found = study._headline(tmp_path)
        assert (
            found["skill/synthetic_only"] == 0.5 and found["dice/real_only"] == 0.9 and "skill/real_only" not in found
        )
        assert found["epsilon"] == 7.993, "rounded up, as in the certificate"
        assert found.get("agreement") == (0.85 if agreement else None)
    report["dice"] = {"synthetic_only": {"mean": 0.8}}  # as in a study whose regimes are without real_only
    (tmp_path / "report" / "report.json").write_text(json.dumps({**report, "agreement": None}))
    assert study._headline(tmp_path) == {"dice/synthetic_only": 0.8, "floor": 0.7, "epsilon": 7.993}
