"""Randomness of privacy noise and privacy sampling: the operating system's entropy, stretched by ChaCha20.

It is never seeded by configuration, never stored, never repeated on resume, after a fork or in a copy. Covered attacks:

- *predictable noise* (seeded or statistical generators): a 256-bit key from :func:`os.urandom`, ChaCha20 (RFC 8439);
- *low bits of floating-point noise* (Mironov 2012): each normal is the sum of four independent ones, halved
  (Holohan, Braghin 2021; Opacus' ``secure_mode`` does the same), so that inverting the sampler from one output means
  solving for four unknowns; the noise is added in double precision and the sum is rounded afterwards.

Not covered: timing side channels, and an attacker who reads this process' memory.
"""

from __future__ import annotations

import math
import os
from fractions import Fraction
from typing import Literal, NoReturn, Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from medsynth.errors import PrivacyError

Kind = Literal["os", "test_only"]

SUMMED_NORMALS = 4
_WORD = 2**64
_BLOCK = 2**18  # normals made at a time, which bounds the memory to some 25 MB
# ChaCha20 repeats after 2^38 bytes of one nonce: take a new key long before.
_BYTES_PER_KEY = 2**32


class Entropy(Protocol):
    """A source of privacy randomness; ``kind`` goes into every ledger entry, and ``test_only`` taints it."""

    @property
    def kind(self) -> Kind:
        """``os``, or ``test_only`` for the deterministic stand-in."""

    def normal(self, shape: int | tuple[int, ...]) -> NDArray[np.float64]:
        """Return independent standard normals of ``shape``."""

    def bernoulli(self, rate: float, n: int) -> NDArray[np.bool_]:
        """Return ``n`` independent coins that are true with probability ``rate`` (at most 2^-64 less)."""


class ChaChaEntropy:
    """An :class:`Entropy` from a ChaCha20 keystream; use :func:`open_entropy`."""

    def __init__(self, kind: Kind, key: bytes | None = None) -> None:
        if (kind == "os") != (key is None):
            raise PrivacyError("privacy noise takes its key from the operating system; only test_only takes one")
        self.kind: Kind = kind
        self._process = os.getpid()
        self._stream = self._open(key or os.urandom(32))
        self._left = _BYTES_PER_KEY

    def normal(self, shape: int | tuple[int, ...]) -> NDArray[np.float64]:
        """Return independent standard normals of ``shape`` (Box, Muller 1958; four of them averaged, times two)."""
        total = math.prod(shape) if isinstance(shape, tuple) else shape
        values = np.empty(total, dtype=np.float64)
        for start in range(0, total, _BLOCK):
            part = values[start : start + _BLOCK]
            part[:] = self._summed_normals(part.size)
        return values.reshape(shape)

    def bernoulli(self, rate: float, n: int) -> NDArray[np.bool_]:
        """Return ``n`` coins by comparing 64-bit integers with ``floor(rate * 2^64)``, computed exactly.

        Rounding down can only lower the sampling rate, and a lower rate costs less privacy than what is charged.
        """
        if not 0 <= rate <= 1:
            raise PrivacyError(f"a sampling rate lies in [0, 1], got {rate}")
        threshold = math.floor(Fraction(rate) * _WORD)
        words = self._words(n)
        if threshold == _WORD:
            return np.ones(n, dtype=np.bool_)
        return words < np.uint64(threshold)

    def __reduce__(self) -> NoReturn:
        raise PrivacyError("privacy randomness is never copied or stored: open a new source instead")

    def _summed_normals(self, count: int) -> NDArray[np.float64]:
        # One Box-Muller pair gives two of the four summands, so two pairs make one normal.
        pairs = count * SUMMED_NORMALS // 2
        words = self._words(2 * pairs).reshape(2, pairs)
        # Radius: 64 bits in (0, 1], so the tail reaches 9.4 standard deviations; angle: 53 bits.
        radius = np.sqrt(-2.0 * np.log((words[0].astype(np.float64) + 1.0) / _WORD))
        angle = (words[1] >> np.uint64(11)).astype(np.float64) * (2 * math.pi / 2**53)
        pair_sums = radius * np.cos(angle) + radius * np.sin(angle)
        summed = pair_sums.reshape(SUMMED_NORMALS // 2, count).sum(axis=0)
        return np.asarray(summed / math.sqrt(SUMMED_NORMALS), dtype=np.float64)

    def _words(self, count: int) -> NDArray[np.uint64]:
        needed = 8 * count
        self._left -= needed
        if self.kind == "os" and (self._left < 0 or os.getpid() != self._process):
            # A forked child inherits the keystream's position: it must not repeat its parent's noise.
            self._process = os.getpid()
            self._stream = self._open(os.urandom(32))
            self._left = _BYTES_PER_KEY - needed
        return np.frombuffer(self._stream.update(bytes(needed)), dtype="<u8").astype(np.uint64, copy=False)

    @staticmethod
    def _open(key: bytes) -> CipherContext:
        return Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()


def open_entropy(kind: str, seed: int = 0) -> Entropy:
    """Open a source of privacy randomness.

    Args:
        kind: ``os`` for every real run; ``test_only`` for a repeatable stand-in that can never be certified.
        seed: of ``test_only``; ``os`` takes none.

    Raises:
        PrivacyError: unknown kind, or a seed for ``os``.
    """
    if kind == "os":
        if seed:
            raise PrivacyError("privacy noise from the operating system cannot be seeded")
        return ChaChaEntropy("os")
    if kind == "test_only":
        return ChaChaEntropy("test_only", b"medsynth test_only, not private!"[:24] + seed.to_bytes(8, "little"))
    raise PrivacyError(f"unknown entropy '{kind}': expected os or test_only")


def describe_source(kind: str) -> dict[str, str | int]:
    """Return what a ledger entry says about the noise of a source of this kind."""
    return {"kind": kind, "generator": "ChaCha20", "dtype": "float64", "summed_normals": SUMMED_NORMALS}
