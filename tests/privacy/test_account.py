"""The account of a cohort: found by its patients, never overspent, never forgotten, whatever crashes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest

from medsynth.errors import BudgetError, PrivacyError, StoreError, VerificationError
from medsynth.privacy.account import Account, Release, open_account
from medsynth.privacy.accounting import Event, epsilon
from medsynth.privacy.ledger import Ledger
from medsynth.privacy.mechanism import GaussianSum

SUM = GaussianSum("pose", 6, clip_norm=4.0, noise_multiplier=1.5, denominator=200.0)
ALONE = epsilon([SUM.event()], 1e-4)
COHORT = "a" * 64
COMMON: dict[str, Any] = {
    "epsilon": 8.0,
    "delta": 1e-4,
    "noise_source": "os",
    "config_digest": "c" * 64,
    "parents": {"cohort": COHORT},
}
ANNA, BERT, CARL = "a1" * 32, "b2" * 32, "c3" * 32


class Site:
    """A site whose runs are opened as `study.py` opens them."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "home" / "accounts"
        self.folder = folder

    def ledger(self, run: str, people: Set[str], cohort: str = COHORT, same_key: bool = True) -> Ledger:
        path = self.folder / f"{run}.jsonl"
        return Ledger(path, open_account(self.root, people, ledger=path, cohort=cohort, same_key=same_key))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def reserve(ledger: Ledger, **more: Any) -> str:
    return ledger.reserve("masks", [SUM], **{**COMMON, **more})


def account(ledger: Ledger) -> Account:
    assert ledger.account is not None
    return ledger.account


def test_runs_on_the_same_patients_share_an_account_whatever_their_folders(site: Site) -> None:
    one, other, third = site.ledger("one", {ANNA, BERT}), site.ledger("two", {BERT, CARL}), site.ledger("three", {CARL})
    assert account(one).id == account(other).id == account(third).id
    reserve(one)
    reserve(other)
    found = account(third).others([])
    assert found.studies == 2 and found.events == (Event("gaussian", 1.5, count=2),)
    assert not found.recovered and found.releases == ()


def test_cohorts_without_a_common_patient_have_their_own(site: Site) -> None:
    one, other = site.ledger("one", {ANNA}), site.ledger("two", {BERT})
    reserve(one)
    assert account(one).id != account(other).id
    assert account(other).others([]).studies == 0


def test_a_cohort_in_two_accounts_joins_them(site: Site) -> None:
    one, other = site.ledger("one", {ANNA}), site.ledger("two", {BERT})
    reserve(one)
    reserve(other)
    both = site.ledger("three", {ANNA, BERT})
    assert account(one).id == account(other).id == account(both).id
    assert account(both).others([]).studies == 2
    reserve(other)  # opened before they were joined
    assert account(both).others([]).events == (Event("gaussian", 1.5, count=3),)
    assert account(site.ledger("one", {ANNA})).others([]).studies == 2


def test_names_of_accounts_are_random_and_say_nothing_of_patients(site: Site, tmp_path: Path) -> None:
    one, other = site.ledger("one", {ANNA}), Site(tmp_path / "elsewhere").ledger("one", {ANNA})
    assert account(one).id != account(other).id
    reserve(one)
    assert ANNA not in one.path.read_text() and ANNA not in (account(one).folder / "account.jsonl").read_text()


def test_an_account_is_readable_by_its_owner_only(site: Site) -> None:
    reserve(site.ledger("one", {ANNA}))
    site.ledger("two", {ANNA, BERT})
    for path in site.root.rglob("*"):
        assert path.name.startswith(".") or path.stat().st_mode & 0o077 == 0, path.name


def test_the_limit_is_for_all_runs_together(site: Site) -> None:
    one, other = site.ledger("one", {ANNA}), site.ledger("two", {ANNA})
    reserve(one)
    account(one).limit(ALONE + 0.1, 1e-4)
    before = account(one).lines()
    with pytest.raises(BudgetError, match=r"limit of these patients' account.*medsynth budget limit"):
        reserve(other)
    assert account(one).lines() == before and not other.path.exists()
    account(one).limit(float("inf"), 1e-4)
    reserve(other)


def test_a_limit_stops_a_study_without_privacy(site: Site) -> None:
    one, other = site.ledger("one", {ANNA}), site.ledger("two", {ANNA})
    reserve(one)
    account(one).limit(100, 1e-4)
    for budget in (8.0, float("inf")):
        with pytest.raises(BudgetError):
            other.reserve(
                "train", [Event("nonprivate")], epsilon=budget, delta=1e-4, noise_source="os", config_digest="2",
                parents={"cohort": "0" * 64},
            )  # fmt: skip
    assert not other.path.exists()
    account(one).limit(float("inf"), 1e-4)
    other.reserve(
        "train", [Event("nonprivate")], epsilon=float("inf"), delta=1e-4, noise_source="os", config_digest="2",
        parents={"cohort": "0" * 64},
    )  # fmt: skip


def test_a_joined_account_keeps_its_limit(site: Site) -> None:
    one, other = site.ledger("one", {ANNA}), site.ledger("two", {BERT})
    reserve(one)
    reserve(other)
    account(other).limit(ALONE + 0.1, 1e-4)
    both = site.ledger("three", {ANNA, BERT})
    with pytest.raises(BudgetError, match="limit"):
        reserve(both)


@pytest.mark.parametrize(("most", "delta"), [(0, 1e-4), (-1, 1e-4), (float("nan"), 1e-4), (1, 0), (1, 1), (1, -1)])
def test_a_limit_that_is_no_budget_is_refused(site: Site, most: float, delta: float) -> None:
    with pytest.raises(PrivacyError, match="a limit needs"):
        account(site.ledger("one", {ANNA})).limit(most, delta)


def test_equal_reservations_are_two_spends(site: Site) -> None:
    first = site.ledger("one", {ANNA})
    reserve(first)
    first.path.unlink()  # somebody starts again in the same folder
    again = site.ledger("one", {ANNA})
    reserve(again)
    assert account(again).others([]).events == (Event("gaussian", 1.5, count=2),)


def test_a_reservation_that_only_the_account_knows_counts(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = site.ledger("one", {ANNA})

    def full(*_: Any) -> str:
        raise StoreError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(ledger._chain, "append", full)
        with pytest.raises(StoreError):
            reserve(ledger)
    assert ledger.entries() == []
    assert account(ledger).others([]).events == (SUM.event(),)
    reserve(ledger)
    assert account(ledger).others(ledger.entries()).events == (SUM.event(),)


@pytest.mark.parametrize("kept", [1, 2])
def test_a_ledger_that_was_cut_or_restored_from_an_older_copy_is_refused(site: Site, kept: int) -> None:
    ledger = site.ledger("one", {ANNA})
    ledger.complete(reserve(ledger), {"one": "0" * 64})
    ledger.complete(reserve(ledger), {"two": "0" * 64})
    whole = ledger.path.read_bytes().splitlines(keepends=True)
    ledger.path.write_bytes(b"".join(whole[:kept]))
    for act in (ledger.reconcile, lambda: reserve(ledger), lambda: site.ledger("one", {ANNA})):
        with pytest.raises(PrivacyError, match=r"lacks reservations.*[Rr]estore ledger\.jsonl"):
            act()
    ledger.path.write_bytes(b"".join(whole))
    ledger.reconcile()


def test_what_a_crash_kept_from_the_ledger_is_written_there_again(site: Site) -> None:
    ledger = site.ledger("one", {ANNA})
    reserve(ledger)
    reserve(ledger)
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole.splitlines(keepends=True)[0])
    ledger.reconcile()
    assert ledger.path.read_bytes() == whole
    ledger.path.write_bytes(whole.splitlines(keepends=True)[0])
    again = site.ledger("one", {ANNA})
    assert ledger.path.read_bytes() == whole and account(again).others(again.entries()).events == ()


def test_a_lost_home_gets_the_runs_own_entries_back_and_says_so(site: Site) -> None:
    ledger = site.ledger("one", {ANNA})
    name = account(ledger).id
    reserve(ledger)
    shutil.rmtree(site.root)
    again = site.ledger("one", {ANNA})
    assert account(again).id == name
    found = account(site.ledger("two", {ANNA})).others([])
    assert found.studies == 1 and found.events == (SUM.event(),) and found.recovered
    site.ledger("one", {ANNA})
    assert account(again).others([]).events == (SUM.event(),), "taken over once"


def test_a_lost_home_joins_what_was_made_since(site: Site) -> None:
    reserve(site.ledger("one", {ANNA}))
    shutil.rmtree(site.root)
    reserve(site.ledger("two", {ANNA, BERT}))
    one = site.ledger("one", {ANNA})
    assert account(one).others([]).studies == 2
    reserve(one)


def test_a_ledger_of_another_cohort_is_refused(site: Site) -> None:
    reserve(site.ledger("one", {ANNA}))
    with pytest.raises(PrivacyError, match=r"another cohort.*[Uu]se a new run folder"):
        site.ledger("one", {BERT})
    other = site.ledger("two", {BERT})
    shutil.copy(site.folder / "one.jsonl", other.path)
    with pytest.raises(PrivacyError, match="another cohort"):
        reserve(other)
    with pytest.raises(PrivacyError, match="another cohort"):
        account(other).adopt(other.entries())


def test_a_ledger_of_another_site_is_refused(site: Site, tmp_path: Path) -> None:
    reserve(site.ledger("one", {ANNA}))
    elsewhere = Site(tmp_path / "elsewhere")
    elsewhere.folder.mkdir()
    shutil.copy(site.folder / "one.jsonl", elsewhere.folder / "one.jsonl")
    with pytest.raises(PrivacyError, match="not in MEDSYNTH_HOME"):
        elsewhere.ledger("one", {CARL}, cohort="d" * 64)


def test_a_cohort_named_with_another_key_is_refused_before_anything_is_spent(site: Site) -> None:
    with pytest.raises(PrivacyError, match="another MEDSYNTH_HOME"):
        site.ledger("one", {ANNA}, same_key=False)
    reserve(site.ledger("one", {ANNA}))
    assert account(site.ledger("one", {ANNA}, same_key=False)).others([]).recovered


def test_a_broken_account_stops_every_reservation(site: Site) -> None:
    ledger = site.ledger("one", {ANNA})
    reserve(ledger)
    path = account(ledger).folder / "account.jsonl"
    path.write_bytes(path.read_bytes().replace(b'"noise_multiplier":1.5', b'"noise_multiplier":9.5'))
    for act in (lambda: reserve(ledger), lambda: site.ledger("two", {ANNA}), lambda: account(ledger).others([])):
        with pytest.raises(VerificationError, match=r"account line 2 was changed.*restore"):
            act()
    path.unlink()
    with pytest.raises(VerificationError, match="lost its lines"):
        site.ledger("two", {ANNA})


def test_wherever_the_last_line_is_cut_the_account_goes_on(site: Site) -> None:
    ledger = site.ledger("one", {ANNA})
    reserve(ledger)
    path = account(ledger).folder / "account.jsonl"
    whole, before = path.read_bytes(), ledger.path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    other = site.ledger("two", {ANNA})
    for size in range(last, len(whole)):
        path.write_bytes(whole[:size])
        ledger.path.write_bytes(before)
        # the run's ledger holds what was acted on, and brings it back
        account(ledger).adopt(ledger.entries())
        assert account(other).others([]).events == (SUM.event(),), size


def test_an_account_without_its_members_stops_everything(site: Site) -> None:
    ledger = site.ledger("one", {ANNA})
    (account(ledger).folder / "members").unlink()
    with pytest.raises(VerificationError, match=r"lost its members.*restore"):
        site.ledger("two", {ANNA})


def test_an_account_of_another_key_stops_everything(site: Site) -> None:
    path = site.folder / "one.jsonl"
    open_account(site.root, {ANNA}, ledger=path, cohort=COHORT, key="k1")
    open_account(site.root, {BERT}, ledger=path, cohort=COHORT, key="k1")
    with pytest.raises(PrivacyError, match=r"another site\.key.*backup"):
        open_account(site.root, {CARL}, ledger=path, cohort=COHORT, key="k2")


def test_a_crash_while_an_account_is_recovered_does_not_hide_that(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    reserve(site.ledger("one", {ANNA}))
    shutil.rmtree(site.root)

    def crash(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Account, "adopt", crash)
        with pytest.raises(KeyboardInterrupt):
            site.ledger("one", {ANNA})
    assert account(site.ledger("one", {ANNA})).others([]).recovered


def test_an_access_without_a_mechanism_is_told_and_not_counted(site: Site) -> None:
    ledger = site.ledger("open", {ANNA})
    ledger.reserve("train", [Event("nonprivate")], **{**COMMON, "epsilon": float("inf")})
    reserve(site.ledger("tests", {ANNA}), noise_source="test_only")
    found = account(site.ledger("one", {ANNA})).others([])
    assert (found.studies, found.without_promise, found.events) == (2, 2, (SUM.event(),))


def test_every_release_but_the_one_being_made_is_remembered(site: Site) -> None:
    one, other = site.ledger("one", {ANNA}), site.ledger("two", {ANNA})
    reserve(one)
    reserve(other)
    for number in range(2):
        account(one).release(one.entries(), Release(f"{number}" * 64, 3.0, 1e-4))
    assert account(one).last_release(one.entries()) == "1" * 64
    assert [r.statement[0] for r in account(one).others(one.entries()).releases] == ["0", "1"]
    assert [r.statement[0] for r in account(one).others(one.entries(), "1" * 64).releases] == ["0"]
    assert account(other).last_release(other.entries()) == ""
    assert [r.statement[0] for r in account(other).others(other.entries()).releases] == ["0", "1"]


def test_the_state_moves_with_what_others_do_and_not_with_ones_own(site: Site) -> None:
    one, other = site.ledger("one", {ANNA}), site.ledger("two", {ANNA})
    reserve(one)
    states = [account(one).others(one.entries()).state]
    reserve(one)
    account(one).release(one.entries(), Release("0" * 64, 3.0, 1e-4))
    assert account(one).others(one.entries()).state == states[0]
    reserve(other)
    states.append(account(one).others(one.entries()).state)
    account(other).release(other.entries(), Release("1" * 64, 3.0, 1e-4))
    states.append(account(one).others(one.entries()).state)
    assert len(set(states)) == 3


def test_pitfall_14_a_declared_sweep_is_charged_as_a_whole(site: Site) -> None:
    ledger = site.ledger("one", {ANNA})
    reserve(ledger, trials=3)
    assert ledger.spent(1e-4) == epsilon([SUM.event()] * 3, 1e-4)
    with pytest.raises(BudgetError, match="each of them in 3 trials"):
        reserve(ledger, trials=3, epsilon=epsilon([SUM.event()] * 5, 1e-4))


def test_pitfall_14_a_sweep_has_no_more_studies_than_it_declared(site: Site) -> None:
    runs = [site.ledger(f"run{number}", {ANNA}) for number in range(3)]
    for ledger in runs[:2]:
        reserve(ledger, trials=2)
    reserve(runs[0], trials=2)  # the same study goes on
    with pytest.raises(BudgetError, match=r"2 studies of this sweep .*declares 2"):
        reserve(runs[2], trials=2)
    assert len(account(runs[0]).sweep(runs[0].entries())) == 3
    reserve(runs[2])  # alone and undeclared it is only in the account
    assert len(account(runs[0]).sweep(runs[0].entries())) == 3


def test_a_sweep_ends_with_its_release(site: Site) -> None:
    runs = [site.ledger(f"run{number}", {ANNA}) for number in range(3)]
    reserve(runs[0], trials=2)
    account(runs[0]).release(runs[0].entries(), Release("0" * 64, 3.0, 1e-4))
    for ledger in runs[1:]:
        reserve(ledger, trials=2)
    assert len(account(runs[2]).sweep(runs[2].entries())) == 2
    assert len(account(runs[0]).sweep(runs[0].entries())) == 1


def _reserve_in_process(folder: Path, number: int, start: Any, results: Any) -> None:
    ledger = Site(folder).ledger(f"run{number}", {ANNA, f"{number:064x}"})
    start.wait()
    try:
        results.put(reserve(ledger))
    except BudgetError:
        results.put("refused")


def test_processes_of_many_runs_cannot_overspend_together(site: Site) -> None:
    account(site.ledger("first", {ANNA})).limit(epsilon([SUM.event()] * 3, 1e-4), 1e-4)
    context = multiprocessing.get_context("spawn")
    start, results = context.Event(), context.Queue()
    workers = [
        context.Process(target=_reserve_in_process, args=(site.folder, number, start, results)) for number in range(6)
    ]
    for worker in workers:
        worker.start()
    start.set()
    answers = [results.get(timeout=240) for _ in workers]
    for worker in workers:
        worker.join()
    assert answers.count("refused") == 3
    found = account(site.ledger("first", {ANNA})).others([])
    assert found.studies == 3 and found.events == (Event("gaussian", 1.5, count=3),)
    assert len([path for path in site.folder.glob("run*.jsonl") if Ledger(path).entries()]) == 3


RESERVES = """
import sys
from pathlib import Path
from medsynth.privacy.account import open_account
from medsynth.privacy.accounting import Event
from medsynth.privacy.ledger import Ledger
folder = Path(sys.argv[1])
path = folder / "run.jsonl"
ledger = Ledger(path, open_account(folder / "home" / "accounts", {"a1" * 32}, ledger=path, cohort="a" * 64))
while True:
    print(ledger.reserve("masks", [Event("gaussian", 200.0)], epsilon=8.0, delta=1e-4, noise_source="os",
                         config_digest="c" * 64, parents={"cohort": "a" * 64}), flush=True)
"""


def test_kill_nine_loses_no_reservation_that_was_acted_on(site: Site, root: Path) -> None:
    acted_on: list[str] = []
    for turn in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", RESERVES, str(site.folder)], cwd=root, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        acted_on += [process.stdout.readline().strip() for _ in range(2 + turn)]
        os.kill(process.pid, signal.SIGKILL)
        acted_on += process.stdout.read().split("\n")[:-1]
        process.stdout.close()
        process.wait()
    ledger = site.ledger("run", {ANNA})
    own = [entry["id"] for entry in ledger.entries()]
    known = [line["entry"] for line in account(ledger).lines() if line["type"] == "reserve"]
    assert set(acted_on) <= set(own) <= set(known) and len(acted_on) >= 14
    assert len(known) - len(acted_on) <= 4, "at most the one in hand at each kill"
