"""Our own privacy-loss distributions: bounds on both sides of exact formulas and of dp-accounting."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from medsynth.errors import PrivacyError
from medsynth.privacy import budget, loss_cells
from medsynth.privacy.accounting import Event, merge, pld_epsilon
from medsynth.privacy.loss_cells import Access
from medsynth.privacy.pld import delta_at, epsilon_bounds, epsilon_upper, gaussian_delta

MIXED = (Event("gaussian", 1.6, count=3), Event("gaussian", 1.0), Event("subsampled_gaussian", 3.4, 0.25, 200))
CASES = (
    MIXED,
    (Event("subsampled_gaussian", 1.0, 0.01, 1000),),
    (Event("subsampled_gaussian", 0.5, 0.001, 10_000),),
    (Event("subsampled_gaussian", 0.7, 0.01, 20_000), Event("subsampled_gaussian", 2.0, 0.02, 5_000)),
    (Event("subsampled_gaussian", 2.0, 0.9, 100),),
    (Event("gaussian", 10.0), Event("subsampled_gaussian", 20.0, 0.25, 200)),
    (Event("subsampled_gaussian", 0.5, 0.5, 1),),
)


@pytest.mark.parametrize("events", CASES)
@pytest.mark.parametrize("delta", [1e-4, 1e-6, 1e-8, 0.1])
def test_the_bounds_enclose_the_truth_and_dp_accounting_lies_at_their_upper_end(
    events: tuple[Event, ...], delta: float
) -> None:
    lower, upper = epsilon_bounds(events, delta)
    pessimistic = pld_epsilon(merge(events), delta, 1e-4)
    assert lower <= pessimistic + 1e-6  # dp-accounting's number is an upper bound: a lower one cannot exceed it
    assert abs(upper - pessimistic) <= 2e-4 + 5e-5 * upper
    assert lower <= upper <= lower + 5e-3 + 2e-3 * upper


@settings(deadline=None, max_examples=40)
@given(st.floats(0.05, 30), st.sampled_from([1e-3, 1e-5, 1e-8]))
def test_gaussians_alone_are_exact(mu: float, delta: float) -> None:
    lower, upper = epsilon_bounds([Event("gaussian", 1 / mu)], delta)
    assert gaussian_delta(upper, mu) <= delta <= gaussian_delta(max(lower, 0), mu) or upper == 0
    assert upper - lower <= 2e-9 * (mu * mu / 2 + 40 * mu + 1)
    parts = [Event("gaussian", math.sqrt(3) / mu, count=2), Event("gaussian", math.sqrt(3) / mu)]
    assert epsilon_upper(parts, delta) == pytest.approx(upper, rel=1e-6, abs=1e-8)


@settings(deadline=None, max_examples=60)
@given(st.floats(0, 40), st.floats(0.05, 6))
def test_the_closed_form_is_scipys(eps: float, mu: float) -> None:
    assert gaussian_delta(eps, mu) == pytest.approx(budget.gaussian_delta(eps, mu), rel=1e-7, abs=1e-15)


@pytest.mark.parametrize("mu", [0.1, 0.5, 1.0, 3.0])
def test_the_grid_agrees_with_the_closed_form(mu: float) -> None:
    # At a rate of almost one the numbers come from cells, tilts and transforms, and the limit is known exactly.
    nearly = Event("subsampled_gaussian", math.sqrt(50) / mu, math.nextafter(1.0, 0.0), 50)
    exact = epsilon_upper([Event("gaussian", 1 / mu)], 1e-6)
    lower, upper = epsilon_bounds([nearly], 1e-6)
    assert lower <= exact * (1 + 1e-9) and exact <= upper + 1e-9
    assert upper - exact <= 2e-4 + 2e-4 * exact


@pytest.mark.parametrize(("rate", "sigma"), [(0.3, 0.8), (0.01, 1.0), (0.9, 3.0)])
def test_one_step_matches_direct_integration_in_both_directions(rate: float, sigma: float) -> None:
    x = np.linspace(-12 * sigma, 1 + 12 * sigma, 2_000_001)
    without = stats.norm.pdf(x, 0, sigma)
    with_ = (1 - rate) * without + rate * stats.norm.pdf(x, 1, sigma)
    for delta in (1e-3, 1e-5):
        lower, upper = epsilon_bounds([Event("subsampled_gaussian", sigma, rate)], delta)
        for eps, holds in ((upper, True), (lower * 0.999 - 1e-4, False)):
            worst = max(
                np.trapezoid(np.maximum(a - math.exp(eps) * b, 0), x) for a, b in ((with_, without), (without, with_))
            )
            assert bool(worst <= delta * (1 + 1e-6)) == holds or lower == 0


def test_cells_hold_all_mass_and_both_readings_order_the_mean_loss() -> None:
    access = Access(0.2, 1.5, 1)
    for cells in loss_cells.cells_of(access, *loss_cells.loss_range(access, 9.0), 1e-3):
        assert cells.p.sum() + cells.below + cells.above == pytest.approx(1, abs=1e-13)
        up, down = loss_cells.split_cells(cells, 1, 0.0), loss_cells.merge_cells(cells, 1, 0.0)
        assert up.mass.sum() + up.infinite == pytest.approx(1, abs=1e-13)
        assert down.correction is not None and np.abs(down.correction).max() <= cells.width / 2
        losses = cells.width * (cells.first + np.arange(up.mass.size))
        true = float(cells.p @ np.log(cells.p / cells.q))  # merging whole cells can only lower the divergence
        assert true <= float(up.mass @ losses) + 1e-12
        middles = losses[: down.mass.size] + cells.width / 2
        assert float(down.mass[:-1] @ (middles[: cells.p.size] + down.correction[:-1])) <= true + 1e-12


def test_connecting_the_dots_keeps_both_masses() -> None:
    access = Access(0.2, 1.5, 1)
    for cells in loss_cells.cells_of(access, *loss_cells.loss_range(access, 9.0), 1e-3):
        up = loss_cells.split_cells(cells, 1, 0.0)
        losses = cells.width * (cells.first + np.arange(up.mass.size))
        assert up.mass @ np.exp(-losses) == pytest.approx(cells.q.sum(), abs=1e-9)
        assert up.mass @ np.exp(-losses) <= cells.q.sum() + cells.below + 1e-14  # rounding moved mass up only


@settings(deadline=None, max_examples=25)
@given(
    st.floats(0.4, 5),
    st.floats(0.001, 0.99),
    st.integers(1, 300),
    st.floats(1e-8, 0.1),
)
def test_the_bounds_move_the_right_way(sigma: float, rate: float, count: int, delta: float) -> None:
    lower, upper = epsilon_bounds([Event("subsampled_gaussian", sigma, rate, count)], delta)
    assert 0 <= lower <= upper
    assert lower <= epsilon_upper([Event("subsampled_gaussian", sigma, rate, 2 * count)], delta)
    assert lower <= epsilon_upper([Event("subsampled_gaussian", sigma / 1.1, rate, count)], delta)
    assert lower <= epsilon_upper([Event("subsampled_gaussian", sigma, min(1.0, rate * 1.1), count)], delta)
    assert lower <= epsilon_upper([Event("gaussian", sigma, count=count)], delta)


def test_delta_is_the_inverse_of_epsilon() -> None:
    for events in CASES:
        upper = epsilon_upper(events, 1e-6)
        assert delta_at(events, upper) == pytest.approx(1e-6, rel=2e-2)
        assert delta_at(events, upper + 0.1) < delta_at(events, upper) < delta_at(events, max(upper - 0.1, 0))
    assert delta_at([Event("nonprivate")], 1.0) == 1


def test_losses_that_no_double_holds_are_charged_without_the_sampling() -> None:
    tiny = Event("subsampled_gaussian", 0.02, 0.5, 10)
    lower, upper = epsilon_bounds([tiny, Event("gaussian", 1.0)], 1e-5)
    assert upper == epsilon_upper([Event("gaussian", 0.02, count=10), Event("gaussian", 1.0)], 1e-5) > 10_000
    assert lower == pytest.approx(epsilon_upper([Event("gaussian", 1.0)], 1e-5), abs=1e-6)
    assert math.isfinite(delta_at([tiny], 3.0)) and delta_at([tiny], 3.0) > 0.5


def test_nothing_costs_nothing_and_access_without_noise_everything() -> None:
    assert epsilon_bounds([], 1e-5) == (0, 0)
    assert epsilon_bounds([*MIXED, Event("nonprivate")], 1e-5) == (math.inf, math.inf)


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, math.nan, math.inf])
def test_a_delta_that_promises_nothing_is_refused(delta: float) -> None:
    with pytest.raises(PrivacyError, match="strictly between 0 and 1"):
        epsilon_bounds(MIXED, delta)


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_an_epsilon_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(PrivacyError, match="finite number >= 0"):
        delta_at(MIXED, value)


def test_it_needs_numpy_only() -> None:
    code = (
        "import sys\n"
        "for name in ('scipy', 'torch', 'dp_accounting', 'opacus'): sys.modules[name] = None\n"
        "from medsynth.privacy.accounting import Event, epsilon\n"
        "print(epsilon([Event('subsampled_gaussian', 1.0, 0.01, 1000)], 1e-5, 'own'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1.82 < float(done.stdout) < 1.84
