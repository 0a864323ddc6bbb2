"""The keystream is ChaCha20 as its standard says, and what is drawn from it has the distribution it claims."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy import stats

from medsynth.errors import PrivacyError
from medsynth.privacy import entropy as entropy_module
from medsynth.privacy.entropy import ChaChaEntropy, describe_source, open_entropy

WORD = 2**64


def rfc8439_block(key: bytes, counter: int) -> bytes:
    """ChaCha20's block function written from RFC 8439, sections 2.1 to 2.3, with a nonce of zeros."""
    start = [int.from_bytes(word, "little") for word in (b"expa", b"nd 3", b"2-by", b"te k")]
    start += [int.from_bytes(key[i : i + 4], "little") for i in range(0, 32, 4)] + [counter, 0, 0, 0]
    state = list(start)

    def quarter(a: int, b: int, c: int, d: int) -> None:
        for x, y, z, turn in ((a, b, d, 16), (c, d, b, 12), (a, b, d, 8), (c, d, b, 7)):
            state[x] = (state[x] + state[y]) % 2**32
            state[z] ^= state[x]
            state[z] = (state[z] << turn | state[z] >> (32 - turn)) % 2**32

    for _ in range(10):
        for column in range(4):
            quarter(column, 4 + column, 8 + column, 12 + column)
        for diagonal in range(4):
            quarter(diagonal, 4 + (diagonal + 1) % 4, 8 + (diagonal + 2) % 4, 12 + (diagonal + 3) % 4)
    return b"".join(((a + b) % 2**32).to_bytes(4, "little") for a, b in zip(state, start, strict=True))


def test_the_reference_is_the_standards_own_example() -> None:
    # RFC 8439, appendix A.1, test vector 1 (key, nonce and counter 0) and 2 (counter 1).
    assert (
        rfc8439_block(bytes(32), 0).hex().startswith("76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7")
    )
    assert (
        rfc8439_block(bytes(32), 1).hex().startswith("9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed")
    )


@pytest.mark.parametrize("key", [bytes(range(32)), b"k" * 32])
def test_coins_come_from_the_keystream_of_the_standard(key: bytes) -> None:
    stream = b"".join(rfc8439_block(key, counter) for counter in range(8))
    words = [int.from_bytes(stream[i : i + 8], "little") for i in range(0, len(stream), 8)]
    coins = ChaChaEntropy("test_only", key).bernoulli(0.3, len(words))
    assert list(coins) == [word < math.floor(Fraction(0.3) * WORD) for word in words]


def test_an_all_zero_key_gives_the_published_block() -> None:
    # Through the public path: the first word of test vector 1 decides at a threshold just above and just below it.
    first = int.from_bytes(bytes.fromhex("76b8e0ada0f13d90"), "little")
    above, below = math.nextafter(first / WORD, 1.0), math.nextafter(first / WORD, 0.0)
    assert ChaChaEntropy("test_only", bytes(32)).bernoulli(above, 1)[0]
    assert not ChaChaEntropy("test_only", bytes(32)).bernoulli(below, 1)[0]


@pytest.mark.parametrize("rate", [0.0, 2.0**-64, 2.0**-65, 1e-300, 1 - 2.0**-53, 1.0])
def test_coins_are_exact_at_both_ends(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    entropy = open_entropy("test_only")
    words = np.array([0, 1, WORD // 2, WORD - 2**11 - 1, WORD - 2**11, WORD - 1], dtype=np.uint64)
    monkeypatch.setattr(entropy, "_words", lambda count: words[:count])
    expected = [int(word) < math.floor(Fraction(rate) * WORD) for word in words]
    assert list(entropy.bernoulli(rate, len(words))) == expected
    if rate in (0.0, 2.0**-65, 1e-300):
        assert not any(expected)  # never above the rate that is charged
    if rate == 1.0:
        assert all(expected)


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan, math.inf])
def test_rates_that_are_none_are_refused(rate: float) -> None:
    with pytest.raises(PrivacyError):
        open_entropy("test_only").bernoulli(rate, 3)


def test_normals_have_the_moments_of_normals() -> None:
    values = open_entropy("test_only", 11).normal(1_000_000)
    for power, moment, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10_170)):
        assert abs(float(np.mean(values**power)) - moment) < 5 * math.sqrt(spread / values.size)
    assert stats.kstest(values, "norm").pvalue > 1e-3


@pytest.mark.parametrize("numpy_is_faster", [True, False])
def test_normals_are_box_and_mullers_whichever_library_computes_them(
    numpy_is_faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the words of the standard's keystream, with sine and cosine themselves."""
    monkeypatch.setattr(entropy_module, "_numpy_is_faster", lambda: numpy_is_faster)
    key, pairs = bytes(range(32)), 400
    stream = b"".join(rfc8439_block(key, counter) for counter in range(pairs * 16 // 64))
    words = np.frombuffer(stream, dtype="<i8").astype(np.float64)
    radius = 3 * np.sqrt(-2 * np.log((np.abs(words[:pairs]) + 0.5) / 2.0**63))
    angle = words[pairs:] * (math.pi / 2.0**63)
    total = torch.full((2 * pairs,), 7.0, dtype=torch.float64)
    ChaChaEntropy("test_only", key).add_normal(total, 3.0)
    expected = 7 + np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    np.testing.assert_allclose(total.numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("found", "faster"),
    [
        ({"log": {"dd": {"current": "X86_V4"}}, "tan": {"dd": {"current": "X86_V4"}}}, True),
        ({"log": {"dd": {"current": "X86_V3"}}, "tan": {"dd": {"current": "baseline(X86_V2)"}}}, False),
        ({"log": {"dd": {"current": "ASIMD"}}}, False),
        ({}, False),
    ],
)
def test_numpy_is_asked_only_where_it_has_both_functions_for_this_processor(
    found: dict[str, dict[str, dict[str, str]]], faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(np.lib.introspect, "opt_func_info", lambda **_: found)
    assert entropy_module._numpy_is_faster.__wrapped__() is faster


def test_angles_are_finer_than_any_grid_of_32_bits() -> None:
    # A pair lies on one of 2^64 rays. On 2^32 rays a ray would meet few cells of the grid far from zero.
    values = open_entropy("test_only", 5).normal(20_000)
    turns = np.arctan2(values[10_000:], values[:10_000]) / (2 * math.pi) * 2.0**32
    assert stats.kstest(turns % 1.0, "uniform").pvalue > 1e-3


@pytest.mark.parametrize("count", [1, 2, 3, 2**15 - 1, 2**15, 2**15 + 1, 2**16 + 3])
def test_any_number_of_normals_can_be_drawn(count: int) -> None:
    values = open_entropy("test_only", 2).normal(count)
    assert values.shape == (count,)
    assert np.unique(values).size == count  # nothing is left from before, nothing is drawn twice


def _filling(word: bytes) -> Callable[[int, bytearray], bytearray]:
    """Return a keystream that repeats one word of 8 bytes."""

    def fill(needed: int, buffer: bytearray) -> bytearray:
        buffer[:needed] = word * (needed // 8)
        return buffer

    return fill


def test_the_largest_normal_is_finite_and_beyond_nine(monkeypatch: pytest.MonkeyPatch) -> None:
    entropy = ChaChaEntropy("test_only", bytes(32))
    # A keystream of zeros: the smallest radius word and the angle zero.
    monkeypatch.setattr(entropy, "_bytes", _filling(bytes(8)))
    extreme = float(entropy.normal(1)[0])
    assert math.isfinite(extreme) and extreme > 9


@pytest.mark.parametrize("word", [2**63 - 1, 2**63, 2**63 + 1, 2**63 - 1000, 2**63 + 1000])
def test_the_smallest_radius_is_a_number(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # |v| next to 2^63: the logarithm of a share of almost 1 must not round to above zero, nor a tangent be infinite.
    entropy = open_entropy("test_only")
    monkeypatch.setattr(entropy, "_bytes", _filling(word.to_bytes(8, "little")))
    assert np.isfinite(entropy.normal(64)).all()


def test_a_key_and_a_kind_belong_together() -> None:
    with pytest.raises(PrivacyError):
        ChaChaEntropy("os", bytes(32))
    with pytest.raises(PrivacyError):
        ChaChaEntropy("test_only")
    assert describe_source("test_only")["kind"] == "test_only"
