"""Label maps as statistics: there and back, drawn maps that look like label maps, bounded vectors."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medsynth.config import Grid, Masks
from medsynth.imaging.phantom import sample_label_maps
from medsynth.metrics.label_maps import anatomy
from medsynth.models.mask_generator import MaskStatistics, ShapeSpace, covariance_root, positive_part


def grid(rank: int, classes: int = 2, spacing: bool = True) -> Grid:
    return Grid(
        spatial_dims=2 if rank == 2 else 3,
        shape=(32,) * rank,
        spacing_mm=(1.0,) * rank if spacing else None,
        labels={value: f"label {value}" for value in range(classes)},
    )


def space(rank: int, classes: int = 2, covariance: str = "diagonal") -> ShapeSpace:
    return ShapeSpace(
        grid(rank, classes), Masks.model_validate({"coefficients": (8,) * rank, "covariance": covariance})
    )


def ellipsoid(rank: int, centre: float = 0.1, radii: tuple[float, ...] = (0.5, 0.3, 0.35)) -> np.ndarray:
    """Return a smooth label map: 1 in one half of an ellipsoid, 2 in the other."""
    lines = [(np.arange(32) + 0.5) / 16 - 1 - centre] * rank
    mesh = np.meshgrid(*lines, indexing="ij")
    inside = sum((axis / radius) ** 2 for axis, radius in zip(mesh, radii, strict=False)) <= 1
    return np.where(inside, 1 + (mesh[0] > 0), 0).astype(np.uint8)


def dice(one: np.ndarray, other: np.ndarray) -> float:
    return 2 * np.count_nonzero(one & other) / (np.count_nonzero(one) + np.count_nonzero(other))


def statistics(layout: ShapeSpace, label: np.ndarray, spread: float = 1e-4) -> MaskStatistics:
    vector = layout.pose_vector(label)
    assert vector is not None
    shape = layout.shape_vector(label, layout.pose(vector))
    return MaskStatistics(vector, np.eye(layout.pose_size) * 1e-3, shape, np.full(layout.band_count, spread))


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("rank", [2, 3])
def test_a_smooth_shape_survives_the_round_trip(rank: int, classes: int) -> None:
    layout, label = space(rank, classes), np.minimum(ellipsoid(rank), classes - 1).astype(np.uint8)
    vector = layout.pose_vector(label)
    assert vector is not None and len(vector) == layout.pose_size
    pose = layout.pose(vector)
    shape = layout.shape_vector(label, pose)
    assert len(shape) == layout.shape_size
    again = layout.label_map(shape, pose)
    assert again.shape == label.shape and again.dtype == np.uint8
    assert all(dice(label == value, again == value) > 0.85 for value in range(1, classes))


def test_the_pose_follows_the_shape() -> None:
    layout = space(3)
    here, there = (layout.pose_vector((ellipsoid(3, centre) > 0).astype(np.uint8)) for centre in (-0.2, 0.2))
    assert here is not None and there is not None
    np.testing.assert_allclose(there[:3] - here[:3], 0.4, atol=0.03)
    np.testing.assert_allclose(there[3:], here[3:], atol=0.05)
    stretch = layout.pose(here).stretch
    np.testing.assert_allclose(np.diag(stretch), np.array([0.5, 0.3, 0.35]) / np.sqrt(5), rtol=0.1)


def test_an_empty_label_map_has_no_pose() -> None:
    assert space(2).pose_vector(np.zeros((32, 32), np.uint8)) is None


@pytest.mark.parametrize("rank", [2, 3])
def test_one_voxel_has_a_pose_and_a_shape(rank: int) -> None:
    layout, label = space(rank), np.zeros((32,) * rank, np.uint8)
    label[(5,) * rank] = 1
    vector = layout.pose_vector(label)
    assert vector is not None and np.isfinite(vector).all()
    assert np.isfinite(layout.shape_vector(label, layout.pose(vector))).all()


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("rank", [2, 3])
def test_drawn_maps_show_something_inside_the_grid_and_follow_the_seed(rank: int, classes: int) -> None:
    layout = space(rank, classes)
    released = statistics(layout, np.minimum(ellipsoid(rank), classes - 1).astype(np.uint8))
    maps = [layout.sample(released, np.random.default_rng(seed)) for seed in range(8)]
    for label in maps:
        assert set(np.unique(label)) == set(range(classes))
        assert not any(np.take(label, end, axis).any() for axis in range(rank) for end in (0, -1))
    assert len({label.tobytes() for label in maps}) == len(maps)
    assert np.array_equal(layout.sample(released, np.random.default_rng(3)), maps[3])


@pytest.mark.parametrize("rank", [2, 3])
def test_ragged_surfaces_are_larger_around_the_same_volume(rank: int) -> None:
    smooth, label = space(rank, 3), ellipsoid(rank)
    settings = smooth.settings.model_copy(update={"roughness": 0.5})
    found, measured = statistics(smooth, label), []
    for layout in (smooth, ShapeSpace(smooth.grid, settings)):
        maps = [layout.sample(found, np.random.default_rng(seed)) for seed in range(12)]
        sizes = [np.count_nonzero(one) for one in maps]
        surfaces = [np.count_nonzero((one > 0) & ~ndimage.binary_erosion(one > 0)) for one in maps]
        measured.append((np.mean(sizes), np.mean(surfaces)))
        assert all(ndimage.label(one)[1] == 1 for one in maps)
    (size, surface), (ragged_size, ragged_surface) = measured
    assert ragged_size == pytest.approx(size, rel=0.08)
    assert ragged_surface > 1.04 * surface


@pytest.mark.parametrize("rank", [2, 3])
def test_labels_of_noisy_shapes_meet_in_one_smooth_border(rank: int) -> None:
    layout, rng = space(rank, 3), np.random.default_rng(0)
    released = statistics(layout, ellipsoid(rank))
    pose = layout.pose(released.pose_mean)
    shapes = released.shape_mean + rng.normal(0, 0.5, (12, layout.shape_size))
    found = anatomy([layout.label_map(shape, pose) for shape in shapes], 3)
    # Without smoothing these noisy planes meet in 1.2 to 2.2 parts a label.
    assert found.measures["components"].mean() < 1.1


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 3))
def test_any_noise_in_the_statistics_still_gives_a_label_map(seed: int, size: float) -> None:
    layout, rng = space(2, 3), np.random.default_rng(seed)
    released = MaskStatistics(
        rng.normal(0, size, layout.pose_size),
        positive_part(rng.normal(0, size, (layout.pose_size, layout.pose_size))),
        rng.normal(0, size, layout.shape_size),
        np.abs(rng.normal(0, size, layout.band_count)),
    )
    label = layout.sample(released, rng)
    assert label.shape == (32, 32) and label.dtype == np.uint8 and label.max() <= 2


def test_the_geometry_is_public() -> None:
    """Two spaces of the same settings are the same, and nothing but settings goes in."""
    one, other = space(3), space(3)
    label = sample_label_maps(grid(3), 1, 7)[0]
    assert vars(one).keys() == vars(other).keys()
    np.testing.assert_array_equal(
        one.label_map(np.zeros(one.shape_size), one.pose(np.zeros(one.pose_size))),
        other.label_map(np.zeros(one.shape_size), one.pose(np.zeros(one.pose_size))),
    )
    pose = one.pose(one.pose_vector(label))
    np.testing.assert_array_equal(one.shape_vector(label, pose), other.shape_vector(label, pose))


@pytest.mark.parametrize("rank", [2, 3])
def test_the_public_centre_alone_is_a_ball_in_the_middle(rank: int) -> None:
    layout = space(rank)
    label = layout.label_map(np.zeros(layout.shape_size), layout.pose(np.zeros(layout.pose_size)))
    assert label.any()
    np.testing.assert_allclose(np.argwhere(label).mean(0), 15.5, atol=0.5)


@pytest.mark.parametrize("rank", [2, 3])
def test_vectors_have_a_public_bound(rank: int) -> None:
    """Occupancies lie in [0, 1], so that no label map whatever makes a shape vector longer than this."""
    layout, rng = space(rank), np.random.default_rng(0)
    bound = 2 * np.sqrt(np.prod(layout.frame.shape))
    for label in [rng.integers(0, 2, (32,) * rank).astype(np.uint8), np.ones((32,) * rank, np.uint8), ellipsoid(rank)]:
        vector = layout.pose_vector(label)
        assert vector is not None
        assert np.linalg.norm(layout.shape_vector(label, layout.pose(vector))) <= bound
        assert np.abs(vector[:rank]).max() <= 1


def test_band_sums_are_mean_squares() -> None:
    layout = space(2, 3)
    deviation = np.random.default_rng(0).normal(0, 2, layout.shape_size)
    sums = layout.band_sums(deviation)
    assert len(sums) == layout.band_count
    assert sums @ layout.band_sizes == pytest.approx(np.square(deviation).sum())


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_positive_part_is_the_nearest_without_negative_directions(seed: int) -> None:
    matrix = np.random.default_rng(seed).normal(size=(5, 5))
    matrix = matrix + matrix.T
    found = positive_part(matrix)
    values = np.linalg.eigvalsh(found)
    assert values.min() > -1e-9
    np.testing.assert_allclose(positive_part(found), found, atol=1e-9)
    lost = np.minimum(np.linalg.eigvalsh(matrix), 0)
    assert np.linalg.norm(matrix - found) == pytest.approx(np.linalg.norm(lost), abs=1e-8)


def test_a_covariance_root_gives_the_covariance_back_and_draws_have_it() -> None:
    half = np.random.default_rng(0).normal(size=(12, 4))
    root = covariance_root(half @ half.T, 4)
    np.testing.assert_allclose(root @ root.T, half @ half.T, atol=1e-9)
    assert covariance_root(half @ half.T, 2).shape == (12, 2)
