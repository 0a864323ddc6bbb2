"""Distributional step audit: one mechanism step, thousands of times, with and without a canary patient.

Source: Jagielski, Ullman, Oprea 2020; Nasr et al. 2023 (gradient canaries). Canaries of one call lie along axes of
their own, so that each output coordinate is an independent run of the mechanism with (or without) one canary; the code
that runs is the code of the stages: draw, clip, sum, noise, denominator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medsynth.privacy.accounting import epsilon
from medsynth.privacy.audit.bounds import epsilon_lower_bound
from medsynth.privacy.audit.finding import Control, Finding
from medsynth.privacy.entropy import Entropy
from medsynth.privacy.gradients import add_clipped
from medsynth.privacy.mechanism import NO_CLIP, DpSgd, GaussianSum

AddClipped = Callable[[Sequence[Tensor], Sequence[Tensor | None], float], float]
Call = Callable[[bool], NDArray[np.float64]]
"""One call of a mechanism with all canaries or with none: what is released along each canary's axis."""

DELTA = 0.05  # the claim holds at every delta; a large one needs the fewest repeats to be falsified
CONFIDENCE = 0.9999
# The code is linear in noise and clip norm. At these values a single step says enough for 20,000 repeats to notice a
# norm that is 1.26 times too large; at the noise of a real study that would take millions.
AUDITED_NOISE = {"gaussian_sum": 1.0, "dp_sgd": 0.5}
LEAST_RATE = 0.25
_LENGTH = 100.0  # of a canary in clip norms: a missing clip cannot hide
_AXES = 500  # canaries in one call
_NORM_ERROR = 1.26  # what a wrong rule for one layer does: the sum of squares is 37 % short
_SHOWS = (
    "The code of one step, run with fresh noise of the operating system, gives a canary patient away no more than its "
    "accountant says: noise that is too small, a missing clip or a wrong norm would show. It runs at noise multiplier "
    "{noise:g}, where a step says enough, and not at the study's. It cannot show that the noise is hard to predict, "
    "nor tell draws of a fixed size from independent coins, nor see the stage's loop around the mechanism."
)


def audit_sum(plan: GaussianSum, entropy: Entropy, *, repeats: int) -> Finding:
    """Audit the code of a noisy sum; see :func:`audit_step`."""
    audited = replace(plan, dimensions=_AXES, noise_multiplier=AUDITED_NOISE[plan.kind])
    half = replace(audited, noise_multiplier=audited.noise_multiplier / 2)
    unclipped = replace(
        audited, clip_norm=NO_CLIP, noise_multiplier=audited.noise_multiplier * audited.clip_norm / NO_CLIP
    )
    longer = replace(
        audited,
        clip_norm=audited.clip_norm * _NORM_ERROR,
        noise_multiplier=audited.noise_multiplier / _NORM_ERROR,
    )
    broken = {"half the noise": half, "no clip": unclipped, "norms 1.26 times too large": longer}
    calls = {name: sum_call(other, audited.clip_norm, entropy) for name, other in broken.items()}
    return audit_step(audited, sum_call(audited, audited.clip_norm, entropy), calls, repeats=repeats)


def audit_sgd(plan: DpSgd, entropy: Entropy, *, repeats: int) -> Finding:
    """Audit the code of a DP-SGD step; see :func:`audit_step`."""
    rate = max(plan.sampling_rate, LEAST_RATE)
    audited = replace(plan, sampling_rate=rate, noise_multiplier=AUDITED_NOISE[plan.kind], steps=1)
    half = replace(audited, noise_multiplier=audited.noise_multiplier / 2)
    calls = {
        "half the noise": sgd_call(half, entropy),
        "no clip": sgd_call(audited, entropy, lambda sums, part, _: add_clipped(sums, part, NO_CLIP)),
        "norms 1.26 times too large": sgd_call(
            audited, entropy, lambda sums, part, clip: add_clipped(sums, part, clip * _NORM_ERROR)
        ),
    }
    return audit_step(audited, sgd_call(audited, entropy), calls, repeats=repeats)


def audit_step(plan: GaussianSum | DpSgd, call: Call, broken: dict[str, Call], *, repeats: int) -> Finding:
    """Compare a lower bound on one step's epsilon with the step's own claim.

    *Guarantees*: a right mechanism goes red with a chance of at most ``1 - CONFIDENCE``.

    Args:
        plan: what is claimed.
        call: what runs.
        broken: positive controls by name.
        repeats: runs with the canary, and as many without.
    """
    claimed = epsilon([plan.event()], DELTA)
    lower = lower_bound(call, repeats)
    found = {name: lower_bound(other, repeats) for name, other in broken.items()}
    return Finding(
        audit="distributional step",
        subject=plan.name,
        measures=f"epsilon of one step at delta {DELTA:g}, lower bound",
        value=lower,
        low=lower,
        high=float("inf"),
        allowed=claimed,
        outcome="pass" if lower <= claimed else "fail",
        blocks=True,
        controls=tuple(Control(name, value, value > claimed) for name, value in found.items()),
        shows=_SHOWS.format(noise=plan.noise_multiplier),
        reads_patients=False,
    )


def lower_bound(call: Call, repeats: int) -> float:
    """Return the lower bound on epsilon from at least ``repeats`` runs with and as many without canaries."""
    calls = -(-repeats // _AXES)
    inside, outside = (np.concatenate([call(included) for _ in range(calls)]) for included in (True, False))
    return epsilon_lower_bound(inside, outside, delta=DELTA, confidence=CONFIDENCE)


def sum_call(plan: GaussianSum, length: float, entropy: Entropy) -> Call:
    """Return the call of a noisy sum; ``length`` is the clip norm in which canaries are long."""
    canaries = np.eye(plan.dimensions) * (_LENGTH * length)
    return lambda included: plan.release(canaries if included else canaries[:0], entropy)


def sgd_call(plan: DpSgd, entropy: Entropy, add: AddClipped = add_clipped) -> Call:
    """Return the call of a DP-SGD step; ``add`` is how a patient enters the sum."""
    canaries = torch.eye(_AXES, dtype=torch.float64) * (_LENGTH * plan.clip_norm)

    def call(included: bool) -> NDArray[np.float64]:
        sums = [torch.zeros(_AXES, dtype=torch.float64)]
        for index in plan.draw(_AXES if included else 0, entropy):
            add(sums, [canaries[index]], plan.clip_norm)
        return np.asarray(plan.noisy_mean(sums, entropy)[0].double().numpy())

    return call
