"""Figures of a comparison: infinity has its place, runs of one epsilon are told apart, nothing known is no crash."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsynth.metrics import figures
from medsynth.metrics.figures import Point


def _point(x: float, mean: float) -> Point:
    return Point(x, mean, mean - 0.1, mean + 0.1)


def test_infinity_stands_right_of_every_epsilon() -> None:
    places = figures._decades({8.0, math.inf, 1.0, 3.0})
    assert sorted(places, key=lambda x: places[x]) == [1.0, 3.0, 8.0, math.inf]
    assert list(figures._decades({math.inf})) == [math.inf]


@pytest.mark.parametrize(
    "points",
    [
        [_point(8.0, 0.4), _point(8.0, 0.5), _point(math.inf, 0.9)],
        [_point(3.0, math.nan)],
        [_point(math.inf, -7.0)],
    ],
)
def test_skill_is_drawn_whatever_is_known(points: list[Point], tmp_path: Path) -> None:
    figures.skill_by_epsilon({"synthetic only": points}, {"strong": 0.9}, tmp_path / "skill.png", "")
    assert (tmp_path / "skill.png").stat().st_size > 5000


def test_dice_is_drawn_for_one_number_and_for_many_runs(tmp_path: Path) -> None:
    lines = {f"run-{number}": 0.1 * number for number in range(8)}
    curves = {name: [_point(20, 0.5)] for name in ("real only", "strong augmentation", *(f"mixed, {r}" for r in lines))}
    figures.dice_by_patients(curves, lines, 0.3, tmp_path / "dice.png", "quick")
    assert (tmp_path / "dice.png").stat().st_size > 5000


@pytest.mark.parametrize("mean", [0.05, 0.45, 0.95, math.nan])
def test_dice_is_drawn_from_zero_to_one_whatever_was_measured(
    mean: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "_save", lambda figure, _: drawn.append(figure))
    block = {"mean": mean, "ci95": [mean - 0.04, mean + 0.04]}
    block |= {"per_label": {"organ": dict(block)}}
    figures.dice({"real_only": block, "mixed": block}, block, tmp_path / "dice.png")
    assert drawn[0].axes[0].get_ylim() == (0.0, 1.0)


@pytest.mark.parametrize(("mean", "zoomed"), [(0.8, True), (0.1, False)])
def test_an_axis_of_dice_that_does_not_start_at_zero_says_so(
    mean: float, zoomed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "_save", lambda figure, _: drawn.append(figure))
    figures.dice_by_patients({"real only": [_point(1, mean)]}, {}, mean, tmp_path / "dice.png", "")
    axis = drawn[0].axes[0]
    assert (axis.get_ylim()[0] > 0, "does not start at 0" in axis.get_ylabel()) == (zoomed, zoomed)


def test_an_attack_that_tells_nobody_apart_is_drawn_along_the_diagonal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Any] = []
    monkeypatch.setattr(figures, "_save", lambda figure, _: drawn.append(figure))
    figures.roc({"generator": (np.zeros(5), np.zeros(4))}, tmp_path / "roc.png")
    (line,) = [line for line in drawn[0].axes[0].lines if line.get_label() == "generator"]
    assert line.get_xydata().tolist() == [[0, 0], [1, 1]] and line.get_drawstyle() == "default"


def test_a_skill_far_below_the_floor_or_above_real_patients_is_shown_as_an_arrow(tmp_path: Path) -> None:
    figure, axes = figures._figure(3, 3, 1, 1)
    axis = axes[0][0]
    figures._point(axis, 0.0, Point(8.0, -3.65, -4.0, -3.0), "red", "far", drawn=(-1.0, 2.0))
    figures._point(axis, 1.0, Point(8.0, -0.001, -0.1, 0.1), "red", "near", drawn=(-1.0, 2.0))
    figures._point(axis, 2.0, Point(8.0, 3.3, 1.5, 20.0), "red", "above", drawn=(-1.0, 2.0))
    far, near, above = (line for line in axis.lines if line.get_marker() in ("v", "o", "^"))
    assert far.get_marker() == "v" and list(far.get_ydata()) == [-1.0] and near.get_marker() == "o"
    assert above.get_marker() == "^" and list(above.get_ydata()) == [2.0]
    assert max(max(line.get_ydata()) for line in axis.lines) == 2.0
    assert [text.get_text() for text in axis.texts] == ["-3.65", "0.00", "3.30"]
    figures._save(figure, tmp_path / "point.png")
