"""One thing that limits a run: what was measured, why it is too much or too little, and what to change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from medsynth.doctor.thresholds import Threshold

Direction = Literal["raise", "lower", "set"]
Kind = Literal["stop", "quality", "cost"]
KINDS: tuple[Kind, ...] = ("stop", "quality", "cost")
"""In the order in which findings are listed: ``stop`` first makes the others worth reading."""
_MOST = 100.0  # how far a figure counts as off, at most: some reach zero


@dataclass(frozen=True)
class Change:
    """What to change: a key of the configuration, where to, and when there is something to add, why."""

    key: str
    direction: Direction
    to: str = ""

    def __str__(self) -> str:
        target = f" {self.to}" if self.to else ""
        return f"{self.direction} {self.key}{target}"


@dataclass(frozen=True)
class Finding:
    """One limit of a run.

    Attributes:
        rule: short name, the same in every version.
        kind: ``stop`` (judge nothing before this is mended), ``quality`` or ``cost``.
        says: the finding in plain words.
        figure: what was measured, in words.
        value: the figure.
        threshold: what it is held against, with the reason.
        off: how many times the figure misses the threshold; above 1 it is a finding, and kinds are ranked by it.
        changes: what to change, the most promising first; empty where no key helps.
        source: which values it rests on, and whether they are internal.
    """

    rule: str
    kind: Kind
    says: str
    figure: str
    value: float
    threshold: Threshold
    off: float
    changes: tuple[Change, ...]
    source: str

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        plain = asdict(self)
        plain["changes"] = [asdict(change) for change in self.changes]
        return plain


def above(value: float, threshold: Threshold) -> float:
    """Return how many times a figure that should stay below exceeds its threshold; below 1: it does not."""
    return min(value / threshold.value, _MOST) if threshold.value else (_MOST if value > 0 else 0.0)


def below(value: float, threshold: Threshold) -> float:
    """Return how many times a figure that should stay above falls short of its threshold; below 1: it does not."""
    return min(threshold.value / value, _MOST) if value > 0 else _MOST


def beyond(finding: Finding) -> list[Finding]:
    """Return the finding where its figure misses the threshold, else nothing."""
    return [finding] if finding.off > 1 else []


def ranked(findings: Sequence[Finding]) -> list[Finding]:
    """Return findings by kind, then the farthest off first."""
    return sorted(findings, key=lambda one: (KINDS.index(one.kind), -one.off))
