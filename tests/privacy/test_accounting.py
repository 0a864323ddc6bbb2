"""Epsilon of a list of events: three accountants agree, bounds go up, equal mechanisms merge."""

from __future__ import annotations

import math
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from medsynth.errors import PrivacyError
from medsynth.privacy.accounting import (
    COARSE_INTERVAL,
    FINE_INTERVAL,
    Event,
    epsilon,
    epsilon_at,
    membership_bound,
    merge,
    pld_epsilon,
)
from medsynth.privacy.budget import gaussian_delta, gaussian_mu

TYPICAL = (Event("gaussian", 1.6, count=3), Event("gaussian", 1.0), Event("subsampled_gaussian", 3.4, 0.25, 200))
GRID = (
    TYPICAL,
    (Event("subsampled_gaussian", 8.0, 0.25, 200),),
    (Event("subsampled_gaussian", 2.0, 0.5, 30),),
    (Event("gaussian", 1.0),),
    (Event("gaussian", 10.0), Event("subsampled_gaussian", 20.0, 0.25, 200)),
)


@pytest.mark.parametrize("events", GRID)
@pytest.mark.parametrize("delta", [1e-4, 1e-5])
def test_prv_agrees_within_two_hundredths_and_rdp_lies_above(events: tuple[Event, ...], delta: float) -> None:
    claimed = epsilon(events, delta)
    assert abs(epsilon(events, delta, "prv") - claimed) <= 0.02
    assert claimed < epsilon(events, delta, "rdp") <= 1.35 * claimed


@pytest.mark.parametrize("sigma", [0.5, 1.0, 3.0])
def test_one_gaussian_matches_the_closed_form(sigma: float) -> None:
    claimed = epsilon([Event("gaussian", sigma)], 1e-5)
    exact = float(brentq(lambda e: gaussian_delta(e, 1 / sigma) - 1e-5, 0, 40))
    assert exact - 1e-9 <= claimed <= exact + 5e-3


def test_many_gaussians_cost_what_their_sum_of_squares_costs() -> None:
    parts = [Event("gaussian", s) for s in (1.0, 2.0, 2.0)]
    mu = math.sqrt(1 + 0.25 + 0.25)
    assert epsilon(parts, 1e-5) == pytest.approx(epsilon([Event("gaussian", 1 / mu)], 1e-5), abs=2e-3)


def test_a_coarser_grid_is_never_lower() -> None:
    events = merge(TYPICAL)
    assert pld_epsilon(events, 1e-4, COARSE_INTERVAL) >= pld_epsilon(events, 1e-4, FINE_INTERVAL)


def test_the_claim_is_rounded_up() -> None:
    raw = pld_epsilon(merge(TYPICAL), 1e-4, FINE_INTERVAL)
    assert raw <= epsilon(TYPICAL, 1e-4) < raw + 1.01e-4


def test_order_and_splitting_of_events_do_not_matter() -> None:
    split = [TYPICAL[2], *[Event("gaussian", 1.6)] * 3, TYPICAL[1]]
    assert epsilon(split, 1e-4) == epsilon(TYPICAL, 1e-4)


def test_typical_events_take_less_than_three_seconds() -> None:
    epsilon([Event("gaussian", 1.0)], 1e-4)  # imports
    started = time.process_time()  # not wall time: other tests run beside this one
    epsilon((*TYPICAL, Event("gaussian", 77.7)), 1.1e-4)
    assert time.process_time() - started < 3


def test_one_nonprivate_event_makes_epsilon_infinite() -> None:
    assert epsilon([*TYPICAL, Event("nonprivate")], 1e-4) == math.inf
    assert epsilon([], 1e-4) == 0


def test_epsilon_falls_with_delta() -> None:
    values = list(epsilon_at(TYPICAL, (1e-6, 1e-5, 1e-4)).values())
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    "bad",
    [
        {"kind": "laplace", "noise_multiplier": 1.0},
        {"kind": "gaussian", "noise_multiplier": 0.0},
        {"kind": "gaussian", "noise_multiplier": 1.0, "sampling_rate": 0.5},
        {"kind": "subsampled_gaussian", "noise_multiplier": 1.0, "sampling_rate": 1.5},
        {"kind": "subsampled_gaussian", "noise_multiplier": math.nan, "sampling_rate": 0.5},
        {"kind": "gaussian", "noise_multiplier": 1.0, "count": 0},
    ],
)
def test_events_that_cannot_be_charged_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(PrivacyError):
        Event(**bad)  # type: ignore[arg-type]


def test_events_survive_json() -> None:
    assert [Event.from_json(event.to_json()) for event in TYPICAL] == list(TYPICAL)
    with pytest.raises(PrivacyError):
        Event.from_json({"kind": "gaussian"})


@settings(max_examples=60, deadline=None)
@given(st.floats(0.01, 20), st.floats(0, 1e-3), st.floats(0, 1), st.floats(0, 1))
def test_membership_bound_contains_chance_and_grows(eps: float, delta: float, low: float, high: float) -> None:
    low, high = sorted((low, high))
    assert membership_bound(eps, delta, low) >= low - 1e-12
    assert membership_bound(eps, delta, low) <= membership_bound(eps, delta, high) + 1e-12 <= 1 + 1e-9


def test_membership_bound_by_hand() -> None:
    assert membership_bound(math.log(3), 0.0, 0.1) == pytest.approx(0.3)
    assert membership_bound(math.log(3), 0.0, 0.5) == pytest.approx(1 - 0.5 / 3)
    assert membership_bound(math.inf, 0.0, 0.01) == 1


@settings(deadline=None)
@given(st.floats(0.1, 20), st.sampled_from([1e-3, 1e-5, 1e-7]))
def test_gaussian_mu_inverts_the_closed_form(eps: float, delta: float) -> None:
    mu = gaussian_mu(eps, delta)
    assert gaussian_delta(eps, mu) <= delta < gaussian_delta(eps, mu * 1.001)


def test_accounting_ledger_and_plans_import_no_torch() -> None:
    code = (
        "import sys; from medsynth.privacy import accounting, budget, entropy, journal, ledger, mechanism;"
        "accounting.epsilon([accounting.Event('gaussian', 1.0)], 1e-5);"
        "sys.exit(any(m in sys.modules for m in ('torch', 'opacus', 'monai')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
