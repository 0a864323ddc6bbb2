"""Named seed streams for everything random except privacy noise and privacy sampling.

A stream is addressed by the study's seed and a name, so that adding a consumer never shifts another one's numbers.
Privacy noise and privacy sampling never come from here: see :mod:`medsynth.privacy.entropy`.
"""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *names: str | int) -> int:
    """Return the 63-bit seed of the stream called ``names`` under ``seed``.

    >>> derive_seed(0, "train") == derive_seed(0, "train") != derive_seed(1, "train")
    True
    """
    text = "/".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(seed: int, *names: str | int) -> np.random.Generator:
    """Return the numpy generator of the stream called ``names`` under ``seed``."""
    return np.random.default_rng(derive_seed(seed, *names))
