"""Dice per patient, its interval and the image-blind floor."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medsynth.metrics import overlap


def test_records_of_a_patient_are_pooled_before_the_ratio() -> None:
    truth = torch.zeros(2, 4, 4, dtype=torch.uint8)
    predicted = truth.clone()
    truth[0, :2] = 1  # 8 voxels
    predicted[0, :1] = 1  # 4 of them
    predicted[1, 0, :2] = 1  # 2 false ones in the other slice
    table = overlap.patient_dice([predicted], [truth], 2)
    assert table.shape == (1, 1) and table[0, 0] == pytest.approx(2 * 4 / (8 + 6))


@pytest.mark.parametrize(("in_truth", "in_prediction", "expected"), [(0, 0, np.nan), (0, 1, 0.0), (1, 0, 0.0)])
def test_absent_labels(in_truth: int, in_prediction: int, expected: float) -> None:
    truth, predicted = torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4)
    truth[0, 0], predicted[0, 0] = 2 * in_truth, 2 * in_prediction
    assert overlap.patient_dice([predicted], [truth], 3)[0, 1] == pytest.approx(expected, nan_ok=True)


def test_a_perfect_prediction_has_dice_one_and_ignores_what_nobody_has() -> None:
    truth = torch.zeros(1, 6, 6, dtype=torch.uint8)
    truth[0, 1] = 1
    table = overlap.patient_dice([truth], [truth], 3)
    assert overlap.patient_means(table)[0] == pytest.approx(1.0)


def test_the_interval_holds_the_mean_and_shrinks_with_patients() -> None:
    random = np.random.default_rng(0)
    small, large = (overlap.bootstrap(random.uniform(size=n), 500, np.random.default_rng(1)) for n in (10, 1000))
    for estimate in (small, large):
        assert estimate.low <= estimate.mean <= estimate.high
    assert large.high - large.low < (small.high - small.low) / 3


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(2)
    hits = [
        e.low <= 0.5 <= e.high for e in (overlap.bootstrap(random.uniform(size=40), 300, random) for _ in range(200))
    ]
    assert 0.88 <= np.mean(hits) <= 0.99


def test_bootstrap_ignores_missing_values_and_says_nan_when_there_is_nothing() -> None:
    values = np.array([0.2, np.nan, 0.4])
    assert overlap.bootstrap(values, 50, np.random.default_rng(0)).mean == pytest.approx(0.3)
    assert np.isnan(overlap.bootstrap(np.array([np.nan]), 50, np.random.default_rng(0)).mean)


def test_the_mean_shape_of_equal_patients_is_their_shape() -> None:
    shape = torch.zeros(8, 8, dtype=torch.uint8)
    shape[2:5, 2:5], shape[5:7, 2:5] = 1, 2
    assert torch.equal(overlap.mean_shape([shape[None]] * 3, 3), shape)


def test_the_mean_shape_beats_every_single_patients_shape_on_those_patients() -> None:
    random = np.random.default_rng(3)
    patients = []
    for _ in range(12):
        label = torch.zeros(1, 24, 24, dtype=torch.uint8)
        x, y = random.integers(4, 9, size=2)
        label[0, x : x + 10, y : y + 10] = 1
        patients.append(label)
    score = [
        np.nanmean(overlap.patient_dice(overlap.constant_prediction(shape, patients), patients, 2))
        for shape in [overlap.mean_shape(patients, 2), *(p[0] for p in patients)]
    ]
    assert score[0] >= max(score[1:]) - 0.02


def test_skill_is_zero_at_the_floor_and_one_at_real() -> None:
    assert overlap.skill(0.68, 0.68, 0.86) == pytest.approx(0)
    assert overlap.skill(0.86, 0.68, 0.86) == pytest.approx(1)
    assert overlap.skill(0.8, 0.7, 0.6) is None
