"""Which steps of a reserved DP-SGD run are spent: claimed on disk before a patient is read, and never twice.

After a crash, steps that were claimed but whose result was not kept are lost: they count as spent and are skipped,
because running them again with fresh noise would be a second release.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from medsynth.errors import PrivacyError


class StepJournal:
    """An append-only file of claimed steps, shared by every process that works on one reservation.

    *Guarantees*: over all restarts and processes at most ``steps`` steps are handed out, each of them once.

    A caller resumes a reservation only if the journal was there: ``found = path.exists()`` before opening it, then
    ``ledger.reserve(..., resume=found)``.
    """

    def __init__(self, path: Path, steps: int) -> None:
        """Open or create the journal.

        Args:
            path: the file; keep it beside the checkpoints.
            steps: T of the reservation.

        Raises:
            PrivacyError: an existing journal is for another T, or unreadable.
        """
        self.path = path
        self.steps = steps
        self._lock = FileLock(f"{path}.lock")
        with self._lock:
            if not path.exists():
                self._append({"steps": steps})
            elif not self._read():
                # A crash while the first line was written: nothing can have been claimed.
                path.write_bytes(b"")
                self._append({"steps": steps})
            self._next()

    @property
    def next_step(self) -> int:
        """The first step that nobody has claimed; ``steps`` when all are spent."""
        with self._lock:
            return self._next()

    @property
    def finished(self) -> bool:
        """Whether every step is spent."""
        return self.next_step >= self.steps

    def claimed_steps(self, block: int = 1) -> Iterator[int]:
        """Yield every step that is left, each claimed on disk before it is yielded.

        Loop over this rather than over numbers of one's own: a second process on the same journal then gets other
        steps, never the same ones.

        Args:
            block: how many steps to claim with one write (lost together in a crash).
        """
        while True:
            with self._lock:
                start = self._next()
                if start >= self.steps:
                    return
                claimed = self.claim(start, block)
            yield from claimed

    def claim(self, step: int, block: int = 1) -> range:
        """Spend the next steps, on disk, before any patient is read for them.

        Args:
            step: must be :attr:`next_step`.
            block: how many steps to claim with one write (lost together in a crash); cut off at ``steps``.

        Returns:
            The claimed steps.

        Raises:
            PrivacyError: the step is spent already, skips ahead, or lies beyond the reservation.
        """
        if block < 1:
            raise PrivacyError(f"a claim needs at least one step, got {block}")
        with self._lock:
            expected = self._next()
            if step != expected:
                raise PrivacyError(f"step {step} cannot be claimed: the next unspent step is {expected}")
            if step >= self.steps:
                raise PrivacyError(f"all {self.steps} reserved steps are spent")
            claimed = range(step, min(step + block, self.steps))
            self._append({"from": claimed.start, "to": claimed.stop})
            return claimed

    def _next(self) -> int:
        position = 0
        lines = self._read()
        if not lines or lines[0].get("steps") != self.steps:
            raise PrivacyError(f"the step journal is not for a run of {self.steps} steps: reserve a new run")
        for line in lines[1:]:
            if line.get("from") != position or not position < line.get("to", -1) <= self.steps:
                raise PrivacyError("the step journal is damaged: reserve a new run")
            position = line["to"]
        return position

    def _read(self) -> list[dict[str, int]]:
        """Return the acknowledged lines; a line without its end was never acknowledged, and is cut off."""
        raw = self.path.read_bytes()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            with self.path.open("r+b") as handle:
                handle.truncate(len(whole))
        try:
            lines = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise PrivacyError("the step journal is damaged: reserve a new run") from error
        if not all(isinstance(line, dict) for line in lines):
            raise PrivacyError("the step journal is damaged: reserve a new run")
        return lines

    def _append(self, value: dict[str, int]) -> None:
        with self.path.open("ab") as handle:
            handle.write(json.dumps(value).encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())
