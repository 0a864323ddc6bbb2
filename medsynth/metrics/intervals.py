"""Bootstrap intervals of what is computed from several models on the same patients: ratios, skill, and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from medsynth.metrics.overlap import Estimate, known_mean

_LEVEL = 0.95
Statistic = Callable[..., np.ndarray]
"""From one mean a series and bootstrap sample, ``(draws,)`` arrays, to ``(draws,)``."""


def paired_bootstrap(
    series: Sequence[np.ndarray], statistic: Statistic, draws: int, random: np.random.Generator, *, over_seeds: bool
) -> Estimate:
    """Return a statistic of several models' means over patients and its percentile bootstrap interval.

    All three are NaN where the statistic is undefined.

    Every model is measured on the same drawn patients (Efron and Tibshirani 1993, section 10.4, paired), so that a
    hard patient is hard for all of them. With ``over_seeds``, the seeds of each model are drawn again as well, crossed
    with the patients: the interval then speaks of another training too, not only of other patients.

    Args:
        series: ``(seed, patient)`` values of each model; NaN is ignored.
        statistic: of the means.
        draws: bootstrap samples.
        random: the stream to draw from.
        over_seeds: draw the seeds again too; without it they are averaged.
    """
    point = statistic(*(_mean(known_mean(values, axis=0)[None]) for values in series))
    if np.isnan(point[0]):  # what does not exist has no interval, though some of the samples had a value
        return Estimate(float("nan"), float("nan"), float("nan"))
    patients = random.integers(series[0].shape[1], size=(draws, series[0].shape[1]))
    means = [_mean(_patients(values, draws, random, over_seeds, patients)) for values in series]
    samples = statistic(*means)
    known = samples[~np.isnan(samples)]
    if not len(known):
        return Estimate(float(point[0]), float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Estimate(float(point[0]), float(low), float(high))


def skill_of(dice: np.ndarray, floor: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Return (dice - floor) / (real - floor); NaN where real training does not beat the floor."""
    return np.divide(dice - floor, real - floor, out=np.full(dice.shape, np.nan), where=real > floor)


def ratio_of(dice: np.ndarray, real: np.ndarray) -> np.ndarray:
    """Return dice / real; NaN where real training reached nothing."""
    return np.divide(dice, real, out=np.full(dice.shape, np.nan), where=real > 0)


def mean_of(values: np.ndarray) -> np.ndarray:
    """Return the means themselves."""
    return values


def _patients(
    values: np.ndarray, draws: int, random: np.random.Generator, over_seeds: bool, patients: np.ndarray
) -> np.ndarray:
    """Return the values of the drawn patients, ``(draws, patient)``, averaged over all or over drawn seeds."""
    if not over_seeds or len(values) == 1:
        return np.asarray(known_mean(values, axis=0)[patients])
    seeds = random.integers(len(values), size=(draws, len(values)))
    weights = np.stack([(seeds == seed).sum(axis=1) for seed in range(len(values))])  # (seed, draws)
    drawn = values[:, patients]  # (seed, draws, patient)
    heavy = np.where(np.isnan(drawn), 0.0, weights[:, :, None])
    total = heavy.sum(axis=0)
    sums = (heavy * np.nan_to_num(drawn)).sum(axis=0)
    return np.divide(sums, total, out=np.full(total.shape, np.nan), where=total > 0)


def _mean(values: np.ndarray) -> np.ndarray:
    return known_mean(values, axis=1)
