"""``medsynth keys``: the site's signing keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

keys_app = typer.Typer(no_args_is_help=True, help="The site's signing keys, in MEDSYNTH_HOME/keys.")

Passphrase = Annotated[
    bool, typer.Option("--passphrase", help="protect the key: asked for, or MEDSYNTH_KEY_PASSPHRASE")
]
PassphraseFile = Annotated[
    Path | None, typer.Option("--passphrase-file", help="protect the key with the line in this file (mode 0600)")
]


@keys_app.command("new")
def keys_new(passphrase: Passphrase = False, file: PassphraseFile = None) -> None:
    """Make the site's first signing key.

    Example: medsynth keys new --passphrase
    """
    from medsynth.release import keys
    from medsynth.site import signing_keys

    keys.create(signing_keys(), keys.new_passphrase(file) if passphrase or file else None)
    print("\n".join(keys.handover(signing_keys())))


@keys_app.command("list")
def keys_list() -> None:
    """List the keys: active or retired, protected by a passphrase or not, and their fingerprints.

    Example: medsynth keys list
    """
    from medsynth.release import keys
    from medsynth.site import signing_keys

    found = [info.line() for info in keys.known_keys(signing_keys())]
    print("\n".join(found or ["no key yet: make one with `medsynth keys new`"]))


@keys_app.command("protect")
def keys_protect(file: PassphraseFile = None) -> None:
    """Protect the active key with a passphrase (or with another one); the public key stays the same.

    Example: medsynth keys protect
    """
    from medsynth.release import keys
    from medsynth.site import signing_keys

    keys.protect(signing_keys(), file)
    print("the active key is protected: batch jobs need MEDSYNTH_KEY_PASSPHRASE or MEDSYNTH_KEY_PASSPHRASE_FILE")


@keys_app.command("rotate")
def keys_rotate(
    passphrase: Passphrase = False,
    file: PassphraseFile = None,
    delete_old: Annotated[
        bool, typer.Option("--delete-old", help="delete the old private key instead of keeping it retired")
    ] = False,
    stolen: Annotated[
        bool, typer.Option("--stolen", help="the old key is not to be trusted: it endorses nothing")
    ] = False,
) -> None:
    """Replace the active key; the old one endorses the new one. Without options, its passphrase is taken over.

    Example: medsynth keys rotate
    """
    from medsynth.release import keys
    from medsynth.site import signing_keys

    new = keys.new_passphrase(file) if passphrase or file else None
    keys.rotate(signing_keys(), new, delete_old=delete_old, stolen=stolen)
    print("\n".join(keys.handover(signing_keys(), stolen=stolen)))


@keys_app.command("public")
def keys_public(
    out: Annotated[Path | None, typer.Option("--out", help="write the public key into this new file")] = None,
) -> None:
    """Print (or write) the public key and its fingerprint, to be handed to collaborators by another way than releases.

    Example: medsynth keys public --out hospital.pem
    """
    from medsynth.release import keys
    from medsynth.site import signing_keys

    print("\n".join(keys.hand_out(signing_keys(), out)))
