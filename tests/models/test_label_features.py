"""Label features: what they span, and least squares that only need public label maps."""

from __future__ import annotations

import numpy as np
import pytest

from medsynth.config import Grid
from medsynth.imaging.phantom import sample_label_maps
from medsynth.models import label_features
from medsynth.models.label_features import LabelFeatures, LeastSquares, low_pass, signed_distance
from medsynth.models.shrinkage import signal_share


def features(rank: int, narrow: int = 2) -> LabelFeatures:
    grid = Grid(
        spatial_dims=2 if rank == 2 else 3,
        shape=(24,) * rank,
        spacing_mm=(1.0,) * rank,
        labels={0: "none", 1: "organ", 2: "part"},
    )
    return LabelFeatures(grid, (4,) * rank, (narrow,) * rank)


@pytest.mark.parametrize("rank", [2, 3])
def test_projection_is_the_weighted_adjoint_of_combination(rank: int) -> None:
    layout, rng = features(rank), np.random.default_rng(0)
    label = sample_label_maps(layout.grid, 1, 3)[0]
    values, weights = rng.standard_normal((2, *label.shape)), rng.standard_normal((2, layout.size))
    counts = 1 / (1 + np.maximum(signed_distance(label > 0) / 4, 0) ** 2)
    inner = (layout.combine(weights, label) * values * counts).sum() / counts.sum()
    assert inner == pytest.approx((layout.project(values, label) * weights).sum(), rel=1e-4)


@pytest.mark.parametrize("rank", [2, 3])
def test_how_many_voxels_are_treated_at_a_time_changes_nothing(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout, rng = features(rank), np.random.default_rng(0)
    label = sample_label_maps(layout.grid, 1, 3)[0]
    values, weights = rng.standard_normal((2, *label.shape)), rng.standard_normal((2, layout.size))
    found = []
    for block in (label.size, 101):
        monkeypatch.setattr(label_features, "_BLOCK", block)
        found.append((layout.combine(weights, label), layout.project(values, label)))
    for whole, parts in zip(*found, strict=True):
        assert np.allclose(whole, parts, rtol=0, atol=1e-5 * np.abs(whole).max())


@pytest.mark.parametrize("rank", [2, 3])
def test_an_image_that_follows_its_label_map_is_found_from_other_label_maps(rank: int) -> None:
    layout, rng = features(rank), np.random.default_rng(1)
    truth = 0.1 * rng.standard_normal((1, layout.size))
    patients, others = sample_label_maps(layout.grid, 60, 5), list(sample_label_maps(layout.grid, 60, 6))
    fit = LeastSquares(layout, others)
    mean = np.mean([fit.vector(layout.combine(truth, label), label) for label in patients], axis=0)
    found = fit.solve(mean)
    wanted = np.stack([layout.combine(truth, label) for label in others[:10]])
    got = np.stack([layout.combine(found, label) for label in others[:10]])
    assert np.mean((got - wanted) ** 2) < 0.2 * np.var(wanted)


@pytest.mark.parametrize("rank", [2, 3])
def test_what_surrounds_an_organ_does_not_show_inside_where_its_own_frame_is_fine(rank: int) -> None:
    for narrow, shows in ((2, True), (6, False)):
        layout = features(rank, narrow)
        label = sample_label_maps(layout.grid, 1, 3)[0]
        around = np.zeros((1, layout.size))
        around[:, : len(low_pass((4,) * rank)[0])] = 1.0  # the features of position alone come first
        shown = layout.combine(around, label)[0]
        assert shown[label > 0].any() == shows and np.abs(shown[signed_distance(label > 0) > 2]).max() > 0.1


def test_what_lies_beside_an_organ_turns_with_it() -> None:
    layout = features(2, 6)
    x, y = np.meshgrid(*[np.arange(24) - 11.5] * 2, indexing="ij")
    labels, images = [], []
    for turn in np.linspace(-0.5, 0.5, 15):
        along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        labels.append(((along / 8) ** 2 + (across / 3) ** 2 <= 1).astype(np.uint8))
        images.append(np.where((across > 0) & (along > 0), 1.0, -1.0)[None])  # one corner is bright
    mean, near = layout.mean_pose(labels), [np.abs(signed_distance(label > 0)) < 4 for label in labels]
    errors = []
    for pose in (None, mean):
        grams = layout.gram(labels, pose) + 1e-3 * np.eye(layout.size)
        moments = np.mean([layout.project(i, m, pose) for i, m in zip(images, labels, strict=True)], axis=0)
        weights = np.linalg.solve(grams, moments.T).T
        fits = [layout.combine(weights, label, pose) for label in labels]
        errors.append(np.mean([np.square(f - i)[0][n].mean() for f, i, n in zip(fits, images, near, strict=True)]))
    assert errors[1] < 0.6 * errors[0]


def test_a_whitened_vector_is_about_as_long_as_its_image() -> None:
    layout, rng = features(2), np.random.default_rng(2)
    maps = list(sample_label_maps(layout.grid, 60, 7))
    fit = LeastSquares(layout, maps)
    image = np.clip(0.4 + 0.3 * rng.standard_normal((1, 24, 24)), -1, 1)
    norms = [np.linalg.norm(fit.vector(image, label)) for label in maps]
    assert np.median(norms) < 1.3 * np.sqrt((image**2).mean())


def test_noise_is_shrunk_away_where_there_is_no_signal() -> None:
    layout = features(2)
    fit = LeastSquares(layout, list(sample_label_maps(layout.grid, 20, 7)))
    noise = np.random.default_rng(0).normal(0, 0.1, (1, layout.size))
    raw, shrunk = (np.linalg.norm(fit.solve(fit.shrunk(noise, sd))) for sd in (0.0, 0.1))
    assert shrunk < 0.5 * raw


def test_the_power_of_a_value_and_of_a_direction_are_told_by_all_their_coefficients() -> None:
    """Nearly as well as if they were known, and better than by a few coefficients of one value."""
    layout, rng = features(2), np.random.default_rng(3)
    fit, sd = LeastSquares(layout, list(sample_label_maps(layout.grid, 20, 7))), 0.3
    power = np.array([1.0, 0.7, 0.4, 0.1])[:, None] * np.exp(-6 * np.linspace(0, 1, layout.size))
    few = np.arange(layout.size) // 4
    errors = []
    for _ in range(20):
        truth = np.sqrt(power) * rng.standard_normal(power.shape)
        noisy = truth + sd * rng.standard_normal(truth.shape)
        alone = np.stack([np.bincount(few, row**2) / np.bincount(few) for row in noisy])
        known, apart = noisy * power / (power + sd**2), noisy * signal_share(alone, sd)[:, few]
        errors.append([np.square(found - truth).sum() for found in (known, fit.shrunk(noisy, sd), apart)])
        np.testing.assert_array_equal(fit.shrunk(truth, 0.0), truth)
    best, pooled, apart_error = np.mean(errors, axis=0)
    assert best < pooled < best + 0.5 * (apart_error - best)


def test_distances_are_counted_from_the_surface() -> None:
    mask = np.zeros(9, bool)
    mask[3:6] = True
    np.testing.assert_allclose(signed_distance(mask), [2.5, 1.5, 0.5, -0.5, -1.5, -0.5, 0.5, 1.5, 2.5])
