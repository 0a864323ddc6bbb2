"""One-run audit: many gradient canaries, each in or out by a fair coin, through all steps of one training.

Source: Steinke, Nasr, Jagielski 2023 (algorithm 1 and theorem 5.2), with the strongest canaries there are: gradients of
full length along axes of their own, as in Nasr et al. 2023.
"""

from __future__ import annotations

import math
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
# Of the canaries that some step is expected to have drawn: only the largest scores, guessed "in". A canary that was in
# and never drawn looks like one that was out, so that "out" is never sure.
_OF_THE_SEEN = (0.9, 0.5, 0.2)
_EACH = 1 - (1 - CONFIDENCE) / (len(_SHARES) + len(_OF_THE_SEEN))
_NOISE_TOO_SMALL = 10.0
# The control must show about what the same attack shows in arithmetic alone; bounds of few guesses scatter.
_NEAR_REACH, _SCATTER, _REHEARSALS = 0.6, 0.5, 5
_MIDDLE = 0.4  # of a canary's expected score: nearer to 0, because few draws leave some canaries unseen
_FEWEST = 200
_MOST_WORK = 1_000_000  # canary gradients in one run: some 30 s
_SHOWS = (
    "All {steps} steps at the study's own rate, noise and clip norm keep {canaries} canaries about as secret as "
    "claimed: noise that is several times too small would show. It runs the mechanism's own draw, clip, noise and "
    "denominator, not the training loop around them: a loop that takes other steps than it charges, or draws "
    "in another way, does not show here, nor do draws of a fixed size. It is a lower bound that no attack with so "
    "many canaries can bring above {ceiling:.2f}; a low value proves nothing."
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
    ceiling = one_run_ceiling(canaries, delta=DELTA, confidence=_EACH)
    lower = lower_bound(plan, entropy, canaries=canaries)
    broken = replace(plan, noise_multiplier=plan.noise_multiplier / _NOISE_TOO_SMALL)
    control = lower_bound(broken, entropy, canaries=canaries)
    needed = min(claimed, _NEAR_REACH * reach(broken, canaries) - _SCATTER)
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
        controls=(Control("a tenth of the noise", control, control > claimed or control >= needed),),
        shows=_SHOWS.format(steps=plan.steps, canaries=canaries, ceiling=ceiling),
        reads_patients=False,
    )


def lower_bound(plan: DpSgd, entropy: Entropy, *, canaries: int) -> float:
    """Return the lower bound on epsilon from one run over all steps of ``plan``."""
    included = entropy.bernoulli(0.5, canaries)
    return best_bound(plan, run_canaries(plan, included, entropy), included)


def best_bound(plan: DpSgd, scores: NDArray[np.float64], included: NDArray[np.bool_]) -> float:
    """Return the best bound over some ways to guess, each of which pays its part of the error.

    Args:
        plan: the training; only public values are read.
        scores: one a canary.
        included: which canaries were in.
    """
    count = len(scores)
    middle = _MIDDLE * plan.steps * plan.sampling_rate * plan.clip_norm / plan.denominator
    surest, largest = np.argsort(-np.abs(scores - middle)), np.argsort(-scores)
    right, seen = (scores > middle) == included, _seen(plan, count)
    guesses = [right[surest[: max(1, int(share * count))]] for share in _SHARES]
    guesses += [included[largest[: max(1, int(share * seen))]] for share in _OF_THE_SEEN]
    return max(one_run_lower_bound(count, len(one), int(one.sum()), delta=DELTA, confidence=_EACH) for one in guesses)


def reach(plan: DpSgd, canaries: int) -> float:
    """Return what the attack shows of a plan in arithmetic alone (binomial draws, Gaussian noise): the lowest of some.

    It says what may be asked of the code: where few draws leave most canaries unseen, or noise hides them, little.
    """
    rng = np.random.default_rng(0)  # no patient, and nothing is released
    unit, spread = plan.clip_norm / plan.denominator, plan.noise_multiplier * math.sqrt(plan.steps)

    def rehearse() -> float:
        included = rng.random(canaries) < 0.5
        drawn = included * rng.binomial(plan.steps, plan.sampling_rate, canaries)
        return best_bound(plan, unit * (drawn + rng.normal(0.0, spread, canaries)), included)

    return min(rehearse() for _ in range(_REHEARSALS))


def _seen(plan: DpSgd, canaries: int) -> float:
    """Return how many canaries are expected to be in and drawn by some step."""
    return canaries / 2 * (1 - (1 - plan.sampling_rate) ** plan.steps)


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

    Half of those that some step draws, guessed right, must prove more than the claim.
    """
    claimed = epsilon([plan.event()], DELTA)
    most = max(min(most, int(_MOST_WORK / (plan.steps * plan.sampling_rate))), _FEWEST)
    count = min(_FEWEST, most)
    while count < most and _bound_of_half(plan, count) < 1.1 * claimed:
        count = min(2 * count, most)
    return count


def _bound_of_half(plan: DpSgd, canaries: int) -> float:
    guesses = max(1, int(_seen(plan, canaries) / 2))
    return one_run_lower_bound(canaries, guesses, guesses, delta=DELTA, confidence=_EACH)
