"""From the promised epsilon to the noise of each mechanism: a function of public constants only.

The number of patients never enters: 256 and 257 patients get the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from scipy.special import log_ndtr, ndtr

from medsynth.config import Masks, Privacy, Train
from medsynth.errors import BudgetError, PrivacyError
from medsynth.privacy.accounting import COARSE_INTERVAL, FINE_INTERVAL, Event, epsilon, merge, pld_epsilon

# The mask statistics are two noisy sums (means of pose and shape, then their spread), which split their share of
# mu^2 equally.
MASK_SUMS = 2
# Plans aim this much below the promise, so that composing stage by stage and rounding up still fits.
_RELATIVE_MARGIN = 1e-3
_ABSOLUTE_MARGIN = 1e-3
_MAX_MULTIPLIER = 1e6


@dataclass(frozen=True)
class BudgetPlan:
    """Noise multipliers of every stage and what they cost together.

    Attributes:
        masks_noise_multiplier: of EACH of the :data:`MASK_SUMS` noisy sums; 0 where there is no such mechanism.
        appearance_noise_multiplier: of the one noisy sum of intensities; 0 where there is none.
        training_noise_multiplier: of each DP-SGD step; 0 where there is none.
        events: the events of each stage by name (``masks``, ``appearance``, ``training``); absent stages are absent.
        epsilon: what all events cost together, in all declared trials (rounded up), at most the promise.
        delta: the promise's delta.
        mu: Gaussian-DP parameter that the promise would allow to one Gaussian mechanism; of one trial.
    """

    masks_noise_multiplier: float
    appearance_noise_multiplier: float
    training_noise_multiplier: float
    events: Mapping[str, tuple[Event, ...]]
    epsilon: float
    delta: float
    mu: float

    @property
    def all_events(self) -> tuple[Event, ...]:
        """Every planned event of every stage."""
        return tuple(event for events in self.events.values() for event in events)


@lru_cache(maxsize=32)
def plan_budget(privacy: Privacy, train: Train, masks: Masks) -> BudgetPlan:
    """Plan the noise of all mechanisms from the public configuration.

    Masks and appearance get ``mu_i^2 = mu^2 * share_i / sum(shares)`` of the Gaussian mechanism that would spend the
    whole promise; the training noise is then the least for which the exact composition stays within epsilon. The
    share of a mechanism that does not run (public shapes, appearance switched off) changes no other fixed share;
    what it leaves goes to the training, or to nobody when there is no training. In a declared sweep of k trials all of
    it fits k times: mu is that of one trial (mu^2 of Gaussian mechanisms adds up, Dong, Roth, Su 2022, corollary 3.3).

    Args:
        privacy: the promise and the shares.
        train: sampling rate, steps, and whether appearance statistics are taken.
        masks: whether the masks come from patients' statistics.

    Raises:
        BudgetError: no training noise fits into what masks and appearance leave.
    """
    if not privacy.private:
        return _nonprivate_plan(privacy, train, masks)
    mu = gaussian_mu(privacy.epsilon, privacy.delta) / math.sqrt(privacy.trials)
    shares = privacy.shares
    total = shares.masks + shares.appearance + shares.training
    sigma_masks = math.sqrt(MASK_SUMS * total / shares.masks) / mu if masks.source == "statistics" else 0.0
    sigma_appearance = math.sqrt(total / shares.appearance) / mu if train.appearance.enabled else 0.0
    events: dict[str, tuple[Event, ...]] = {}
    if sigma_masks:
        events["masks"] = (Event("gaussian", sigma_masks, count=MASK_SUMS),)
    if sigma_appearance:
        events["appearance"] = (Event("gaussian", sigma_appearance),)
    sigma_training = 0.0
    if train.steps:
        fixed = tuple(event for stage in events.values() for event in stage)
        sigma_training = _training_noise(fixed, privacy, train)
        events["training"] = (Event("subsampled_gaussian", sigma_training, train.sampling_rate, train.steps),)
    spent = epsilon([event for stage in events.values() for event in stage] * privacy.trials, privacy.delta)
    return BudgetPlan(sigma_masks, sigma_appearance, sigma_training, MappingProxyType(events), spent, privacy.delta, mu)


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Return the exact delta of a Gaussian mechanism with sensitivity/noise ``mu`` at ``epsilon``.

    Balle, Wang 2018, theorem 8; Dong, Roth, Su 2022, corollary 2.13.
    """
    return float(ndtr(mu / 2 - epsilon / mu) - math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu)))


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Return the largest ``mu`` with ``gaussian_delta(epsilon, mu) <= delta``, from below.

    Raises:
        PrivacyError: an epsilon or a delta that is no budget.
    """
    if not (0 < epsilon < math.inf and 0 < delta < 1):
        raise PrivacyError(f"a budget needs 0 < epsilon < inf and 0 < delta < 1, got {epsilon} and {delta}")
    low, high = 1e-9, 1.0
    while gaussian_delta(epsilon, high) <= delta:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if gaussian_delta(epsilon, middle) <= delta else (low, middle)
    return low


def _nonprivate_plan(privacy: Privacy, train: Train, masks: Masks) -> BudgetPlan:
    active = {"masks": masks.source == "statistics", "appearance": train.appearance.enabled, "training": train.steps}
    events = {stage: (Event("nonprivate"),) for stage, on in active.items() if on}
    spent = math.inf if events else 0.0
    return BudgetPlan(0.0, 0.0, 0.0, MappingProxyType(events), spent, privacy.delta, math.inf)


def _training_noise(fixed: tuple[Event, ...], privacy: Privacy, train: Train) -> float:
    target = privacy.epsilon - max(_RELATIVE_MARGIN * privacy.epsilon, min(_ABSOLUTE_MARGIN, privacy.epsilon / 10))

    def cost(sigma: float, interval: float) -> float:
        step = Event("subsampled_gaussian", sigma, train.sampling_rate, train.steps)
        return pld_epsilon(merge((*fixed, step) * privacy.trials), privacy.delta, interval)

    high = 1.0
    while cost(high, COARSE_INTERVAL) > target:
        high *= 2
        if high > _MAX_MULTIPLIER:
            raise BudgetError(
                f"epsilon {privacy.epsilon:g} leaves nothing to the training after masks and appearance: "
                "raise privacy.shares.training or privacy.epsilon"
            )
    low = high / 2 if high > 1 else 0.0
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        # Very little noise makes the grid of the accountant huge; half a unit never fits a sensible promise anyway.
        affordable = middle > 0.05 and cost(middle, COARSE_INTERVAL) <= target
        low, high = (low, middle) if affordable else (middle, high)
    while cost(high, FINE_INTERVAL) > target:
        high *= 1.001
    return high
