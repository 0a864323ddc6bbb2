"""One-run audit: many gradient canaries, each in or out by a fair coin, through all steps of one training.

Source: Steinke, Nasr, Jagielski 2023 (algorithm 1 and theorem 5.2), with the strongest canaries there are: gradients of
full length along axes of their own, as in Nasr et al. 2023.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from medsynth import logs
from medsynth.privacy.accounting import epsilon
from medsynth.privacy.audit.bounds import one_run_ceiling, one_run_lower_bound
from medsynth.privacy.audit.finding import Control, Finding
from medsynth.privacy.entropy import Entropy
from medsynth.privacy.gradients import add_clipped
from medsynth.privacy.mechanism import DpSgd

CONFIDENCE = 0.95
# The claim holds at every delta; at a small one the theorem's additive term (2 m delta alpha) leaves the most room.
DELTA = 1e-6
# Guessing at few canaries is surer, guessing at many proves more: each share is tried, and each pays its part of the
# error (Bonferroni).
_SHARES = (1.0, 0.5, 0.25, 0.1)
_NOISE_TOO_SMALL = 10.0
_NEAR_CEILING = 0.6
_MIDDLE = 0.4  # of a canary's expected score: nearer to 0, because few draws leave some canaries unseen
_FEWEST = 200
_MOST_WORK = 1_000_000  # canary gradients in one run: some 30 s
_SHOWS = (
    "All {steps} steps at the study's own rate, noise and clip norm keep {canaries} canaries about as secret as "
    "claimed: a wrong noise level, a wrong number of steps or coins that are not independent would show. It is a lower "
    "bound that no attack with so many canaries can bring above {ceiling:.2f}; a low value proves nothing."
)


def audit_training(plan: DpSgd, entropy: Entropy, *, canaries: int) -> Finding:
    """Compare a lower bound on the whole training's epsilon with its claim.

    *Guarantees*: a right mechanism goes red with a chance of at most ``1 - CONFIDENCE``.

    Args:
        plan: the training as it was executed.
        entropy: source of coins and noise; nothing is spent, since no patient is read.
        canaries: how many, at least 20.
    """
    claimed = epsilon([plan.event()], DELTA)
    each = 1 - (1 - CONFIDENCE) / len(_SHARES)
    ceiling = one_run_ceiling(canaries, delta=DELTA, confidence=each)
    lower = lower_bound(plan, entropy, canaries=canaries)
    broken = replace(plan, noise_multiplier=plan.noise_multiplier / _NOISE_TOO_SMALL)
    control = lower_bound(broken, entropy, canaries=canaries)
    return Finding(
        audit="one run with canaries",
        subject=plan.name,
        measures=f"epsilon of the training at delta {DELTA:g}, lower bound",
        value=lower,
        low=lower,
        high=float("inf"),
        allowed=claimed,
        # Where even a tenth of the noise stays below the claim, silence means nothing.
        outcome="fail" if lower > claimed else ("pass" if control > claimed else "cannot say"),
        blocks=True,
        controls=(Control("a tenth of the noise", control, control > min(claimed, _NEAR_CEILING * ceiling)),),
        shows=_SHOWS.format(steps=plan.steps, canaries=canaries, ceiling=ceiling),
        reads_patients=False,
    )


def lower_bound(plan: DpSgd, entropy: Entropy, *, canaries: int) -> float:
    """Return the lower bound on epsilon from one run over all steps of ``plan``."""
    included = entropy.bernoulli(0.5, canaries)
    scores = run_canaries(plan, included, entropy)
    middle = _MIDDLE * plan.steps * plan.sampling_rate * plan.clip_norm / plan.denominator  # public
    surest = np.argsort(-np.abs(scores - middle))
    right = (scores > middle) == included
    each = 1 - (1 - CONFIDENCE) / len(_SHARES)
    bounds = []
    for share in _SHARES:
        guesses = max(1, int(share * canaries))
        correct = int(right[surest[:guesses]].sum())
        bounds.append(one_run_lower_bound(canaries, guesses, correct, delta=DELTA, confidence=each))
    return max(bounds)


def run_canaries(plan: DpSgd, included: NDArray[np.bool_], entropy: Entropy) -> NDArray[np.float64]:
    """Return each canary's score: what all released steps together say along its axis."""
    count = len(included)
    members = np.flatnonzero(included)
    scores = np.zeros(count)
    canary = torch.zeros(count, dtype=torch.float64)
    for _ in logs.progress(range(plan.steps), "canaries through the training", plan.steps):
        sums = [torch.zeros(count, dtype=torch.float64)]
        for index in plan.draw(len(members), entropy):
            axis = int(members[index])
            canary[axis] = 2 * plan.clip_norm
            add_clipped(sums, [canary], plan.clip_norm)
            canary[axis] = 0.0
        scores += plan.noisy_mean(sums, entropy)[0].double().numpy()
    return scores


def enough_canaries(plan: DpSgd, most: int) -> int:
    """Return the fewest canaries with which a broken training would show beyond its claim, at most ``most``.

    A quarter of them, guessed right, must prove more than the claim: where few steps draw few patients, not every
    canary was ever seen.
    """
    claimed = epsilon([plan.event()], DELTA)
    each = 1 - (1 - CONFIDENCE) / len(_SHARES)
    most = max(min(most, int(_MOST_WORK / (plan.steps * plan.sampling_rate))), _FEWEST)
    count = min(_FEWEST, most)
    while count < most and _bound_of_a_quarter(count, each) < 1.1 * claimed:
        count = min(2 * count, most)
    return count


def _bound_of_a_quarter(canaries: int, confidence: float) -> float:
    return one_run_lower_bound(canaries, canaries // 4, canaries // 4, delta=DELTA, confidence=confidence)
