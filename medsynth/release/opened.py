"""A release as it lies on disk, read once before any question is asked about it."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from medsynth.errors import VerificationError
from medsynth.privacy.ledger import Ledger
from medsynth.release.marks import LEDGER
from medsynth.store import digest_file

_SPECIAL_BITS = stat.S_ISUID | stat.S_ISGID | stat.S_ISVTX


@dataclass(frozen=True)
class Tree:
    """What lies in the folder of a release, each file read once.

    Attributes:
        digests: SHA-256 of each regular file by relative POSIX path.
        folders: relative paths of the folders.
        odd: what may not be in a release at all, in words: links, devices, unreadable files, special modes.
    """

    digests: Mapping[str, str]
    folders: frozenset[str]
    odd: tuple[str, ...]


@dataclass(frozen=True)
class Release:
    """A release while it is checked.

    Attributes:
        pem: public key in the release; empty when it is missing or no key.
        given: public key that the caller has from elsewhere.
        chain: ids of the keys from the given one to the one that signed, where the hospital rotated its key.
        statement: the signed statement; empty when the envelope cannot be opened.
    """

    folder: Path
    tree: Tree
    pem: bytes = b""
    given: bytes | None = None
    chain: tuple[str, ...] = ()
    statement: Mapping[str, Any] = field(default_factory=dict)

    @property
    def predicate(self) -> Mapping[str, Any]:
        """What the statement says."""
        return mapping(self.statement, "predicate")

    @property
    def claim(self) -> Mapping[str, Any]:
        """What is promised."""
        return mapping(self.predicate, "claim")

    @property
    def signer(self) -> bytes:
        """The key that the signature is checked with."""
        return self.given if self.given is not None and not self.chain else self.pem

    def ledger(self) -> Ledger:
        """Return the ledger in the release."""
        return Ledger(self.folder / LEDGER)


Question = Callable[[Release], Sequence[str]]


def mapping(value: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """Return a child that should be a mapping; an empty one when it is not."""
    child = value.get(key)
    return child if isinstance(child, dict) else {}


def parse(payload: bytes) -> dict[str, Any]:
    """Return a JSON object; an empty one for anything else, and for NaN and infinities, which compare with nothing."""
    try:
        value = json.loads(payload, parse_constant=_no_number)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def scan(folder: Path) -> Tree:
    """Read every file of a release once.

    Raises:
        VerificationError: the folder itself cannot be listed.
    """
    digests: dict[str, str] = {}
    folders: set[str] = set()
    odd: list[str] = []

    def refuse(error: OSError) -> NoReturn:
        raise VerificationError(f"a folder of the release cannot be read: {error.strerror}") from error

    for place, names, files in os.walk(folder, onerror=refuse):
        for name in sorted([*names, *files]):
            path = Path(place) / name
            relative, mode = path.relative_to(folder).as_posix(), path.lstat().st_mode
            if stat.S_ISDIR(mode):
                folders.add(relative)
            elif stat.S_ISLNK(mode):
                odd.append(f"{relative} is a link, not a file")
            elif not stat.S_ISREG(mode):
                odd.append(f"{relative} is no regular file: released files are plain data")
            else:
                odd += [f"{relative} has a special file mode: make it 0644"] if mode & _SPECIAL_BITS else []
                try:
                    digests[relative] = digest_file(path)
                except OSError as error:
                    odd.append(f"{relative} cannot be read: {error.strerror}")
    return Tree(digests, frozenset(folders), tuple(odd))


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")
