"""The law of scale: how many parameters DP-SGD can move for the better, as measured on phantom cohorts."""

from __future__ import annotations

import math


def signal(noise_multiplier: float, batch: float, steps: int, parameters: int) -> float:
    """Return x: how far a perfectly aligned signal of all steps stands above their noise.

    A step's clipped sum has length at most ``batch`` clip norms, its noise one of about ``noise_multiplier
    sqrt(parameters)``; over T steps the signal adds up T times, the noise sqrt(T) times. With much noise a step, x is
    mu N / sqrt(parameters), whatever the sampling rate (Dong, Roth, Su 2022, corollary 5.4).

    Args:
        noise_multiplier: of each step; 0 gives infinity.
        batch: expected patients of a step.
        steps: of DP-SGD.
        parameters: trainable ones.
    """
    if not noise_multiplier:
        return math.inf
    return math.sqrt(steps) * batch / (noise_multiplier * math.sqrt(parameters))
