"""Volumes on request: the label that was asked for has its volume, the others keep theirs, anatomy stays."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from medsynth.config import Grid, Synthesise
from medsynth.errors import ConfigError
from medsynth.imaging.phantom import sample_label_maps
from medsynth.models.label_volumes import resize_labels, smooth_borders, volume_factors


def grid(rank: int, classes: int = 3, size: int = 40) -> Grid:
    return Grid(
        spatial_dims=2 if rank == 2 else 3,
        shape=(size,) * rank,
        spacing_mm=(1.0, 2.0, 1.5)[:rank],
        labels={value: f"label {value}" for value in range(classes)},
    )


def mesh(rank: int) -> list[np.ndarray]:
    return np.meshgrid(*[(np.arange(40) + 0.5) / 20 - 1] * rank, indexing="ij")


def halves(rank: int) -> np.ndarray:
    """Return an ellipsoid of two touching labels."""
    axes = mesh(rank)
    inside = sum((axis / radius) ** 2 for axis, radius in zip(axes, (0.5, 0.35, 0.4), strict=False)) <= 1
    return np.where(inside, 1 + (axes[0] > 0.1), 0).astype(np.uint8)


def nested(rank: int) -> np.ndarray:
    """Return a ball (2) in the middle of a larger one (1)."""
    radius = np.sqrt(sum(axis**2 for axis in mesh(rank)))
    return np.select([radius < 0.25, radius < 0.55], [2, 1], 0).astype(np.uint8)


def volumes(label: np.ndarray, classes: int = 3) -> np.ndarray:
    return np.bincount(label.reshape(-1), minlength=classes).astype(float)


@pytest.mark.parametrize("factors", [{1: 1.6}, {2: 0.5}, {1: 0.7, 2: 1.5}, {1: 1.3, 2: 1.3}])
@pytest.mark.parametrize("shape", [halves, nested])
@pytest.mark.parametrize("rank", [2, 3])
def test_each_label_gets_its_volume(rank: int, shape: object, factors: dict[int, float]) -> None:
    label = shape(rank)  # type: ignore[operator]  # one of the two functions above
    again = resize_labels(label, factors, grid(rank).spacing_mm)
    assert again.shape == label.shape and again.dtype == np.uint8
    wanted = volumes(label)[1:] * [factors.get(1, 1.0), factors.get(2, 1.0)]
    np.testing.assert_allclose(volumes(again)[1:], wanted, rtol=0.03)


@pytest.mark.parametrize("rank", [2, 3])
def test_labels_that_touch_go_on_touching_and_stay_whole(rank: int) -> None:
    again = resize_labels(halves(rank), {1: 2.0})
    assert all(ndimage.label(part)[1] == 1 for part in (again > 0, again == 1, again == 2))
    assert np.any((again == 1) & ndimage.binary_dilation(again == 2))


@pytest.mark.parametrize("factor", [0.4, 2.5])
@pytest.mark.parametrize("rank", [2, 3])
def test_an_enclosed_label_stays_enclosed(rank: int, factor: float) -> None:
    again = resize_labels(nested(rank), {2: factor})
    assert not np.any(ndimage.binary_dilation(again == 2) & (again == 0))
    assert ndimage.label(again == 2)[1] == 1


def test_nothing_asked_changes_nothing() -> None:
    label = halves(3)
    assert resize_labels(label, {}) is label
    assert resize_labels(label, {1: 1.0, 7: 3.0}) is label, "7 is not in the map"
    assert not resize_labels(label * 0, {1: 2.0}).any()


def test_the_outline_stays_where_only_the_shares_change() -> None:
    label = halves(3)
    one, two = volumes(label)[1:]
    again = resize_labels(label, {1: 0.8, 2: (two + 0.2 * one) / two})
    np.testing.assert_array_equal(again > 0, label > 0)


def test_a_lesion_that_the_border_cuts_stays_at_the_border() -> None:
    axes = mesh(2)
    label = ((axes[0] + 0.9) ** 2 + axes[1] ** 2 < 0.2).astype(np.uint8)
    for factor in (0.5, 2.0):
        again = resize_labels(label, {1: factor})
        assert again[0].any() and not again[-1].any()
        assert again.sum() == pytest.approx(factor * label.sum(), abs=1)


def test_a_shape_near_the_border_moves_in_rather_than_being_cut() -> None:
    axes = mesh(3)
    label = (sum((axis - shift) ** 2 for axis, shift in zip(axes, (0.6, 0, 0), strict=True)) < 0.1).astype(np.uint8)
    assert not label[-1].any()
    again = resize_labels(label, {1: 3.0})
    assert not any(np.take(again, end, axis).any() for axis in range(3) for end in (0, -1))


def test_any_number_of_labels_of_any_phantom() -> None:
    """Where a chain of labels passes voxels along, shares may stay rough: seldom."""
    draw = np.random.default_rng(0)
    hit = []
    for seed in range(150):
        classes = int(draw.integers(2, 7))
        label = sample_label_maps(grid(2, classes, 64), 1, seed)[0]
        factors = {value: float(draw.choice([0.5, 1, 2, draw.uniform(0.5, 2)])) for value in range(1, classes)}
        after, before = (volumes(each, classes)[1:] for each in (resize_labels(label, factors), label))
        wanted = np.where(before > 0, np.maximum(1, before * list(factors.values())), 0)
        hit.append(np.all(np.abs(after - wanted) <= 2 + 0.1 * wanted))
    assert np.mean(hit) >= 0.98


@pytest.mark.parametrize("rank", [2, 3])
def test_ragged_borders_become_smooth_and_nothing_else_changes(rank: int) -> None:
    label = halves(rank)
    near = (np.abs(mesh(rank)[0] - 0.1) < 0.12) & (label > 0)
    ragged = np.where(near, np.random.default_rng(0).integers(1, 3, label.shape), label).astype(np.uint8)
    smooth = smooth_borders(ragged, 2.0)
    np.testing.assert_array_equal(smooth > 0, label > 0)
    np.testing.assert_allclose(volumes(smooth), volumes(ragged), atol=2)
    assert ndimage.label(ragged == 1)[1] > 1 and ndimage.label(smooth == 1)[1] == ndimage.label(smooth == 2)[1] == 1
    assert np.mean(smooth[label > 0] == label[label > 0]) > 0.9


@pytest.mark.parametrize("rank", [2, 3])
def test_small_and_enclosed_labels_survive_smoothing(rank: int) -> None:
    label = nested(rank)
    label[(slice(20, 22),) * rank] = 3
    smooth = smooth_borders(label, 2.0)
    np.testing.assert_allclose(volumes(smooth, 4), volumes(label, 4), atol=3)
    assert not np.any(ndimage.binary_dilation(smooth >= 2) & (smooth == 0))
    assert smooth_borders((label > 0).astype(np.uint8), 2.0).sum() == np.count_nonzero(label)


@pytest.mark.parametrize("rank", [2, 3])
def test_a_median_is_turned_into_a_factor(rank: int) -> None:
    layout = grid(rank)
    maps = list(sample_label_maps(layout, 9, 3))
    voxel = float(np.prod(layout.spacing_mm or 1))
    median = float(np.median([volumes(label)[2] for label in maps])) * voxel
    how = Synthesise(volume_median={"label 2": 1.4 * median}, volume_scale={"label 1": 0.8})
    assert volume_factors(maps, layout, how) == pytest.approx({1: 0.8, 2: 1.4})
    assert volume_factors(maps, layout, Synthesise()) == {}


def test_a_volume_that_the_grid_cannot_hold_is_refused() -> None:
    with pytest.raises(ConfigError, match="ask for less"):
        volume_factors([halves(3)], grid(3), Synthesise(volume_scale={"label 1": 60.0}))
    at_the_border = (np.arange(40) < 9).astype(np.uint8)[:, None].repeat(40, 1)
    with pytest.raises(ConfigError, match=r"asks for 6.00 times .* lets 4.44 times come out"):
        volume_factors([at_the_border], grid(2), Synthesise(volume_scale={"label 1": 6.0}))
    with pytest.raises(ConfigError, match="would cut 1 of 1 label maps"):
        volume_factors([halves(3)], grid(3), Synthesise(volume_scale={"label 1": 15.0}))
    with pytest.raises(ConfigError, match="hardly ever draws"):
        volume_factors([(halves(3) == 1).astype(np.uint8)], grid(3), Synthesise(volume_scale={"label 2": 2.0}))
