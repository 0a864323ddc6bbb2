"""The law of scale: how many parameters DP-SGD can move for the better, as measured on phantom cohorts.

The numbers of :data:`MEASURED` are public constants, fitted by ``python -m pipelines.scale_law`` (docs/explanation/
scale-law.md); no patient is among them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ScaleLaw:
    """What DP-SGD adds to the skill of a public generator: ``(g + s log10(d / 10^4)) h - l (1 - h)``.

    ``h = 1 / (1 + (half d^q / reach)^power)``, reach as :func:`reach` says, d trainable parameters.

    Attributes:
        gain: g, without noise at 10,000 parameters.
        gain_a_decade: s, more of it for ten times the parameters.
        loss: l, where all is noise.
        half: reach at half of the way, of one parameter.
        exponent: q, how the parameters count against the reach.
        power: how steep it is there.
        error: root mean square by which it misses cells that it was not fitted on, in skill.
        parameters: sizes that were measured, rising.
    """

    gain: float
    gain_a_decade: float
    loss: float
    half: float
    exponent: float
    power: float
    error: float
    parameters: tuple[int, ...]

    def expected(self, reached: float, parameters: float) -> float:
        """Return what DP-SGD is expected to add to the skill; below 0 it does harm.

        Args:
            reached: of the training (:func:`reach`).
            parameters: that it moves; a number outside of the sizes measured counts as the nearest of them.
        """
        size = self._measured(parameters)
        share = 1 / (1 + (self.half * size**self.exponent / reached) ** self.power)
        return self._noiseless(size) * share - self.loss * (1 - share)

    def least_reach(self, parameters: float) -> float:
        """Return the reach from which on so many parameters add more than the law's error; infinity if none does."""
        size = self._measured(parameters)
        share = (self.error + self.loss) / (self._noiseless(size) + self.loss)
        if not 0 < share < 1:
            return math.inf
        return float(self.half * size**self.exponent / (1 / share - 1) ** (1 / self.power))

    def most_parameters(self, reached: float) -> int | None:
        """Return the most parameters, of the sizes measured, that add more than the law's error; None if none does."""
        good = [size for size in self.parameters if self.expected(reached, size) > self.error]
        return max(good, default=None)

    def _measured(self, parameters: float) -> float:
        return min(max(parameters, self.parameters[0]), self.parameters[-1])

    def _noiseless(self, size: float) -> float:
        return self.gain + self.gain_a_decade * math.log10(size / 1e4)


MEASURED = ScaleLaw(
    gain=0.29,
    gain_a_decade=0.30,
    loss=0.0,
    half=2320.0,
    exponent=0.0,
    power=0.90,
    error=0.040,
    parameters=(2_176, 14_688, 170_624),
)
"""Fitted to 48 cells on 2026-11-22 (docs/log.md), the form in the reach alone, without what noise alone adds there."""


def reach(noise_multiplier: float, batch: float, steps: int) -> float:
    """Return how far a perfectly aligned signal of all steps stands above the noise of one parameter.

    A step's clipped sum has length at most ``batch`` clip norms, its noise ``noise_multiplier`` a parameter; over
    T steps the signal adds up T times, the noise sqrt(T) times. With much noise a step this is mu N, whatever the
    sampling rate (Dong, Roth, Su 2022, corollary 5.4).

    Args:
        noise_multiplier: of each step; 0 gives infinity.
        batch: expected patients of a step.
        steps: of DP-SGD.
    """
    return math.sqrt(steps) * batch / noise_multiplier if noise_multiplier else math.inf
