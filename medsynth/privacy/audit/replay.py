"""Record-replay on neighbouring cohorts: the study's own mechanisms on a cohort with and without one patient.

The same coins, the outputs before the noise, and the same transcript (its noise is ``test_only`` and never released):
what a mechanism released on the first cohort is given to whatever follows on the second, as adaptive composition
demands. What is left of the difference is the patient's own contribution, which may not be longer than the clip norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from medsynth.privacy.audit.finding import Control, Finding
from medsynth.privacy.entropy import Entropy, open_entropy
from medsynth.privacy.gradients import Backend, Batch
from medsynth.privacy.mechanism import NO_CLIP, DpSgd, GaussianSum
from medsynth.privacy.preflight import CLIP_TOLERANCE

ALLOWED = 1 + CLIP_TOLERANCE
# A backend that takes patients together rounds the others' single-precision gradients anew when one leaves: some 1e-7
# of a clip norm each (3e-7 measured).
ALLOWED_TOGETHER = 1 + 1e-5
_SEED = 1
_TOO_WIDE = 1.26
_SHOWS = (
    "With one patient more or less, {number} times and with hostile patients among them, the mechanism of this very "
    "study moves by no more than its clip norm. It is exact for the patients that were tried and says nothing of "
    "others, nor of the noise."
)

Flow = Callable[[int | None, "Wrap"], object]
"""Run the mechanisms of a stage on all patients but one (None: on all), each mechanism wrapped first."""
Wrap = Callable[[GaussianSum], GaussianSum]
Units = Callable[[int], Batch]
"""Return the batch of one patient by its number."""


@dataclass
class Tape:
    """What mechanisms released on the first cohort, and their outputs before the noise on it and on its neighbour."""

    released: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    recorded: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    replayed: dict[str, NDArray[np.float64]] = field(default_factory=dict)

    def distances(self) -> dict[str, float]:
        """Return how far the two outputs of each mechanism lie apart (L2); infinite where one is not finite."""
        return {name: _length(self.recorded[name] - self.replayed[name]) for name in self.replayed}


@dataclass(frozen=True)
class TapedSum(GaussianSum):
    """A noisy sum with repeated noise that writes to a tape, and replays what the first cohort released."""

    tape: Tape = field(default_factory=Tape)

    def release(self, units: Iterable[NDArray[np.floating]], entropy: Entropy) -> NDArray[np.float64]:
        """Return the release of the cohort that was recorded, whatever ``units`` are; ``entropy`` is not used."""
        vectors = list(units)
        if self.name in self.tape.released:
            self.tape.replayed[self.name] = self._before_noise(vectors, self.clip_norm)
        else:
            self.tape.recorded[self.name] = self._before_noise(vectors, self.clip_norm)
            self.tape.released[self.name] = GaussianSum.release(self, vectors, open_entropy("test_only", _SEED))
        return self.tape.released[self.name]

    def _before_noise(self, vectors: Sequence[NDArray[np.floating]], clip_norm: float) -> NDArray[np.float64]:
        # What comes after the noise, rounding to a grid included, is post-processing and would blur the comparison.
        silent = GaussianSum(self.name, self.dimensions, clip_norm, 0.0, self.denominator)
        return silent.release(vectors, open_entropy("test_only", _SEED))


@dataclass(frozen=True)
class _Unclipped(TapedSum):
    """Broken on purpose: no clip, before vectors that another unit of measure made a million times as long."""

    def _before_noise(self, vectors: Sequence[NDArray[np.floating]], clip_norm: float) -> NDArray[np.float64]:
        return np.asarray(sum(_longer(vectors), np.zeros(self.dimensions)) / self.denominator)


@dataclass(frozen=True)
class _Loose(TapedSum):
    """Broken on purpose: the same long vectors, clipped at more than the clip norm."""

    def _before_noise(self, vectors: Sequence[NDArray[np.floating]], clip_norm: float) -> NDArray[np.float64]:
        return super()._before_noise(list(_longer(vectors)), _TOO_WIDE * clip_norm)


def _longer(units: Iterable[NDArray[np.floating]]) -> Iterator[NDArray[np.float64]]:
    for unit in units:
        # Bounded, so that one huge patient does not swallow the others' digits.
        yield 1e6 * np.clip(np.nan_to_num(np.asarray(unit, dtype=np.float64)), -1e6, 1e6)


def audit_sums(flow: Flow, neighbours: Sequence[int], subject: str) -> Finding:
    """Replay the noisy sums of a stage without each of some patients.

    Args:
        flow: runs the stage's code.
        neighbours: the patients that are taken out, one after the other.
        subject: what the sums release, e.g. ``"masks"``.
    """
    value = replay_sums(flow, neighbours, TapedSum)
    controls = {
        "no clip": replay_sums(flow, neighbours[:1], _Unclipped),
        f"a clip {_TOO_WIDE} times too wide": replay_sums(flow, neighbours[:1], _Loose),
    }
    return _finding(subject, value, controls, len(neighbours), ALLOWED)


def replay_sums(flow: Flow, neighbours: Sequence[int], kind: type[TapedSum]) -> float:
    """Return how far the sums move without one of ``neighbours``, in clip norms: the farthest sum and patient."""
    tape, plans = Tape(), dict[str, GaussianSum]()

    def wrap(plan: GaussianSum) -> GaussianSum:
        plans[plan.name] = plan
        return kind(plan.name, plan.dimensions, plan.clip_norm, plan.noise_multiplier, plan.denominator, tape)

    flow(None, wrap)
    farthest = 0.0
    for patient in neighbours:
        flow(patient, wrap)
        moved = tape.distances()
        farthest = max(farthest, *(moved[name] * plan.denominator / plan.clip_norm for name, plan in plans.items()))
    return farthest


def audit_steps(plan: DpSgd, backend: Backend, units: Units, count: int, neighbours: Sequence[int]) -> Finding:
    """Replay one step of DP-SGD, with the study's backend, without each of some patients.

    Args:
        plan: the training's mechanism.
        backend: what it clips with, opened for its model and loss.
        units: batch of a patient.
        count: number of patients.
        neighbours: the patients that are taken out, one after the other; the longest gradients last.
    """
    value = max(replay_step(plan, backend, units, count, patient) for patient in neighbours)
    hostile = neighbours[-2:]
    controls = {
        "no clip": max(replay_step(plan, backend.at(NO_CLIP), units, count, patient) for patient in hostile),
        "mean over the real batch": _replay_alone(plan, backend, units(neighbours[0])),
    }
    allowed = ALLOWED if backend.name == "unit" else ALLOWED_TOGETHER
    return _finding(plan.name, value, controls, len(neighbours), allowed)


def replay_step(plan: DpSgd, backend: Backend, units: Units, count: int, patient: int) -> float:
    """Return how far a step moves without ``patient``, in clip norms, with a coin that falls on that patient."""
    order = [number for number in range(count) if number != patient] + [patient]
    silent = replace(plan, noise_multiplier=0.0)  # before the noise: single precision rounds after it
    seed = next(s for s in range(_SEED, 1_000_000) if count - 1 in plan.draw(count, open_entropy("test_only", s)))
    outputs = []
    for size in (count, count - 1):
        drawn = [order[index] for index in plan.draw(size, open_entropy("test_only", seed))]
        total = backend.clipped_sum([units(number) for number in drawn])
        outputs.append(silent.noisy_mean(total.tensors, open_entropy("test_only", seed)))
    return _moved(plan, *outputs)


def _replay_alone(plan: DpSgd, backend: Backend, unit: Batch) -> float:
    """Return how far a step that divides by the patients drawn moves, in clip norms: one patient, then nobody."""
    alone, nobody = backend.clipped_sum([unit]).tensors, backend.clipped_sum([]).tensors
    return _moved(plan, alone, nobody)


def _moved(plan: DpSgd, one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    moved = math.sqrt(sum(_length(a - b) ** 2 for a, b in zip(one, other, strict=True)))
    return moved * plan.denominator / plan.clip_norm


def _finding(subject: str, value: float, controls: dict[str, float], number: int, allowed: float) -> Finding:
    return Finding(
        audit="record-replay",
        subject=subject,
        measures="largest change by one patient, in clip norms",
        value=value,
        low=value,
        high=value,
        allowed=allowed,
        outcome="pass" if value <= allowed else "fail",
        blocks=True,
        controls=tuple(Control(name, found, not found <= allowed) for name, found in controls.items()),
        shows=_SHOWS.format(number=number),
        reads_patients=True,
    )


def _length(difference: NDArray[np.float64] | Tensor) -> float:
    here = difference if isinstance(difference, np.ndarray) else difference.cpu()
    values = np.asarray(here, dtype=np.float64)
    length = float(np.linalg.norm(values))
    return length if math.isfinite(length) else math.inf
