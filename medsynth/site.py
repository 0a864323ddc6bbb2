"""The folder that a site keeps across runs: signing keys and the accounts of its cohorts."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from medsynth.errors import StoreError

HOME_VARIABLE = "MEDSYNTH_HOME"
_KEY_FILE = "site.key"
_ACCOUNTS = "accounts"
_KEY_BYTES = 32


def site_home() -> Path:
    """Return the site's folder: ``$MEDSYNTH_HOME``, else ``$XDG_STATE_HOME/medsynth``, else the user's state folder.

    It is not made here. Whoever shares it between machines shares one account of every cohort.

    Source: XDG Base Directory Specification 0.8 (state data; relative paths are to be ignored).
    """
    chosen = os.environ.get(HOME_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    state = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (state if state.is_absolute() else Path.home() / ".local" / "state") / "medsynth"


def signing_keys() -> Path:
    """Return where the site's signing keys lie (see ``release/keys.py``)."""
    return site_home() / "keys"


def accounts() -> Path:
    """Return where the accounts of the site's cohorts lie, made readable by its owner only.

    Raises:
        StoreError: it cannot be made.
    """
    return _private(_private(site_home()) / _ACCOUNTS)


def site_key() -> bytes:
    """Return the site's own key (32 random bytes, mode 0600), drawn at the first call.

    It names patients in the accounts and never leaves the site. Without it no patient is recognised again.

    Raises:
        StoreError: it cannot be read or made, others can read it, or it is gone while accounts are there.
    """
    path = _private(site_home()) / _KEY_FILE
    try:
        if not path.exists():
            _refuse_new_key(path.parent / _ACCOUNTS)
            _draw_key(path)
        if path.stat().st_mode & 0o077:
            raise StoreError(
                f"{HOME_VARIABLE}/{_KEY_FILE} can be read by others than its owner: chmod 600 it, and think of who may "
                "have copied it"
            )
        key = path.read_bytes()
    except OSError as error:
        raise _unusable(error) from error
    if len(key) != _KEY_BYTES:
        raise StoreError(
            f"{HOME_VARIABLE}/{_KEY_FILE} is damaged: restore it from a copy (without it no patient of earlier runs is "
            "recognised)"
        )
    return key


def _refuse_new_key(accounts: Path) -> None:
    """A new key would recognise nobody: every account would start again at nothing spent."""
    if accounts.is_dir() and any(path.is_dir() and not path.name.startswith(".") for path in accounts.iterdir()):
        raise StoreError(
            f"{HOME_VARIABLE}/{_KEY_FILE} is gone, and accounts are there that it named the patients of: restore it "
            f"from a backup. Only where no study of these patients counts any more, move {HOME_VARIABLE}/accounts away"
        )


def _draw_key(path: Path) -> None:
    """Bring a whole key to its place at once; where two processes draw one, the first stays."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(_KEY_BYTES))
            file.flush()
            os.fsync(file.fileno())
        os.link(scratch, path)
    except FileExistsError:
        pass
    finally:
        scratch.unlink(missing_ok=True)


def _private(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise _unusable(error) from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StoreError(f"{HOME_VARIABLE} cannot be written: set it to a folder that is kept between runs")
    return folder


def _unusable(error: OSError) -> StoreError:
    return StoreError(
        f"{HOME_VARIABLE} cannot be used ({error.strerror}): set it to a folder that can be written and is kept "
        "between runs; what a site has spent on its patients is remembered there"
    )
