"""How far a noisy statistic is believed.

Wiener's filter (1949), the signal's power taken from what was released, for coefficients; for occupancies, which lie
between 0 and 1 and are 0 almost everywhere, the posterior mean (Robbins 1956) under a public prior.
"""

from __future__ import annotations

import numpy as np
from scipy.special import softmax
from scipy.stats import norm

from medsynth.models.pose import Array

_EMPTY, _FULL = 0.8, 0.15  # public: chance of exactly 0 where nothing is expected, of exactly 1 where everything is
_NEVER = 1e-300
RINGING = 0.03  # standard deviation of what truncated cosine series add to empty and full voxels


def signal_share(power: Array, noise_sd: Array | float) -> Array:
    """Return the share of signal in mean squares ``power`` of values with noise of ``noise_sd`` in each, in [0, 1]."""
    return np.asarray(np.maximum(power - noise_sd**2, 0) / np.maximum(power, 1e-12))


def believed_occupancy(noisy: Array, noise_sd: float, expected: Array) -> Array:
    """Return the posterior mean of occupancies in [0, 1] that were measured with normal noise, voxel by voxel.

    A mean occupancy is 0 in most places and 1 in few, evenly in between elsewhere; so noise in empty space is told from
    an organ. Without noise occupancies stay as they are.

    Args:
        noisy: (\\*spatial) measured occupancies.
        noise_sd: standard deviation of the noise in each.
        expected: (\\*spatial) public guess in [0, 1]: the lower, the likelier is 0, the higher, the likelier is 1.
    """
    if noise_sd <= 0:
        return noisy
    sd = np.hypot(noise_sd, RINGING)
    empty, full = _EMPTY * (1 - expected), _FULL * expected
    far = np.maximum(noisy, 1 - noisy)  # seen from the side where the difference does not cancel
    inside = np.maximum(norm.cdf((1 - far) / noise_sd) - norm.cdf(-far / noise_sd), _NEVER)
    lean = noise_sd * (norm.pdf(noisy / noise_sd) - norm.pdf((1 - noisy) / noise_sd))
    between = np.clip(noisy + lean / inside, 0, 1)
    kept = (RINGING / sd) ** 2
    chances = np.log(np.maximum(np.stack([empty, full, 1 - empty - full]), _NEVER))
    chances += np.stack([norm.logpdf(noisy, 0, sd), norm.logpdf(noisy, 1, sd), np.log(inside)])
    values = np.stack([kept * noisy, 1 + kept * (noisy - 1), between])
    return np.asarray((softmax(chances, axis=0) * values).sum(0))


def joint_sd(first: Array | float, second: Array | float) -> Array:
    """Return the standard deviation of :func:`joined`."""
    return np.sqrt(_weight(first, second)) * first


def joined(first: Array, second: Array, sds: tuple[Array | float, Array | float]) -> Array:
    """Return the mean of two noisy measurements of the same, each weighted by the inverse of its variance.

    Without noise it is the second, which was measured around the first and corrects it.
    """
    weight = _weight(*sds)
    return np.asarray(weight * first + (1 - weight) * second)


def _weight(first: Array | float, second: Array | float) -> Array:
    """Return the weight of the first of two measurements of these standard deviations."""
    total = np.square(first) + np.square(second)
    return np.asarray(np.divide(np.square(second), total, out=np.zeros(np.shape(total)), where=total > 0))
