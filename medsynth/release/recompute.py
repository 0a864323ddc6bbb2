"""What a ledger costs, computed again by whoever verifies, with every accountant that is installed there.

medsynth's own accountant needs NumPy only and is always asked; dp-accounting is asked too where it is installed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

from medsynth.privacy import accounting, pld
from medsynth.privacy.accounting import OWN_GRID, Event, coarsen, membership_bound
from medsynth.release import spending

OWN, GOOGLE = "medsynth's own accountant", "dp-accounting"
EXCESS = 0.01
"""A claim may be so much (relative, and absolute below epsilon 1) above what the ledger costs: rounding and grids."""
Bounds = dict[float, float]


def accountants() -> tuple[str, ...]:
    """Return the names of the accountants that can be asked here."""
    return (OWN, GOOGLE) if importlib.util.find_spec("dp_accounting") is not None else (OWN,)


def epsilons(events: Sequence[Event], delta: float) -> dict[str, float]:
    """Return, by each accountant, the epsilon that no honest claim for all events lies below.

    Args:
        events: what the ledger holds.
        delta: in (0, 1).
    """
    asked: dict[str, Callable[[Sequence[Event], float], float]] = {OWN: _own, GOOGLE: accounting.epsilon}
    return {name: asked[name](events, delta) for name in accountants()}


def membership(events: Sequence[Event], delta: float) -> dict[str, Bounds]:
    """Return, by each accountant, the bounds on membership attacks by false-positive rate (see :func:`epsilons`)."""
    merged = coarsen(events)
    curve = [(pld.epsilon_upper(merged, value), value) for value in (delta, *spending.CURVE)]
    own = {
        rate: min(membership_bound(epsilon, value, rate) for epsilon, value in curve) - OWN_GRID
        for rate in spending.FALSE_POSITIVE_RATES
    }
    return {name: own if name == OWN else dict(spending.membership(events, delta)) for name in accountants()}


def contradiction(claimed: float, computed: float) -> str | None:
    """Return why a claim and the cost of the ledger do not belong together; None when they do."""
    if not claimed >= computed - spending.TOLERANCE:
        return "less than was spent"
    if claimed > computed + EXCESS * max(1.0, computed):
        return "so much more than the ledger costs that one of the two was changed"
    return None


def _own(events: Sequence[Event], delta: float) -> float:
    merged = coarsen(events)
    # Claims are never further below the upper bound (accounting.claimed), nor below what is certain.
    return max(0.0, pld.epsilon_lower(merged, delta), pld.epsilon_upper(merged, delta) - OWN_GRID)
