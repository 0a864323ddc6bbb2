"""Appearance: statistics of known images, and images that have them again."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from scipy import ndimage

from medsynth.config import Appearance, Grid
from medsynth.imaging.phantom import phantom_pairs, sample_label_maps, smooth_field
from medsynth.models.appearance import AppearanceSpace
from medsynth.models.label_features import signed_distance

_VALUES = np.array([-0.6, 0.2, 0.6])


def grid(rank: int, channels: int = 1) -> Grid:
    return Grid(
        spatial_dims=2 if rank == 2 else 3,
        shape=(32,) * rank,
        spacing_mm=(1.0,) * rank,
        channels=3 if channels == 3 else 1,
        labels={0: "none", 1: "organ", 2: "part"},
    )


@lru_cache
def space(rank: int = 2, channels: int = 1) -> AppearanceSpace:
    public = grid(rank, channels)
    return AppearanceSpace(public, Appearance(coefficients=(4,) * rank), list(sample_label_maps(public, 24, 1)))


def pairs(rank: int, channels: int, count: int = 24) -> tuple[list[np.ndarray], np.ndarray]:
    """Label maps with known intensities and one smooth texture in all channels."""
    labels, images = sample_label_maps(grid(rank), count, 2), []
    for index, label in enumerate(labels):
        texture = smooth_field(np.random.default_rng(index), label.shape, 8)
        planes = [_VALUES[label] + strength * texture for strength in (0.3, 0.2, 0.1)[:channels]]
        images.append(np.stack(planes).clip(-1, 1).astype(np.float32))
    return images, labels


def released(rank: int, channels: int) -> np.ndarray:
    images, labels = pairs(rank, channels)
    vectors = [space(rank, channels).vector(x, y) for x, y in zip(images, labels, strict=True)]
    return np.mean(vectors, axis=0)


@pytest.mark.parametrize(("rank", "channels"), [(2, 1), (2, 3), (3, 1)])
def test_dressed_images_show_the_labels_and_follow_the_seed(rank: int, channels: int) -> None:
    layout = space(rank, channels)
    mean = released(rank, channels)
    assert len(mean) == layout.size
    found, label = layout.statistics(mean, 0.0), sample_label_maps(grid(rank), 1, 9)[0]
    dressed = layout.render(label, found, np.random.default_rng(1))
    assert dressed.shape == (channels, *label.shape) and dressed.dtype == np.float32
    assert np.abs(dressed).max() <= 1
    for plane in dressed:
        means = [plane[label == value].mean() for value in range(3)]
        assert means[0] + 0.3 < means[1] < means[2]
    assert np.array_equal(layout.render(label, found, np.random.default_rng(1)), dressed)
    assert not np.array_equal(layout.render(label, found, np.random.default_rng(2)), dressed)


def test_the_channels_share_one_field() -> None:
    layout = space(2, 3)
    found, label = layout.statistics(released(2, 3), 0.0), sample_label_maps(grid(2), 1, 9)[0]
    draws = np.stack([layout.render(label, found, np.random.default_rng(seed)) for seed in range(40)])
    rest = (draws - draws.mean(0))[:, :, label == 0]
    assert np.corrcoef(rest[:, 0].reshape(-1), rest[:, 2].reshape(-1))[0, 1] > 0.5


def test_either_of_two_tissues_stays_one_of_them() -> None:
    """Half of the patients are dark around the organ, half are bright: no dressed image is grey there."""
    layout, labels = space(), sample_label_maps(grid(2), 24, 2)
    images = [np.where(label > 0, 0.0, 0.8 if index % 2 else -0.8)[None] for index, label in enumerate(labels)]
    mean = np.mean([layout.vector(x, y) for x, y in zip(images, labels, strict=True)], axis=0)
    found, label = layout.statistics(mean, 0.0), sample_label_maps(grid(2), 1, 9)[0]
    around = ndimage.binary_dilation(label > 0, iterations=6) & ~ndimage.binary_dilation(label > 0, iterations=2)
    values = np.stack([layout.render(label, found, np.random.default_rng(seed))[0][around] for seed in range(20)])
    assert np.mean(np.abs(values) < 0.4) < 0.25
    assert 0.3 < np.mean(values > 0) < 0.7


@pytest.mark.parametrize("rank", [2, 3])
def test_organs_are_alike_inside_and_what_is_around_them_is_not(rank: int) -> None:
    layout, label = space(rank), sample_label_maps(grid(rank), 1, 9)[0]
    distance = signed_distance(label > 0)
    order = np.argsort(np.where(distance > 4, distance, np.inf), axis=None)[: np.count_nonzero(label)]
    fields = [layout._smooth_field(label, np.random.default_rng(seed)) for seed in range(60)]
    inside, around = (
        np.std([field.flat[where].mean() for field in fields]) for where in (np.flatnonzero(label), order)
    )
    assert inside < 0.7 * around
    assert np.std([field[label > 0] for field in fields]) == pytest.approx(1, abs=0.05)


def test_densities_are_sharpened_more_where_features_are_fine() -> None:
    label, shares = sample_label_maps(grid(2), 1, 9)[0], []
    for count in (4, 9):
        layout = AppearanceSpace(grid(2), Appearance(coefficients=(count, count)))
        weights = np.zeros((layout.levels, layout.features.size))
        weights[0, -2:] = 0.3  # a little more of the dark half inside, the same density whatever the features
        inside = layout._distribution(weights, label, None)[label.reshape(-1) > 0]
        shares.append(inside[:, inside.shape[1] // 2].mean())
    assert 0.5 < shares[0] < shares[1] - 0.02


def test_what_surrounds_a_voxel_looks_like_it() -> None:
    layout, label = space(), sample_label_maps(grid(2), 1, 9)[0]
    found = layout.statistics(released(2, 1), 0.0)
    draws = np.stack([layout.render(label, found, np.random.default_rng(seed))[0] for seed in range(40)])
    rest = draws - draws.mean(0)
    neighbours = np.corrcoef(rest[:, 1:].reshape(-1), rest[:, :-1].reshape(-1))[0, 1]
    assert neighbours > 0.6, "white noise has 0"


def test_a_vector_depends_on_its_own_image_alone_and_is_bounded() -> None:
    layout = space()
    images, labels = phantom_pairs(grid(2), 6, 0)
    vectors = [layout.vector(image, label) for image, label in zip(images, labels, strict=True)]
    np.testing.assert_array_equal(vectors[2], layout.vector(images[2], labels[2]))
    assert all(vector[0] == vectors[0][0] > 0 for vector in vectors)
    assert np.median([np.linalg.norm(vector) for vector in vectors]) < 2.4


def test_a_clip_that_shortens_all_vectors_alike_changes_nothing() -> None:
    layout = space()
    mean = np.mean([layout.vector(*pair) for pair in zip(*phantom_pairs(grid(2), 6, 0), strict=True)], axis=0)
    whole, half = layout.statistics(mean, 0.0), layout.statistics(mean / 2, 0.0)
    np.testing.assert_allclose(half.density, whole.density, rtol=1e-9)
    assert not np.allclose(layout.statistics(np.append(mean[0], mean[1:] / 2), 0.0).density, whole.density)


@pytest.mark.parametrize("size", [0.1, 1.0, 100.0])
def test_any_noise_still_gives_an_image(size: float) -> None:
    layout, rng = space(), np.random.default_rng(0)
    found = layout.statistics(rng.normal(0, size, layout.size), size)
    image = layout.render(sample_label_maps(grid(2), 1, 9)[0], found, rng)
    assert np.isfinite(image).all() and np.abs(image).max() <= 1


def test_an_image_without_labels_counts_as_nothing() -> None:
    layout = space()
    vector = layout.vector(np.zeros((1, 32, 32), np.float32), np.zeros((32, 32), np.uint8))
    assert not vector.any(), "it has no pose to be measured in"
