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

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
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
# What the cipher adds its stream to, a piece at a time, and by how much its output buffer must be longer than that.
_ZEROS = memoryview(bytes(2**15))
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

    def add_normal(self, total: Tensor, scale: float) -> None:
        """Add independent normals of standard deviation ``scale`` to a flat float64 tensor on the CPU, in place."""

    def bernoulli(self, rate: float, n: int) -> NDArray[np.bool_]:
        """Return ``n`` independent coins that are true with probability ``rate`` (at most 2^-64 less)."""


@dataclass(frozen=True)
class _Work:
    """Buffers for ``count`` pairs of normals, and views of them: made once, used for every block of this size."""

    drawn: Tensor
    values: Tensor
    radius: Tensor
    tangent: Tensor
    quotient: Tensor
    half: Tensor

    @classmethod
    def of(cls, count: int, buffer: bytearray) -> _Work:
        import torch

        drawn = torch.frombuffer(buffer, dtype=torch.int64, count=2 * count)
        values = torch.empty(2 * count, dtype=torch.float64)
        radius, tangent = values.split(count)
        return cls(drawn, values, radius, tangent, torch.empty_like(radius), values.new_tensor(0.5**64))


@functools.cache
def _numpy_is_faster() -> bool:
    """Return whether numpy computes logarithms and tangents of doubles with this processor's widest instructions.

    Then (AVX-512) it takes a third of torch's time, else several times as much. Both are right to the last bits.
    """
    found = np.lib.introspect.opt_func_info(func_name="^(log|tan)$", signature="float64")
    dispatched = {
        name for name, kinds in found.items() if not any(k["current"].startswith("baseline") for k in kinds.values())
    }
    return dispatched == {"log", "tan"}


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
        self._drawn = bytearray(8 * _BLOCK + _CIPHER_BLOCK)
        self._work: _Work | None = None

    def normal(self, shape: int | tuple[int, ...]) -> NDArray[np.float64]:
        """Return independent standard normals of ``shape``."""
        import torch

        values = np.zeros(shape, dtype=np.float64)
        self.add_normal(torch.from_numpy(values.reshape(-1)), 1.0)
        return values

    def add_normal(self, total: Tensor, scale: float) -> None:
        """Add independent normals of standard deviation ``scale`` to ``total``, in place (Box, Muller 1958).

        Args:
            total: flat, float64, on the CPU.
            scale: > 0.
        """
        for start in range(0, total.numel(), _BLOCK):
            self._add_block(total[start : start + _BLOCK], scale)

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

    def _add_block(self, total: Tensor, scale: float) -> None:
        """Add ``r cos(a)`` to the first half of at most ``_BLOCK`` numbers and ``r sin(a)`` to the second.

        Radius and angle from 64 bits each, read as integers in [-2^63, 2^63). The radius drops the sign, so that the
        tail, where the integer is small, is not rounded and reaches 9.4 standard deviations. With ``t = tan(a/2)`` and
        ``q = 2r / (1 + t^2)`` it is ``r cos(a) = q - r`` and ``r sin(a) = q t``: one function instead of two, which no
        library has in one. Everything is float64. Few passes over a block that stays in the cache: the scale is in the
        radius, and the last operations add to the total.
        """
        import torch

        count = total.numel()
        first = (count + 1) // 2
        if self._work is None:
            self._work = _Work.of(_BLOCK // 2, self._drawn)
        work = self._work if first == _BLOCK // 2 else _Work.of(first, self._drawn)
        self._bytes(16 * first, self._drawn)
        work.values.copy_(work.drawn)
        # (2 r)^2 / 8 = -log(u) with u = (|v| + 1/2) / 2^63.
        torch.add(work.half, work.radius.abs_(), alpha=0.5**63, out=work.radius)
        work.tangent.mul_(math.pi / 2**64)
        _into(np.log, torch.log, work.radius)
        _into(np.tan, torch.tan, work.tangent)
        twice = np.sqrt(work.radius.mul_(-8 * scale**2).numpy(), out=work.radius.numpy())  # twice as fast as torch's
        torch.mul(work.tangent, work.tangent, out=work.quotient).add_(1.0)
        np.divide(twice, work.quotient.numpy(), out=work.quotient.numpy())
        total[:first].add_(work.quotient).sub_(work.radius, alpha=0.5)
        second = count - first
        total[first:].addcmul_(work.quotient[:second], work.tangent[:second])

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
        room = memoryview(buffer)
        for start in range(0, needed, len(_ZEROS)):
            self._stream.update_into(_ZEROS[: needed - start], room[start:])
        return buffer

    @staticmethod
    def _open(key: bytes) -> CipherContext:
        return Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()


def _into(by_numpy: np.ufunc, by_torch: Callable[..., Tensor], values: Tensor) -> None:
    """Replace ``values`` by a function of them, of whichever library is faster here."""
    if _numpy_is_faster():
        by_numpy(values.numpy(), out=values.numpy())
    else:
        by_torch(values, out=values)


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
