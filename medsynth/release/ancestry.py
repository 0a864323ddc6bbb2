"""The walk from a release back to the cohort, over manifests; public and released facts only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medsynth.errors import CertificationError, StoreError
from medsynth.store import Manifest, Sensitivity, digest_tree, read_manifest

ROOT = "synthetic"
"""The stage folder that released files are rendered from."""
LINEAGE = frozenset({"ingest", "encode", "masks", "train", "synthesise"})
"""The stages that a release may descend from. What others measure on patients may stop a release, never shape it."""


@dataclass(frozen=True)
class Node:
    """One stage folder of the ancestry: what its manifest says, without its files and details.

    Attributes:
        folder: name of the stage folder, e.g. ``"generator"``.
        digest: digest of its manifest.
        parents: digest of each folder that it was made from, by name.
        ledger_entries: ids of the mechanisms whose outputs it holds.
    """

    folder: str
    stage: str
    sensitivity: Sensitivity
    digest: str
    config_digest: str
    parents: Mapping[str, str]
    ledger_entries: tuple[str, ...]
    medsynth_version: str

    def as_json(self) -> dict[str, Any]:
        """Return the node as JSON values."""
        return {**asdict(self), "parents": dict(self.parents), "ledger_entries": list(self.ledger_entries)}


@dataclass(frozen=True)
class Ancestry:
    """Every folder that a release was made from, the root first, and the manifests they carry."""

    nodes: tuple[Node, ...]
    manifests: Mapping[str, Manifest]

    def __getitem__(self, folder: str) -> Node:
        return next(node for node in self.nodes if node.folder == folder)

    def descends_from_patients(self, folder: str) -> bool:
        """Whether a private folder is above ``folder``."""
        node = self[folder]
        return node.sensitivity == "private" or any(self.descends_from_patients(name) for name in node.parents)


def walk(root: Path, folders: Mapping[str, Path]) -> Ancestry:
    """Read the manifests from the folder ``root`` back to those without parents.

    Files of releasable folders are digested again. Those of private folders are not: they may be archived by now, and
    no released file is made from them but through a mechanism.

    Args:
        root: the finished folder ``synthetic/``.
        folders: where the other stage folders lie, by name; absent ones are looked for beside ``root``.

    Raises:
        CertificationError: a folder is absent or unfinished, is not the one its child was made from, or holds files
            that were changed since.
    """
    manifests: dict[str, Manifest] = {}
    pending: list[tuple[str, Path, str | None]] = [(ROOT, root, None)]
    while pending:
        name, path, expected = pending.pop(0)
        manifest = _read(name, path)
        if expected is not None and manifest.digest != expected:
            raise CertificationError(
                f"'{name}' is not the folder that a later stage was made from (its manifest has another digest): "
                f"run the stages after '{manifest.stage}' again"
            )
        if name in manifests:
            continue
        manifests[name] = manifest
        if manifest.sensitivity != "private":
            _check_files(name, path, manifest)
        for parent, digest in manifest.parents.items():
            pending.append((parent, folders.get(parent, root.parent / parent), digest))
    return Ancestry(tuple(_node(name, manifest) for name, manifest in manifests.items()), manifests)


def parse_nodes(values: Sequence[Mapping[str, Any]]) -> tuple[Node, ...]:
    """Return nodes from their JSON form.

    Raises:
        KeyError, TypeError: a field is absent or unknown.
    """
    return tuple(Node(**{**value, "ledger_entries": tuple(value["ledger_entries"])}) for value in values)


def broken_edges(nodes: Sequence[Node], entries: Sequence[str]) -> list[str]:
    """Return what is wrong with an ancestry on its own: edges that lead nowhere, patients read outside the ledger.

    Args:
        nodes: the ancestry, the root first.
        entries: ids of the entries of the ledger.
    """
    known = {node.folder: node for node in nodes}
    problems: list[str] = []
    if len(known) != len(nodes) or not nodes or nodes[0].folder != ROOT:
        problems.append(f"the ancestry must start at '{ROOT}' and name each folder once")
    for node in nodes:
        for parent, digest in node.parents.items():
            if parent not in known:
                problems.append(f"edge '{node.folder}' -> '{parent}': the parent is not in the ancestry")
            elif known[parent].digest != digest:
                problems.append(f"edge '{node.folder}' -> '{parent}': the parent has another digest")
            elif known[parent].sensitivity == "private" and not node.ledger_entries:
                problems.append(f"'{node.folder}' read patients ('{parent}') without a mechanism in the ledger")
        problems += [
            f"'{node.folder}' names ledger entry {entry}, which the ledger does not hold"
            for entry in node.ledger_entries
            if entry not in entries
        ]
        if node.sensitivity == "internal":
            problems.append(f"'{node.folder}' is internal and may not be part of a release")
        if node.stage not in LINEAGE:
            problems.append(f"'{node.folder}' was written by stage '{node.stage}', which no release may descend from")
    return problems


def _read(name: str, path: Path) -> Manifest:
    try:
        return read_manifest(path)
    except StoreError as error:
        raise CertificationError(f"the ancestry of the release cannot be walked at '{name}': {error}") from error


def _check_files(name: str, path: Path, manifest: Manifest) -> None:
    found = digest_tree(path)
    changed = sorted(key for key in found.keys() | manifest.files.keys() if found.get(key) != manifest.files.get(key))
    if changed:
        raise CertificationError(
            f"{len(changed)} file(s) of '{name}' were changed, added or removed since the stage finished "
            f"(first: {changed[0]}): run stage '{manifest.stage}' again"
        )


def _node(name: str, manifest: Manifest) -> Node:
    return Node(
        folder=name,
        stage=manifest.stage,
        sensitivity=manifest.sensitivity,
        digest=manifest.digest,
        config_digest=manifest.config_digest,
        parents=dict(manifest.parents),
        ledger_entries=manifest.ledger_entries,
        medsynth_version=manifest.medsynth_version,
    )
