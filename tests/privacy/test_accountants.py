"""The grid of docs/reference/accountants.md: four accountants agree, or the table says which one fails."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from medsynth.privacy import pld
from medsynth.privacy.accounting import epsilon
from medsynth.stages.certify import allowance

ROOT = Path(__file__).resolve().parents[2]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("write_accountants", ROOT / "docs" / "write_accountants.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GRID = script().grid()


def test_the_grid_covers_what_it_should() -> None:
    events = [event for _, row, _ in GRID for event in row]
    assert len(GRID) >= 30
    assert {1e-4, 1e-8} <= {delta for *_, delta in GRID}
    rates, counts, noises = zip(*((e.sampling_rate, e.count, e.noise_multiplier) for e in events), strict=True)
    assert (min(rates), max(rates), max(counts)) == (0.001, 1, 100_000)
    assert min(noises) <= 0.5 and max(noises) == 50
    assert sum(len(row) > 1 for _, row, _ in GRID) >= 5


def test_the_page_is_of_this_grid() -> None:
    page = (ROOT / "docs" / "reference" / "accountants.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| (\S+) \| (\d+\.\d+) \|", page, re.MULTILINE)
    assert [(name, float(delta)) for name, delta, _ in rows] == [(name, delta) for name, _, delta in GRID]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "events", "delta"), GRID, ids=[name for name, *_ in GRID])
def test_four_accountants_agree(name: str, events: tuple, delta: float) -> None:  # type: ignore[type-arg]
    claimed = epsilon(events, delta)
    lower, upper = pld.epsilon_bounds(events, delta)
    # dp-accounting's grid of 1e-4 is coarse where a step's loss is smaller than it: too high, by less than 0.02.
    assert lower <= claimed + 1e-6
    assert upper - 3e-4 - 1e-5 * upper <= claimed <= upper + (2e-2 if events[0].sampling_rate <= 0.001 else 1e-3)
    assert abs(epsilon(events, delta, "prv") - claimed) <= allowance(claimed)
    assert epsilon(events, delta, "rdp") >= claimed
