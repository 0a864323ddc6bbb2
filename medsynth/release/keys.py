"""The site's signing keys: one active, the retired ones beside it, each new key endorsed by the one before.

- ``private.pem``: the active key (PKCS #8, mode 0600, encrypted where there is a passphrase)
- ``public.pem``: its public half, to be handed to collaborators
- ``retired/``: private and public halves of former keys, by key id
- ``endorsements.jsonl``: one endorsement a rotation; copied into every release
"""

from __future__ import annotations

import contextlib
import getpass
import os
import stat
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from medsynth.errors import CertificationError
from medsynth.files import replace_bytes
from medsynth.logs import say
from medsynth.release import endorsements, signing
from medsynth.release.marks import ENDORSEMENTS, PUBLIC_KEY
from medsynth.release.signing import SigningKey
from medsynth.site import HOME_VARIABLE

PRIVATE_KEY = "private.pem"
RETIRED = "retired"
PASSPHRASE = "MEDSYNTH_KEY_PASSPHRASE"
PASSPHRASE_FILE = "MEDSYNTH_KEY_PASSPHRASE_FILE"
MIN_PASSPHRASE = 12
"""Characters; OpenSSL stretches a passphrase by 2048 rounds only, so that its own length has to carry the weight."""
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


@dataclass(frozen=True)
class KeyInfo:
    """One key of the site.

    Attributes:
        key_id: SHA-256 of the public key.
        active: whether releases are signed with it.
        protected: whether a passphrase is needed; None where the private half was deleted.
    """

    key_id: str
    active: bool
    protected: bool | None

    def line(self) -> str:
        """Return the key as a line for a terminal."""
        state = "active " if self.active else "retired"
        held = {None: "private half deleted", True: "passphrase", False: "no passphrase"}[self.protected]
        return f"{state}  {held:<20}  {signing.fingerprint(self.key_id)}"


def create(folder: Path, passphrase: bytes | None = None) -> str:
    """Make the site's first key and return its id.

    Args:
        folder: ``HOME/keys``; made when absent.
        passphrase: protects the key; None leaves that to the file's mode.

    Raises:
        CertificationError: there is an active key already, or half of one, or the folder cannot be written.
    """
    with _locked(folder):
        if _has_key(folder):
            public(folder)
            raise CertificationError("there is an active key already: replace it with `medsynth keys rotate`")
        return _install(folder, signing.new_key(), passphrase)


def open_key(folder: Path, *, ask: bool = True) -> SigningKey:
    """Return the active key; one is made where there is none, so that a batch job does not stop for it.

    Args:
        folder: ``HOME/keys``.
        ask: whether a passphrase may be asked for at the terminal; otherwise only the environment is looked at.

    Raises:
        CertificationError: the key is unreadable, no Ed25519 key, readable by others, its passphrase is not there (or
            too short for a new key), or only its public half is.
    """
    path = folder / PRIVATE_KEY
    with _locked(folder):
        if not _has_key(folder):
            passphrase = stored_passphrase()
            if passphrase is not None:
                _require_long(passphrase)
            _install(folder, signing.new_key(), passphrase)
            hint = {} if passphrase else {"protect_it": "medsynth keys protect"}
            say("signing key made", protected=bool(passphrase), **hint)
        pem = _read_private(path)
    key = signing.load_private(pem, opening_passphrase(ask) if signing.is_protected(pem) else None)
    if not (folder / PUBLIC_KEY).is_file() or (folder / PUBLIC_KEY).read_bytes() != signing.public_pem(key):
        _write(folder / PUBLIC_KEY, signing.public_pem(key), 0o644)  # a rotation was stopped before its last file
    return key


def protect(folder: Path, file: Path | None = None) -> None:
    """Encrypt the active key with a (new) passphrase; the public half stays as it is.

    Args:
        folder: ``HOME/keys``.
        file: holds the new passphrase; None takes the environment's, or asks at the terminal.

    Raises:
        CertificationError: there is no key, or a passphrase cannot be had.
    """
    path = folder / PRIVATE_KEY
    if not _has_key(folder):
        raise CertificationError("there is no key to protect: make one with `medsynth keys new --passphrase`")
    pem = _read_private(path)
    key = signing.load_private(pem, opening_passphrase() if signing.is_protected(pem) else None)
    passphrase = new_passphrase(file)
    with _locked(folder):
        _write(path, signing.private_pem(key, passphrase), 0o600)


def rotate(folder: Path, passphrase: bytes | None = None, *, delete_old: bool = False, stolen: bool = False) -> str:
    """Replace the active key by a new one and return the new key's id.

    The old key signs an endorsement of the new one, so that who holds the old public key can follow. A key that was
    stolen must not: its thief could endorse a key of his own, so that former endorsements are dropped as well.

    Args:
        folder: ``HOME/keys``.
        passphrase: of the new key; None takes over the protection of the old one.
        delete_old: delete the old private half instead of retiring it.
        stolen: endorse nothing, and drop the endorsements that there are.

    Raises:
        CertificationError: there is no active key, or it cannot be opened.
    """
    path = folder / PRIVATE_KEY
    if not _has_key(folder):
        raise CertificationError("there is no key to rotate: make one with `medsynth keys new`")
    old_pem = _read_private(path)
    opening = opening_passphrase() if signing.is_protected(old_pem) else None
    old, new = signing.load_private(old_pem, opening), signing.new_key()
    with _locked(folder):
        retired = folder / RETIRED / signing.key_id(signing.public_pem(old))
        retired.parent.mkdir(mode=0o700, exist_ok=True)
        _write(retired.with_suffix(".public.pem"), signing.public_pem(old), 0o644)
        if not delete_old:
            _write(retired.with_suffix(".private.pem"), old_pem, 0o600)
        lines = b"" if stolen else read_endorsements(folder) + endorsements.endorse(signing.public_pem(new), old)
        _write(folder / ENDORSEMENTS, lines, 0o644)
        # whatever stops this before the next line leaves the old key active, and its endorsement hurts nobody
        return _install(folder, new, passphrase or opening)


def known_keys(folder: Path) -> list[KeyInfo]:
    """Return every key of the site, the active one first.

    Raises:
        CertificationError: one half of the active key is missing.
    """
    found: list[KeyInfo] = []
    if _has_key(folder):
        pem = public(folder)
        found.append(KeyInfo(signing.key_id(pem), True, signing.is_protected(_read_private(folder / PRIVATE_KEY))))
    for path in sorted((folder / RETIRED).glob("*.public.pem")):
        identity = signing.key_id(path.read_bytes())
        private = path.with_name(path.name.replace(".public.pem", ".private.pem"))
        protected = signing.is_protected(private.read_bytes()) if private.is_file() else None
        if all(info.key_id != identity for info in found):
            found.append(KeyInfo(identity, False, protected))
    return found


def public(folder: Path) -> bytes:
    """Return the active key's public half (PEM).

    Raises:
        CertificationError: there is none, or one half of it is missing.
    """
    if not _has_key(folder):
        raise CertificationError("this site has no signing key: make one with `medsynth keys new`")
    try:
        return signing.canonical_pem((folder / PUBLIC_KEY).read_bytes())
    except FileNotFoundError:
        again = " (the next `medsynth certify` writes it again as well)"
        raise CertificationError(_half(PUBLIC_KEY, PRIVATE_KEY, again)) from None


def _has_key(folder: Path) -> bool:
    """Whether there is an active private key.

    Raises:
        CertificationError: only its public half is there; nothing can be signed with that, and it may not be replaced
            in silence, because collaborators hold it.
    """
    if (folder / PRIVATE_KEY).exists():
        return True
    if (folder / PUBLIC_KEY).exists():
        raise CertificationError(_half(PRIVATE_KEY, PUBLIC_KEY))
    return False


def _half(missing: str, left: str, otherwise: str = "") -> str:
    return (
        f"half of the signing key is missing: there is {left} and no {missing} in MEDSYNTH_HOME/keys. Restore it from "
        f"the backup{otherwise}, or move {left} away and make a new key with `medsynth keys new`"
    )


def hand_out(folder: Path, out: Path | None) -> list[str]:
    """Return the active public key and its fingerprint as lines; with ``out`` the key is written there instead.

    Raises:
        CertificationError: there is no key, ``out`` cannot be written, or it is there and holds something else.
    """
    pem = public(folder)
    named = f"fingerprint (SHA-256): {signing.fingerprint(signing.key_id(pem))}"
    if out is None:
        return [pem.decode().rstrip("\n"), named]
    try:
        with out.open("xb") as file:  # never over a file that is there: it may be the private key
            file.write(pem)
    except FileExistsError:
        if not _holds(out, pem):
            raise CertificationError(
                f"'{out.name}' is there already and is not this public key: choose another name, nothing was written"
            ) from None
    except OSError as error:
        raise CertificationError(f"the public key cannot be written: {error.strerror}") from error
    return [f"public key written to {out.name}", named]


def _holds(path: Path, content: bytes) -> bool:
    """Whether ``path`` is an ordinary file of this content; reading anything else might wait for ever."""
    try:
        return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content
    except OSError:
        return False


def handover(folder: Path, *, stolen: bool = False) -> list[str]:
    """Return what to do after the active key changed."""
    lines = [
        f"new signing key, fingerprint (SHA-256): {signing.fingerprint(signing.key_id(public(folder)))}",
        "hand its public half to collaborators by another way than the releases: `medsynth keys public --out FILE`",
    ]
    if stolen:
        lines.append("tell them to trust the old key no more: whoever has it can sign releases in its name")
    elif read_endorsements(folder):
        lines.append("releases made from now on carry the old key's endorsement of this one")
    return lines


def read_endorsements(folder: Path) -> bytes:
    """Return the endorsements of former keys, to be put into a release; empty when nothing was rotated."""
    path = folder / ENDORSEMENTS
    return path.read_bytes() if path.is_file() else b""


def new_passphrase(file: Path | None = None) -> bytes:
    """Return a passphrase for a new key: from ``file``, the environment, or typed twice at the terminal.

    Raises:
        CertificationError: none can be had, the two typed ones differ, or it is too short.
    """
    found = _from_file(file) if file is not None else stored_passphrase()
    if found is None:
        if not sys.stdin.isatty():
            raise CertificationError(_nobody_to_ask("a passphrase for the new key is needed"))
        found = getpass.getpass("New passphrase: ").encode()
        if getpass.getpass("The same again: ").encode() != found:
            raise CertificationError("the two passphrases differ: nothing was changed, try again")
    _require_long(found)
    return found


def _require_long(passphrase: bytes) -> None:
    if len(passphrase) < MIN_PASSPHRASE:
        raise CertificationError(f"the passphrase is too short: use at least {MIN_PASSPHRASE} characters")


def opening_passphrase(ask: bool = True) -> bytes:
    """Return the passphrase of an existing key: from the environment, or asked for at the terminal.

    Raises:
        CertificationError: none can be had.
    """
    found = stored_passphrase()
    if found is None:
        if not (ask and sys.stdin.isatty()):
            raise CertificationError(_nobody_to_ask("the signing key is protected by a passphrase"))
        found = getpass.getpass("Passphrase of the signing key: ").encode()
    return found


def stored_passphrase() -> bytes | None:
    """Return the passphrase that the environment holds or names a file of; None when it does neither."""
    value, file = os.environ.get(PASSPHRASE), os.environ.get(PASSPHRASE_FILE)
    if value:
        return value.encode()
    return _from_file(Path(file)) if file else None


def _from_file(path: Path) -> bytes:
    try:
        if path.stat().st_mode & _OTHERS:
            raise CertificationError("the passphrase file may be read by others: make its mode 0600")
        value = path.read_bytes().rstrip(b"\r\n")
    except OSError as error:
        raise CertificationError(f"the passphrase file cannot be read: {error.strerror}") from error
    if not value:
        raise CertificationError("the passphrase file is empty: write the passphrase into its first line")
    return value


def _nobody_to_ask(why: str) -> str:
    return f"{why}, and nobody can be asked here: set {PASSPHRASE}, or {PASSPHRASE_FILE} to a file of mode 0600"


def _read_private(path: Path) -> bytes:
    try:
        if path.stat().st_mode & _OTHERS:
            raise CertificationError(f"the signing key '{path.name}' may be read by others: make its mode 0600")
        return path.read_bytes()
    except OSError as error:
        raise CertificationError(f"the signing key cannot be read: {error.strerror}") from error


def _install(folder: Path, key: SigningKey, passphrase: bytes | None) -> str:
    _write(folder / PRIVATE_KEY, signing.private_pem(key, passphrase), 0o600)
    _write(folder / PUBLIC_KEY, signing.public_pem(key), 0o644)
    return signing.key_id(signing.public_pem(key))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", mode=0o600)
        lock.acquire()
    except OSError as error:
        raise CertificationError(
            f"the folder of the signing keys cannot be used ({error.strerror}): set {HOME_VARIABLE} to a folder that "
            "can be written and is kept between runs"
        ) from error
    try:
        yield
    finally:
        lock.release()


def _write(path: Path, content: bytes, mode: int) -> None:
    """Replace a file as a whole; with its mode from the start, a key is at no time readable by others."""
    try:
        replace_bytes(path, content, mode=mode)
    except OSError as error:
        raise CertificationError(f"the folder of the signing keys cannot be written: {error.strerror}") from error
