"""Intervals: paired by patient, wider with seeds, honest where there is nothing to divide by."""

from __future__ import annotations

import numpy as np
import pytest

from medsynth.metrics.intervals import mean_of, paired_bootstrap, ratio_of, skill_of


def _stream() -> np.random.Generator:
    return np.random.default_rng(3)


def test_hard_patients_cancel_in_a_ratio() -> None:
    real = np.random.default_rng(0).uniform(0.2, 0.9, (1, 30))
    paired = paired_bootstrap([0.9 * real, real], ratio_of, 400, _stream(), over_seeds=False)
    shuffled = paired_bootstrap([0.9 * real[:, ::-1], real], ratio_of, 400, _stream(), over_seeds=False)
    assert paired.mean == pytest.approx(0.9) and paired.high - paired.low < 1e-9
    assert shuffled.high - shuffled.low > 0.05


def test_seeds_that_differ_widen_the_interval_and_leave_the_mean() -> None:
    values = np.random.default_rng(1).normal(0.7, 0.02, (4, 40)) + np.array([[-0.1], [0.0], [0.02], [0.1]])
    patients, both = (paired_bootstrap([values], mean_of, 2000, _stream(), over_seeds=o) for o in (False, True))
    assert both.mean == patients.mean == pytest.approx(values.mean())
    assert both.high - both.low > 5 * (patients.high - patients.low)
    one = paired_bootstrap([values[:1]], mean_of, 500, _stream(), over_seeds=True)
    assert one == paired_bootstrap([values[:1]], mean_of, 500, _stream(), over_seeds=False)


@pytest.mark.parametrize("over_seeds", [False, True])
def test_a_patient_whose_labels_are_absent_is_left_out(over_seeds: bool) -> None:
    values = np.array([[0.5, np.nan, 0.7], [0.5, np.nan, 0.7]])
    found = paired_bootstrap([values], mean_of, 300, _stream(), over_seeds=over_seeds)
    assert found.mean == pytest.approx(0.6) and 0.5 <= found.low <= found.high <= 0.7


def test_skill_is_zero_at_the_floor_one_at_real_and_unknown_when_real_learnt_nothing() -> None:
    dice = np.array([0.6, 0.8, 0.7, 0.7])
    found = skill_of(dice, np.array([0.6, 0.6, 0.6, 0.8]), np.array([0.8, 0.8, 0.8, 0.8]))
    assert found[:3] == pytest.approx([0.0, 1.0, 0.5]) and np.isnan(found[3])
    hopeless = paired_bootstrap([np.ones((1, 5))] * 3, skill_of, 100, _stream(), over_seeds=False)
    assert np.isnan([hopeless.mean, hopeless.low, hopeless.high]).all()


@pytest.mark.parametrize("over_seeds", [False, True])
def test_a_skill_that_does_not_exist_has_no_interval(over_seeds: bool) -> None:
    real, floor = (
        np.array([[0.1, 0.9, 0.4, 0.5]]),
        np.array([[0.3, 0.5, 0.6, 0.6]]),
    )  # 0.475 on 0.5: some samples beat it
    found = paired_bootstrap([real - 0.1, floor, real], skill_of, 200, _stream(), over_seeds=over_seeds)
    assert np.isnan([found.mean, found.low, found.high]).all()
