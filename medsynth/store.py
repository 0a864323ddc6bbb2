"""Stage folders: written in a temporary place, ``manifest.json`` last, then renamed into existence.

No manifest means not finished. A manifest names its parents by digest, so that the ancestry of a release (and with
it every privacy spend) can be walked back.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from medsynth import __version__
from medsynth.errors import StoreError
from medsynth.files import HALF_WRITTEN, replace_bytes

MANIFEST = "manifest.json"
_LOCK = ".lock"
_STATE = "unfinished.sha256"  # in a folder that a later run may go on with: what it was begun from
Sensitivity = Literal["public", "released", "internal", "private"]
ORDER: tuple[Sensitivity, ...] = ("public", "released", "internal", "private")


@dataclass(frozen=True)
class Manifest:
    """What a finished stage folder says of itself.

    Attributes:
        stage: verb that wrote the folder, e.g. ``"train"``.
        sensitivity: the most sensitive kind of value inside (``public`` < ``released`` < ``internal`` < ``private``).
        config_digest: SHA-256 of the sections of the configuration that the stage depends on.
        parents: digest of each folder that was read, by stage folder name.
        ledger_entries: ids of the ledger entries whose output lies in this folder.
        files: SHA-256 of each file inside, by relative POSIX path (without the manifest).
        details: stage-specific JSON values; never a patient identifier, count of patients drawn, seed of noise or path.
    """

    stage: str
    sensitivity: Sensitivity
    config_digest: str
    parents: Mapping[str, str]
    ledger_entries: tuple[str, ...] = ()
    files: Mapping[str, str] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    medsynth_version: str = __version__

    @property
    def releasable(self) -> bool:
        """Whether ``export`` may read this folder."""
        return self.sensitivity in ("public", "released")

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, and so of every file that it names."""
        return hashlib.sha256(canonical_json(asdict(self))).hexdigest()


def canonical_json(value: Any) -> bytes:
    """Return the one byte string that stands for ``value`` (sorted keys, no blanks, UTF-8)."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def json_text(values: Mapping[str, Any]) -> bytes:
    """Return the one text of a JSON file: sorted keys, one blank of indent, a line feed at the end, UTF-8."""
    return (json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode()


def digest_of(value: Any) -> str:
    """Return the SHA-256 (hex) of a JSON value in its canonical form."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def digest_file(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest_tree(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file below ``folder`` by relative POSIX path, the manifest left out."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / MANIFEST)
    return {p.relative_to(folder).as_posix(): digest_file(p) for p in files}


def is_done(folder: Path) -> bool:
    """Whether ``folder`` is a finished stage folder."""
    return (folder / MANIFEST).is_file()


def partial(out: Path) -> Path:
    """Return where the stage folder ``out`` is written until it is finished."""
    return out.with_name(f".{out.name}.partial")


def settle(out: Path, *, replace: bool = False) -> None:
    """Put the stage folder in its place that a run had finished when it was killed.

    Without it what the run spent of the privacy budget would be lost with its scratch files.

    Args:
        out: the stage folder.
        replace: in the place of a finished one, too.

    Raises:
        StoreError: it cannot be moved.
    """
    finished = _finished(out)
    if not finished.is_dir() or (out.exists() and not replace):
        return
    try:
        _clear(finished)
        shutil.rmtree(out, ignore_errors=True)
        os.replace(finished, out)
    except OSError as error:
        raise StoreError(f"cannot put the finished folder '{out.name}' in its place: {error.strerror}") from error


def _finished(out: Path) -> Path:
    """Return where a finished folder is cleared of what only an interrupted run needs."""
    return out.with_name(f".{out.name}.finished")


def _clear(folder: Path) -> None:
    """Remove what the manifest does not name."""
    named = read_manifest(folder).files.keys() | {MANIFEST}
    for path in list(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() not in named:
            path.unlink()


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a finished stage folder.

    Raises:
        StoreError: the folder is unfinished or its manifest is unreadable.
    """
    try:
        raw = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return Manifest(**{**raw, "ledger_entries": tuple(raw["ledger_entries"])})
    except FileNotFoundError:
        raise StoreError(f"stage folder '{folder.name}' is not finished: run the stage before it first") from None
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        raise StoreError(f"stage folder '{folder.name}' has an unreadable manifest: delete the folder") from error


@contextlib.contextmanager
def alone_in(folder: Path, what: str) -> Iterator[None]:
    """Make the folder of a run, its owner's alone, and keep every other process from writing it during the block.

    Two would take each other's half-written stages away, and take the same private steps twice.

    Args:
        folder: of the run.
        what: how messages call it.

    Raises:
        StoreError: another process is writing it, or it cannot be written.
    """
    lock = FileLock(folder / _LOCK, mode=0o600)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)  # patients' voxels lie in it
        lock.acquire(timeout=0)
    except Timeout:
        raise StoreError(
            f"another process is writing the {what} folder: wait until it ends, stop it, or choose another --out"
        ) from None
    except OSError as error:
        raise StoreError(f"cannot write the {what} folder: {error.strerror}") from error
    try:
        yield
    finally:
        lock.release()


def write_bytes(path: Path, content: bytes) -> None:
    """Write one file of a run folder as a whole.

    Raises:
        StoreError: it cannot be written.
    """
    try:
        replace_bytes(path, content)
    except OSError as error:
        raise StoreError(f"cannot write the run folder: {error.strerror}") from error


@contextlib.contextmanager
def set_aside(out: Path) -> Iterator[None]:
    """Move a finished folder out of the way of its replacement; it comes back when the block raises."""
    aside = out.with_name(f".{out.name}.replaced")
    if is_done(out):
        shutil.rmtree(aside, ignore_errors=True)
        out.rename(aside)
    try:
        yield
    except BaseException:
        if aside.exists() and not out.exists():
            aside.rename(out)
        raise
    shutil.rmtree(aside, ignore_errors=True)


class StageFolder:
    """A stage folder being written: put files under :attr:`path`, then call :meth:`finish` once."""

    def __init__(self, final: Path, stage: str, config_digest: str, inputs: Mapping[str, Path]) -> None:
        self.final = final
        self.path = partial(final)
        self._stage = stage
        self._config_digest = config_digest
        self._inputs = dict(inputs)
        self.manifest: Manifest | None = None

    def resume(self, *, scratch: str | None = None) -> bool:
        """Return whether an interrupted run of the same settings and inputs left something, else begin empty.

        Args:
            scratch: beginning of the names of files and folders that no run goes on with.
        """
        identity = digest_of({"digest": self._config_digest, **self._parents()})
        state = self.path / _STATE
        same = state.is_file() and state.read_text(encoding="ascii", errors="replace") == identity
        for left in list(self.path.iterdir()):
            if not same or (scratch and left.name.startswith(scratch)):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        if not same:
            replace_bytes(state, identity.encode("ascii"))
        return same

    def finish(
        self,
        sensitivity: Sensitivity,
        *,
        ledger_entries: tuple[str, ...] = (),
        details: Mapping[str, Any] | None = None,
        check: Callable[[Path], None] | None = None,
        scratch: Sequence[str] = (),
    ) -> Manifest:
        """Digest every file, write the manifest, and rename the folder into place.

        Args:
            sensitivity: the most sensitive kind of value in the folder.
            ledger_entries: ids of the ledger entries whose outputs lie here.
            details: stage-specific JSON values.
            check: looks at the complete folder before it is renamed into place; when it raises, nothing appears.
            scratch: files that only an interrupted run needs. They go last, when the folder is finished and has left
                the place where interrupted runs are looked for; those that are not there are left out.
        """
        values = dict(details or {})
        if sensitivity == "private":
            # the digest of a private folder leaves in the ledger: unsalted, whoever has all patients but one could
            # test for that one
            values.setdefault("salt", secrets.token_hex(16))
        parents = self._parents()
        for left in self.path.rglob(HALF_WRITTEN):  # by a run that was killed
            left.unlink()
        goes = (*scratch, _STATE)
        self.manifest = Manifest(
            stage=self._stage,
            sensitivity=sensitivity,
            config_digest=self._config_digest,
            parents=parents,
            ledger_entries=tuple(ledger_entries),
            files={name: digest for name, digest in digest_tree(self.path).items() if name not in goes},
            details=values,
        )
        with (self.path / MANIFEST).open("wb") as handle:
            handle.write(json_text(asdict(self.manifest)))
            handle.flush()
            os.fsync(handle.fileno())
        if check is not None:
            check(self.path)
        shutil.rmtree(_finished(self.final), ignore_errors=True)
        os.replace(self.path, _finished(self.final))
        settle(self.final)
        return self.manifest

    def _parents(self) -> dict[str, str]:
        return {name: read_manifest(folder).digest for name, folder in sorted(self._inputs.items())}


@contextlib.contextmanager
def create(
    out: Path,
    stage: str,
    config_digest: str,
    inputs: Mapping[str, Path] | None = None,
    *,
    keep_partial: bool = False,
) -> Iterator[StageFolder]:
    """Open a new stage folder; a half-written one is removed when the block raises.

    Args:
        out: the final folder; must not exist.
        stage: verb that writes it.
        config_digest: digest of the sections the stage depends on.
        inputs: finished stage folders that are read, by name.
        keep_partial: keep the half-written folder on failure and find it again next time (stages that resume).

    Raises:
        StoreError: ``out`` exists already, cannot be written, or an input is not finished.
    """
    for parent in (inputs or {}).values():
        read_manifest(parent)
    settle(out)
    if out.exists():
        raise StoreError(f"'{out.name}' exists already: delete it or pass --replace")
    folder = StageFolder(out, stage, config_digest, inputs or {})
    try:
        if folder.path.exists() and not keep_partial:
            shutil.rmtree(folder.path)
        folder.path.mkdir(parents=True, exist_ok=keep_partial)
    except OSError as error:
        raise StoreError(f"cannot write into the folder of stage '{stage}': {error.strerror}") from error
    try:
        yield folder
    except OSError as error:
        _discard(folder, keep_partial)
        raise StoreError(f"stage '{stage}' could not write its folder: {error.strerror}") from error
    except BaseException:
        _discard(folder, keep_partial)
        raise
    if folder.manifest is None:
        _discard(folder, keep_partial)
        raise StoreError(f"stage '{stage}' ended without finishing its folder")


def _discard(folder: StageFolder, keep: bool) -> None:
    empty = folder.path.is_dir() and not any(left.name != _STATE for left in folder.path.iterdir())
    if empty or not keep:
        shutil.rmtree(folder.path, ignore_errors=True)
