"""What a certificate says of all studies of the same patients, and that nobody can say less than was reserved."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medsynth import store
from medsynth.config import Study
from medsynth.errors import PrivacyError, VerificationError
from medsynth.privacy.account import Account, Others, Release, open_account
from medsynth.privacy.accounting import Event, epsilon
from medsynth.privacy.ledger import Ledger
from medsynth.release import gate, spending
from medsynth.release.ancestry import walk
from medsynth.site import accounts
from medsynth.stages import certify
from medsynth.tracking import Tracker

Run = Callable[..., Path]
Make = Callable[..., Study]
PEOPLE = frozenset({"a1" * 32})
OTHER = Event("gaussian", 5.0)
RELEASE = Release("e" * 64, 2.5, 1e-4)
KNOWN = Others(2, 1, (OTHER,), (RELEASE,), False, "5" * 64)


def costs(events: Any, delta: float) -> dict[str, float]:
    return {"pld": epsilon(events, delta)}


def entries_of(run: Path) -> list[dict[str, Any]]:
    return Ledger(run / "ledger.jsonl").entries()


def predicate(run: Path, others: Others | None = KNOWN) -> dict[str, Any]:
    account = spending.account(others, entries_of(run), 1e-4)
    return {"account": account, "claim": {"delta": 1e-4, "trials": 1}}


def charged(run: Path) -> Account:
    """The account of a fake run, opened as the study runner does."""
    cohort = store.read_manifest(run / "cohort").digest
    return open_account(accounts(), PEOPLE, ledger=run / "ledger.jsonl", cohort=cohort)


def reserve(ledger: Ledger, event: Event = OTHER, trials: int = 1) -> None:
    ledger.reserve(
        "masks",
        [event],
        epsilon=8.0,
        delta=1e-4,
        noise_source="os",
        config_digest="c" * 64,
        parents={"cohort": "d" * 64},
        trials=trials,
    )


def certified(run: Path, study: Study) -> dict[str, Any]:
    import base64

    inputs = {name: run / name for name in ("synthetic", "keys")} | {"ledger": run / "ledger.jsonl"}
    certify.run(study, inputs | {"account": charged(run).folder}, run / "certificate", Tracker())
    envelope = json.loads((run / "certificate" / "certificate.dsse.json").read_text())
    statement: dict[str, Any] = json.loads(base64.b64decode(envelope["payload"]))
    return statement


@pytest.fixture
def one_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(certify, "agreeing_accountants", lambda events, delta: {"pld": epsilon(events, delta)})


def test_the_number_is_that_of_everything_together(fake_run: Run) -> None:
    run = fake_run()
    own = spending.events(entries_of(run))
    said = predicate(run)["account"]
    assert said["epsilon"] == pytest.approx(epsilon([*own, OTHER], 1e-4), abs=1e-3)
    assert epsilon(own, 1e-4) < epsilon([*own, OTHER], 1e-4) <= said["epsilon"]
    assert said["earlier_releases"] == [{"statement": "e" * 64, "epsilon": 2.5, "delta": 1e-4}]


def test_words_say_what_the_numbers_say(fake_run: Run) -> None:
    run = fake_run()
    words = predicate(run)["account"]["in_words"]
    assert "2 other studies" in words and "e" * 12 in words and "1 of the other studies read patients without" in words
    alone = predicate(run, Others(0, 0, (), (), False, ""))["account"]["in_words"]
    assert "knows no other study" in alone and "without a mechanism" not in alone
    assert "is missing from it" in predicate(run, Others(0, 0, (), (), True, ""))["account"]["in_words"]
    assert "unknown to this ledger" in predicate(run, None)["account"]["in_words"]


@pytest.mark.parametrize("others", [KNOWN, None, Others(0, 0, (), (), True, "")])
def test_a_true_account_holds(fake_run: Run, others: Others | None) -> None:
    run = fake_run()
    assert spending.check_account(predicate(run, others), entries_of(run), costs) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epsilon": 0.5}, "all studies together cost epsilon"),
        ({"epsilon": float("nan")}, "all studies together cost epsilon"),
        ({"delta": 1e-3}, "its delta is"),
        ({"scope": "ledger"}, "unknown, and names some"),
        ({"scope": "world"}, "expected 'site' or 'ledger'"),
        ({"other_studies": 1}, "words"),
        ({"without_promise": 3}, "more studies without a promise"),
        ({"earlier_releases": []}, "words"),
        ({"recovered": True}, "words"),
        ({"in_words": "No other study is known."}, "words"),
        ({"other_events": [{**OTHER.to_json(), "noise_multiplier": 0.5}]}, "all studies together cost epsilon"),
        ({"other_events": [{**OTHER.to_json(), "count": 50}]}, "all studies together cost epsilon"),
    ],
)
def test_a_false_account_is_named(fake_run: Run, wrong: dict[str, Any], message: str) -> None:
    run = fake_run()
    said = predicate(run)
    said["account"] |= copy.deepcopy(wrong)
    assert any(message in problem for problem in spending.check_account(said, entries_of(run), costs))


def test_a_sweep_that_the_ledger_does_not_charge_is_named(fake_run: Run) -> None:
    run = fake_run()
    said = predicate(run)
    said["claim"]["trials"] = 4
    assert any("sweep of 4" in problem for problem in spending.check_account(said, entries_of(run), costs))


def test_an_access_without_a_mechanism_is_no_summand(fake_run: Run) -> None:
    said = predicate(fake_run())
    said["account"]["other_events"] = [Event("nonprivate").to_json()]
    with pytest.raises(PrivacyError, match="cannot be part of a sum"):
        spending.check_account(said, [], costs)


def test_a_certificate_counts_what_other_runs_reserved(fake_run: Run, fake_study: Make, one_accountant: None) -> None:
    run = fake_run()
    account = charged(run)
    other = Ledger(run.parent / "other.jsonl", account)
    reserve(other)
    account.release(other.entries(), RELEASE)
    statement = certified(run, fake_study())
    said, claim = statement["predicate"]["account"], statement["predicate"]["claim"]
    assert said["scope"] == "site" and said["other_studies"] == 1
    assert said["epsilon"] > claim["epsilon"]
    assert [entry["statement"] for entry in said["earlier_releases"]] == ["e" * 64]
    page = (run / "certificate" / "payload" / "PRIVACY.md").read_text()
    assert said["in_words"] in page
    mine = [line for line in account.lines() if line["type"] == "release"][-1]
    assert mine["statement"] == store.digest_of(statement) and mine["epsilon"] == claim["epsilon"]


def test_the_release_is_noted_before_the_certificate_is_finished(
    fake_run: Run, fake_study: Make, one_accountant: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fake_run()

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(store.StageFolder, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        certified(run, fake_study())
    assert not (run / "certificate").exists()
    assert [line["type"] for line in charged(run).lines()][-1] == "release"


def test_a_certificate_with_a_ledger_of_another_cohort_is_refused(fake_run: Run, fake_study: Make) -> None:
    run = fake_run()
    elsewhere = open_account(accounts(), {"b2" * 32}, ledger=run.parent / "none.jsonl", cohort="d" * 64)
    book = Ledger(run / "ledger.jsonl", charged(run))
    reserve(book)
    inputs = {"synthetic": run / "synthetic", "keys": run / "keys", "ledger": book.path, "account": elsewhere.folder}
    with pytest.raises(PrivacyError, match="another cohort"):
        certify.run(fake_study(), inputs, run / "certificate", Tracker())
    assert not (run / "certificate").exists()


@pytest.mark.parametrize("victim", ["ledger", "account"])
def test_a_broken_chain_stops_the_certificate(fake_run: Run, fake_study: Make, victim: str) -> None:
    run = fake_run()
    folder = charged(run).folder
    path = run / "ledger.jsonl" if victim == "ledger" else folder / "account.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"noise_multiplier":8.0', b'"noise_multiplier":9.0'))
    inputs = {"synthetic": run / "synthetic", "keys": run / "keys", "ledger": run / "ledger.jsonl", "account": folder}
    with pytest.raises(VerificationError, match=rf"{victim} line \d was changed.*restore"):
        certify.run(fake_study(), inputs, run / "certificate", Tracker())
    assert not (run / "certificate").exists()


def test_pitfall_14_a_sweep_whose_studies_cost_more_than_the_claim_is_refused(fake_run: Run, fake_study: Make) -> None:
    run = fake_run()
    account = charged(run)
    cheap, dear = (Ledger(run.parent / f"{name}.jsonl", account) for name in ("cheap", "dear"))
    for book, noise in ((cheap, 20.0), (dear, 4.0)):
        reserve(book, Event("gaussian", noise), trials=2)
    ancestry, privacy = walk(run / "synthetic", {}), fake_study().privacy
    assert any("of this sweep reserved" in reason for reason in gate.refusals(ancestry, cheap, privacy))
    assert not any("of this sweep reserved" in reason for reason in gate.refusals(ancestry, dear, privacy))


def test_every_declared_trial_is_in_the_claim(fake_run: Run) -> None:
    entries = [{**entry, "trials": 3} for entry in entries_of(fake_run())]
    once = spending.events([{**entry, "trials": 1} for entry in entries])
    assert epsilon(spending.events(entries), 1e-4) == epsilon(once * 3, 1e-4)
    assert spending.trials(entries) == 3


def test_the_gate_refuses_a_delta_above_the_rule(fake_run: Run, fake_study: Make) -> None:
    run = fake_run()
    for delta in (1 / 200, 1 / 1999):
        privacy = fake_study().privacy.model_copy(update={"delta": delta})
        reasons = gate.refusals(walk(run / "synthetic", {}), Ledger(run / "ledger.jsonl"), privacy)
        assert any("above 1/(10 N)" in reason for reason in reasons)


def test_an_earlier_release_of_the_same_study_is_listed_and_the_same_statement_is_none(
    fake_run: Run, fake_study: Make, one_accountant: None
) -> None:
    run = fake_run()

    def again(**more: str) -> dict[str, Any]:
        if (run / "certificate").exists():
            shutil.rmtree(run / "certificate")
        # DICOM files hold the time at which they are written: without them, bytes are a function of the settings.
        return certified(run, fake_study(export={"formats": ["nifti"], **more}))

    def earlier(statement: dict[str, Any]) -> list[str]:
        return [entry["statement"] for entry in statement["predicate"]["account"]["earlier_releases"]]

    first = again()
    assert earlier(first) == [] and again() == first
    second = again(licence="CC0-1.0")
    assert earlier(second) == [store.digest_of(first)] and again(licence="CC0-1.0") == second
    assert earlier(again()) == [store.digest_of(first), store.digest_of(second)]
