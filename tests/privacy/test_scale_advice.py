"""The fitted law: what it expects, and the advice that a plan takes from it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from medsynth.privacy.scale_law import MEASURED, ScaleLaw, reach

SIZES = (2_000, 20_000, 200_000)
LAW = ScaleLaw(gain=0.5, gain_a_decade=0.2, loss=0.1, half=4.0, exponent=0.5, power=1.5, error=0.05, parameters=SIZES)


def test_the_law_runs_from_its_loss_to_its_gain() -> None:
    assert LAW.expected(math.inf, 1e4) == pytest.approx(0.5)
    assert LAW.expected(math.inf, 1e5) == pytest.approx(0.7)
    assert LAW.expected(400.0, 1e4) == pytest.approx(0.2)
    assert replace(LAW, exponent=0.0).expected(4.0, 1e4) == pytest.approx(0.2)
    assert LAW.expected(1e-9, 1e4) == pytest.approx(-0.1)


def test_sizes_that_were_not_measured_count_as_the_nearest() -> None:
    assert LAW.expected(9.0, 5) == LAW.expected(9.0, SIZES[0])
    assert LAW.expected(9.0, 1e9) == LAW.expected(9.0, SIZES[-1])


@pytest.mark.parametrize("size", SIZES)
def test_from_the_least_reach_on_parameters_add_more_than_the_error(size: int) -> None:
    least = LAW.least_reach(size)
    assert LAW.expected(least, size) == pytest.approx(LAW.error)
    assert LAW.expected(least * 1.01, size) > LAW.error > LAW.expected(least / 1.01, size)
    assert replace(LAW, error=0.9).least_reach(size) == math.inf


def test_more_reach_allows_more_parameters_and_none_allows_none() -> None:
    found = [LAW.most_parameters(reach(noise, 50, 40)) for noise in (40.0, 2.0, 0.7, 0.2)]
    assert found == [None, *SIZES]
    assert replace(LAW, error=0.3).most_parameters(reach(2.0, 50, 40)) is None


def test_the_measured_law_is_one() -> None:
    assert MEASURED.loss >= 0 and MEASURED.half > 0 and MEASURED.power > 0 and 0 < MEASURED.error < 0.2
    assert MEASURED.most_parameters(math.inf) == max(MEASURED.parameters)
    assert MEASURED.most_parameters(1e-6) is None
