"""The walk from a release back to the cohort, over manifests; public and released facts only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from medsynth.errors import CertificationError, StoreError
from medsynth.store import ORDER, Manifest, Sensitivity, digest_tree, read_manifest

ROOT = "synthetic"
"""The stage folder that released files are rendered from."""
LINEAGE = frozenset({"ingest", "encode", "masks", "train", "synthesise"})
"""The stages that a release may descend from. What others measure on patients may stop a release, never shape it."""
_READS: Mapping[str, frozenset[str]] = {
    "train": frozenset({"ingest", "encode", "masks"}),
    "synthesise": frozenset({"encode", "masks", "train"}),
}
"""The stages that a stage always reads, whatever the configuration: an ancestry without one of them was shortened."""


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


def broken_edges(nodes: Sequence[Node], entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what is wrong with an ancestry on its own: edges that lead nowhere, patients read outside the ledger.

    Args:
        nodes: the ancestry, the root first.
        entries: the entries of the ledger.
    """
    known = {node.folder: node for node in nodes}
    if len(known) != len(nodes) or not nodes or nodes[0].folder != ROOT:
        return [f"the ancestry must start at '{ROOT}' and name each folder once"]
    reached = _above(ROOT, known) | {ROOT}
    problems = [f"'{name}' is in the ancestry, but nothing was made from it" for name in known if name not in reached]
    for node in nodes:
        problems += _broken_edges_of(node, known)
        problems += _wrong_kind(node, known)
        problems += _left_out(node, known)
        problems += _wrong_entries(node, entries)
    return problems


def _broken_edges_of(node: Node, known: Mapping[str, Node]) -> Iterator[str]:
    for parent, digest in node.parents.items():
        if parent not in known:
            yield f"edge '{node.folder}' -> '{parent}': the parent is not in the ancestry"
        elif known[parent].digest != digest:
            yield f"edge '{node.folder}' -> '{parent}': the parent has another digest"
        elif known[parent].sensitivity == "private" and not node.ledger_entries:
            yield f"'{node.folder}' read patients ('{parent}') without a mechanism in the ledger"


def _wrong_kind(node: Node, known: Mapping[str, Node]) -> Iterator[str]:
    if node.stage not in LINEAGE:
        yield f"'{node.folder}' was written by stage '{node.stage}', which no release may descend from"
    if node.sensitivity not in ORDER:
        yield f"'{node.folder}' is of the unknown sensitivity {node.sensitivity!r}"
    if node.sensitivity == "internal":
        yield f"'{node.folder}' is internal and may not be part of a release"
    if (node.stage == "ingest") != (node.sensitivity == "private"):
        yield f"'{node.folder}' is {node.sensitivity}, which stage '{node.stage}' never writes"
    above = [known[name] for name in _above(node.folder, known)]
    if node.sensitivity == "public" and (node.ledger_entries or any(n.sensitivity == "private" for n in above)):
        yield f"'{node.folder}' calls itself public, but was made from patients"


def _left_out(node: Node, known: Mapping[str, Node]) -> Iterator[str]:
    """Yield what this stage always has and the ancestry does not name: then a spend could be hidden with it."""
    read = {known[name].stage for name in node.parents if name in known}
    learnt = node.stage == "train" or (node.stage == "masks" and node.sensitivity != "public")
    always = _READS.get(node.stage, frozenset()) | ({"ingest"} if learnt else frozenset())
    for stage in sorted(always - read):
        yield f"'{node.folder}' names no folder of stage '{stage}', which stage '{node.stage}' always reads"
    if learnt and not node.ledger_entries:
        yield f"'{node.folder}' was learnt from patients, and names no spend in the ledger"
    if node.folder == ROOT and (node.stage, node.sensitivity) != ("synthesise", "released"):
        yield f"'{ROOT}' is {node.sensitivity} and of stage '{node.stage}': expected released pairs of 'synthesise'"


def _wrong_entries(node: Node, entries: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for identity in node.ledger_entries:
        entry = next((entry for entry in entries if entry["id"] == identity), None)
        if entry is None:
            yield f"'{node.folder}' names ledger entry {identity}, which the ledger does not hold"
            continue
        if entry["status"] != "complete" or entry["stage"] != node.stage:
            yield f"'{node.folder}' names ledger entry {identity}, which is not a finished one of its stage"
        if not entry["events"]:
            yield f"'{node.folder}' names ledger entry {identity}, which charges nothing"
        if entry["config_digest"] != node.config_digest:
            yield f"'{node.folder}' was made with another configuration than ledger entry {identity} charged"
        missing = [name for name, digest in entry["parents"].items() if node.parents.get(name) != digest]
        if missing:
            yield f"edge '{node.folder}' -> '{missing[0]}': ledger entry {identity} read it, the ancestry says nothing"


def _above(folder: str, known: Mapping[str, Node]) -> set[str]:
    """Return every known folder that ``folder`` was made from, near or far; a cycle ends where it began."""
    found: set[str] = set()
    pending = [folder]
    while pending:
        node = known.get(pending.pop())
        new = {name for name in (node.parents if node else ()) if name in known} - found
        found |= new
        pending += new
    return found


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
