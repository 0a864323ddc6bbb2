"""From what an attacker saw to a lower confidence bound on epsilon."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.stats import beta, binom

from medsynth.errors import PrivacyError

_LEAST_RUNS = 100
_BISECTIONS = 40
_MOST = 50.0  # no audit reaches such an epsilon


def epsilon_lower_bound(
    with_canary: NDArray[np.float64], without: NDArray[np.float64], *, delta: float, confidence: float
) -> float:
    """Return a lower confidence bound on epsilon from two samples of an attacker's statistic.

    Jagielski, Ullman, Oprea 2020, algorithm 1; Clopper, Pearson 1934 for the two rates. The first half of both samples
    chooses the threshold and the direction, the second half gives the bound.

    Args:
        with_canary: statistic of runs with the canary.
        without: statistic of runs without it.
        delta: at which epsilon is bounded.
        confidence: of the bound.

    Raises:
        PrivacyError: fewer than 100 runs on either side.
    """
    if min(len(with_canary), len(without)) < _LEAST_RUNS:
        raise PrivacyError(f"an audit needs at least {_LEAST_RUNS} runs with and {_LEAST_RUNS} without the canary")
    halves = [np.array_split(sample, 2) for sample in (with_canary, without)]
    thresholds = np.quantile(np.concatenate([halves[0][0], halves[1][0]]), np.linspace(0.001, 0.999, 200))
    candidates = [(float(t), reverse) for t in thresholds for reverse in (False, True)]
    chosen = max(candidates, key=lambda c: _bound(halves[0][0], halves[1][0], c, delta, confidence))
    return max(0.0, _bound(halves[0][1], halves[1][1], chosen, delta, confidence))


def one_run_lower_bound(canaries: int, guesses: int, correct: int, *, delta: float, confidence: float) -> float:
    """Return a lower confidence bound on epsilon from guesses about independent coins in ONE run.

    Steinke, Nasr, Jagielski 2023, theorem 5.2: under (epsilon, delta)-DP for every canary, the number of right guesses
    out of r is at most binomial(r, e^epsilon / (1 + e^epsilon)), but for a term that delta allows.

    Args:
        canaries: m, each in or out by its own fair coin.
        guesses: r, how many were guessed at; the others were abstained from.
        correct: how many guesses were right.
        delta: at which epsilon is bounded.
        confidence: of the bound.
    """
    if not 0 <= correct <= guesses <= canaries:
        raise PrivacyError("an audit's counts need 0 <= correct <= guesses <= canaries")
    if _p_value(canaries, guesses, correct, 0.0, delta) >= 1 - confidence:
        return 0.0
    low, high = 0.0, _MOST
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        rejected = _p_value(canaries, guesses, correct, middle, delta) < 1 - confidence
        low, high = (middle, high) if rejected else (low, middle)
    return low


def one_run_ceiling(canaries: int, *, delta: float, confidence: float) -> float:
    """Return the bound that all guesses right would give: no audit with so many canaries can show more."""
    return one_run_lower_bound(canaries, canaries, canaries, delta=delta, confidence=confidence)


def _p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """Return the chance of so many right guesses under (epsilon, delta)-DP (theorem 5.2: beta + 2 m delta alpha)."""
    right = 1 / (1 + math.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, right))
    steps = np.arange(1, correct + 1)
    below = np.cumsum(binom.pmf(correct - steps, guesses, right))
    alpha = float(np.max(below / steps)) if correct else 0.0
    return min(1.0, tail + 2 * canaries * delta * alpha)


def _bound(
    inside: NDArray[np.float64],
    outside: NDArray[np.float64],
    test: tuple[float, bool],
    delta: float,
    confidence: float,
) -> float:
    """Return log((P[rejects | one] - delta) / P[rejects | other]) with both ends at their unfavourable limit."""
    threshold, reverse = test
    hits, false_alarms = int((inside > threshold).sum()), int((outside > threshold).sum())
    if reverse:
        hits, false_alarms = len(outside) - false_alarms, len(inside) - hits
        inside, outside = outside, inside
    alpha = (1 - confidence) / 2
    low = float(beta.ppf(alpha, hits, len(inside) - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - alpha, false_alarms + 1, len(outside) - false_alarms))
    if false_alarms == len(outside):
        high = 1.0
    return math.log((low - delta) / high) if low > delta else -math.inf
