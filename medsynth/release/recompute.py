"""What a ledger costs, computed again by whoever verifies, with every accountant that is installed there."""

from __future__ import annotations

from collections.abc import Sequence

from medsynth.privacy import accounting
from medsynth.privacy.accounting import Event
from medsynth.release import spending

TOLERANCE = 1e-6
"""Claims are rounded up; this much only covers floating-point differences between machines."""
EXCESS = 0.01
"""A claim may be so much (relative, and absolute below epsilon 1) above what the ledger costs: rounding and grids."""


def accountants() -> tuple[str, ...]:
    """Return the names of the accountants that can be asked here."""
    return ("dp-accounting",)


def epsilons(events: Sequence[Event], delta: float) -> dict[str, float]:
    """Return epsilon of all events by each accountant."""
    return {"dp-accounting": accounting.epsilon(events, delta)}


def membership(events: Sequence[Event], delta: float) -> dict[float, float]:
    """Return the bound on the true-positive rate of membership attacks by false-positive rate."""
    return dict(spending.membership(events, delta))


def contradiction(claimed: float, computed: float) -> str | None:
    """Return why a claim and the cost of the ledger do not belong together; None when they do."""
    if claimed < computed - TOLERANCE:
        return "less than was spent"
    if claimed > computed + EXCESS * max(1.0, computed):
        return "so much more than the ledger costs that one of the two was changed"
    return None
