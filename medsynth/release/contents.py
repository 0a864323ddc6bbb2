"""What a statement may hold at all: a part that nothing checks could promise what the ledger does not give."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from medsynth.release import spending
from medsynth.release.opened import Release

_PARTS: Mapping[str, frozenset[str]] = {
    "ledger": frozenset({"head", "entries"}),
    "build": frozenset({"pairs", "config_digests"}),
    "dataset": frozenset({"name", "description", "licence", "modality", "spatial_dims", "spacing_mm", "labels"}),
}
_PREDICATE = frozenset(
    {
        *_PARTS,
        "claim",
        "accountants",
        "mechanisms",
        "ancestry",
        "not_covered",
        "public_inputs",
        "account",
        "audits",
        "implementation",
    }
)
_ROWS = {
    "epsilon_at": frozenset({"delta", "epsilon"}),
    "membership": frozenset({"false_positive_rate", "true_positive_rate_at_most", "in_words"}),
}
_VERDICTS = frozenset({"pass", "cannot say"})
"""An audit that says anything else refuses the certificate."""
_VERSION = re.compile(r"[0-9A-Za-z.+!_-]{1,64}")
_A_PROMISE = re.compile(r"(epsilon|\u03b5|delta|\u03b4)\W{0,4}\d|\)\s*-?\s*(differential|DP\b)", re.IGNORECASE)


def contents(release: Release) -> list[str]:
    """Whether the predicate has the parts that are checked, and none besides; its free words promise nothing."""
    said = release.predicate
    problems = list(_other_keys("the predicate", said, _PREDICATE))
    for name, known in _PARTS.items():
        problems += _other_keys(name, said[name], known)
    problems += _other_keys("build", said["build"]["config_digests"], frozenset({"certify", "export"}))
    problems += _other_keys("account", said["account"], frozenset(spending.account(None, (), 0.1)))
    for name, known in _ROWS.items():
        for row in said["claim"][name]:
            problems += _other_keys(name, row, known)
    problems += _audits(said["audits"])
    problems += _versions(said["implementation"])
    return problems + promises(said)


def promises(said: Mapping[str, Any]) -> list[str]:
    """Return which free words of a statement promise something, or hide something.

    Args:
        said: a predicate, or its ``dataset``, ``claim``, ``public_inputs`` and ``audits`` alone.
    """
    return [
        f"{where} holds a promise or a control character of its own: {text!r}"
        for where, text in _free_words(said)
        if not isinstance(text, str) or not text.isprintable() or _A_PROMISE.search(text)
    ]


def _other_keys(where: str, values: Mapping[str, Any], known: frozenset[str]) -> Iterator[str]:
    for key in sorted(values.keys() ^ known):
        yield f"{where} {'lacks' if key in known else 'has an unknown part'} {key!r}"


def _audits(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for row in rows:
        if row.keys() - {"verdict"} != {"audit", "subject"}:
            yield "audits has a row with other parts than audit, subject and verdict"
        elif row.get("verdict", "pass") not in _VERDICTS:
            yield f"audit '{row['audit']}' of '{row['subject']}' ended with {row['verdict']!r}: that refuses a release"


def _versions(values: Mapping[str, Any]) -> Iterator[str]:
    for name, version in values.items():
        if not (_VERSION.fullmatch(name) and isinstance(version, str) and _VERSION.fullmatch(version)):
            yield f"implementation names {name!r} {version!r}: expected packages and their versions"


def _free_words(said: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    dataset = said["dataset"]
    for name in ("name", "description", "licence", "modality"):
        yield f"dataset.{name}", dataset[name]
    for value, label in dataset["labels"].items():
        yield "dataset.labels", value
        yield "dataset.labels", label
    yield "claim.linkage", said["claim"]["linkage"]
    for line in said["public_inputs"]:
        yield "public_inputs", line
    for row in said["audits"]:
        for text in row.values():
            yield "audits", text
