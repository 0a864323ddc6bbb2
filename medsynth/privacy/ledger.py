"""The privacy ledger: append-only, hash-chained JSON lines; every spend is written down before it happens.

A line is a ``reserve``, a ``resume`` or a ``complete`` record. ``id`` is the SHA-256 of the record without it, and
``previous`` the id of the line above, so that a change anywhere breaks the chain. Only public values go in: never the
number of patients, batch sizes, losses, seeds or paths.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from filelock import FileLock

from medsynth import __version__
from medsynth.errors import BudgetError, PrivacyError, VerificationError
from medsynth.privacy.accounting import Event
from medsynth.privacy.accounting import epsilon as compose
from medsynth.privacy.entropy import describe_source

GENESIS = "0" * 64
UNIT = "patient"
RELATION = "add_or_remove_one"
Record = dict[str, Any]


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
    """The ledger of one cohort, a file that several processes may append to.

    *Guarantees*: no sequence of reservations through this class composes to more than the budget that was passed with
    the last accepted one; an interrupted reservation stays spent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(f"{path}.lock")

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

        Returns:
            The id of the reservation.

        Raises:
            BudgetError: everything reserved before plus this exceeds the budget; nothing is written.
            VerificationError: the ledger's chain is broken.
            PrivacyError: a value that must not be recorded, or DP-SGD without a passed preflight.
        """
        events = [entry if isinstance(entry, Event) else entry.event() for entry in mechanisms]
        clip_norms, by_plan, schemes = _plan_fields(mechanisms)
        _require_preflight(events, preflight)
        record: Record = {
            "type": "reserve",
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
        with self._lock:
            records = self._repaired()
            if resume and (found := _interrupted(records, record)) is not None:
                self._append(records, {"type": "resume", "entry": found})
                return found
            _check_budget(records, events, epsilon, delta, stage)
            return self._append(records, record)

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
        with self._lock:
            records = self._repaired()
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
            self._append(records, {**record, "executed": [event.to_json() for event in ran]})

    def completed(self, config_digest: str, parents: Mapping[str, str], outputs: Mapping[str, str]) -> str | None:
        """Return the finished reservation that put out exactly ``outputs`` from these settings and folders, if any."""
        for entry in reversed(self.entries()):
            same = entry["config_digest"] == config_digest and entry["parents"] == dict(parents)
            if same and entry["status"] == "complete" and entry["outputs"] == dict(outputs):
                return str(entry["id"])
        return None

    def entries(self) -> list[Record]:
        """Return the reservations in order, each with ``status`` (``reserved`` or ``complete``) and ``outputs``.

        Raises:
            VerificationError: the chain is broken.
        """
        records = self._verified()
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
        self._verified()

    @property
    def head(self) -> str:
        """Id of the last line; it stands for the whole ledger."""
        records = self._verified()
        return str(records[-1]["id"]) if records else GENESIS

    def spent(self, delta: float) -> float:
        """Return epsilon of all reservations together, finished or not."""
        return compose(events_of(self._verified()), delta)

    def taints(self) -> list[str]:
        """Return why nothing that rests on this ledger can be certified; empty when it can."""
        return taints_of(self._verified())

    def _verified(self) -> list[Record]:
        raw = self.path.read_bytes() if self.path.exists() else b""
        return parse_chain(raw)

    def _repaired(self) -> list[Record]:
        """Return the records after mending a crash in the middle of an append; call it under the lock."""
        raw = self.path.read_bytes() if self.path.exists() else b""
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            # reserve() returns after the line's end is on disk, so nobody acted on an incomplete line. A line that
            # lacks only its end stays: it counts as spent.
            try:
                records = parse_chain(raw + b"\n")
                self._write(b"\n")
                return records
            except VerificationError:
                with self.path.open("r+b") as handle:
                    handle.truncate(len(whole))
                    os.fsync(handle.fileno())
        return parse_chain(whole)

    def _append(self, records: Sequence[Record], record: Record) -> str:
        body = {**record, "previous": records[-1]["id"] if records else GENESIS}
        identity = _identity(body)
        self._write(_canonical({**body, "id": identity}) + b"\n")
        return identity

    def _write(self, data: bytes) -> None:
        new = not self.path.exists()
        with self.path.open("ab") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        if new:
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def parse_chain(raw: bytes) -> list[Record]:
    """Return the records of a ledger file after checking its chain.

    Raises:
        VerificationError: says which line is changed, missing, moved or incomplete.
    """
    if raw and not raw.endswith(b"\n"):
        number = len(raw.splitlines())
        raise VerificationError(f"ledger line {number} is incomplete: a writer was stopped inside it")
    records: list[Record] = []
    previous = GENESIS
    for number, line in enumerate(raw.splitlines(), start=1):
        try:
            record = json.loads(line)
            body = {key: value for key, value in record.items() if key != "id"}
            sound = record["id"] == _identity(body) and line == _canonical(record)
        except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError) as error:
            raise VerificationError(f"ledger line {number} is unreadable") from error
        if not sound:
            raise VerificationError(f"ledger line {number} was changed: its digest does not fit its content")
        if record["previous"] != previous:
            raise VerificationError(f"ledger line {number} does not follow the line above it: lines are missing")
        previous = record["id"]
        records.append(record)
    return records


def events_of(records: Sequence[Record]) -> list[Event]:
    """Return every reserved event of ``records``."""
    return [Event.from_json(event) for r in records if r["type"] == "reserve" for event in r["events"]]


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


def _check_budget(records: Sequence[Record], new: Sequence[Event], epsilon: float, delta: float, stage: str) -> None:
    before = events_of(records)
    after = compose([*before, *new], delta)
    if after <= epsilon:
        return
    raise BudgetError(
        f"stage '{stage}' does not fit into the budget: spent {compose(before, delta):g}, with this {after:g}, "
        f"budget {epsilon:g} at delta {delta:g}. Spends are never refunded, not by a crash nor by deleting outputs: "
        "raise privacy.epsilon, lower the stage's share, or start over with a cohort that was not used"
    )


def _interrupted(records: Sequence[Record], wanted: Record) -> str | None:
    done = {record["entry"] for record in records if record["type"] == "complete"}
    same = ("stage", "config_digest", "parents", "events", "mechanisms", "sensitivity", "denominators", "noise_source")
    plain = json.loads(_canonical(wanted))
    for record in reversed(records):
        is_open = record["type"] == "reserve" and record["id"] not in done
        if is_open and all(record[key] == plain[key] for key in same):
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


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def _identity(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(_canonical(body)).hexdigest()
