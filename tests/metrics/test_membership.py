"""Membership and copy measures: 1 for members that stand out, one half for chance, intervals that hold the truth."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medsynth.metrics.membership import area_surely, area_under, attack, grid, roc, true_positives
from medsynth.metrics.memorisation import centred, coarse, copies, relative_distances


def test_members_who_stand_out_are_found_and_strangers_are_not() -> None:
    rng = np.random.default_rng(0)
    strangers = rng.standard_normal(60)
    clear = attack(strangers[:40] + 10, strangers, 200, rng)
    assert (clear.auc, clear.auc_low, clear.tpr) == (1.0, 1.0, 1.0)
    chance = attack(rng.standard_normal(60), strangers, 500, rng)
    assert chance.auc_low < 0.5 < chance.auc_high and chance.tpr < 0.15
    against = attack(strangers[:40] - 10, strangers, 200, rng)
    assert against.auc == 0.0, "the score has a direction: an attack that is wrong does not count as right"


def test_the_area_is_that_of_normal_scores() -> None:
    rng = np.random.default_rng(1)
    found = attack(rng.normal(1.0, 1, 800), rng.normal(0, 1, 800), 100, rng)
    truth = 0.760  # Phi(1 / sqrt 2)
    assert found.auc == pytest.approx(truth, abs=0.03) and found.auc_low < truth < found.auc_high
    assert found.tpr == pytest.approx(0.0924, abs=0.05)  # Phi(1 - 2.326)


def test_equal_scores_are_one_half() -> None:
    same = np.zeros(10)
    assert attack(same, same, 100, np.random.default_rng(0)).auc == 0.5 and true_positives(same, same) == 0.0


def test_the_curve_runs_from_corner_to_corner_and_has_the_same_area() -> None:
    rng = np.random.default_rng(2)
    members, strangers = rng.normal(1, 1, 30), rng.normal(0, 1, 20)
    false, true = roc(members, strangers)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(true, false) == pytest.approx(attack(members, strangers, 100, rng).auc)
    assert area_under(grid()) == pytest.approx(0.5, abs=1e-6)


def cohort(count: int = 20) -> tuple[torch.Tensor, np.ndarray]:
    stream = torch.Generator().manual_seed(0)
    return torch.randn(2 * count, 1, 12, 12, generator=stream), np.arange(2 * count) < count


def test_copies_are_found_and_fresh_images_are_not() -> None:
    patients, trained = cohort()
    stream = torch.Generator().manual_seed(1)
    noisy = patients[:20] + 0.3 * torch.randn(20, 1, 12, 12, generator=stream)
    fresh = torch.randn(20, 1, 12, 12, generator=stream)
    found = [
        copies(relative_distances([*coarse(patients).split(1)], coarse(images)), trained, 300, np.random.default_rng(0))
        for images in (noisy, fresh)
    ]
    assert found[0].share == 1.0 > found[0].limit(0.15) and found[0].low == 1.0
    assert found[1].share < found[1].limit(0.15) and found[1].chance == pytest.approx(0.5, abs=0.1)


def test_unequal_sides_move_chance_and_a_patient_counts_by_the_nearest_record() -> None:
    patients, _ = cohort()
    trained = np.arange(40) < 30
    images = torch.randn(50, 1, 12, 12, generator=torch.Generator().manual_seed(3))
    found = copies(
        relative_distances([*coarse(patients).split(1)], coarse(images)), trained, 300, np.random.default_rng(0)
    )
    assert found.chance == pytest.approx(0.75, abs=0.1) and found.share < found.limit(0.15)
    two = relative_distances([coarse(patients[:2]), coarse(patients[2:4])], coarse(images))
    one = relative_distances([coarse(patients[:1]), coarse(patients[2:4])], coarse(images))
    assert two.shape == (2, 50) and np.allclose(two[1], one[1]) and not np.allclose(two[0], one[0])


def test_where_the_organ_lies_does_not_matter() -> None:
    images, labels = torch.zeros(2, 1, 8, 8), torch.zeros(2, 8, 8, dtype=torch.uint8)
    images[0, 0, 1:3, 1:3], labels[0, 1:3, 1:3] = 1.0, 1
    images[1, 0, 4:6, 3:5], labels[1, 4:6, 3:5] = 1.0, 1
    moved = centred(images, labels)
    assert torch.equal(moved[0], moved[1]) and torch.equal(centred(images, labels * 0), images)


def test_the_sure_area_is_clopper_and_pearsons_where_nothing_overlaps_and_never_above_what_was_measured() -> None:
    assert area_surely(1.0, 25, 35, 0.01) == pytest.approx(0.01 ** (1 / 25))
    assert area_surely(0.0, 25, 35, 0.01) == 0.0
    lows = [area_surely(area, 20, 20, 0.01) for area in (0.5, 0.7, 0.9, 0.99)]
    assert lows == sorted(lows) and all(low < area for low, area in zip(lows, (0.5, 0.7, 0.9, 0.99), strict=True))
    assert area_surely(0.7, 2000, 2000, 0.01) > 0.65 > area_surely(0.7, 20, 2000, 0.01)
