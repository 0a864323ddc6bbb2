"""What is believed of noisy occupancies: the posterior mean, computed here once more by summation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm

from medsynth.models.shrinkage import believed_occupancy


@pytest.mark.parametrize("sd", [0.02, 0.1, 0.5, 3.0])
@pytest.mark.parametrize("guess", [0.0, 0.3, 1.0])
def test_it_is_the_posterior_mean(sd: float, guess: float) -> None:
    """0 with a chance of 0.8 where nothing is expected, 1 with 0.15 where all is, each give or take 0.03; else even."""
    noisy = np.linspace(-0.4, 1.4, 19)
    value = np.linspace(-0.5, 1.5, 20001)
    step = value[1] - value[0]
    empty, full = 0.8 * (1 - guess), 0.15 * guess
    even = np.where((value >= 0) & (value <= 1), 1.0, 0.0)
    prior = empty * norm.pdf(value, 0, 0.03) + full * norm.pdf(value, 1, 0.03) + (1 - empty - full) * even
    weights = prior * norm.pdf((noisy[:, None] - value) / sd) * step
    expected = (weights * value).sum(1) / weights.sum(1)
    found = believed_occupancy(noisy, sd, np.full_like(noisy, guess))
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_without_noise_occupancies_stay_as_they_are() -> None:
    noisy = np.random.default_rng(0).normal(0.5, 0.6, (4, 5, 6))
    guess = np.full_like(noisy, 0.4)
    np.testing.assert_array_equal(believed_occupancy(noisy, 0.0, guess), noisy)
    np.testing.assert_allclose(believed_occupancy(np.clip(noisy, 0.1, 0.9), 1e-6, guess), np.clip(noisy, 0.1, 0.9))


def test_empty_space_is_told_from_an_organ() -> None:
    rng = np.random.default_rng(1)
    truth = np.clip(3 - np.abs(np.arange(40) - 20), 0, 1) * np.ones((50, 1))
    noisy = truth + 0.2 * rng.standard_normal(truth.shape)
    found = believed_occupancy(noisy, 0.2, np.full_like(truth, 0.1))
    assert np.square(found - truth).mean() < 0.4 * np.square(noisy - truth).mean()
    assert np.square(found - truth)[truth == 1].mean() < 1.5 * np.square(noisy - truth)[truth == 1].mean()


@pytest.mark.parametrize("noisy", [-50.0, 50.0])
def test_far_values_stay_finite(noisy: float) -> None:
    found = believed_occupancy(np.array([noisy]), 0.05, np.array([0.5]))
    assert np.isfinite(found).all()
