"""What the cells add up to: JSON, a table for the documentation, and one figure."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pipelines.scale_law.law import FORMS, Fit, Row, best, fit, gains, predicted, reach

_NAMES = {"bias_norm": "biases and norms", "lora": "LoRA, rank 2", "all": "all"}
_COLOURS = {"bias_norm": "#33658a", "lora": "#d1603d", "all": "#6a994e"}
_MARKS = {200: "o", 1000: "s", 5000: "^", 20000: "D"}


def write_report(rows: Sequence[Row], wanted: int, folder: Path) -> str:
    """Write ``scale_law.json``, ``.md`` and ``.png`` and return the table.

    Args:
        rows: cells that were measured.
        wanted: how many were asked for.
        folder: where to.
    """
    fits = [one for form in FORMS if (one := fit(rows, form)) is not None]
    text = markdown(rows, wanted, fits)
    (folder / "scale_law.md").write_text(text, encoding="utf-8")
    found = {"cells": list(rows), "wanted": wanted, "fits": [asdict(one) for one in fits]}
    (folder / "scale_law.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if fits:
        _draw(rows, best(fits), folder / "scale_law.png")
    return text


def markdown(rows: Sequence[Row], wanted: int, fits: Sequence[Fit]) -> str:
    """Return the skill of every cell, and what each form of the law misses."""
    epsilons = sorted({_epsilon(row) for row in rows if row["patients"]})
    header = ["patients", "trained", "parameters", *(f"epsilon {epsilon:g}" for epsilon in epsilons)]
    lines = ["| " + " | ".join(header) + " |", "|---:|---|---:|" + "---:|" * len(epsilons)]
    for patients, name in sorted(
        {(row["patients"], row["trainable"]) for row in rows if row["patients"]},
        key=lambda key: (key[0], list(_NAMES).index(key[1])),
    ):
        own = [row for row in rows if (row["patients"], row["trainable"]) == (patients, name)]
        cells = [_skills([row for row in own if _epsilon(row) == epsilon]) for epsilon in epsilons]
        lines.append("| " + " | ".join([f"{patients:,}", _NAMES[name], f"{own[0]['parameters']:,}", *cells]) + " |")
    lines += ["", *_notes(rows, wanted), *(_line(found) for found in fits)]
    return "\n".join(lines) + "\n"


def _notes(rows: Sequence[Row], wanted: int) -> list[str]:
    lines = [f"{len(rows)} of {wanted} cells were measured."]
    public = [row for row in rows if not row["patients"]]
    if public:
        lines.append(
            f"Without DP-SGD: Dice {statistics.fmean(public[0]['dice']):.3f}, skill {public[0]['skill']:.2f}. Floor "
            f"{public[0]['floor']:.3f}, real only {public[0]['real']:.3f}."
        )
    return lines


def _line(found: Fit) -> str:
    values = ", ".join(f"{name} {value:.2f}" for name, value in found.values.items())
    return (
        f"- {found.form}: {values}; misses by {found.error:.3f}, left out by {found.left_out:.3f} ({found.cells} cells)"
    )


def _skills(rows: Sequence[Row]) -> str:
    values = [row["skill"] for row in rows]
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def _epsilon(row: Row) -> float:
    return math.inf if row["epsilon"] == "inf" else float(row["epsilon"])


def _draw(rows: Sequence[Row], found: Fit, path: Path) -> None:
    """Draw each cell's gain against its reach, the fitted law, and the cells without noise at the right edge."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    pairs = gains(rows)
    finite = [reach(row) for row, _ in pairs if math.isfinite(reach(row))]
    edge = max(finite) * 3
    figure = Figure(figsize=(6.4, 4.0))
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for row, gain in pairs:
        x = min(reach(row), edge)
        axis.plot(x, gain, _MARKS.get(row["patients"], "."), color=_COLOURS[row["trainable"]], alpha=0.85)
    for name, parameters in {row["trainable"]: float(row["parameters"]) for row, _ in pairs}.items():
        line = np.geomspace(min(finite), edge, 200)
        axis.plot(line, predicted(found, line, np.full(200, parameters)), color=_COLOURS[name], lw=1.0)
    axis.axhline(0, color="#8a8f98", lw=0.8)
    for name, colour in _COLOURS.items():
        axis.plot([], [], "o", color=colour, label=_NAMES[name])
    for patients, mark in _MARKS.items():
        axis.plot([], [], mark, color="#8a8f98", label=f"{patients:,} patients")
    axis.set_xscale("log")
    axis.set_xlabel("reach: sqrt(steps) x batch / noise multiplier, about mu N; right edge: no noise")
    axis.set_ylabel("skill added to the public generator")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight", facecolor="white", metadata={"Software": None})
