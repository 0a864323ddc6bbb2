"""``medsynth doctor RUN``: all rules on one run, as a ranked table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsynth.doctor.cost_rules import COST_RULES
from medsynth.doctor.drafts import relevant, unused_training
from medsynth.doctor.evidence import PUBLIC, Evidence, gather
from medsynth.doctor.finding import Finding, ranked
from medsynth.doctor.image_rules import IMAGE_RULES
from medsynth.doctor.label_rules import LABEL_RULES
from medsynth.doctor.privacy_rules import PRIVACY_RULES

if TYPE_CHECKING:
    from rich.console import Console

RULES = (*PRIVACY_RULES, unused_training, *IMAGE_RULES, *LABEL_RULES, *COST_RULES)
_COLUMNS = 130  # those of the table and their frame
_COLOURS = {"stop": "bold red", "quality": "yellow", "cost": "cyan"}
_INTERNAL = "INTERNAL: these figures were measured on patients and stay inside the hospital"


def examine(evidence: Evidence) -> list[Finding]:
    """Return what limits a run, the most pressing first."""
    return ranked(relevant(evidence.study, [finding for rule in RULES for finding in rule(evidence)]))


def doctor(run: Path, *, as_json: bool = False) -> None:
    """Print what limits a finished or half finished run.

    Args:
        run: the run's folder; read, never written.
        as_json: print one JSON object instead of a table.

    Raises:
        StoreError: the folder is no run.
    """
    evidence = gather(run)
    findings = examine(evidence)
    if as_json:
        print(json.dumps(_object(evidence, findings), indent=1, allow_nan=False))
    else:
        _print(_console(), evidence, findings)


def _object(evidence: Evidence, findings: Sequence[Finding]) -> dict[str, Any]:
    return {
        "internal": True,
        "study": evidence.study.name,
        "dice": _headline(evidence),
        "findings": [{"rank": rank, **one.to_json()} for rank, one in enumerate(findings, 1)],
        "not_measured": list(evidence.absent),
    }


def _headline(evidence: Evidence) -> dict[str, float | None]:
    return {
        "synthetic_only": evidence.number("dice", "synthetic_only", "mean"),
        "real_only": evidence.number("dice", "real_only", "mean"),
        "floor": evidence.number("floor", "mean"),
        "skill": evidence.number("dice", "synthetic_only", "skill"),
    }


def _print(console: Console, evidence: Evidence, findings: Sequence[Finding]) -> None:
    from rich.markup import escape
    from rich.table import Table

    console.print(f"[bold]{_INTERNAL}[/]")
    known = [
        f"{name.replace('_', ' ')} {value:.3f}" for name, value in _headline(evidence).items() if value is not None
    ]
    console.print(f"{evidence.study.name}: {', '.join(known) or 'nothing was measured on pairs yet'}")
    table = Table(show_lines=True)
    for name, width in (("", 2), ("what limits", 28), ("measured", 26), ("held against", 25), ("what to change", 33)):
        table.add_column(name, width=width)
    for rank, one in enumerate(findings, 1):
        colour = _COLOURS[one.kind]
        origin = "\n[dim](released and public values)[/]" if one.source == PUBLIC else ""
        table.add_row(
            str(rank),
            f"[{colour}]{escape(one.says)}[/]",
            escape(one.figure) + origin,
            escape(f"{one.threshold.value:g}: {one.threshold.reason}"),
            escape("\n".join(f"- {change}" for change in one.changes) or "-"),
        )
    if findings:
        console.print(table)
        console.print("Change one thing at a time, from the top; red first: it makes the rest worth reading.")
    else:
        console.print("nothing that is measured lies beyond its threshold")
    for what in evidence.absent:
        console.print(f"not looked at: {what}")


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    console.width = max(console.width, _COLUMNS)  # a batch job has no terminal, and tables should not be cut there
    return console
