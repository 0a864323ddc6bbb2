"""Print epsilon by four accountants over a grid, and write docs/reference/accountants.md (`make accountants`)."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from medsynth.errors import MedsynthError
from medsynth.privacy import pld
from medsynth.privacy.accounting import Accountant, Event, epsilon

PAGE = Path(__file__).resolve().parent / "reference" / "accountants.md"
Setting = tuple[str, tuple[Event, ...], float]

HEAD = """# Accountants

*Written by `make accountants`; do not edit. That they agree is a test (`make slow`).*

Four accountants compute epsilon from the same list of events;
`medsynth.privacy.accounting.epsilon(events, delta, accountant)` asks one of them.

- `pld`: Google's dp-accounting, privacy-loss distributions with connected dots. **The number that is claimed.** Its
  grid of 1e-4 is coarse where every loss is tiny: there its number is too high (q 0.001 at sigma 50), never too low.
- `own`: `medsynth/privacy/pld.py`, numpy only, shares no code with the first. It gives a certified lower and upper
  bound; `medsynth verify` recomputes with it where nothing else is installed.
- `prv`: Opacus, random variables of privacy loss (Gopi, Lee, Wutschitz 2021), upper end of its own error bar of 0.01.
- `rdp`: Opacus, Rényi differential privacy: simple and loose.

When an accountant returns less than our lower bound it has given up; `epsilon` then raises an error instead of passing
the number on. With more than 16 different mechanisms, noise below 0.5, or delta below 1e-10, `pld` answers with our own
upper bound: dp-accounting takes 0.3 s a mechanism, and half a minute at little noise. Of more than 96 different
mechanisms, noise is rounded down and rates up before any accountant sees them: 10,000 different ones take 2 s, and
epsilon rises by at most 3 % when they follow a schedule (50 % when they are scattered at random).

In the table `own` is lower .. upper, the last columns compare with `pld`, and an accountant that fails is named with
its error. T is the number of steps, q the sampling rate, sigma the noise multiplier.

"""


def step(sigma: float, rate: float, count: int) -> Event:
    return Event("subsampled_gaussian" if rate < 1 else "gaussian", sigma, rate, count)


def grid() -> list[Setting]:
    """Return (name, events, delta) of every row."""
    plain = [
        (0.5, 0.001, 1_000), (0.5, 0.001, 10_000), (0.5, 0.01, 100), (0.7, 0.01, 10_000), (0.7, 0.001, 100_000),
        (1.0, 0.001, 100_000), (1.0, 0.01, 1_000), (1.0, 0.01, 100_000), (1.0, 0.1, 100), (1.0, 0.5, 10),
        (2.0, 0.001, 10_000), (2.0, 0.05, 2_000), (2.0, 0.5, 30), (2.0, 0.9, 100), (3.4, 0.25, 200),
        (5.0, 0.1, 10_000), (8.0, 0.25, 200), (8.0, 1.0, 50), (10.0, 0.5, 1_000), (20.0, 0.05, 100_000),
        (20.0, 1.0, 1_000), (50.0, 0.001, 100_000), (50.0, 0.3, 10_000), (50.0, 1.0, 100_000),
        (0.5, 1.0, 1), (1.0, 1.0, 1), (0.1, 0.5, 10),
    ]  # fmt: skip
    deltas = (1e-4, 1e-5, 1e-6, 1e-8)
    rows: list[Setting] = [
        (f"q {rate:g}, T {count}, sigma {sigma:g}", (step(sigma, rate, count),), deltas[index % 4])
        for index, (sigma, rate, count) in enumerate(plain)
    ]
    masks = (Event("gaussian", 1.6, count=3), Event("gaussian", 1.0))
    schedule = tuple(step(1.0 + 0.25 * k, 0.02, 500) for k in range(12))
    rates = tuple(step(2.0, rate, 200) for rate in (0.01, 0.02, 0.05, 0.1, 0.2))
    mixed = [
        ("masks, appearance, 200 steps at q 0.25", (*masks, step(3.4, 0.25, 200)), 1.1e-4),
        ("gaussian sigma 10, 200 steps at q 0.25, sigma 20", (Event("gaussian", 10.0), step(20.0, 0.25, 200)), 1e-5),
        ("12 levels of sigma, 1 to 3.75, q 0.02, T 500 each", schedule, 1e-5),
        ("5 rates, 0.01 to 0.2, sigma 2, T 200 each", rates, 1e-6),
        ("two studies: q 0.25 T 200 sigma 6; q 0.1 T 2000 sigma 4", (step(6.0, 0.25, 200), step(4.0, 0.1, 2000)), 1e-5),
        ("gaussians sigma 2, 3, 5 and 1000 steps at q 0.01, sigma 0.8",
         (*(Event("gaussian", s) for s in (2.0, 3.0, 5.0)), step(0.8, 0.01, 1000)), 1e-8),
    ]  # fmt: skip
    return rows + [(name, tuple(events), delta) for name, events, delta in mixed]


def ask(events: Sequence[Event], delta: float, accountant: Accountant) -> float | str:
    """Return epsilon, or in short why there is none."""
    try:
        return epsilon(events, delta, accountant)
    except MedsynthError:
        return "refused: below the certain bound"
    except Exception as error:  # Opacus fails in many ways; the table says which
        return f"fails: {type(error).__name__}"


def shown(value: float | str, reference: float | None = None) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.4f}" if reference is None else f"{value - reference:+.4f}"


def row(name: str, events: tuple[Event, ...], delta: float) -> list[str]:
    claimed, prv, rdp = (ask(events, delta, a) for a in ("pld", "prv", "rdp"))
    lower, upper = pld.epsilon_bounds(events, delta)
    reference = claimed if isinstance(claimed, float) else upper
    relative = f"{100 * (rdp / reference - 1):+.1f} %" if isinstance(rdp, float) and math.isfinite(rdp) else str(rdp)
    own = f"{lower:.4f} .. {upper:.4f}"
    differences = [shown(upper, reference), shown(prv, reference), relative]
    return [name, f"{delta:g}", shown(claimed), own, shown(prv), shown(rdp), *differences]


def main() -> None:
    names = ["setting", "delta", "pld", "own", "prv", "rdp", "own - pld", "prv - pld", "rdp / pld"]
    table = Table(*names, title="epsilon by four accountants")
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    started = time.monotonic()
    for name, events, delta in grid():
        cells = row(name, events, delta)
        table.add_row(*cells)
        lines.append("| " + " | ".join(cells) + " |")
        print(".", end="", file=sys.stderr, flush=True)
    Console(width=190).print(table)
    print(f"{len(lines) - 2} settings in {time.monotonic() - started:.0f} s", file=sys.stderr)
    PAGE.write_text(HEAD + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
