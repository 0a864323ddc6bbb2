"""Entropy and the three mechanisms: sensitivity, noise, sampling."""

from __future__ import annotations

import copy
import math
import os
import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from medsynth.errors import PrivacyError
from medsynth.privacy.accounting import Event
from medsynth.privacy.entropy import open_entropy
from medsynth.privacy.mechanism import (
    ROUNDING_SLACK,
    DpSgd,
    GaussianHistogram,
    GaussianSum,
    clip_vector,
    noise_grid,
)
from medsynth.privacy.preflight import CLIP_TOLERANCE

PLAN = DpSgd("denoiser", sampling_rate=0.25, steps=20, noise_multiplier=2.0, clip_norm=0.5, denominator=64.0)
SUM = GaussianSum("pose", dimensions=5, clip_norm=2.0, noise_multiplier=0.7, denominator=10.0)
QUIET = GaussianSum("pose", dimensions=5, clip_norm=2.0, noise_multiplier=0.0, denominator=10.0)
HISTOGRAM = GaussianHistogram("grey", edges=(0.0, 1.0, 2.0, 4.0), noise_multiplier=0.0, denominator=8.0)


@pytest.mark.parametrize("kind", ["os", "test_only"])
def test_normals_are_standard_and_independent(kind: str) -> None:
    values = open_entropy(kind).normal((500, 400))
    assert values.shape == (500, 400) and values.dtype == np.float64
    assert stats.kstest(values.ravel(), "norm").pvalue > 1e-5
    assert abs(np.corrcoef(values[:, :-1].ravel(), values[:, 1:].ravel())[0, 1]) < 0.012
    half = values.size // 2  # the two halves share no Box-Muller pair
    assert abs(np.corrcoef(values.ravel()[:half], values.ravel()[half:])[0, 1]) < 0.016


def test_normals_have_tails() -> None:
    values = np.abs(open_entropy("os").normal(2_000_000))
    for bound in (3.0, 4.0):
        expected = 2 * stats.norm.sf(bound) * values.size
        assert abs((values > bound).sum() - expected) < 6 * math.sqrt(expected)


@pytest.mark.parametrize("rate", [0.0, 0.01, 0.25, 0.9, 1.0])
def test_coins_have_their_rate(rate: float) -> None:
    coins = open_entropy("os").bernoulli(rate, 200_000)
    assert stats.binomtest(int(coins.sum()), coins.size, rate).pvalue > 1e-6


def test_pitfall_16_noise_is_never_seeded_stored_or_repeated() -> None:
    one, other = open_entropy("os"), open_entropy("os")
    assert not np.array_equal(one.normal(8), other.normal(8))
    assert not np.array_equal(one.normal(8), one.normal(8))
    with pytest.raises(PrivacyError):
        open_entropy("os", seed=3)
    for copier in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(PrivacyError):
            copier(one)  # type: ignore[operator]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_pitfall_16_a_forked_process_draws_other_noise() -> None:
    entropy = open_entropy("os")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, entropy.normal(4).tobytes())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(read, 32) != entropy.normal(4).tobytes()


def test_test_only_entropy_repeats_and_says_what_it_is() -> None:
    one, other = open_entropy("test_only", 1), open_entropy("test_only", 1)
    assert np.array_equal(one.normal(10), other.normal(10)) and one.kind == "test_only"
    assert not np.array_equal(one.normal(10), open_entropy("test_only", 2).normal(10))
    with pytest.raises(PrivacyError):
        open_entropy("numpy")


@settings(deadline=None)
@given(arrays(np.float64, 6, elements=st.floats(allow_nan=True, allow_infinity=True)), st.floats(1e-3, 1e3))
def test_no_vector_is_longer_than_the_clip_norm(vector: np.ndarray, bound: float) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        clipped = clip_vector(vector, bound)
    assert np.isfinite(clipped).all() and np.linalg.norm(clipped) <= bound * (1 + 1e-12)


@settings(deadline=None)
@given(arrays(np.float64, 5, elements=st.floats(-1e6, 1e6)))
def test_one_patient_moves_the_sum_by_at_most_the_clip_norm(extra: np.ndarray) -> None:
    cohort = [np.full(5, float(k)) for k in range(4)]
    with_extra, without = (QUIET.release(units, open_entropy("os")) for units in ([*cohort, extra], cohort))
    assert np.linalg.norm(with_extra - without) * QUIET.denominator <= QUIET.clip_norm * (1 + 1e-9)


def test_pitfall_07_a_patient_that_is_not_finite_counts_as_zero() -> None:
    good = np.ones(5)
    for bad in (np.array([1, 2, np.nan, 0, 0]), np.array([np.inf, 0, 0, 0, 0]), np.full(5, 1e200)):
        with np.errstate(over="ignore"):
            both, alone = (QUIET.release(units, open_entropy("os")) for units in ([good, bad], [good]))
        assert np.array_equal(both, alone)


def test_pitfall_06_the_denominator_is_the_public_constant() -> None:
    unit = np.full(5, 0.1)
    for count in (1, 3, 50):
        assert QUIET.release([unit] * count, open_entropy("os")) == pytest.approx(count * unit / 10.0)
    ones, quiet = [torch.ones(3)], DpSgd("d", 0.25, 5, 0.0, 1.0, 64.0)
    assert torch.equal(quiet.noisy_mean(ones, open_entropy("os"))[0], torch.full((3,), 1 / 64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_lies_across_parameters_of_any_size(dtype: torch.dtype) -> None:
    sizes = (1, 2**15 - 2, 3, 2**16 + 1)
    sums = [torch.full((size,), float(number), dtype=dtype) for number, size in enumerate(sizes)]
    handed_over = [total.clone() for total in sums]
    found = DpSgd("d", 0.25, 5, 0.5, 1.0, 2.0).noisy_mean(handed_over, open_entropy("test_only", 3))
    if dtype == torch.float32:  # no sum without noise is left
        assert all(torch.equal(total, part) for total, part in zip(handed_over, found, strict=True))
    assert [part.shape for part in found] == [total.shape for total in sums]
    noise = torch.cat([2 * part - total for part, total in zip(found, sums, strict=True)])
    assert stats.kstest(noise.numpy(), stats.norm(0, 0.5).cdf).pvalue > 1e-4
    assert noise[2**15 - 8 :].unique().numel() > 0.99 * (2**16 + 8)  # nothing twice, nothing left out


def test_the_noise_has_the_planned_size_and_is_drawn_once() -> None:
    entropy = open_entropy("test_only")
    draws = np.array([SUM.release([np.ones(5) * 0.1] * 7, entropy) for _ in range(4000)])
    wanted = stats.norm(0.07, 0.7 * 2.0 / 10.0)
    assert stats.kstest(draws.ravel(), wanted.cdf).pvalue > 1e-4


def test_pitfall_05_empty_draw_is_a_noise_only_step() -> None:
    entropy = open_entropy("test_only")
    zeros = [torch.zeros(200, 50), torch.zeros(3)]
    noise = PLAN.noisy_mean(zeros, entropy)
    assert [tuple(part.shape) for part in noise] == [(200, 50), (3,)] and noise[0].dtype == torch.float32
    wanted = stats.norm(0, 2.0 * 0.5 / 64.0)
    assert stats.kstest(noise[0].numpy().ravel(), wanted.cdf).pvalue > 1e-4
    assert PLAN.draw(0, entropy) == []
    nobody, nothing = (SUM.release(units, open_entropy("test_only", 5)) for units in ([], [np.full(5, np.nan)]))
    assert np.array_equal(nobody, nothing)


def test_pitfall_04_every_patient_has_its_own_coin() -> None:
    entropy = open_entropy("test_only")
    draws = [PLAN.draw(40, entropy) for _ in range(2000)]
    sizes = [len(draw) for draw in draws]
    # A binomial size, not a fixed one; and pairs are independent, which shuffled epochs are not.
    assert stats.chisquare(*_binned(sizes, 40, 0.25)).pvalue > 1e-5
    both = sum(1 for draw in draws if {0, 1} <= set(draw))
    assert stats.binomtest(both, 2000, 0.25**2).pvalue > 1e-5
    assert min(sizes) != max(sizes)


def _binned(sizes: list[int], n: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    edges = [-0.5, 5.5, 7.5, 8.5, 9.5, 10.5, 11.5, 12.5, 14.5, n + 0.5]
    expected = np.diff(stats.binom.cdf(np.array(edges), n, rate)) * len(sizes)
    return np.histogram(sizes, edges)[0], expected


def test_pitfall_17_a_plan_cannot_change_while_it_runs() -> None:
    for name in ("noise_multiplier", "clip_norm", "sampling_rate", "denominator"):
        with pytest.raises(AttributeError):
            setattr(PLAN, name, 1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: GaussianSum("x", 3, 0.0, 1.0, 1.0),
        lambda: GaussianSum("x", 3, 1.0, -1.0, 1.0),
        lambda: GaussianSum("x", 3, 1.0, math.inf, 1.0),
        lambda: GaussianSum("x", 3, 1.0, 1.0, 0.0),
        lambda: DpSgd("x", 1.2, 3, 1.0, 1.0, 1.0),
        lambda: DpSgd("x", 0.2, 0, 1.0, 1.0, 1.0),
        lambda: SUM.release([np.ones(4)], open_entropy("os")),
    ],
)
def test_senseless_plans_and_units_are_refused(make: Callable[[], object]) -> None:
    with pytest.raises(PrivacyError):
        make()


def test_no_noise_is_charged_as_nonprivate() -> None:
    assert QUIET.event().kind == "nonprivate"
    assert DpSgd("d", 0.25, 5, 0.0, 1.0, 64.0).event().kind == "nonprivate"
    assert PLAN.event().count == 20 and PLAN.event().sampling_rate == 0.25


def test_a_histogram_is_normalised_over_all_values_of_a_patient() -> None:
    patients = [np.array([[-5.0, 0.5], [1.5, 99.0]]), np.full(1000, 1.5)]
    released = HISTOGRAM.release(patients, open_entropy("os"))
    assert released == pytest.approx(np.array([0.5, 0.25 + 1.0, 0.25]) / 8.0)


@settings(deadline=None)
@given(arrays(np.float64, st.integers(0, 20), elements=st.floats(allow_nan=True, allow_infinity=True)))
def test_one_patient_moves_a_histogram_by_at_most_one(values: np.ndarray) -> None:
    other = [np.array([0.5, 3.0])]
    both, alone = (HISTOGRAM.release(cohort, open_entropy("os")) for cohort in ([*other, values], other))
    assert np.linalg.norm(both - alone) * HISTOGRAM.denominator <= 1 + 1e-12
    if values.size == 0 or not np.isfinite(values).all():
        assert np.array_equal(both, alone)


def test_a_histogram_is_charged_and_drawn_like_a_sum_of_norm_one() -> None:
    plan = replace(HISTOGRAM, noise_multiplier=1.5)
    assert plan.event() == Event("gaussian", 1.5) and HISTOGRAM.event().kind == "nonprivate"
    entropy = open_entropy("test_only")
    draws = np.array([plan.release([], entropy) for _ in range(3000)])
    assert stats.kstest(draws.ravel(), stats.norm(0, 1.5 / 8.0).cdf).pvalue > 1e-4


@pytest.mark.parametrize("edges", [(), (1.0,), (0.0, 0.0), (1.0, 0.0), (0.0, math.nan), (0.0, math.inf)])
def test_bin_edges_that_are_none_are_refused(edges: tuple[float, ...]) -> None:
    with pytest.raises(PrivacyError, match="bin edges"):
        GaussianHistogram("grey", edges, 1.0, 1.0)


@settings(deadline=None, max_examples=30)
@given(st.floats(1e-3, 1e3), st.floats(0.1, 100))
def test_what_is_released_lies_on_the_public_grid(clip: float, noise: float) -> None:
    grid = noise_grid(noise * clip)
    assert 2.0**-21 <= grid / (noise * clip) <= 2.0**-20 and math.log2(grid) % 1 == 0
    released = GaussianSum("x", 6, clip, noise, 4.0).release([np.full(6, clip / 7)] * 3, open_entropy("os"))
    assert np.array_equal(np.rint(released * 4.0 / grid), released * 4.0 / grid)
    step = DpSgd("d", 0.5, 1, noise, clip, 4.0).noisy_mean([torch.full((6,), clip / 3)], open_entropy("os"))[0]
    # in single precision, up to the 24 bits that it has
    cells = step.double().numpy() * 4.0 / grid
    assert np.allclose(cells, np.rint(cells), rtol=2.0**-23, atol=0)


def test_the_noise_pays_for_the_rounding_of_clips_and_sums() -> None:
    # Sums of 4096 vectors of full length, which partly cancel, with and without one more, in two orders.
    rng = np.random.default_rng(0)
    units = [v / np.linalg.norm(v) * 3 for v in rng.normal(size=(4096, 5)) * 10.0 ** rng.uniform(-3, 3, (4096, 5))]
    quiet = GaussianSum("x", 5, 1.0, 0.0, 1.0)
    one, other = (quiet.release(cohort, open_entropy("os")) for cohort in (units, units[1:][::-1]))
    assert np.linalg.norm(one - other) <= 1.0 + ROUNDING_SLACK
    assert 2 * 65536.0**2 * 2.0**-53 + CLIP_TOLERANCE <= ROUNDING_SLACK


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GaussianSum("x", 0, 1.0, 1.0, 1.0), "whole number of dimensions"),
        (lambda: GaussianSum("x", 2.5, 1.0, 1.0, 1.0), "whole number of dimensions"),  # type: ignore[arg-type]
        (lambda: GaussianSum("x", 3, math.nan, 1.0, 1.0), "finite clip_norm > 0"),
        (lambda: GaussianSum("x", 3, 1.0, math.nan, 1.0), "noise_multiplier"),
        (lambda: GaussianSum("x", 3, 1.0, 1.0, math.inf), "finite denominator > 0"),
        (lambda: GaussianHistogram("x", (0.0, 1.0), -1.0, 1.0), "noise_multiplier"),
        (lambda: GaussianHistogram("x", (0.0, 1.0), 1.0, 0.0), "denominator"),
        (lambda: DpSgd("x", 1.2, 3, 1.0, 1.0, 1.0), "in \\(0, 1\\]"),
        (lambda: DpSgd("x", 0.0, 3, 1.0, 1.0, 1.0), "sampling_rate > 0"),
        (lambda: DpSgd("x", math.nan, 3, 1.0, 1.0, 1.0), "sampling_rate > 0"),
        (lambda: DpSgd("x", 0.2, 3, math.inf, 1.0, 1.0), "noise_multiplier"),
        (lambda: DpSgd("x", 0.2, True, 1.0, 1.0, 1.0), "whole number of steps"),
    ],
)
def test_bad_fields_are_refused_with_what_to_do(make: Callable[[], object], words: str) -> None:
    with pytest.raises(PrivacyError, match=words):
        make()
