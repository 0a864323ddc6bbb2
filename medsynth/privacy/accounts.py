"""Where a site keeps its accounts: one folder each, all below one folder and under one lock.

An account folder holds chained lines (``account.jsonl``) and the keyed references of its patients (``members``). Both
are private and never leave the site.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Set
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from medsynth.errors import PrivacyError, StoreError, VerificationError
from medsynth.files import replace_bytes, sync_folder
from medsynth.privacy.chain import Chain, Record, lock

LINES = "account.jsonl"
MEMBERS = "members"
_ID = re.compile(r"[0-9a-f]{32}")


class Accounts:
    """All accounts of a site, below one folder and under one lock."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        # One lock object a process: whoever holds it may take it again, through another Accounts too.
        self._lock = FileLock(self.root / ".lock", is_singleton=True)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep every other writer of any account out.

        Raises:
            StoreError: the folder cannot be written.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StoreError(f"the accounts cannot be written ({error.strerror}): set MEDSYNTH_HOME") from error
        with lock(self._lock, "account"):
            yield

    def ids(self) -> list[str]:
        """Return every account, joined ones too."""
        if not self.root.is_dir():
            return []
        return sorted(path.name for path in self.root.iterdir() if _ID.fullmatch(path.name))

    def lines(self, identity: str) -> list[Record]:
        """Return the lines of one account folder.

        Raises:
            VerificationError: they are missing, or their chain is broken.
        """
        path = self.root / identity / LINES
        if not path.is_file():
            raise VerificationError("an account has lost its lines: restore MEDSYNTH_HOME/accounts from a copy")
        return self.chain(identity).records()

    def chain(self, identity: str) -> Chain:
        """Return the file of an account."""
        return Chain(self.root / identity / LINES, "account", 0o600)

    def current(self, identity: str) -> str:
        """Return the account that ``identity`` was joined into, or ``identity`` itself. Call it under the lock."""
        seen = {identity}
        while True:
            joined = [str(line["into"]) for line in self._mended(identity) if line["type"] == "join"]
            if not joined:
                return identity
            identity = joined[-1]
            if identity in seen or identity not in self.ids():
                raise VerificationError("the accounts refer to each other wrongly: restore MEDSYNTH_HOME from a copy")
            seen.add(identity)

    def holders(self, references: Set[str]) -> set[str]:
        """Return the accounts that hold any of these patients. Call it under the lock."""
        return {self.current(name) for name in self.ids() if not references.isdisjoint(self.members(name))}

    def members(self, identity: str) -> frozenset[str]:
        """Return the references of an account's patients (private: neither they nor their number may be shown).

        Raises:
            VerificationError: they are missing; without them its patients would seem new.
        """
        path = self.root / identity / MEMBERS
        found = frozenset(path.read_text(encoding="ascii").split()) if path.is_file() else frozenset()
        if not found:
            raise VerificationError("an account has lost its members: restore MEDSYNTH_HOME/accounts from a copy")
        return found

    def require_key(self, key: str) -> None:
        """Check that every account names its patients with the key ``key`` (its id). Call it under the lock.

        Raises:
            PrivacyError: another one.
        """
        for identity in self.ids():
            if self._mended(identity)[0].get("key", key) != key:
                raise PrivacyError(
                    "an account was made with another site.key, so that its patients would not be recognised: restore "
                    "MEDSYNTH_HOME/site.key from a backup"
                )

    def create(self, identity: str, references: Set[str], key: str, *, recovered: bool = False) -> None:
        """Make an account; it appears whole or not at all. Call it under the lock.

        Args:
            identity: its name.
            references: of its patients, at least one.
            key: id of the key that named them.
            recovered: it was there before and was lost; a crash right after this must not forget that.
        """
        new = self.root / f".{identity}.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(mode=0o700)
        chain = Chain(new / LINES, "account", 0o600)
        opened = chain.seal([], {"type": "open", "account": identity, "key": key, "at": _now()})
        chain.append(opened)
        if recovered:
            chain.append(chain.seal([opened], {"type": "recover", "at": _now()}))
        _write_private(new / MEMBERS, references)
        os.rename(new, self.root / identity)
        sync_folder(self.root)

    def admit(self, identity: str, references: Set[str]) -> None:
        """Add patients to an account. Call it under the lock."""
        known = self.members(identity)
        if not references <= known:
            _write_private(self.root / identity / MEMBERS, references | known)

    def append(self, identity: str, record: Mapping[str, Any]) -> None:
        """Write one line. Call it under the lock."""
        chain = self.chain(identity)
        chain.append(chain.seal(self._mended(identity), {**record, "at": _now()}))

    def _mended(self, identity: str) -> list[Record]:
        if not (self.root / identity / LINES).is_file():
            return self.lines(identity)
        return self.chain(identity).mended()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _write_private(path: Path, references: Set[str]) -> None:
    """Replace a members file; it is readable by its owner only."""
    replace_bytes(path, ("\n".join(sorted(references)) + "\n").encode("ascii"), mode=0o600)
