"""Audits that can falsify a claim and never prove one: lower bounds on epsilon from repeated runs of a mechanism.

The distributional step audit runs one DP-SGD step many times with and without a canary patient and asks how well a
threshold tells the two apart (Jagielski et al. 2020; Nasr et al. 2021). A lower bound above the claimed epsilon means
that the implementation is wrong. Positive controls (half the noise, no clip) must turn it red.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import beta
from torch import Tensor

from medsynth.errors import PrivacyError
from medsynth.privacy.accounting import epsilon
from medsynth.privacy.entropy import Entropy
from medsynth.privacy.gradients import add_clipped
from medsynth.privacy.mechanism import DpSgd

Step = Callable[[bool], float]
"""Runs the mechanism once, with the canary or without, and returns what an attacker looks at."""

AddClipped = Callable[[Sequence[Tensor], Sequence[Tensor | None], float], float]

# The canary's gradient in clip norms: far beyond the bound, so that a missing clip cannot hide.
_CANARY_LENGTH = 100.0
_BYSTANDERS = 2
_DIMENSIONS = 4


@dataclass(frozen=True)
class StepAudit:
    """What one step audit found.

    Attributes:
        epsilon_lower: the mechanism is not (epsilon, delta)-DP for any smaller epsilon, at ``confidence``.
        epsilon_claimed: the accountant's epsilon of one step.
        delta: of both.
        confidence: of the lower bound (Clopper-Pearson).
        repeats: runs with the canary, and as many without.
    """

    epsilon_lower: float
    epsilon_claimed: float
    delta: float
    confidence: float
    repeats: int

    @property
    def passed(self) -> bool:
        """Whether the audit failed to falsify the claim."""
        return self.epsilon_lower <= self.epsilon_claimed


def audit_dp_sgd(
    plan: DpSgd,
    entropy: Entropy,
    *,
    delta: float = 0.05,
    repeats: int = 10_000,
    confidence: float = 0.999,
    executed: DpSgd | None = None,
    add: AddClipped = add_clipped,
) -> StepAudit:
    """Audit one step of a plan with the code that training uses (draw, clip, noise).

    Args:
        plan: what is claimed.
        entropy: source of randomness; the audit spends nothing, since no patient is read.
        delta: at which the claim and the bound are compared; the claim holds at every delta, and a large one needs
            the fewest repeats to be falsified.
        repeats: runs with and without the canary.
        confidence: of the lower bound; the audit turns a right mechanism red with at most ``1 - confidence``.
        executed: what really runs, for positive controls; default ``plan``.
        add: how a patient enters the sum, for positive controls.
    """
    step = canary_step(executed or plan, entropy, add)
    claimed = epsilon([replace(plan, steps=1).event()], delta)
    with_canary = np.array([step(True) for _ in range(repeats)])
    without = np.array([step(False) for _ in range(repeats)])
    lower = epsilon_lower_bound(with_canary, without, delta=delta, confidence=confidence)
    return StepAudit(lower, claimed, delta, confidence, repeats)


def canary_step(plan: DpSgd, entropy: Entropy, add: AddClipped = add_clipped) -> Step:
    """Return a step on a toy cohort whose canary's gradient is long and lies along the first axis.

    Args:
        plan: what runs.
        entropy: source of its randomness.
        add: how a patient's gradient enters the sum.
    """
    canary = torch.zeros(_DIMENSIONS, dtype=torch.float64)
    canary[0] = _CANARY_LENGTH * plan.clip_norm
    bystander = torch.zeros(_DIMENSIONS, dtype=torch.float64)
    bystander[-1] = plan.clip_norm

    def step(included: bool) -> float:
        cohort = [bystander] * _BYSTANDERS + [canary] * included
        sums = [torch.zeros(_DIMENSIONS, dtype=torch.float64)]
        for index in plan.draw(len(cohort), entropy):
            add(sums, [cohort[index]], plan.clip_norm)
        return float(plan.noisy_mean(sums, entropy)[0][0])

    return step


def epsilon_lower_bound(
    with_canary: NDArray[np.float64], without: NDArray[np.float64], *, delta: float, confidence: float
) -> float:
    """Return a lower confidence bound on epsilon from two samples of an attacker's statistic.

    The first half of both samples chooses the threshold and the direction, the second half gives the bound.

    Args:
        with_canary: statistic of runs with the canary, larger when it is there.
        without: statistic of runs without it.
        delta: at which epsilon is bounded.
        confidence: of the bound.

    Raises:
        PrivacyError: fewer than 100 runs on either side.
    """
    if min(len(with_canary), len(without)) < 100:
        raise PrivacyError("an audit needs at least 100 runs with and 100 without the canary")
    halves = [np.array_split(sample, 2) for sample in (with_canary, without)]
    thresholds = np.quantile(np.concatenate([halves[0][0], halves[1][0]]), np.linspace(0.001, 0.999, 200))
    candidates = [(float(t), reverse) for t in thresholds for reverse in (False, True)]
    chosen = max(candidates, key=lambda c: _bound(halves[0][0], halves[1][0], c, delta, confidence))
    return max(0.0, _bound(halves[0][1], halves[1][1], chosen, delta, confidence))


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
