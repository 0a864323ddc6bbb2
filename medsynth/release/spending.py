"""From the ledger's entries to the numbers of a claim; shared by the one who signs and the one who verifies."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from medsynth.errors import PrivacyError
from medsynth.privacy.account import Others, counted_events
from medsynth.privacy.accounting import COARSE_INTERVAL, Event, claimed, epsilon, membership_bound
from medsynth.privacy.chain import Record
from medsynth.privacy.ledger import RELATION, UNIT, charged_events, taints_of, trials_of

FALSE_POSITIVE_RATES = (0.001, 0.01, 0.05, 0.10)
_DECIMALS = 3
TOLERANCE = 1e-6
"""Claims are rounded up; this much only covers floating-point differences between machines."""
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
    "trials",
    "config_digest",
    "parents",
    "status",
    "outputs",
)
# one claim is true at every delta at once; the best of these bounds an attack far better than the claimed delta alone
CURVE = (1e-3, 3e-3, 0.01, 0.02, 0.04, 0.07, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


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
    """Return everything that the entries charge: what they reserved, in every declared trial."""
    return charged_events(entries)


def trials(entries: Sequence[Record]) -> int:
    """Return of how many studies the sweep of a ledger was declared to be (1: no sweep)."""
    return max((trials_of(entry) for entry in entries), default=1)


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
    """Return epsilon of all events at ``delta`` as :func:`accounting.claimed` has it on the quick grid, rounded up.

    It is an upper bound of its own, beside :func:`accounting.epsilon`: either may be the smaller one.
    """
    return round_up(claimed(spent, delta, COARSE_INTERVAL))


def curve(spent: Sequence[Event], delta: float) -> list[tuple[float, float]]:
    """Return (epsilon, delta) of all events at ``delta`` and at the values of :data:`CURVE`; all of them hold."""
    return [(cost_at(spent, value), value) for value in (delta, *CURVE)]


def membership(spent: Sequence[Event], delta: float) -> tuple[tuple[float, float], ...]:
    """Return (false-positive rate, bound on the true-positive rate) of any membership attack on one patient.

    The bound is the lowest over the privacy curve of the events, at ``delta`` and at larger values.

    Args:
        spent: every event of the ledger.
        delta: failure probability of the claim.
    """
    points = curve(spent, delta)
    return tuple(
        (rate, min(1.0, round_up(min(membership_bound(epsilon, value, rate) for epsilon, value in points))))
        for rate in FALSE_POSITIVE_RATES
    )


def account(others: Others | None, entries: Sequence[Record], delta: float) -> dict[str, Any]:
    """Return what a certificate says of everything ever reserved for the same patients.

    Args:
        others: what the account of the cohort holds beside this study; None where there is no account.
        entries: the study's own ledger.
        delta: failure probability of the claim.
    """
    known = others or Others(0, 0, (), (), False, "")
    values = {
        "scope": "site" if others else "ledger",
        "epsilon": round_up(epsilon([*counted_events(entries), *known.events], delta)),
        "delta": delta,
        "other_studies": known.studies,
        "without_promise": known.without_promise,
        "other_events": [event.to_json() for event in known.events],
        "earlier_releases": [
            {"statement": release.statement, "epsilon": release.epsilon, "delta": release.delta}
            for release in known.releases
        ],
        "recovered": known.recovered,
        "state": known.state,
    }
    return {**values, "in_words": account_in_words(values)}


def account_in_words(values: Mapping[str, Any]) -> str:
    """Return the account of a cohort (as :func:`account` gives it) in the words of a privacy officer."""
    if values["scope"] == "ledger":
        return (
            "Other studies of these patients are unknown to this ledger: what other ledgers charged for the same "
            "patients adds to the epsilon claimed."
        )
    many, number = values["other_studies"], f"epsilon = {values['epsilon']:g} at delta = {values['delta']:g}"
    if many == 0 and not values["other_events"]:
        words = f"The site's account knows no other study of any of these patients; all of this one costs {number}."
    else:
        words = (
            f"The site's account knows {many} other {'study' if many == 1 else 'studies'} of some of these patients. "
            f"Everything that was ever reserved for them, this study included, costs {number}."
        )
    if earlier := values["earlier_releases"]:
        listed = ", ".join(f"{r['statement'][:12]} ({r['epsilon']:g}, {r['delta']:g})" for r in earlier)
        words += f" Certified before, each with its (epsilon, delta): {listed}."
    if values["without_promise"]:
        words += (
            f" {values['without_promise']} of the other studies read patients without a mechanism, or with repeatable "
            "noise: no number covers them, and nothing of theirs may leave the site."
        )
    if values["recovered"]:
        words += (
            " The account was lost once and restored from the ledgers of runs: a study whose ledger was not seen again "
            "is missing from it."
        )
    return words


def check_account(
    predicate: Mapping[str, Any],
    entries: Sequence[Record],
    costs: Callable[[Sequence[Event], float], Mapping[str, float]],
) -> list[str]:
    """Return what is wrong with the account in a certificate: epsilon is computed again from the signed events.

    Args:
        predicate: of the signed statement.
        entries: the ledger of the release.
        costs: epsilon of events at a delta, by each accountant at hand.

    Raises:
        KeyError, TypeError, ValueError, PrivacyError: a part is missing or unreadable.
    """
    signed, claim = predicate["account"], predicate["claim"]
    others = [Event.from_json(event) for event in signed["other_events"]]
    if any(event.kind == "nonprivate" for event in others):
        raise PrivacyError("an access without a mechanism cannot be part of a sum: it is told apart from it")
    problems = []
    if signed["scope"] not in ("site", "ledger"):
        problems.append(f"scope is {signed['scope']!r}: expected 'site' or 'ledger'")
    if signed["scope"] == "ledger" and (others or signed["other_studies"] or signed["earlier_releases"]):
        problems.append("it calls other studies unknown, and names some")
    if signed["delta"] != claim["delta"]:
        problems.append(f"its delta is {signed['delta']:g}, the claim's {claim['delta']:g}")
    if claim["trials"] != trials(entries):
        problems.append(f"the claim is for a sweep of {claim['trials']} studies, the ledger charges {trials(entries)}")
    for name, spent in costs([*counted_events(entries), *others], claim["delta"]).items():
        if not signed["epsilon"] >= spent - TOLERANCE:
            problems.append(
                f"all studies together cost epsilon {spent:g} ({name}), the certificate says {signed['epsilon']:g}"
            )
    if not 0 <= signed["without_promise"] <= signed["other_studies"]:
        problems.append("more studies without a promise than other studies")
    if signed["in_words"] != account_in_words(signed):
        problems.append("its words do not say what its numbers say")
    return problems
