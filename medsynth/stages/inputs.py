"""What each stage depends on: the sections of the configuration and the folders that it reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from medsynth.config import Study
from medsynth.errors import StoreError
from medsynth.imaging.deidentify import REFERENCES_FILE, key_id, read_references
from medsynth.privacy.account import Account, open_account
from medsynth.privacy.ledger import Ledger
from medsynth.site import accounts, site_key
from medsynth.store import digest_file, digest_of, read_manifest

SECTIONS: dict[str, tuple[str, ...]] = {
    "ingest": ("seed", "grid", "ingest"),
    "encode": ("seed", "grid", "encode"),
    "masks": ("seed", "grid", "privacy", "ingest", "encode", "masks"),
    "train": ("seed", "grid", "privacy", "ingest", "encode", "masks", "train"),
    "synthesise": ("seed", "grid", "synthesise"),
    "segment": ("seed", "grid", "segment"),
    "audit": ("seed", "grid", "privacy", "ingest", "encode", "masks", "train", "audit"),
    "evaluate": ("name", "seed", "grid", "privacy", "segment", "evaluate"),
    "certify": ("name", "description", "grid", "privacy", "ingest", "encode", "masks", "train", "export"),
    "export": ("name", "grid", "export"),
}
HISTORY = "history.json"
"""Of stage ``train``: mean losses of a few steps each, on phantoms (and, without privacy, on patients), by name."""


def config_digest(config: Study, stage: str) -> str:
    """Return the SHA-256 of the sections of ``config`` that ``stage`` depends on."""
    values = config.model_dump(mode="json")
    return digest_of({name: values[name] for name in SECTIONS[stage]})


def account_of(run: Path) -> Account:
    """Return the account that the patients of a run's ``cohort/`` have at this site (made where there is none).

    Raises:
        StoreError: there is no finished cohort folder, it was changed, or MEDSYNTH_HOME cannot be used.
        PrivacyError: the run's ledger belongs to another cohort, or the cohort was read under another MEDSYNTH_HOME.
        VerificationError: the chain of the ledger or of the account is broken.
    """
    cohort = run / "cohort"
    manifest, references, key = read_manifest(cohort), read_references(cohort), key_id(site_key())
    if manifest.files.get(REFERENCES_FILE) != digest_file(cohort / REFERENCES_FILE):
        raise StoreError(
            "cohort/ was changed since ingest finished: by what its patients are recognised is not what its manifest "
            "says. Restore it, or run ingest again with --replace"
        )
    return open_account(
        accounts(),
        references.names,
        ledger=run / "ledger.jsonl",
        cohort=manifest.digest,
        same_key=references.key_id == key,
        key=key,
    )


def open_ledger(inputs: Mapping[str, Path]) -> Ledger:
    """Return the run's ledger (``ledger``), which charges the cohort's account (``account``) where one was given."""
    return Ledger(inputs["ledger"], Account(inputs["account"]) if "account" in inputs else None)


def stage_inputs(inputs: Mapping[str, Path], *names: str) -> dict[str, Path]:
    """Return the named folders of ``inputs``.

    Raises:
        StoreError: one of them was not given.
    """
    missing = [name for name in names if name not in inputs]
    if missing:
        raise StoreError(
            f"this stage needs the finished folder(s) {', '.join(missing)}: run the stages before it first"
        )
    return {name: inputs[name] for name in names}
