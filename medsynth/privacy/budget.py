"""From the promised epsilon to the noise of each mechanism: a function of public constants only.

The number of patients never enters: 256 and 257 patients get the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from medsynth.config import Masks, Privacy, Study, Train
from medsynth.errors import BudgetError, PrivacyError
from medsynth.privacy.accounting import Event, claimed, epsilon, planned
from medsynth.privacy.pld import epsilon_bounds, gaussian_delta
from medsynth.privacy.scale_law import reach
from medsynth.sections import MOST_STEPS

# The mask statistics are two noisy sums (means of pose and shape, then their spread), which split their share of
# mu^2 equally.
MASK_SUMS = 2
# Plans aim this much below the promise, so that composing stage by stage and rounding up still fits.
_RELATIVE_MARGIN = 1e-3
_ABSOLUTE_MARGIN = 1e-3
_MAX_MULTIPLIER = 1e6

_VOXELS_A_COSINE, _MOST_COSINES, _LEAST_COSINES = 8, 8, 2
_FULL_REACH = 74.0  # of the appearance statistics, from which on all features stand out of the noise (docs/log.md)
_LEAST_PART = 1 / 2  # of the cosines an axis: fewer lose more than their noise costs
_LEAST_GUESSED_PART = 2 / 3  # where a public template guesses them, so that noise costs less


@dataclass(frozen=True)
class BudgetPlan:
    """Noise multipliers of every stage and what they cost together.

    Attributes:
        masks_noise_multiplier: of EACH of the :data:`MASK_SUMS` noisy sums; 0 where there is no such mechanism.
        appearance_noise_multiplier: of EACH of the noisy sums of intensities (:func:`appearance_sums`); 0 where there
            are none.
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


@lru_cache(maxsize=32)
def plan_budget(privacy: Privacy, train: Train, masks: Masks) -> BudgetPlan:
    """Plan the noise of all mechanisms from the public configuration.

    Masks and appearance get ``mu_i^2 = mu^2 * share_i / sum(shares)`` of the Gaussian mechanism that would spend the
    whole promise; the training noise is then the least for which the exact composition stays within epsilon. The
    share of a mechanism that does not run (public shapes, appearance switched off) goes to the training; without
    training, to the other mechanisms that run. In a declared sweep of k trials all of
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
    noise = _training_noise(_fixed_events(privacy, train, masks), privacy, train) if train.steps else 0.0
    return plan_at_noise(privacy, train, masks, noise)


def plan_at_noise(privacy: Privacy, train: Train, masks: Masks, training_noise: float) -> BudgetPlan:
    """Return what the mechanisms cost when the training's noise is given; the fixed ones take their shares of epsilon.

    Args:
        privacy: the promise and the shares.
        train: sampling rate, steps, and whether appearance statistics are taken.
        masks: whether the masks come from patients' statistics.
        training_noise: noise multiplier of each DP-SGD step; 0 where there is no training.

    Raises:
        PrivacyError: noise that is no noise.
    """
    events = dict(_fixed_events(privacy, train, masks))
    if train.steps:
        events["training"] = (Event("subsampled_gaussian", training_noise, train.sampling_rate, train.steps),)
    spent = epsilon([event for stage in events.values() for event in stage] * privacy.trials, privacy.delta)
    return BudgetPlan(
        masks_noise_multiplier=_noise_of(events, "masks"),
        appearance_noise_multiplier=_noise_of(events, "appearance"),
        training_noise_multiplier=_noise_of(events, "training"),
        events=MappingProxyType(events),
        epsilon=spent,
        delta=privacy.delta,
        mu=gaussian_mu(privacy.epsilon, privacy.delta) / math.sqrt(privacy.trials),
    )


def plan_features(study: Study) -> Study:
    """Return the study with everything that it leaves to planning filled in, from public constants alone.

    ``train.appearance.coefficients``: one cosine for every 8 voxels of an axis, at most 8, times how far the
    statistics reach above their noise (:func:`medsynth.privacy.scale_law.reach`) beside the reach at which all of
    them are worth their noise, at least half, two thirds with a public template. Few patients or a small epsilon so
    get fewer numbers with less noise in each. The choice reads no patient and costs nothing.

    Args:
        study: coefficients that it names are kept.
    """
    appearance, privacy = study.train.appearance, study.privacy
    if appearance.coefficients is not None:
        return study
    part = 1.0
    if privacy.private and appearance.enabled:
        noise = _noise_of(_fixed_events(privacy, study.train, study.masks), "appearance")
        noise /= math.sqrt(appearance_sums(privacy, study.train))  # as if one sum had all of it
        least = _LEAST_PART if appearance.template_centre_mm is None else _LEAST_GUESSED_PART
        part = min(max(reach(noise, study.declared_in_training, 1) / _FULL_REACH, least), 1.0)
    full = [min(size / _VOXELS_A_COSINE, _MOST_COSINES) for size in study.grid.shape]
    chosen = tuple(max(round(part * count), _LEAST_COSINES) for count in full)
    filled = appearance.model_copy(update={"coefficients": chosen})
    return study.model_copy(update={"train": study.train.model_copy(update={"appearance": filled})})


def appearance_sums(privacy: Privacy, train: Train) -> int:
    """Return how many noisy sums tell the appearance; they split its share of mu^2 equally.

    Two, the second around what the first released, but one for products of coefficients (factors), which have no such
    centre, and without privacy, where the first has no noise to mend.
    """
    return 2 if privacy.private and not train.appearance.factors else 1


def most_steps(privacy: Privacy, train: Train, masks: Masks, training_noise: float) -> int:
    """Return how many DP-SGD steps of this noise the promise pays for, beside the fixed mechanisms.

    Raises:
        BudgetError: not even one.
    """
    trained = train.model_copy(update={"steps": 1})  # any number of steps leaves the statistics the same shares
    fixed = [event for stage in _fixed_events(privacy, trained, masks).values() for event in stage]

    def fits(steps: int) -> bool:
        step = Event("subsampled_gaussian", training_noise, train.sampling_rate, steps)
        return planned([*fixed, step] * privacy.trials, privacy.delta) <= _target(privacy)

    if not fits(1):
        raise BudgetError(
            f"epsilon {privacy.epsilon:g} does not pay for one step at noise multiplier {training_noise:g}: raise one"
        )
    low, high = 1, 2
    while high < MOST_STEPS and fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 1000):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return min(low, MOST_STEPS)


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


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the epsilon that one Gaussian mechanism of ``mu`` costs: :func:`gaussian_mu` backwards."""
    return epsilon_bounds([Event("gaussian", 1 / mu)], delta)[1]


def _nonprivate_plan(privacy: Privacy, train: Train, masks: Masks) -> BudgetPlan:
    active = {"masks": masks.source == "statistics", "appearance": train.appearance.enabled, "training": train.steps}
    events = {stage: (Event("nonprivate"),) for stage, on in active.items() if on}
    spent = math.inf if events else 0.0
    return BudgetPlan(0.0, 0.0, 0.0, MappingProxyType(events), spent, privacy.delta, math.inf)


def _fixed_events(privacy: Privacy, train: Train, masks: Masks) -> Mapping[str, tuple[Event, ...]]:
    shares, drawn, promise = privacy.shares, masks.source == "statistics", privacy.epsilon
    if train.steps:
        total = shares.masks + shares.appearance + shares.training
    else:
        total, promise = shares.masks * drawn + shares.appearance * train.appearance.enabled, _target(privacy)
    mu = gaussian_mu(promise, privacy.delta) / math.sqrt(privacy.trials)
    events = {}
    if drawn:
        events["masks"] = (Event("gaussian", math.sqrt(MASK_SUMS * total / shares.masks) / mu, count=MASK_SUMS),)
    if train.appearance.enabled:
        count = appearance_sums(privacy, train)
        noise = math.sqrt(count * total / shares.appearance) / mu
        events["appearance"] = (Event("gaussian", noise, count=count),)
    return events


def _noise_of(events: Mapping[str, tuple[Event, ...]], stage: str) -> float:
    return events[stage][0].noise_multiplier if stage in events else 0.0


def _target(privacy: Privacy) -> float:
    return privacy.epsilon - max(_RELATIVE_MARGIN * privacy.epsilon, min(_ABSOLUTE_MARGIN, privacy.epsilon / 10))


def _training_noise(fixed: Mapping[str, tuple[Event, ...]], privacy: Privacy, train: Train) -> float:
    target, before = _target(privacy), [event for stage in fixed.values() for event in stage]

    def everything(sigma: float) -> list[Event]:
        return [*before, Event("subsampled_gaussian", sigma, train.sampling_rate, train.steps)] * privacy.trials

    high = 1.0
    while planned(everything(high), privacy.delta) > target:
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
        affordable = middle > 0.05 and planned(everything(middle), privacy.delta) <= target
        low, high = (low, middle) if affordable else (middle, high)
    while claimed(everything(high), privacy.delta) > target:
        high *= 1.001
    return high
