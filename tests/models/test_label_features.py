"""Label features: what they span, and least squares that only need public label maps."""

from __future__ import annotations

import numpy as np
import pytest

from medsynth.config import Grid
from medsynth.imaging.phantom import sample_label_maps
from medsynth.models import label_features
from medsynth.models.label_features import LabelFeatures, LeastSquares, signed_distance


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
    found = fit.solve(mean, 0.0)
    wanted = np.stack([layout.combine(truth, label) for label in others[:10]])
    got = np.stack([layout.combine(found, label) for label in others[:10]])
    assert np.mean((got - wanted) ** 2) < 0.2 * np.var(wanted)


@pytest.mark.parametrize("rank", [2, 3])
def test_what_surrounds_an_organ_does_not_show_inside_where_its_own_frame_is_fine(rank: int) -> None:
    for narrow, shows in ((2, True), (6, False)):
        layout = features(rank, narrow)
        label = sample_label_maps(layout.grid, 1, 3)[0]
        around = np.zeros((1, layout.size))
        around[:, : np.flatnonzero(layout.groups >= 8)[0]] = 1.0  # the groups of position alone come first
        shown = layout.combine(around, label)[0]
        assert shown[label > 0].any() == shows and np.abs(shown[signed_distance(label > 0) > 2]).max() > 0.1


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
    raw, shrunk = (np.linalg.norm(fit.solve(noise, sd)) for sd in (0.0, 0.1))
    assert shrunk < 0.5 * raw


def test_distances_are_counted_from_the_surface() -> None:
    mask = np.zeros(9, bool)
    mask[3:6] = True
    np.testing.assert_allclose(signed_distance(mask), [2.5, 1.5, 0.5, -0.5, -1.5, -0.5, 0.5, 1.5, 2.5])
