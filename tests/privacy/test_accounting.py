"""Epsilon of a list of events: three accountants agree, bounds go up, equal mechanisms merge."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq

from medsynth.errors import PrivacyError
from medsynth.privacy import accounting
from medsynth.privacy.accounting import (
    COARSE_INTERVAL,
    DISTINCT,
    FINE_INTERVAL,
    OWN_GRID,
    Accountant,
    Event,
    claimed,
    coarsen,
    epsilon,
    epsilon_at,
    membership_bound,
    merge,
    planned,
    pld_epsilon,
)
from medsynth.privacy.budget import gaussian_mu
from medsynth.privacy.pld import epsilon_bounds, epsilon_lower, epsilon_upper, gaussian_delta

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


def test_one_nonprivate_event_makes_epsilon_infinite() -> None:
    assert epsilon([*TYPICAL, Event("nonprivate")], 1e-4) == math.inf
    assert epsilon([], 1e-4) == 0


def test_epsilon_falls_with_delta() -> None:
    values = list(epsilon_at(TYPICAL, (1e-6, 1e-5, 1e-4)).values())
    assert values == sorted(values, reverse=True)


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ({"kind": "laplace", "noise_multiplier": 1.0}, "expected gaussian"),
        *(
            ({"kind": kind, "noise_multiplier": sigma}, "finite noise_multiplier > 0")
            for kind in ("gaussian", "subsampled_gaussian")
            for sigma in (0.0, -1.0, math.nan, math.inf, -math.inf)
        ),
        ({"kind": "gaussian", "noise_multiplier": 1.0, "sampling_rate": 0.5}, "use kind subsampled_gaussian"),
        *(
            ({"kind": "subsampled_gaussian", "noise_multiplier": 1.0, "sampling_rate": q}, r"in \(0, 1\]")
            for q in (0.0, -0.1, 1.0000001, 1.5, 256.0, math.nan, math.inf)
        ),
        *(
            ({"kind": "gaussian", "noise_multiplier": 1.0, "count": count}, "whole count >= 1")
            for count in (0, -1, 2.0, True, math.nan)
        ),
    ],
)
def test_events_that_cannot_be_charged_are_refused_with_what_to_do(bad: dict[str, Any], words: str) -> None:
    with pytest.raises(PrivacyError, match=words):
        Event(**bad)


@pytest.mark.parametrize("accountant", ["pld", "own", "prv", "rdp"])
@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, 2.0, math.nan, math.inf])
def test_a_delta_that_promises_nothing_is_refused(delta: float, accountant: Accountant) -> None:
    with pytest.raises(PrivacyError, match=r"use 1/\(10 N\)"):
        epsilon(TYPICAL, delta, accountant)


def test_an_unknown_accountant_is_refused() -> None:
    with pytest.raises(PrivacyError, match="expected pld, own, prv or rdp"):
        epsilon(TYPICAL, 1e-5, "moments")  # type: ignore[arg-type]


@pytest.mark.parametrize("accountant", ["pld", "own", "prv", "rdp"])
def test_a_rate_of_one_is_no_sampling(accountant: Accountant) -> None:
    coins, all_of_them = (Event(kind, 2.0, 1.0, 7) for kind in ("subsampled_gaussian", "gaussian"))
    assert epsilon([coins], 1e-5, accountant) == epsilon([all_of_them], 1e-5, accountant)
    assert merge([coins, all_of_them]) == (Event("gaussian", 2.0, count=14),)


SCHEDULES = {
    "noise": [Event("subsampled_gaussian", 1 + 3 * i / 10_000, 0.01) for i in range(10_000)],
    "both": [Event("subsampled_gaussian", 3 - i / 10_000, 0.005 + i / 1e6) for i in range(10_000)],
    "gaussians": [Event("gaussian", 50 + i / 100) for i in range(10_000)],
    "equal": [Event("subsampled_gaussian", 1.0, 0.01)] * 10_000,
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_ten_thousand_events_are_composed_as_few(name: str) -> None:
    assert len(coarsen(SCHEDULES[name])) <= DISTINCT
    assert 1 < epsilon(SCHEDULES[name], 1e-5) < 8


@pytest.mark.slow
@pytest.mark.parametrize(("least", "most", "rate"), [(0.4, 0.9, 0.001), (0.3, 0.5, 0.01), (0.8, 2.0, 0.3)])
def test_ten_thousand_events_of_little_noise_are_composed_as_few(least: float, most: float, rate: float) -> None:
    step = (most - least) / 10_000
    events = [Event("subsampled_gaussian", least + step * i, rate) for i in range(10_000)]
    assert len(coarsen(events)) <= DISTINCT
    assert epsilon(events, 1e-5) < 500


@pytest.mark.slow
@pytest.mark.parametrize("name", ["noise", "both"])
def test_coarsening_costs_little_and_never_saves(name: str) -> None:
    events = SCHEDULES[name]
    coarse = coarsen(events)
    assert len(coarse) <= DISTINCT and sum(e.count for e in coarse) == 10_000
    # From below: noise rounded up and rates down, so no more than the truth.
    grid = 2.0**-9
    kind = "subsampled_gaussian"
    cheaper = [
        Event(
            kind,
            math.exp(grid * math.ceil(math.log(e.noise_multiplier) / grid)),
            math.exp(grid * math.floor(math.log(e.sampling_rate) / grid)),
        )
        for e in events
    ]
    lower = epsilon_lower(merge(cheaper), 1e-5)
    assert lower <= epsilon(events, 1e-5, "own") <= 1.035 * lower


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0.3, 60), st.floats(0.001, 1.0), st.integers(1, 9)), min_size=1, max_size=40))
def test_coarsened_events_are_dearer_one_by_one(parts: list[tuple[float, float, int]]) -> None:
    events = [Event("subsampled_gaussian", *part) for part in parts]
    coarse = coarsen(events, 5)
    sampled = [e for e in coarse if e.kind == "subsampled_gaussian"]
    gaussians = [e for e in coarse if e.kind == "gaussian"]
    true = [e for e in merge(events) if e.kind == "subsampled_gaussian"]
    if len(merge(events)) > 5:
        assert len(coarse) <= 6
        # A rate that was rounded up to 1 has become a gaussian event.
        assert sum(e.count for e in sampled) <= sum(e.count for e in true)
        assert max((e.noise_multiplier for e in sampled), default=0) <= max(
            (e.noise_multiplier for e in true), default=0
        )
        assert min((e.sampling_rate for e in sampled), default=1) >= min((e.sampling_rate for e in true), default=1)
    squares = math.fsum(e.count / e.noise_multiplier**2 for e in merge(events) if e.kind == "gaussian")
    assert math.fsum(e.count / e.noise_multiplier**2 for e in gaussians) >= squares * (1 - 1e-15)


def test_coarsening_keeps_access_without_noise() -> None:
    many = [Event("gaussian", 1 + i / 1000) for i in range(2 * DISTINCT)]
    assert epsilon([*many, Event("nonprivate")], 1e-5) == math.inf


def test_little_noise_is_answered_by_our_own_upper_bound() -> None:
    for events in ([Event("subsampled_gaussian", 0.1, 0.5, 10)], [Event("subsampled_gaussian", 0.01, 0.5, 10)]):
        assert epsilon(events, 1e-5) == epsilon(events, 1e-5, "own") > 100


@pytest.mark.parametrize("found", [0.5, math.nan, -1.0])
def test_an_accountant_that_says_too_little_is_not_believed(found: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "pld_epsilon", lambda *_: found)
    assert epsilon(TYPICAL, 1e-4) == epsilon(TYPICAL, 1e-4, "own")
    monkeypatch.setattr("medsynth.privacy.opacus_accounting.epsilon", lambda *_: found)
    with pytest.raises(PrivacyError, match="it gave up"):
        epsilon(TYPICAL, 1e-4, "prv")


@pytest.mark.parametrize(
    ("events", "delta"),
    [
        ((Event("subsampled_gaussian", 1.0, 0.01, 3000),), 1e-12),
        ((Event("subsampled_gaussian", 2.0, 0.1, 3000),), 1e-11),
        ((Event("subsampled_gaussian", 6.0, 0.25, 100),), 1e-30),
    ],
)
def test_at_a_very_small_delta_the_library_is_not_asked(events: tuple[Event, ...], delta: float) -> None:
    assert not epsilon_lower(events, delta) <= pld_epsilon(events, delta, FINE_INTERVAL) < math.inf
    for found in (epsilon(events, delta), claimed(events, delta, COARSE_INTERVAL), planned(events, delta)):
        assert epsilon_lower(events, delta) <= found <= epsilon(events, delta, "own")


def test_a_coarse_grid_costs_no_more_than_our_own_bound_and_no_claim_is_far_below_it() -> None:
    events = (Event("subsampled_gaussian", 20.0, 0.01, 20_000),)
    coarse, upper = pld_epsilon(events, 1e-6, COARSE_INTERVAL), epsilon_upper(events, 1e-6)
    assert coarse > 1.01 * upper
    assert upper - OWN_GRID <= claimed(events, 1e-6, COARSE_INTERVAL) <= upper


def test_the_claim_is_never_below_what_is_compared_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lower, upper = epsilon_bounds(TYPICAL, 1e-4)
    monkeypatch.setattr(accounting, "pld_epsilon", lambda *_: lower)
    assert claimed(TYPICAL, 1e-4) == max(lower, upper - OWN_GRID)


def test_without_dp_accounting_the_error_names_the_other_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(PrivacyError, match="'own'"):
        epsilon([Event("gaussian", 1.2345)], 1e-5)


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
