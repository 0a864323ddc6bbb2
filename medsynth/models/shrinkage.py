"""How far a noisy statistic is believed: Wiener's filter (1949), the signal's power taken from what was released."""

from __future__ import annotations

import numpy as np

from medsynth.models.pose import Array


def signal_share(power: Array, noise_sd: Array | float) -> Array:
    """Return the share of signal in mean squares ``power`` of values with noise of ``noise_sd`` in each, in [0, 1]."""
    return np.asarray(np.maximum(power - noise_sd**2, 0) / np.maximum(power, 1e-12))
