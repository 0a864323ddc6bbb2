"""What an audit found, beside what its positive control found: the one form of every audit's result (no torch)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["pass", "fail", "cannot say", "broken"]


@dataclass(frozen=True)
class Control:
    """A deliberately broken mechanism (or a leaky model), measured by the same audit.

    Attributes:
        name: what was broken, e.g. ``"half the noise"``.
        value: what the audit measured on it.
        caught: whether the audit went red, as it must.
    """

    name: str
    value: float
    caught: bool


@dataclass(frozen=True)
class Finding:
    """The result of one audit.

    Attributes:
        audit: which audit, e.g. ``"record-replay"``.
        subject: what was audited, e.g. ``"denoiser"``.
        measures: what ``value`` is.
        value: what was measured; infinite when the audited code could not stand what it was given.
        low: lower end of the interval (or the bound itself); equal to ``value`` for exact audits.
        high: upper end of the interval.
        allowed: what may not be exceeded by ``low``.
        outcome: ``pass``, ``fail`` or ``cannot say``, before the controls are looked at.
        blocks: whether ``fail`` refuses a certificate.
        controls: the positive controls; one that was not caught makes the audit broken.
        shows: one sentence, what this can and what it cannot show.
        reads_patients: whether the value depends on real patients (then it is internal, pass or fail).
        detail: more of what was measured, in words.
    """

    audit: str
    subject: str
    measures: str
    value: float
    low: float
    high: float
    allowed: float
    outcome: Literal["pass", "fail", "cannot say"]
    blocks: bool
    controls: tuple[Control, ...]
    shows: str
    reads_patients: bool
    detail: str = ""

    @property
    def verdict(self) -> Verdict:
        """``broken`` where a positive control was not caught (or there was none), else the outcome."""
        return self.outcome if self.controls and all(control.caught for control in self.controls) else "broken"

    def refusal(self) -> str | None:
        """Return why this finding refuses a certificate, or None."""
        name = f"audit '{self.audit}' of '{self.subject}'"
        if self.verdict == "broken":
            missed = ", ".join(control.name for control in self.controls if not control.caught) or "none was run"
            return f"{name} is broken: it did not catch its positive control ({missed}); nothing it says counts"
        if self.verdict == "fail" and self.blocks and self.reads_patients:
            # Refusals reach logs of jobs and the file UNCERTIFIED: what was measured on patients stays in the folder.
            return f"{name} failed: {self.measures} is above what is allowed (figures: folder of the audit)"
        if self.verdict == "fail" and self.blocks:
            return f"{name} failed: {self.measures} is at least {self.low:.4g}, allowed is {self.allowed:.4g}"
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the finding, its verdict included, as JSON values (infinity as the text ``inf``)."""
        values = {**asdict(self), "controls": [asdict(control) for control in self.controls], "verdict": self.verdict}
        return {key: _plain(value) for key, value in values.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Finding:
        """Read a finding back.

        Raises:
            KeyError, TypeError, ValueError: a field is missing or unreadable.
        """
        read = {key: value for key, value in values.items() if key != "verdict"}
        for key in ("value", "low", "high", "allowed"):
            read[key] = float(read[key])
        controls = tuple(Control(c["name"], float(c["value"]), bool(c["caught"])) for c in read["controls"])
        return cls(**{**read, "controls": controls})


def refusals(findings: Sequence[Finding]) -> list[str]:
    """Return why ``findings`` refuse a certificate; empty when they do not."""
    return [reason for finding in findings if (reason := finding.refusal()) is not None]


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [{key: _plain(one) for key, one in item.items()} for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value
