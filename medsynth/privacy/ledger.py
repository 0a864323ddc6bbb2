"""The privacy ledger of a run: append-only chained lines; every spend is written down before it happens.

A line (see :mod:`medsynth.privacy.chain`) is a ``reserve``, a ``resume`` or a ``complete`` record. Only public values
go in: never the number of patients, batch sizes, losses, seeds or paths. What a run reserves is written to the account
of its cohort first (:mod:`medsynth.privacy.account`), so that other runs on the same patients see it.
"""

from __future__ import annotations

import contextlib
import json
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from medsynth import __version__
from medsynth.errors import BudgetError, PrivacyError
from medsynth.privacy.accounting import Event
from medsynth.privacy.accounting import epsilon as compose
from medsynth.privacy.chain import GENESIS, Chain, Record, canonical
from medsynth.privacy.entropy import describe_source

if TYPE_CHECKING:
    from medsynth.privacy.account import Account

UNIT = "patient"
RELATION = "add_or_remove_one"


class Mechanism(Protocol):
    """What the ledger reads from a plan of :mod:`medsynth.privacy.mechanism`."""

    @property
    def name(self) -> str:
        """What is released."""

    @property
    def kind(self) -> str:
        """``gaussian_sum`` or ``dp_sgd``."""

    @property
    def scheme(self) -> str:
        """How patients are sampled, in words."""

    @property
    def clip_norm(self) -> float:
        """Sensitivity."""

    @property
    def denominator(self) -> float:
        """Public constant that the sum is divided by."""

    def event(self) -> Event:
        """Return what all of it costs."""


# Keys that would betray the cohort or the noise, wherever they stand in a record.
_FORBIDDEN = frozenset({"n", "patients", "n_patients", "batch_size", "batch_sizes", "loss", "losses", "seed", "path"})


class Ledger:
    """The ledger of one run, a file that several processes may append to.

    *Guarantees*: what the file holds never composes to more than the budget that was passed with the last accepted
    reservation; an interrupted reservation stays spent. With an account, ledger and account hold the same reservations
    of this study, a ledger that was cut or replaced by an older copy is refused, and no reservation exceeds the
    account's limit. Without an account nothing notices that lines at the end are gone.
    """

    def __init__(self, path: Path, account: Account | None = None) -> None:
        """Name the file; nothing is read or written.

        Args:
            path: the file.
            account: the account of the cohort; None leaves the ledger on its own.
        """
        self.path = path
        self.account = account
        self._chain = Chain(path)

    def reserve(
        self,
        stage: str,
        mechanisms: Sequence[Mechanism | Event],
        *,
        epsilon: float,
        delta: float,
        noise_source: str | Mapping[str, Any],
        config_digest: str,
        parents: Mapping[str, str],
        sensitivity: Mapping[str, Any] | None = None,
        denominators: Mapping[str, float] | None = None,
        sampling: Mapping[str, Any] | None = None,
        preflight: Mapping[str, Any] | None = None,
        resume: bool = False,
        trials: int = 1,
    ) -> str:
        """Write down what a stage is about to spend, before it reads a patient.

        Clip norms, denominators, sampling and events are taken from the mechanism plans themselves; what is passed
        beside them (draws, records a patient) is added.

        Args:
            stage: verb of the stage.
            mechanisms: every plan that will be executed; the whole of T.
            epsilon: the budget for everything in this ledger; infinite for a non-private study.
            delta: the budget's delta.
            noise_source: ``Entropy.kind``, or the mapping of ``entropy.describe_source``.
            config_digest: digest of the stage's configuration.
            parents: digests of the folders that the stage reads, by name.
            sensitivity: more on the sensitivity, e.g. ``{"draws": 4, "max_records": 1}``.
            denominators: only for plain events; plans bring their own.
            sampling: more on the sampling.
            preflight: ``Evidence.to_json()`` for DP-SGD.
            resume: go on within an interrupted reservation of the same stage, configuration, parents and events,
                where there is one (stages that journal their steps only).
            trials: declared number of studies of a sweep, each charged like this one.

        Returns:
            The id of the reservation.

        Raises:
            BudgetError: everything reserved before plus this exceeds the budget of the study or the limit of the
                account; nothing is written.
            VerificationError: the chain of the ledger or of the account is broken.
            PrivacyError: a budget that is no budget, a value that must not be recorded, DP-SGD without a passed
                preflight, or a ledger of another cohort.
            StoreError: ledger or account cannot be written.
        """
        _require_budget(epsilon, delta, trials)
        events = [entry if isinstance(entry, Event) else entry.event() for entry in mechanisms]
        clip_norms, by_plan, schemes = _plan_fields(mechanisms)
        _require_preflight(events, preflight)
        record: Record = {
            "type": "reserve",
            "nonce": secrets.token_hex(16),  # two equal reservations are two spends: their ids must differ
            "account": self.account.id if self.account is not None else None,
            "trials": trials,
            "stage": stage,
            "code": f"medsynth {__version__}",
            "mechanisms": [e.kind if isinstance(e, Event) else f"{e.kind}:{e.name}" for e in mechanisms],
            "events": [event.to_json() for event in events],
            "sensitivity": _joined({"unit": UNIT, "relation": RELATION, "clip_norms": clip_norms}, sensitivity),
            "denominators": _joined(by_plan, denominators),
            "sampling": _joined(schemes, sampling),
            "noise_source": describe_source(noise_source) if isinstance(noise_source, str) else dict(noise_source),
            "config_digest": config_digest,
            "parents": dict(parents),
            "preflight": dict(preflight) if preflight is not None else None,
            "budget": {"epsilon": _finite_or_text(epsilon), "delta": delta},
        }
        _refuse_private(record)
        with self._locked():
            records = self._reconciled()
            if resume and (found := _interrupted(records, record)) is not None:
                self._chain.append(self._chain.seal(records, {"type": "resume", "entry": found}))
                return found
            _check_budget(records, record, epsilon, delta)
            sealed = self._chain.seal(records, record)
            if self.account is not None:
                # First there: a crash in between is charged, never forgotten.
                self.account.reserve(records, sealed)
            return self._chain.append(sealed)

    def complete(self, entry_id: str, outputs: Mapping[str, str], executed: Sequence[Event] | None = None) -> None:
        """Write down that a reservation was used up and what came out.

        Args:
            entry_id: what :meth:`reserve` returned.
            outputs: digest of each output, by its relative name inside the stage folder.
            executed: the events that really ran, if they are not the reserved ones (fewer steps, never more).

        Raises:
            PrivacyError: unknown or completed entry, absolute output names, or more executed than reserved.
        """
        if any(Path(name).is_absolute() or ".." in Path(name).parts for name in outputs):
            raise PrivacyError("outputs are named relative to the stage folder, never by an absolute path")
        with self._locked():
            records = self._chain.mended()
            found = [r for r in records if r["type"] == "reserve" and r["id"] == entry_id]
            if not found:
                raise PrivacyError("this ledger holds no such reservation: complete what reserve() returned")
            if any(r["type"] == "complete" and r["entry"] == entry_id for r in records):
                raise PrivacyError("this reservation is complete already: reserve again to spend again")
            reserved = events_of(found)
            ran = list(executed) if executed is not None else reserved
            if not _within(ran, reserved):
                raise PrivacyError("more was executed than was reserved: this ledger's epsilon would be false")
            record = {"type": "complete", "entry": entry_id, "outputs": dict(outputs)}
            sealed = self._chain.seal(records, {**record, "executed": [event.to_json() for event in ran]})
            self._chain.append(sealed)
            if self.account is not None:
                self.account.complete(entry_id)

    def completed(self, config_digest: str, parents: Mapping[str, str], outputs: Mapping[str, str]) -> str | None:
        """Return the finished reservation that put out exactly ``outputs`` from these settings and folders, if any."""
        for entry in reversed(self.entries()):
            same = entry["config_digest"] == config_digest and entry["parents"] == dict(parents)
            if same and entry["status"] == "complete" and entry["outputs"] == dict(outputs):
                return str(entry["id"])
        return None

    def reconcile(self) -> None:
        """Bring the ledger and its account to the same reservations of this study.

        Raises:
            PrivacyError: the ledger lacks lines that it once had, or belongs to the account of another cohort.
            VerificationError: a chain is broken.
        """
        with self._locked():
            self._reconciled()

    def entries(self) -> list[Record]:
        """Return the reservations in order, each with ``status`` (``reserved`` or ``complete``) and ``outputs``.

        Raises:
            VerificationError: the chain is broken.
        """
        records = self._chain.records()
        done = {record["entry"]: record for record in records if record["type"] == "complete"}
        return [
            {
                **record,
                "status": "complete" if record["id"] in done else "reserved",
                "outputs": done[record["id"]]["outputs"] if record["id"] in done else {},
            }
            for record in records
            if record["type"] == "reserve"
        ]

    def verify_chain(self) -> None:
        """Check every line of the file.

        Raises:
            VerificationError: says which line is changed, missing, moved or incomplete.
        """
        self._chain.records()

    @property
    def head(self) -> str:
        """Id of the last line; it stands for the whole ledger."""
        records = self._chain.records()
        return str(records[-1]["id"]) if records else GENESIS

    def spent(self, delta: float) -> float:
        """Return epsilon of all reservations together, finished or not, declared trials included."""
        return compose(charged_events(self._chain.records()), delta)

    def taints(self) -> list[str]:
        """Return why nothing that rests on this ledger can be certified; empty when it can."""
        return taints_of(self._chain.records())

    def _reconciled(self) -> list[Record]:
        records = self._chain.mended()
        for missing in self.account.adopt(records) if self.account is not None else []:
            self._chain.append(missing)
            records.append(missing)
        return records

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # The account's lock always comes first, so that no two writers wait for each other.
        outer = self.account.locked() if self.account is not None else contextlib.nullcontext()
        with outer, self._chain.locked():
            yield


def events_of(records: Sequence[Record]) -> list[Event]:
    """Return every reserved event of ``records``."""
    return [Event.from_json(event) for r in records if r["type"] == "reserve" for event in r["events"]]


def charged_events(records: Sequence[Record]) -> list[Event]:
    """Return every reserved event of ``records`` as often as its study was declared to be tried."""
    return [
        replace(event, count=event.count * trials_of(record)) for record in records for event in events_of([record])
    ]


def trials_of(record: Record) -> int:
    """Return of how many studies the sweep of a reservation was declared to be (1: no sweep)."""
    return int(record.get("trials", 1))


def study_of(records: Sequence[Record]) -> str:
    """Return what names the study that a ledger belongs to: the id of its first reservation, "" where there is none."""
    return next((str(record["id"]) for record in records if record["type"] == "reserve"), "")


def taints_of(records: Sequence[Record]) -> list[str]:
    """Return why nothing that rests on these reservations can be certified; empty when it can."""
    reasons = []
    for record in records:
        if record["type"] != "reserve":
            continue
        if record["noise_source"].get("kind") != "os":
            reasons.append(f"stage '{record['stage']}' drew repeatable noise (test_only)")
        if any(event["kind"] == "nonprivate" for event in record["events"]):
            reasons.append(f"stage '{record['stage']}' read patients without a mechanism")
    return reasons


def _require_budget(epsilon: float, delta: float, trials: int) -> None:
    if not epsilon > 0:
        raise PrivacyError(
            f"a budget needs epsilon > 0, got {epsilon}: 1 to 10 are usual, infinity means a study without privacy"
        )
    if not 0 < delta < 1:
        raise PrivacyError(f"a budget needs delta in (0, 1), got {delta}: at most 1/(10 N) for N declared patients")
    if trials < 1:
        raise PrivacyError(f"a sweep has at least one study, got {trials} trials: set privacy.trials to 1 or more")


def _check_budget(records: Sequence[Record], new: Record, epsilon: float, delta: float) -> None:
    before = charged_events(records)
    after = compose([*before, *charged_events([new])], delta)
    if after <= epsilon:
        return
    sweep = f", each of them in {trials_of(new)} trials" if trials_of(new) > 1 else ""
    raise BudgetError(
        f"stage '{new['stage']}' does not fit into the budget{sweep}: spent {compose(before, delta):g}, with this "
        f"{after:g}, budget {epsilon:g} at delta {delta:g}. Spends are never refunded, not by a crash nor by deleting "
        "outputs: start a new run folder, whose budget is its own (the account of these patients counts both)"
    )


def _interrupted(records: Sequence[Record], wanted: Record) -> str | None:
    done = {record["entry"] for record in records if record["type"] == "complete"}
    same = ["stage", "config_digest", "parents", "events", "trials", "mechanisms", "sensitivity", "denominators"]
    same.append("noise_source")
    plain = json.loads(canonical(wanted))
    for record in reversed(records):
        is_open = record["type"] == "reserve" and record["id"] not in done
        if is_open and all(record.get(key) == plain[key] for key in same):
            return str(record["id"])
    return None


def _within(ran: Sequence[Event], reserved: Sequence[Event]) -> bool:
    left: dict[tuple[Any, ...], int] = {}
    for event in reserved:
        key = (event.kind, event.noise_multiplier, event.sampling_rate)
        left[key] = left.get(key, 0) + event.count
    for event in ran:
        key = (event.kind, event.noise_multiplier, event.sampling_rate)
        left[key] = left.get(key, 0) - event.count
    return all(count >= 0 for count in left.values())


def _require_preflight(events: Sequence[Event], preflight: Mapping[str, Any] | None) -> None:
    if any(event.kind == "subsampled_gaussian" for event in events) and not (preflight or {}).get("passed"):
        raise PrivacyError("DP-SGD is reserved only with the evidence of a passed preflight: run preflight() first")


def _plan_fields(mechanisms: Sequence[Mechanism | Event]) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """Return clip norms, denominators and sampling schemes by name of plan."""
    plans = [entry for entry in mechanisms if not isinstance(entry, Event)]
    if len({plan.name for plan in plans}) < len(plans):
        raise PrivacyError("two mechanisms of one reservation have the same name: name each release")
    return (
        {plan.name: plan.clip_norm for plan in plans},
        {plan.name: plan.denominator for plan in plans},
        {plan.name: plan.scheme for plan in plans},
    )


def _joined(own: Mapping[str, Any], more: Mapping[str, Any] | None) -> Record:
    """Return both; what is executed (``own``) can be added to but not contradicted."""
    clash = [key for key, value in (more or {}).items() if key in own and own[key] != value]
    if clash:
        raise PrivacyError(f"'{clash[0]}' is taken from the mechanism that runs: do not pass another value for it")
    return {**own, **(more or {})}


def _refuse_private(value: Any) -> None:
    if isinstance(value, Mapping):
        for key, child in value.items():
            if str(key).lower() in _FORBIDDEN:
                raise PrivacyError(f"a ledger entry must not hold '{key}': it would betray the cohort or the noise")
            _refuse_private(child)


def _finite_or_text(value: float) -> float | str:
    return value if math.isfinite(value) else "inf"
