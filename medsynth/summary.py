"""What ``medsynth run`` prints at the end: what went in, what came out, what it cost, where to look."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medsynth import store
from medsynth.config import Study
from medsynth.privacy.audit.finding import Finding
from medsynth.release.spending import round_up

# Without the kind of work in the address, MLflow 3 opens an experiment as one of language models: no runs are seen.
_RUNS_PAGE = "http://127.0.0.1:5000/#/experiments/1/runs?workflowType=machine_learning"


def summary(study: Study, run: Path) -> str:
    """Return the summary of a finished run as text."""
    cohort = store.read_manifest(run / "cohort").details
    report = json.loads((run / "report" / "report.json").read_text(encoding="utf-8"))
    rows = [
        ("patients in", cohort.get("patients")),
        ("quarantined", _quarantined(cohort.get("quarantined", {}))),
        ("pairs out", store.read_manifest(run / "synthetic").details["pairs"]),
        ("epsilon", _epsilon(study, report)),
        *((f"Dice {name.replace('_', ' ')}", _dice(report, name)) for name in report["dice"]),
        ("image-blind floor", f"{report['floor']['mean']:.3f}"),
        *_skill(report),
        ("audits", _audits(report.get("audits", []))),
        ("report", run / "report" / "report.html"),
        ("release", run / "release"),
        ("MLflow", study.tracking.uri or f"mlflow ui --backend-store-uri {shlex.quote(_database(run))}"),
    ]
    if not study.tracking.uri:
        rows.append(("its page", _RUNS_PAGE))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join(["", f"medsynth run of '{study.name}' finished", *lines])


def _database(run: Path) -> str:
    return f"sqlite:///{run / 'mlflow' / 'mlflow.db'}"


def _audits(findings: Sequence[Mapping[str, Any]]) -> str:
    counts = Counter(str(finding["verdict"]) for finding in findings)
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common()) or "none"


def print_findings(findings: Sequence[Finding]) -> None:
    """Print what the audits found as a table, then what each can and cannot show."""
    from rich.console import Console
    from rich.table import Table

    table = Table("audit", "measured", "allowed", "controls", "verdict", title="internal")
    for one in findings:
        missed = [control.name for control in one.controls if not control.caught]
        caught = f"{len(one.controls)} caught" if not missed else f"MISSED: {', '.join(missed)}"
        colour = {"pass": "green", "cannot say": "yellow"}.get(one.verdict, "bold red")
        measured = f"{one.value:.3g}" if one.low == one.high else f"{one.value:.3g} ({one.low:.3g} to {one.high:.3g})"
        measured = measured if math.isfinite(one.high) else f"at least {one.low:.3g}"
        table.add_row(
            f"{one.audit}: {one.subject}", measured, f"{one.allowed:.3g}", caught, f"[{colour}]{one.verdict}[/]"
        )
    console = Console()
    console.print(table)
    subjects: dict[tuple[str, str], list[str]] = {}
    for one in findings:
        subjects.setdefault((one.audit, one.shows), []).append(one.subject)
    for (audit, shows), of in subjects.items():
        console.print(f"{audit} of {', '.join(of)}: {shows}", highlight=False)


def _quarantined(reasons: Mapping[str, int]) -> str:
    listed = ", ".join(f"{reason} {count}" for reason, count in sorted(reasons.items()))
    return f"{sum(reasons.values())}" + (f"  ({listed})" if listed else "")


def _epsilon(study: Study, report: dict[str, Any]) -> str:
    if not study.privacy.private:
        return "infinite: NOT PRIVATE, the release is marked UNCERTIFIED"
    return f"{round_up(report['epsilon']):.3f} at delta {report['delta']:g}, unit {report['unit']}"


def _skill(report: dict[str, Any]) -> list[tuple[str, str]]:
    value = report["dice"].get("synthetic_only", {}).get("skill")
    return [] if value is None else [("skill synthetic only", f"{value:.2f}  (0: the floor, 1: real only)")]


def _dice(report: dict[str, Any], name: str) -> str:
    values = report["dice"][name]
    low, high = values["ci95"]
    return f"{values['mean']:.3f}  (95 % interval {low:.3f} to {high:.3f}, {values['n_patients']} patients)"
