"""From the ledger's entries to the numbers of a claim; shared by the one who signs and the one who verifies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from medsynth.privacy.accounting import COARSE_INTERVAL, Event, membership_bound, merge, pld_epsilon
from medsynth.privacy.ledger import RELATION, UNIT, Record, events_of, taints_of

FALSE_POSITIVE_RATES = (0.001, 0.01, 0.05, 0.10)
_DECIMALS = 3
_MECHANISM_FIELDS = (
    "id",
    "stage",
    "code",
    "mechanisms",
    "events",
    "sensitivity",
    "denominators",
    "sampling",
    "noise_source",
    "preflight",
    "config_digest",
    "parents",
    "status",
    "outputs",
)
# one claim is true at every delta at once; the best of these bounds an attack far better than the claimed delta alone
_CURVE = (1e-3, 3e-3, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def round_up(value: float, decimals: int = _DECIMALS) -> float:
    """Return ``value`` rounded up, so that a claim is never below what was computed.

    >>> round_up(7.12301), round_up(7.123)
    (7.124, 7.123)
    """
    if not math.isfinite(value):
        return value
    scale = 10**decimals
    # what is within floating-point error of a round number stays there
    return float(math.ceil(value * scale - 1e-9) / scale)


def events(entries: Sequence[Record]) -> list[Event]:
    """Return everything that the entries charge."""
    return events_of(entries)


def taints(entries: Sequence[Record]) -> list[str]:
    """Return what makes a ledger uncertifiable: repeatable noise, access without a mechanism, another unit."""
    reasons = taints_of(entries)
    for entry in entries:
        sensitivity = entry["sensitivity"]
        if (sensitivity.get("unit"), sensitivity.get("relation")) != (UNIT, RELATION):
            reasons.append(
                f"stage '{entry['stage']}' was charged for the unit {sensitivity.get('unit')!r} under "
                f"{sensitivity.get('relation')!r}: expected {UNIT!r} under {RELATION!r}"
            )
    return reasons


def mechanism(entry: Record) -> dict[str, Any]:
    """Return what a certificate says of one ledger entry."""
    return {name: entry[name] for name in _MECHANISM_FIELDS}


def cost_at(spent: Sequence[Event], delta: float) -> float:
    """Return epsilon (PLD, the quick grid, never below the exact one) of all events at ``delta``, rounded up."""
    merged = merge(spent)
    return round_up(pld_epsilon(merged, delta, COARSE_INTERVAL)) if merged else 0.0


def membership(spent: Sequence[Event], delta: float) -> tuple[tuple[float, float], ...]:
    """Return (false-positive rate, bound on the true-positive rate) of any membership attack on one patient.

    The bound is the lowest over the privacy curve of the events, at ``delta`` and at larger values.

    Args:
        spent: every event of the ledger.
        delta: failure probability of the claim.
    """
    curve = [(cost_at(spent, value), value) for value in (delta, *_CURVE)]
    return tuple(
        (rate, min(1.0, round_up(min(membership_bound(epsilon, value, rate) for epsilon, value in curve))))
        for rate in FALSE_POSITIVE_RATES
    )
