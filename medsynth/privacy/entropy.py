"""Randomness of privacy noise and privacy sampling: the operating system's entropy, stretched by ChaCha20.

It is never seeded by configuration, never stored, never repeated on resume, after a fork or in a copy. Covered attacks:

- *predictable noise* (seeded or statistical generators): a 256-bit key from :func:`os.urandom`, ChaCha20 (RFC 8439);
- *low bits of floating-point noise* (Mironov 2012; Holohan, Braghin 2021): the noise is added in double precision and
  the sum is rounded to a public grid (:func:`medsynth.privacy.mechanism.noise_grid`), 2^32 times as coarse as the last
  bit of a normal. A normal comes from 128 random bits that it shares with one other, so that every cell of the grid
  that has a chance worth counting is reached from either cohort, in more ways than could be listed.

Not covered: timing side channels, and an attacker who reads this process' memory. More in
docs/explanation/mechanisms.md.
"""

from __future__ import annotations

import math
import os
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, NoReturn, Protocol

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from medsynth.errors import PrivacyError

if TYPE_CHECKING:
    from torch import Tensor

Kind = Literal["os", "test_only"]

_WORD = 2**64
_BLOCK = 2**15  # normals made at a time: all of their intermediate values stay in a core's cache
# What the cipher adds its stream to, and by how much its output buffer must be longer than that.
_ZEROS = memoryview(bytes(8 * _BLOCK))
_CIPHER_BLOCK = 64
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
        # Kept from block to block: fresh pages would cost more than the arithmetic.
        self._drawn = bytearray(len(_ZEROS) + _CIPHER_BLOCK)
        self._values: tuple[Tensor, Tensor] | None = None

    def normal(self, shape: int | tuple[int, ...]) -> NDArray[np.float64]:
        """Return independent standard normals of ``shape`` (Box, Muller 1958)."""
        total = math.prod(shape) if isinstance(shape, tuple) else shape
        # Room for the partner of the last one.
        values = np.empty(total + total % 2, dtype=np.float64)
        for start in range(0, total, _BLOCK):
            self._fill(values[start : start + _BLOCK])
        return values[:total].reshape(shape)

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

    def _fill(self, values: NDArray[np.float64]) -> None:
        """Fill ``values``, an even number of at most ``_BLOCK``, with normals ``r cos(a)`` and ``r sin(a)``.

        Radius and angle from 64 bits each, read as integers in [-2^63, 2^63). The radius drops the sign, so that the
        tail, where the integer is small, is not rounded and reaches 9.4 standard deviations. torch evaluates log, cos
        and sin several times faster than numpy; the values stay float64.
        """
        import torch

        pairs = values.size // 2
        if self._values is None:
            self._values = torch.empty(_BLOCK, dtype=torch.float64), torch.tensor(0.5**64, dtype=torch.float64)
        (radius, angle), half = self._values[0][: 2 * pairs].chunk(2), self._values[1]
        cosine, sine = torch.from_numpy(values).chunk(2)
        drawn = torch.frombuffer(self._bytes(16 * pairs, self._drawn), dtype=torch.int64, count=2 * pairs)
        self._values[0][: 2 * pairs].copy_(drawn)
        # radius^2 / 2 = -log(u) with u = (|v| + 1/2) / 2^63.
        torch.add(half, radius.abs_(), alpha=0.5**63, out=radius).log_().mul_(-2).sqrt_()
        torch.cos(angle.mul_(math.pi / 2**63), out=cosine)
        torch.sin(angle, out=sine)
        cosine.mul_(radius)
        sine.mul_(radius)

    def _words(self, count: int) -> NDArray[np.uint64]:
        drawn = self._bytes(8 * count, bytearray(8 * count + _CIPHER_BLOCK))
        return np.frombuffer(drawn, dtype="<u8", count=count).astype(np.uint64, copy=False)

    def _bytes(self, needed: int, buffer: bytearray) -> bytearray:
        """Return ``buffer`` with ``needed`` fresh bytes at its start."""
        self._left -= needed
        if self.kind == "os" and (self._left < 0 or os.getpid() != self._process):
            # A forked child inherits the keystream's position: it must not repeat its parent's noise.
            self._process = os.getpid()
            self._stream = self._open(os.urandom(32))
            self._left = _BYTES_PER_KEY - needed
        zeros = _ZEROS[:needed] if needed <= len(_ZEROS) else bytes(needed)
        self._stream.update_into(zeros, buffer)
        return buffer

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
    return {"kind": kind, "generator": "ChaCha20", "dtype": "float64"}
