"""The folder that a site keeps across runs: signing keys and the accounts of its cohorts."""

from __future__ import annotations

import os
from pathlib import Path

HOME_VARIABLE = "MEDSYNTH_HOME"


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
