"""The account of a cohort: everything that any run of this site ever reserved for the same patients.

Patients are recognised across runs by keyed references (see :mod:`medsynth.imaging.deidentify`), never by the name of a
folder. Cohorts that share a patient share an account; a cohort that lies in two accounts joins them.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from pathlib import Path

from medsynth.errors import BudgetError, PrivacyError, StoreError
from medsynth.privacy.accounting import Event, epsilon, merge
from medsynth.privacy.accounts import Accounts
from medsynth.privacy.chain import Chain, Record, canonical
from medsynth.privacy.ledger import events_of, study_of, taints_of, trials_of

_ID_BYTES = 16
_LEDGER_CUT = (
    "the run's ledger lacks reservations of this study that the account holds: it was cut, or an older copy took its "
    "place. Restore ledger.jsonl, or start over in a new run folder (what was reserved stays charged)"
)

_OTHER_COHORT = (
    "this run's ledger belongs to the account of another cohort: none of its patients is in the cohort folder. Use a "
    "new run folder for these patients"
)
_UNKNOWN_ACCOUNT = (
    "this run's ledger belongs to an account that is not in MEDSYNTH_HOME, and charges nothing to this cohort folder: "
    "set MEDSYNTH_HOME to the folder that was used before, or use a new run folder"
)
_OTHER_HOME = (
    "the cohort was read under another MEDSYNTH_HOME, whose key named its patients: set MEDSYNTH_HOME to the folder "
    "that was used then, or run ingest again with --replace"
)


@dataclass(frozen=True)
class Release:
    """One certified release: digest of its signed statement, and what it claims."""

    statement: str
    epsilon: float
    delta: float


@dataclass(frozen=True)
class Others:
    """What an account holds beside one study.

    Attributes:
        studies: number of other studies.
        without_promise: how many of them read patients without a mechanism, or drew repeatable noise.
        events: everything they reserved, merged; accesses without a mechanism are left out, no number covers them.
        releases: what was certified before, from this study too.
        recovered: the account was restored from ledgers of runs, so that studies may be missing.
        state: digest that changes whenever another study adds to any of the above; it says nothing of the patients.
    """

    studies: int
    without_promise: int
    events: tuple[Event, ...]
    releases: tuple[Release, ...]
    recovered: bool
    state: str


class Account:
    """The account that a run charges.

    *Guarantees*: reservations of all runs on these patients, by whatever processes at once, never compose to more than
    the account's limit; what was reserved is never taken back; a crash at any point leaves at most a reservation that
    nobody acted on, and that counts.
    """

    def __init__(self, folder: Path) -> None:
        """Name the account.

        Args:
            folder: its folder below the site's accounts (see :func:`open_account`).
        """
        self.site = Accounts(folder.parent)
        self.folder = folder

    @property
    def id(self) -> str:
        """Name of the account, random; of the one that it was joined into, if it was."""
        with self.locked():
            return self.site.current(self.folder.name)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other run out (see :meth:`Accounts.locked`)."""
        with self.site.locked():
            yield

    def lines(self) -> list[Record]:
        """Return the lines of this account and of all that were joined into it, oldest first.

        Raises:
            VerificationError: a chain is broken.
        """
        with self.locked():
            here = self.id
            group = [name for name in self.site.ids() if self.site.current(name) == here]
            lines = [self.site.lines(name) for name in group]
        # A clock may have been turned back: it decides only between accounts that were joined.
        return lines[0] if len(lines) == 1 else sorted((r for each in lines for r in each), key=lambda r: str(r["at"]))

    def adopt(self, records: Sequence[Record], *, recovered: bool = False) -> list[Record]:
        """Take over reservations of a run's ledger that the account does not know (its folder was lost).

        Args:
            records: lines of the run's ledger.
            recovered: the account was lost, so that other studies may be missing.

        Returns:
            Lines that the ledger has to append: a crash came between the account and the ledger.

        Raises:
            PrivacyError: the ledger belongs to another cohort, or lacks lines that it once had.
        """
        with self.locked():
            here, ids = self.id, self.site.ids()
            bound = {record["account"] for record in records if record.get("account")}
            if any(name not in ids or self.site.current(name) != here for name in bound):
                raise PrivacyError(_OTHER_COHORT)
            lines, study = self.lines(), study_of(records)
            missing = _missing(lines, records)
            known = {line["entry"] for line in lines if line["type"] == "reserve"}
            for record in records:
                if record["type"] == "reserve" and record["id"] not in known:
                    self.site.append(here, _line(record, study))
            if recovered and not any(line["type"] == "recover" for line in lines):
                self.site.append(here, {"type": "recover"})
            return missing

    def reserve(self, records: Sequence[Record], sealed: Record) -> None:
        """Write down a reservation before the run's ledger does.

        Args:
            records: lines of the run's ledger so far.
            sealed: its next line.

        Raises:
            BudgetError: the limit of the account would be exceeded, or a sweep has its declared number of studies.
        """
        with self.locked():
            lines = self.lines()
            line = {**_line(sealed, study_of([*records, sealed])), "sealed": sealed}
            _check_sweep(lines, line)
            _check_limits(lines, line)
            self.site.append(self.id, line)

    def complete(self, entry: str) -> None:
        """Note that a reservation was used up (for show only: it counts either way, so a full disk stops nothing)."""
        with contextlib.suppress(StoreError), self.locked():
            self.site.append(self.id, {"type": "complete", "entry": entry})

    def release(self, records: Sequence[Record], release: Release) -> None:
        """Note that a study was certified."""
        line = {"type": "release", "study": study_of(records), "statement": release.statement}
        with self.locked():
            self.site.append(self.id, {**line, "epsilon": release.epsilon, "delta": release.delta})

    def limit(self, most: float, delta: float) -> None:
        """Set what all reservations together may cost from now on.

        Args:
            most: epsilon; infinite lifts the limit.
            delta: its failure probability.

        Raises:
            PrivacyError: no budget.
        """
        if not most > 0:
            raise PrivacyError(f"a limit needs epsilon > 0, got {most}: 'inf' lifts it")
        if not 0 < delta < 1:
            raise PrivacyError(f"a limit needs delta in (0, 1), got {delta}: at most 1/(10 N) for N patients")
        with self.locked():
            # A joined account keeps its own limit: each of them holds for the whole.
            for name in (name for name in self.site.ids() if self.site.current(name) == self.id):
                self.site.append(name, {"type": "limit", "account": name, "epsilon": str(most), "delta": delta})

    def last_release(self, records: Sequence[Record]) -> str:
        """Return the digest of the last statement that was certified from a study; "" where there is none."""
        lines, study = self.lines(), study_of(records)
        found = [str(line["statement"]) for line in lines if line["type"] == "release" and line["study"] == study]
        return found[-1] if found else ""

    def others(self, records: Sequence[Record], without: str = "") -> Others:
        """Return what the account holds beside a study.

        Args:
            records: the study's ledger.
            without: digest of a statement that is no earlier release (it is the one being made).
        """
        lines, study = self.lines(), study_of(records)
        own = {record["id"] for record in records if record["type"] == "reserve"}
        reserved = [line for line in lines if line["type"] == "reserve" and line["entry"] not in own]
        studies = {line["study"] for line in reserved} - {study}
        tainted = {line["study"] for line in reserved if taints_of([line])} - {study}
        certified = [line for line in lines if line["type"] == "release"]
        released = {
            Release(line["statement"], line["epsilon"], line["delta"]): None
            for line in certified
            if line["statement"] != without
        }
        elsewhere = {line["statement"] for line in certified if line["study"] != study}
        recovered = any(line["type"] == "recover" for line in lines)
        state = [sorted(line["entry"] for line in reserved), sorted(elsewhere), recovered]
        return Others(
            studies=len(studies),
            without_promise=len(tainted),
            events=merge(counted_events(reserved)),
            releases=tuple(released),
            recovered=recovered,
            state=hashlib.sha256(canonical(state)).hexdigest(),
        )

    def sweep(self, records: Sequence[Record]) -> list[Event]:
        """Return what the studies of this one's declared sweep reserved, its own included."""
        lines, study = self.lines(), study_of(records)
        number = _sweeps(lines)
        members = [line for line in lines if line["type"] == "reserve" and line["study"] in number]
        return counted_events([line for line in members if number[line["study"]] == number.get(study)])


def open_account(
    root: Path, references: Set[str], *, ledger: Path, cohort: str, same_key: bool = True, key: str = ""
) -> Account:
    """Return the account of a cohort, found by its patients: made where there is none, joined where there are two.

    Args:
        root: folder of the site's accounts.
        references: keyed references of the cohort's patients (private).
        ledger: the run's ledger; what it holds and the account does not is taken over.
        cohort: digest of the cohort folder.
        same_key: whether the references were made with the key that the site has today.
        key: id of that key of today; accounts keep it.

    Raises:
        PrivacyError: the ledger is that of another cohort or lacks lines that it once had, or the cohort was read, or
            an account made, under another key.
        VerificationError: a chain is broken.
    """
    site = Accounts(root)
    with site.locked():
        site.require_key(key)
        chain = Chain(ledger)
        with chain.locked():
            lines = chain.mended()
        records = [record for record in lines if record["type"] == "reserve"]
        if not same_key and not records:
            raise PrivacyError(_OTHER_HOME)
        bound = {str(record["account"]) for record in records if record.get("account")}
        lost = bound - set(site.ids())
        known, found = {site.current(name) for name in bound - lost}, site.holders(references)
        if not known <= found:
            raise PrivacyError(_OTHER_COHORT)
        if lost and not any(cohort in record["parents"].values() for record in records):
            raise PrivacyError(_UNKNOWN_ACCOUNT)
        account = Account(root / _gather(site, found, lost, references, key))
        with chain.locked():
            for missing in account.adopt(lines, recovered=bool(lost) or not same_key):
                chain.append(missing)
        return account


def counted_events(lines: Sequence[Record]) -> list[Event]:
    """Return every reserved event that a number can cover; accesses without a mechanism are left out."""
    return [event for event in events_of(lines) if event.kind != "nonprivate"]


def limits_of(lines: Sequence[Record]) -> list[tuple[float, float]]:
    """Return the limits (epsilon, delta) that hold; each of joined accounts has its own."""
    last = {line["account"]: (float(line["epsilon"]), line["delta"]) for line in lines if line["type"] == "limit"}
    return [limit for limit in last.values() if limit[0] < float("inf")]


def _gather(site: Accounts, found: Set[str], lost: Set[str], references: Set[str], key: str) -> str:
    """Bring all patients of a cohort under one account and return it."""
    for name in lost:
        site.create(name, references, key, recovered=True)
    names = sorted(found) + sorted(lost)
    if not names:
        names = [secrets.token_hex(_ID_BYTES)]
        site.create(names[0], references, key)
    for other in names[1:]:
        site.append(other, {"type": "join", "into": names[0]})
    site.admit(names[0], references)
    return names[0]


def _missing(lines: Sequence[Record], records: Sequence[Record]) -> list[Record]:
    """Return the account's reservations of a study that its ledger lacks, as the ledger's next lines.

    The account is written first, so that a crash leaves at most the next line; whatever else is missing was there once.
    A ledger that holds nothing names no study: what it once held is another study's.
    """
    study, own = study_of(records), {record["id"] for record in records}
    head = records[-1]["id"] if records else None
    done = {line["entry"] for line in lines if line["type"] == "complete"}
    missing = []
    for line in lines:
        if line["type"] == "reserve" and line["study"] == study and line["entry"] not in own:
            sealed = line.get("sealed")
            if line["entry"] in done or sealed is None or sealed["previous"] != head:
                raise PrivacyError(_LEDGER_CUT)
            missing.append(sealed)
            head = sealed["id"]
    return missing


def _line(record: Record, study: str) -> Record:
    return {
        "type": "reserve",
        "entry": record["id"],
        "study": study,
        "stage": record["stage"],
        "events": record["events"],
        "noise_source": record["noise_source"],
        "trials": trials_of(record),
        "delta": record["budget"]["delta"],
    }


def _sweeps(lines: Sequence[Record]) -> dict[str, int]:
    """Return the number of the sweep of each study that declares one; a sweep ends with its first release."""
    number, found = 0, dict[str, int]()
    for line in lines:
        if line["type"] == "reserve" and trials_of(line) > 1:
            found.setdefault(line["study"], number)
        if line["type"] == "release" and found.get(line["study"]) == number:
            number += 1
    return found


def _check_sweep(lines: Sequence[Record], new: Record) -> None:
    before, after = _sweeps(lines), _sweeps([*lines, new])
    if new["study"] in before or new["study"] not in after:
        return
    same = [study for study, number in after.items() if number == after[new["study"]]]
    declared = min(trials_of(line) for line in [*lines, new] if line.get("study") in same and trials_of(line) > 1)
    if len(same) > declared:
        raise BudgetError(
            f"{len(same) - 1} studies of this sweep read these patients already, privacy.trials declares {declared}: "
            "certify one of them, or set privacy.trials to 1 and pay for this study on its own"
        )


def _check_limits(lines: Sequence[Record], new: Record) -> None:
    if limits_of(lines) and len(counted_events([new])) < len(events_of([new])):
        raise BudgetError(
            f"stage '{new['stage']}' reads these patients without a mechanism, which no limit of their account allows: "
            "set a finite privacy.epsilon, use other patients, or have whoever answers for them lift it (medsynth "
            "budget limit)"
        )
    for most, delta in limits_of(lines):
        before, added = counted_events([line for line in lines if line["type"] == "reserve"]), counted_events([new])
        after = epsilon([*before, *added], delta)
        if after > most:
            raise BudgetError(
                f"stage '{new['stage']}' does not fit under the limit of these patients' account: all studies together "
                f"reserved {epsilon(before, delta):g}, with this {after:g}, limit {most:g} at delta {delta:g}. Lower "
                "privacy.epsilon, use other patients, or have whoever answers for them raise it (medsynth budget limit)"
            )
