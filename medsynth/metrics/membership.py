"""How well a score tells patients of the training set from patients that no stage has trained on.

Shokri et al. 2017 for the question; Carlini et al. 2022 for the true-positive rate at few false alarms. The unit is the
patient: intervals are bootstraps over patients of both sides.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FALSE_ALARMS = 0.01
_LEVEL = 0.95
_GRID = 2001
_BISECTIONS = 50


@dataclass(frozen=True)
class Attack:
    """What an attack reached.

    Attributes:
        auc: chance that a member scores higher than a stranger.
        auc_low: lower end of its 95 % interval.
        auc_high: upper end.
        tpr: share of members above all but :data:`FALSE_ALARMS` of the strangers (above all of fewer than 100).
        tpr_low: lower end of its 95 % interval.
        tpr_high: upper end.
    """

    auc: float
    auc_low: float
    auc_high: float
    tpr: float
    tpr_low: float
    tpr_high: float


def attack(
    members: NDArray[np.float64], strangers: NDArray[np.float64], draws: int, random: np.random.Generator
) -> Attack:
    """Measure an attack.

    Args:
        members: one score a training patient; higher: more like a member.
        strangers: one score a held-out patient.
        draws: bootstrap samples.
        random: the stream to draw from.
    """
    wins = (members[:, None] > strangers) + 0.5 * (members[:, None] == strangers)
    aucs, tprs = [], []
    for _ in range(draws):
        inside, outside = (random.integers(len(side), size=len(side)) for side in (members, strangers))
        aucs.append(float(wins[np.ix_(inside, outside)].mean()))
        tprs.append(true_positives(members[inside], strangers[outside]))
    tails = ((1 - _LEVEL) / 2, (1 + _LEVEL) / 2)
    (auc_low, auc_high), (tpr_low, tpr_high) = np.quantile(aucs, tails), np.quantile(tprs, tails)
    return Attack(
        float(wins.mean()),
        float(auc_low),
        float(auc_high),
        true_positives(members, strangers),
        float(tpr_low),
        float(tpr_high),
    )


def area_surely(auc: float, members: int, strangers: int, error: float) -> float:
    """Return a lower confidence bound on the area that holds for any distribution of scores and any number of patients.

    Hoeffding 1963, section 5b (two-sample U-statistics, the bound by relative entropy): at perfect separation it is
    Clopper and Pearson's ``error ** (1 / n)``, where a bootstrap would give an interval of no width.

    Args:
        auc: the area that was measured, ties counted half.
        members: number of training patients.
        strangers: number of held-out patients.
        error: chance that the bound lies above the truth, in (0, 1).
    """
    pairs, needed = min(members, strangers), -math.log(error)
    low, high = 0.0, auc
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if pairs * _relative_entropy(auc, middle) >= needed else (low, middle)
    return low


def _relative_entropy(one: float, other: float) -> float:
    terms = ((one, other), (1 - one, 1 - other))
    return math.inf if other == 0 < one else sum(p * math.log(p / q) for p, q in terms if p > 0)


def true_positives(members: NDArray[np.float64], strangers: NDArray[np.float64]) -> float:
    """Return the share of members above a threshold that at most :data:`FALSE_ALARMS` of the strangers pass."""
    threshold = np.quantile(strangers, 1 - FALSE_ALARMS, method="higher")
    return float((members > threshold).mean())


def roc(
    members: NDArray[np.float64], strangers: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return false- and true-positive rates over all thresholds, from (0, 0) to (1, 1)."""
    thresholds = np.concatenate([[np.inf], np.unique(np.concatenate([members, strangers]))[::-1]])
    return (strangers >= thresholds[:, None]).mean(1), (members >= thresholds[:, None]).mean(1)


def area_under(rate_at: NDArray[np.float64]) -> float:
    """Return the area under true-positive rates given at :func:`grid` of false-positive rates (trapezoids)."""
    return float(np.trapezoid(rate_at, grid()))


def grid() -> NDArray[np.float64]:
    """Return false-positive rates from 0 to 1, dense near 0 where bounds bend."""
    return np.linspace(0, 1, _GRID) ** 3
