"""What a list of executed mechanisms costs: (epsilon, delta) for one patient added or removed.

Every number is an upper bound that is rounded up. Three accountants can be asked: ``pld`` (Google's dp-accounting,
the number that is claimed; no torch), and ``prv`` and ``rdp`` (Opacus, to check it: PRV agrees within 0.02, RDP is
looser). This module imports no torch.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

from medsynth.errors import PrivacyError

Kind = Literal["gaussian", "subsampled_gaussian", "nonprivate"]
Accountant = Literal["pld", "own", "prv", "rdp"]

# Step of the privacy-loss grid. dp-accounting's connect-the-dots estimate is pessimistic: a coarser grid can only
# raise epsilon. At 1e-4 it is within 1e-5 of the limit on our events; 1e-3 is ten times faster and 1e-4 higher.
FINE_INTERVAL = 1e-4
COARSE_INTERVAL = 1e-3
_DECIMALS = 4


@dataclass(frozen=True)
class Event:
    """One kind of access to the patients, ``count`` times, with public constants only.

    Attributes:
        kind: ``gaussian`` (every patient), ``subsampled_gaussian`` (each patient by its own coin) or ``nonprivate``.
        noise_multiplier: standard deviation of the noise divided by the sensitivity (the clip norm).
        sampling_rate: probability of a patient's coin; 1 for ``gaussian``.
        count: number of releases; steps of DP-SGD.

    Raises:
        PrivacyError: values that no accountant could charge.
    """

    kind: Kind
    noise_multiplier: float = 0.0
    sampling_rate: float = 1.0
    count: int = 1

    def __post_init__(self) -> None:
        if self.kind not in ("gaussian", "subsampled_gaussian", "nonprivate"):
            raise PrivacyError(f"unknown event kind '{self.kind}': expected gaussian, subsampled_gaussian, nonprivate")
        if self.kind != "nonprivate" and not (math.isfinite(self.noise_multiplier) and self.noise_multiplier > 0):
            raise PrivacyError(f"a {self.kind} event needs noise_multiplier > 0, got {self.noise_multiplier}")
        if not 0 < self.sampling_rate <= 1 or (self.kind == "gaussian" and self.sampling_rate != 1):
            raise PrivacyError(f"a {self.kind} event cannot have sampling_rate {self.sampling_rate}")
        if not isinstance(self.count, int) or self.count < 1:
            raise PrivacyError(f"an event needs a whole count >= 1, got {self.count}")

    def to_json(self) -> dict[str, Any]:
        """Return the event as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Event:
        """Read an event back.

        Raises:
            PrivacyError: unknown or missing keys, or values out of range.
        """
        try:
            return cls(
                kind=value["kind"],
                noise_multiplier=float(value["noise_multiplier"]),
                sampling_rate=float(value["sampling_rate"]),
                count=value["count"],
            )
        except (KeyError, TypeError, ValueError) as error:
            raise PrivacyError(f"unreadable event in a ledger or certificate: {error}") from error


def epsilon(events: Sequence[Event], delta: float, accountant: Accountant = "pld") -> float:
    """Return epsilon of all ``events`` together, rounded up to four decimals.

    *Guarantees*: publishing the outputs of all events is (epsilon, delta)-differentially private for the addition or
    removal of one patient, provided that each event's sensitivity and sampling were as recorded.

    Args:
        events: everything that was (or will be) executed; order does not matter.
        delta: in (0, 1).
        accountant: ``pld`` (claimed), ``prv`` or ``rdp`` (checks; these two import torch).

    Raises:
        PrivacyError: delta out of range or an unknown accountant.
    """
    if not 0 < delta < 1:
        raise PrivacyError(f"delta must lie in (0, 1), got {delta}")
    merged = merge(events)
    if any(event.kind == "nonprivate" for event in merged):
        return math.inf
    if not merged:
        return 0.0
    if accountant == "pld":
        return _round_up(pld_epsilon(merged, delta, FINE_INTERVAL))
    if accountant == "own":
        return _round_up(importlib.import_module("medsynth.privacy.pld").epsilon_upper(merged, delta))
    if accountant in ("prv", "rdp"):
        # By name, because `medsynth verify` uses this module and must not depend on torch, which Opacus imports.
        opacus_accounting = importlib.import_module("medsynth.privacy.opacus_accounting")
        return _round_up(opacus_accounting.epsilon(merged, delta, accountant))
    raise PrivacyError(f"unknown accountant '{accountant}': expected pld, prv or rdp")


def epsilon_at(events: Sequence[Event], deltas: Sequence[float], accountant: Accountant = "pld") -> dict[float, float]:
    """Return :func:`epsilon` at each of ``deltas`` (a certificate states three)."""
    return {delta: epsilon(events, delta, accountant) for delta in deltas}


def membership_bound(epsilon: float, delta: float, false_positive_rate: float) -> float:
    """Return the highest true-positive rate that any membership attack can have at a false-positive rate.

    Kairouz, Oh, Viswanath 2015, theorem 2.1 (hypothesis-testing region of (epsilon, delta)-DP).

    Args:
        epsilon: privacy parameter, may be infinite.
        delta: privacy parameter in [0, 1].
        false_positive_rate: in [0, 1].
    """
    if not 0 <= false_positive_rate <= 1:
        raise PrivacyError(f"a false-positive rate lies in [0, 1], got {false_positive_rate}")
    # exp overflows a double above 709; the bound is 1 long before.
    growth = math.exp(min(epsilon, 700.0))
    steep = growth * false_positive_rate + delta if false_positive_rate > 0 else delta
    flat = 1 - (1 - delta - false_positive_rate) / growth
    return min(1.0, max(0.0, min(steep, flat)))


def merge(events: Sequence[Event]) -> tuple[Event, ...]:
    """Return equal mechanisms as one event with the sum of their counts, in a canonical order."""
    counts: dict[tuple[Kind, float, float], int] = {}
    for event in events:
        key = (event.kind, event.noise_multiplier, event.sampling_rate)
        counts[key] = counts.get(key, 0) + event.count
    return tuple(Event(*key, count) for key, count in sorted(counts.items()))


@lru_cache(maxsize=256)
def pld_epsilon(events: tuple[Event, ...], delta: float, interval: float) -> float:
    """Return epsilon by privacy-loss distributions, not rounded.

    Koskela et al. 2020; Doroshenko et al. 2022 (connect the dots), as implemented by dp-accounting.

    Args:
        events: merged events, none of them ``nonprivate``.
        delta: in (0, 1).
        interval: step of the privacy-loss grid; larger is faster and never lower.
    """
    from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant(NeighboringRelation.ADD_OR_REMOVE_ONE, value_discretization_interval=interval)
    for event in events:
        gaussian = GaussianDpEvent(event.noise_multiplier)
        if event.kind == "gaussian":
            accountant.compose(gaussian, event.count)
        else:
            accountant.compose(PoissonSampledDpEvent(event.sampling_rate, gaussian), event.count)
    return float(accountant.get_epsilon(delta))


def _round_up(value: float) -> float:
    return math.ceil(value * 10**_DECIMALS) / 10**_DECIMALS if math.isfinite(value) else math.inf
