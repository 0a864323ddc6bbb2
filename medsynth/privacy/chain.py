"""Hash-chained JSON lines on disk: the file format of the ledger of a run and of the account of a cohort.

``id`` of a line is the SHA-256 of the line without it, and ``previous`` the id of the line above, so that a change
anywhere breaks the chain.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from medsynth.errors import StoreError, VerificationError
from medsynth.files import sync_folder

GENESIS = "0" * 64
Record = dict[str, Any]


class Chain:
    """One file of chained lines that several processes may append to.

    *Guarantees*: :meth:`append` returns after the line is on disk; a writer that is stopped at any byte, or that finds
    the disk full, leaves a file that :meth:`mended` brings back to its acknowledged lines, or to one more.
    """

    def __init__(self, path: Path, what: str = "ledger", mode: int = 0o666) -> None:
        """Name the file; nothing is read or written.

        Args:
            path: the file.
            what: how messages call it.
            mode: permissions of a new file, before the umask.
        """
        self.path = path
        self._what = what
        self._mode = mode
        self._lock = FileLock(f"{path}.lock")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other writer out.

        Raises:
            StoreError: the lock cannot be written.
        """
        with lock(self._lock, self._what):
            yield

    def records(self) -> list[Record]:
        """Return every line after checking the chain.

        Raises:
            VerificationError: says which line is changed, missing, moved or incomplete.
        """
        return parse_chain(self._raw(), self._what)

    def mended(self) -> list[Record]:
        """Return every line after mending a crash in the middle of an append; call it under the lock.

        Raises:
            VerificationError: the chain is broken elsewhere than in an unfinished last line.
            StoreError: the file cannot be written.
        """
        raw = self._raw()
        whole = raw[: raw.rfind(b"\n") + 1]
        if len(whole) < len(raw):
            # append() returns after the line's end is on disk, so nobody acted on an incomplete line. A line that
            # lacks only its end stays: it counts.
            with contextlib.suppress(VerificationError):
                records = parse_chain(raw + b"\n", self._what)
                self._write(b"\n")
                return records
            self._cut(len(whole))
        return parse_chain(whole, self._what)

    def seal(self, records: Sequence[Record], record: Mapping[str, Any]) -> Record:
        """Return ``record`` as the line that follows ``records``: with ``previous`` and ``id``."""
        body = {**record, "previous": records[-1]["id"] if records else GENESIS}
        return {**body, "id": identity(body)}

    def append(self, sealed: Record) -> str:
        """Write a sealed line to disk and return its id; call it under the lock.

        Raises:
            StoreError: the disk is full or the file unwritable; the file is as it was before.
        """
        self._write(canonical(sealed) + b"\n")
        return str(sealed["id"])

    def _raw(self) -> bytes:
        return self.path.read_bytes() if self.path.exists() else b""

    def _write(self, data: bytes) -> None:
        new = not self.path.exists()
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, self._mode)
            try:
                _write_or_undo(handle, data)
            finally:
                os.close(handle)
            if new:
                sync_folder(self.path.parent)
        except OSError as error:
            raise StoreError(
                f"the {self._what} cannot be written ({error.strerror}), so nothing was done that it would not know: "
                "make room or give access, and run the same command again; what was reserved before stays reserved"
            ) from error

    def _cut(self, size: int) -> None:
        try:
            with self.path.open("r+b") as handle:
                handle.truncate(size)
                os.fsync(handle.fileno())
        except OSError as error:
            raise StoreError(f"the {self._what} cannot be mended ({error.strerror}): give write access") from error


@contextlib.contextmanager
def lock(file_lock: FileLock, what: str) -> Iterator[None]:
    """Hold ``file_lock``; failures to make it are told as those of ``what``.

    Raises:
        StoreError: the lock cannot be written.
    """
    try:
        file_lock.acquire()
    except OSError as error:
        raise StoreError(f"the {what} cannot be locked ({error.strerror}): give write access to its folder") from error
    try:
        yield
    finally:
        file_lock.release()


def parse_chain(raw: bytes, what: str = "ledger") -> list[Record]:
    """Return the records of a file after checking its chain.

    Args:
        raw: the file's bytes.
        what: how messages call it.

    Raises:
        VerificationError: says which line is changed, missing, moved or incomplete.
    """
    if raw and not raw.endswith(b"\n"):
        number = len(raw.splitlines())
        raise VerificationError(f"{what} line {number} is incomplete: a writer was stopped inside it")
    records: list[Record] = []
    previous = GENESIS
    for number, line in enumerate(raw.splitlines(), start=1):
        try:
            record = json.loads(line)
            body = {key: value for key, value in record.items() if key != "id"}
            sound = record["id"] == identity(body) and line == canonical(record)
        except (ValueError, AttributeError, KeyError, TypeError) as error:
            raise VerificationError(f"{what} line {number} is unreadable: restore the file from a copy") from error
        if not sound:
            raise VerificationError(
                f"{what} line {number} was changed, its digest does not fit its content: restore the file from a copy"
            )
        if record["previous"] != previous:
            raise VerificationError(
                f"{what} line {number} does not follow the line above it, lines are missing: restore the file from a "
                "copy"
            )
        previous = record["id"]
        records.append(record)
    return records


def canonical(value: Any) -> bytes:
    """Return the one byte string that stands for a JSON value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def identity(body: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of a line without its ``id``."""
    return hashlib.sha256(canonical(body)).hexdigest()


def _write_or_undo(handle: int, data: bytes) -> None:
    """Append all of ``data`` and bring it to disk, or leave the file as long as it was."""
    before = os.fstat(handle).st_size
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(handle, view) :]
        os.fsync(handle)
    except OSError:
        # A file that cannot be cut either keeps a torn line (mended next time) or a whole one (which then counts).
        with contextlib.suppress(OSError):
            os.ftruncate(handle, before)
            os.fsync(handle)
        raise
