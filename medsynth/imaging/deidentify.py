"""Keyed hashes: pseudonyms that only the holder of the cohort folder can tie to a person or a file, and references by
which one site recognises its patients in other cohorts."""

from __future__ import annotations

import csv
import hashlib
import hmac
import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path

from medsynth.errors import InputError, StoreError
from medsynth.imaging.tree import files_below

KEY_FILE = "pseudonym.key"
QUARANTINE_FILE = "quarantine.csv"
REFERENCES_FILE = "references.txt"
_KEY_BYTES = 32


@dataclass(frozen=True)
class Pseudonyms:
    """Names derived from HMAC-SHA256 (RFC 2104) under one random key a cohort."""

    key: bytes = field(repr=False)

    def patient(self, person: str) -> str:
        """Return the pseudonym of a person (the hospital's own identifier goes in)."""
        return f"p-{_keyed(self.key, 'patient', person)[:12]}"

    def case(self, source: str) -> str:
        """Return the name of a case from its source path relative to the input."""
        return f"c-{_keyed(self.key, 'case', source)[:12]}"

    def reference(self, source: str) -> str:
        """Return the reference of a refused file from its path relative to the input."""
        return f"q-{_keyed(self.key, 'quarantine', source)[:8]}"


def create_pseudonyms(folder: Path) -> Pseudonyms:
    """Draw a key from the operating system and store it in ``folder``, readable by its owner only (mode 0600)."""
    key = secrets.token_bytes(_KEY_BYTES)
    handle = os.open(folder / KEY_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(key)
    return Pseudonyms(key)


@dataclass(frozen=True)
class References:
    """By what a site recognises the patients of a cohort: HMAC-SHA256 (RFC 2104) under the site's own key.

    Attributes:
        key_id: which key it was, without telling the key.
        names: one a DICOM Patient ID and one a picture's voxel values; private, as is their number.
    """

    key_id: str
    names: frozenset[str] = field(repr=False)


def reference_person(key: bytes, person: str) -> str:
    """Return the reference of a patient by the hospital's own identifier (DICOM Patient ID)."""
    return _keyed(key, "person", person)


def reference_picture(key: bytes, values: str) -> str:
    """Return the reference of a picture by the digest of its voxel values (``Loaded.values``)."""
    return _keyed(key, "picture", values)


def key_id(key: bytes) -> str:
    """Return what names a site's key without telling it."""
    return _keyed(key, "key", "")


def write_references(folder: Path, references: References) -> None:
    """Write the references of a cohort into its (private) folder."""
    lines = [references.key_id, *sorted(references.names)]
    (folder / REFERENCES_FILE).write_text("\n".join(lines) + "\n", encoding="ascii")


def read_references(cohort: Path) -> References:
    """Read what :func:`write_references` wrote.

    Raises:
        StoreError: there is nothing.
    """
    try:
        lines = (cohort / REFERENCES_FILE).read_text(encoding="ascii").split()
    except OSError:
        lines = []
    if len(lines) < 2:
        raise StoreError(
            "the cohort folder does not say by what its patients are recognised in other runs: run ingest again with "
            "--replace"
        )
    return References(lines[0], frozenset(lines[1:]))


def _keyed(key: bytes, kind: str, text: str) -> str:
    # Names of files need not be UTF-8.
    return hmac.new(key, f"{kind}\0{text}".encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


def relative(path: Path, source: Path) -> str:
    """Return ``path`` relative to the input folder, as POSIX text."""
    return Path(os.path.relpath(path, source)).as_posix()


def explain(cohort: Path, source: Path) -> dict[str, Path]:
    """Resolve the references of a quarantine list to files, for the hospital's own screen and nowhere else.

    Args:
        cohort: finished cohort folder with its key.
        source: the input folder that was ingested.

    Returns:
        Reference to path; a series is named by its first file. References whose file is gone are left out.

    Raises:
        StoreError: no key or no quarantine list in ``cohort``.
        InputError: ``source`` is no folder, or not the one that was ingested.
    """
    try:
        names = Pseudonyms((cohort / KEY_FILE).read_bytes())
        with (cohort / QUARANTINE_FILE).open(newline="", encoding="utf-8") as handle:
            wanted = {row["ref"] for row in csv.DictReader(handle)}
    except OSError:
        raise StoreError("the cohort folder has no readable key or quarantine list: run ingest again") from None
    if not source.is_dir():
        raise InputError("the input is no folder: give the folder that was ingested")
    closed: list[Path] = []
    there = sorted(files_below(source, closed))
    found = {names.reference(relative(path, source)): path for path in [*there, *closed]}
    if wanted and not wanted & found.keys():
        raise InputError(
            f"none of the {len(wanted)} references belongs to a file below this folder: give the one that was ingested"
        )
    return {ref: found[ref] for ref in sorted(wanted & found.keys())}
