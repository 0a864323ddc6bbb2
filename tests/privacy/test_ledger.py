"""The ledger and the step journal: no overspend, no silent edit, no refund, no repeated step."""

from __future__ import annotations

import json
import math
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medsynth.errors import BudgetError, PrivacyError, VerificationError
from medsynth.privacy.accounting import Event, epsilon
from medsynth.privacy.chain import GENESIS, parse_chain
from medsynth.privacy.journal import StepJournal
from medsynth.privacy.ledger import Ledger
from medsynth.privacy.mechanism import DpSgd, GaussianSum

POSE = GaussianSum("pose", 6, clip_norm=4.0, noise_multiplier=1.5, denominator=200.0)
SHAPE = GaussianSum("shape", 60, clip_norm=40.0, noise_multiplier=1.5, denominator=200.0)
TRAIN = DpSgd("denoiser", 0.25, 20, 2.0, 1.0, 50.0)
COMMON: dict[str, Any] = {
    "epsilon": 8.0,
    "delta": 1e-4,
    "noise_source": "os",
    "config_digest": "c" * 64,
    "parents": {"cohort": "a" * 64},
}
PASSED = {"preflight": {"backend": "unit", "passed": True}}


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl")


def test_what_was_reserved_and_done_can_be_read_back(ledger: Ledger) -> None:
    masks = ledger.reserve("masks", [POSE, SHAPE], **COMMON)
    ledger.complete(masks, {"statistics.npz": "d" * 64})
    train = ledger.reserve("train", [TRAIN], sensitivity={"draws": 4, "max_records": 1}, **PASSED, **COMMON)
    one, other = ledger.entries()
    assert (one["id"], one["status"], one["outputs"]) == (masks, "complete", {"statistics.npz": "d" * 64})
    assert (other["id"], other["status"]) == (train, "reserved")
    assert other["sensitivity"] == {
        "unit": "patient",
        "relation": "add_or_remove_one",
        "clip_norms": {"denoiser": 1.0},
        "draws": 4,
        "max_records": 1,
    }
    assert one["denominators"] == {"pose": 200.0, "shape": 200.0}
    assert other["sampling"] == {"denoiser": "bernoulli over patients"}
    assert other["noise_source"]["kind"] == "os" and other["noise_source"]["dtype"] == "float64"
    assert ledger.taints() == []
    assert ledger.spent(1e-4) == epsilon([POSE.event(), SHAPE.event(), TRAIN.event()], 1e-4)


def test_the_budget_is_for_all_stages_together(ledger: Ledger) -> None:
    ledger.reserve("masks", [POSE, SHAPE], **COMMON)
    before = ledger.path.read_bytes()
    big = DpSgd("denoiser", 0.25, 2000, 2.0, 1.0, 50.0)
    with pytest.raises(BudgetError, match=r"spent .*budget 8"):
        ledger.reserve("train", [big], **PASSED, **COMMON)
    assert ledger.path.read_bytes() == before


def test_a_crash_refunds_nothing(ledger: Ledger) -> None:
    for _ in range(2):
        ledger.reserve("masks", [POSE, SHAPE], **COMMON)
    with pytest.raises(BudgetError):
        for _ in range(9):
            Ledger(ledger.path).reserve("masks", [POSE, SHAPE], **COMMON)


def test_resume_goes_on_within_the_reservation(ledger: Ledger) -> None:
    first = ledger.reserve("train", [TRAIN], resume=True, **PASSED, **COMMON)
    spent = ledger.spent(1e-4)
    assert ledger.reserve("train", [TRAIN], resume=True, **PASSED, **COMMON) == first
    assert ledger.spent(1e-4) == spent
    other = {**COMMON, "config_digest": "e" * 64}
    assert ledger.reserve("train", [TRAIN], resume=True, **PASSED, **other) != first
    ledger.complete(first, {})
    assert ledger.reserve("train", [TRAIN], resume=True, **PASSED, **COMMON) != first


def test_stages_that_do_not_resume_spend_again(ledger: Ledger) -> None:
    assert ledger.reserve("masks", [POSE], **COMMON) != ledger.reserve("masks", [POSE], **COMMON)
    assert len(ledger.entries()) == 2


def _reserve_in_process(path: Path, start: Any, results: Any) -> None:
    start.wait()
    try:
        results.put(Ledger(path).reserve("masks", [POSE, SHAPE], **{**COMMON, "epsilon": 5.0}))
    except BudgetError:
        results.put("refused")


def test_processes_cannot_overspend_together(tmp_path: Path) -> None:
    # Alone each fits into 5; two do not.
    alone = epsilon([POSE.event(), SHAPE.event()], 1e-4)
    assert alone <= 5 < epsilon([POSE.event(), SHAPE.event()] * 2, 1e-4)
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    path = tmp_path / "ledger.jsonl"
    workers = [context.Process(target=_reserve_in_process, args=(path, start, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    start.set()
    answers = [results.get(timeout=120) for _ in workers]
    for worker in workers:
        worker.join()
    assert answers.count("refused") == 2
    assert len(Ledger(path).entries()) == 1


def _three_lines(ledger: Ledger) -> list[bytes]:
    ledger.complete(ledger.reserve("masks", [POSE], **COMMON), {"a": "b"})
    ledger.reserve("train", [TRAIN], **PASSED, **COMMON)
    return ledger.path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_an_edited_line_is_found(ledger: Ledger, number: int) -> None:
    lines = _three_lines(ledger)
    lines[number - 1] = (
        lines[number - 1].replace(b"4.0", b"0.4").replace(b'"a":"b"', b'"a":"c"').replace(b"20,", b"10,")
    )
    ledger.path.write_bytes(b"".join(lines))
    with pytest.raises(VerificationError, match=f"line {number}"):
        ledger.verify_chain()
    with pytest.raises(VerificationError):
        ledger.reserve("masks", [POSE], **COMMON)


@pytest.mark.parametrize("gone", [1, 2])
def test_a_missing_or_moved_line_is_found(ledger: Ledger, gone: int) -> None:
    lines = _three_lines(ledger)
    ledger.path.write_bytes(b"".join(line for k, line in enumerate(lines, start=1) if k != gone))
    with pytest.raises(VerificationError, match="missing"):
        ledger.verify_chain()
    ledger.path.write_bytes(lines[1] + lines[0] + lines[2])
    with pytest.raises(VerificationError):
        ledger.verify_chain()


@pytest.mark.parametrize("garbage", [b"\n", b"[]\n", b"{}\n", b"\xff\n", b'{"id":1}\n'])
def test_garbage_is_found(ledger: Ledger, garbage: bytes) -> None:
    lines = _three_lines(ledger)
    ledger.path.write_bytes(b"".join(lines[:2]) + garbage)
    with pytest.raises(VerificationError, match="line 3"):
        ledger.verify_chain()


@pytest.mark.parametrize("keep", [1, 40, -2])
def test_a_crash_inside_an_append_is_mended(ledger: Ledger, keep: int) -> None:
    lines = _three_lines(ledger)
    ledger.path.write_bytes(b"".join(lines[:2]) + lines[2][:keep])
    with pytest.raises(VerificationError, match="line 3 is incomplete"):
        ledger.verify_chain()
    ledger.reserve("train", [TRAIN], **PASSED, **COMMON)
    ledger.verify_chain()
    assert len(ledger.entries()) == 2


def test_cutting_off_the_last_newline_refunds_nothing(ledger: Ledger) -> None:
    lines = _three_lines(ledger)
    ledger.path.write_bytes(b"".join(lines)[:-1])
    ledger.reserve("masks", [POSE], **COMMON)
    assert [e["stage"] for e in ledger.entries()] == ["masks", "train", "masks"]


def test_the_head_names_the_whole_ledger(ledger: Ledger) -> None:
    assert ledger.head == GENESIS
    _three_lines(ledger)
    assert ledger.head == parse_chain(ledger.path.read_bytes())[-1]["id"]


def test_nonprivate_and_test_only_taint(ledger: Ledger) -> None:
    ledger.reserve("train", [TRAIN], **PASSED, **{**COMMON, "noise_source": "test_only"})
    assert "test_only" in ledger.taints()[0]
    ledger.reserve("train", [Event("nonprivate")], **{**COMMON, "epsilon": math.inf})
    assert len(ledger.taints()) == 2 and ledger.spent(1e-4) == math.inf
    with pytest.raises(BudgetError):
        ledger.reserve("masks", [POSE], **COMMON)


def test_pitfall_18_the_ledger_says_what_was_executed(ledger: Ledger) -> None:
    entry = ledger.reserve("train", [TRAIN], **PASSED, **COMMON)
    for more in (Event("subsampled_gaussian", 2.0, 0.25, 21), Event("subsampled_gaussian", 1.0, 0.25, 20)):
        with pytest.raises(PrivacyError, match="more was executed"):
            ledger.complete(entry, {}, executed=[more])
    ledger.complete(entry, {}, executed=[Event("subsampled_gaussian", 2.0, 0.25, 13)])
    assert parse_chain(ledger.path.read_bytes())[-1]["executed"][0]["count"] == 13
    with pytest.raises(PrivacyError, match="complete already"):
        ledger.complete(entry, {})
    with pytest.raises(PrivacyError, match="taken from the mechanism"):
        ledger.reserve("masks", [POSE], sensitivity={"clip_norms": {"pose": 1.0}}, **COMMON)


def test_pitfall_08_no_preflight_no_training(ledger: Ledger) -> None:
    for evidence in (None, {"passed": False}):
        with pytest.raises(PrivacyError, match="preflight"):
            ledger.reserve("train", [TRAIN], preflight=evidence, **COMMON)
    assert not ledger.path.exists()


def test_pitfall_15_and_16_counts_losses_seeds_and_paths_are_refused(ledger: Ledger) -> None:
    for key in ("n_patients", "batch_size", "loss", "seed", "path"):
        with pytest.raises(PrivacyError, match=key):
            ledger.reserve("masks", [POSE], sensitivity={"more": {key: 1}}, **COMMON)
    entry = ledger.reserve("masks", [POSE], **COMMON)
    with pytest.raises(PrivacyError, match="relative"):
        ledger.complete(entry, {"/data/x": "d"})
    with pytest.raises(PrivacyError, match="no such reservation"):
        ledger.complete("0" * 64, {})


def test_pitfall_17_a_schedule_is_one_event_a_segment(ledger: Ledger) -> None:
    segments = [DpSgd(f"denoiser {k}", 0.25, 10, sigma, 1.0, 50.0) for k, sigma in enumerate((2.0, 4.0))]
    ledger.reserve("train", segments, **PASSED, **COMMON)
    assert [e["noise_multiplier"] for e in ledger.entries()[0]["events"]] == [2.0, 4.0]
    assert ledger.spent(1e-4) == epsilon([s.event() for s in segments], 1e-4)


def test_steps_are_handed_out_once(tmp_path: Path) -> None:
    journal = StepJournal(tmp_path / "steps.jsonl", 5)
    assert list(journal.claim(0, block=2)) == [0, 1] and journal.next_step == 2
    for wrong in (0, 1, 3):
        with pytest.raises(PrivacyError):
            journal.claim(wrong)
    assert list(journal.claim(2, block=10)) == [2, 3, 4] and journal.finished
    with pytest.raises(PrivacyError, match="spent"):
        journal.claim(5)


def test_pitfall_16_after_a_kill_claimed_steps_are_lost_and_not_repeated(tmp_path: Path) -> None:
    path = tmp_path / "steps.jsonl"
    StepJournal(path, 10).claim(0, block=4)  # killed after step 1: steps 2 and 3 are spent all the same
    again = StepJournal(path, 10)
    assert again.next_step == 4
    handed_out = [4 + len(again.claim(4, 3)) - 3, *range(5, 7)]
    while not StepJournal(path, 10).finished:
        journal = StepJournal(path, 10)
        handed_out += list(journal.claim(journal.next_step))
    assert handed_out == list(range(4, 10))


def test_two_processes_cannot_claim_the_same_step(tmp_path: Path) -> None:
    one, other = StepJournal(tmp_path / "s.jsonl", 4), StepJournal(tmp_path / "s.jsonl", 4)
    one.claim(0)
    with pytest.raises(PrivacyError, match="next unspent step is 1"):
        other.claim(0)


def test_two_processes_share_the_steps_and_repeat_none(tmp_path: Path) -> None:
    runs = [StepJournal(tmp_path / "s.jsonl", 7).claimed_steps(block=2) for _ in range(2)]
    taken = [next(runs[turn]) for turn in (0, 1, 0, 1, 1)] + [step for run in runs for step in run]
    assert sorted(taken) == list(range(7))


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw.replace(b'"steps": 4', b'"steps": 5'),
        lambda raw: raw.replace(b'"to": 2', b'"to": 1'),
        lambda raw: raw.splitlines(keepends=True)[0] + raw.splitlines(keepends=True)[2],
        lambda raw: b"x" + raw,
        lambda raw: raw + b"5\n",
        lambda raw: raw + b"\xff\n",
    ],
)
def test_a_damaged_journal_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "s.jsonl"
    journal = StepJournal(path, 4)
    journal.claim(0, 2)
    journal.claim(2, 1)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(PrivacyError):
        StepJournal(path, 4)


def test_a_claim_that_was_not_acknowledged_is_not_spent(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl"
    StepJournal(path, 4).claim(0)
    whole = path.read_bytes()
    path.write_bytes(whole + json.dumps({"from": 1, "to": 2}).encode()[:9])
    assert StepJournal(path, 4).next_step == 1
    path.write_bytes(b'{"ste')
    assert StepJournal(path, 4).next_step == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epsilon": 0.0}, r"epsilon > 0, got 0.*1 to 10 are usual"),
        ({"epsilon": -1.0}, "epsilon > 0"),
        ({"epsilon": math.nan}, "epsilon > 0, got nan"),
        ({"epsilon": -math.inf}, "epsilon > 0"),
        ({"delta": 0.0}, r"delta in \(0, 1\).*1/\(10 N\)"),
        ({"delta": 1.0}, "delta in"),
        ({"delta": -1e-4}, "delta in"),
        ({"delta": math.nan}, "delta in"),
        ({"trials": 0}, "at least one study"),
    ],
)
def test_a_budget_that_is_none_is_refused_and_nothing_is_written(
    ledger: Ledger, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(PrivacyError, match=message):
        ledger.reserve("masks", [POSE], **{**COMMON, **wrong})
    assert not ledger.path.exists()


@pytest.mark.parametrize("noise", [-1.0, math.nan, math.inf])
def test_noise_that_is_none_makes_no_plan(noise: float) -> None:
    with pytest.raises(PrivacyError, match="noise_multiplier"):
        GaussianSum("pose", 6, 4.0, noise, 200.0)
    with pytest.raises(PrivacyError, match="noise_multiplier"):
        DpSgd("denoiser", 0.25, 20, noise, 1.0, 50.0)
    with pytest.raises(PrivacyError, match="noise_multiplier"):
        Event("gaussian", noise)


def test_no_noise_fits_no_finite_budget(ledger: Ledger) -> None:
    for plan in (GaussianSum("pose", 6, 4.0, 0.0, 200.0), DpSgd("denoiser", 0.25, 20, 0.0, 1.0, 50.0)):
        with pytest.raises(BudgetError, match="does not fit into the budget"):
            ledger.reserve("masks", [plan], **PASSED, **COMMON)
    assert not ledger.path.exists()


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.01, math.nan])
def test_a_rate_that_is_no_probability_makes_no_plan(rate: float) -> None:
    with pytest.raises(PrivacyError, match="rate"):
        DpSgd("denoiser", rate, 20, 2.0, 1.0, 50.0)
    with pytest.raises(PrivacyError, match="rate"):
        Event("subsampled_gaussian", 2.0, rate, 20)
