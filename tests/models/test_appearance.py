"""Appearance: statistics of known images, and images that have them again."""

from __future__ import annotations

import numpy as np
import pytest

from medsynth.config import Appearance, Grid
from medsynth.imaging.phantom import phantom_pairs
from medsynth.models.appearance import AppearanceSpace


def grid(rank: int, channels: int = 1) -> Grid:
    return Grid(
        spatial_dims=2 if rank == 2 else 3,
        shape=(32,) * rank,
        spacing_mm=(1.0,) * rank,
        channels=3 if channels == 3 else 1,
        labels={0: "none", 1: "organ", 2: "part"},
    )


def space(rank: int = 2, channels: int = 1) -> AppearanceSpace:
    return AppearanceSpace(grid(rank, channels), Appearance(coefficients=(4,) * rank))


def square(rank: int) -> np.ndarray:
    label = np.zeros((32,) * rank, np.uint8)
    label[(slice(8, 22),) * rank] = 1
    label[(slice(16, 22), *(slice(8, 22),) * (rank - 1))] = 2
    return label


@pytest.mark.parametrize(("rank", "channels"), [(2, 1), (2, 3), (3, 1)])
def test_statistics_of_one_known_image_are_read_back(rank: int, channels: int) -> None:
    layout, label = space(rank, channels), square(rank)
    values = np.array([-0.8, 0.1, 0.6])
    image = np.stack([values[label] + 0.1 * channel for channel in range(channels)]).astype(np.float32)
    vector = layout.vector(image, label)
    assert len(vector) == layout.size
    found = layout.statistics(vector, 0.0)
    region = layout.region_map(label)
    for value in range(3):
        for here in np.unique(region[label == value]):
            np.testing.assert_allclose(found.level[here], values[value] + 0.1 * np.arange(channels), atol=1e-5)
    assert found.texture.max() == pytest.approx(0.01, abs=1e-6), "a flat image has the least texture"


@pytest.mark.parametrize("rank", [2, 3])
def test_regions_belong_to_one_label_and_count_outwards(rank: int) -> None:
    layout, label = space(rank), square(rank)
    region = layout.region_map(label)
    assert region.min() >= 0 and region.max() < layout.regions
    for here in np.unique(region):
        assert len(np.unique(label[region == here] > 0)) == 1
    assert set(np.unique(region[label == 1])).isdisjoint(np.unique(region[label == 2]))
    empty = layout.region_map(np.zeros_like(label))
    assert len(np.unique(empty)) == 1


@pytest.mark.parametrize(("rank", "channels"), [(2, 1), (2, 3), (3, 1)])
def test_dressed_images_show_the_labels_and_follow_the_seed(rank: int, channels: int) -> None:
    layout, label = space(rank, channels), square(rank)
    rng = np.random.default_rng(0)
    noise = 0.05 * rng.standard_normal((channels, *label.shape))
    image = (np.array([-0.6, 0.2, 0.6])[label][None] + noise).clip(-1, 1).astype(np.float32)
    released = layout.statistics(layout.vector(image, label), 0.0)
    dressed = layout.render(label, released, np.random.default_rng(1))
    assert dressed.shape == image.shape and dressed.dtype == np.float32
    assert np.abs(dressed).max() <= 1
    means = [dressed[0][label == value].mean() for value in range(3)]
    assert means[0] < means[1] < means[2]
    assert np.array_equal(layout.render(label, released, np.random.default_rng(1)), dressed)
    assert not np.array_equal(layout.render(label, released, np.random.default_rng(2)), dressed)


def test_a_vector_depends_on_its_own_image_alone_and_is_bounded() -> None:
    layout = space()
    images, labels = phantom_pairs(grid(2), 6, 0)
    vectors = [layout.vector(image, label) for image, label in zip(images, labels, strict=True)]
    np.testing.assert_array_equal(vectors[2], layout.vector(images[2], labels[2]))
    assert all(vector[0] == 1 for vector in vectors)
    # count, levels, their squares and textures are at most 1 each; the mean image at most its weight
    bound = np.sqrt(1 + layout.regions * 3 + 3.0**2)
    assert max(np.linalg.norm(vector) for vector in vectors) <= bound


@pytest.mark.parametrize("size", [0.1, 1.0, 100.0])
def test_any_noise_still_gives_an_image(size: float) -> None:
    layout, rng = space(), np.random.default_rng(0)
    released = layout.statistics(rng.normal(0, size, layout.size), size)
    image = layout.render(square(2), released, rng)
    assert np.isfinite(image).all() and np.abs(image).max() <= 1


def test_noise_is_shrunk_away_where_there_is_no_signal() -> None:
    layout = space()
    mean = np.zeros(layout.size)
    mean[0] = 1
    noisy = mean + np.random.default_rng(0).normal(0, 0.1, layout.size)
    noisy[0] = 1
    raw, shrunk = (np.linalg.norm(layout.statistics(noisy, sd).position) for sd in (0.0, 0.1))
    assert shrunk < 0.7 * raw


def test_an_image_without_labels_counts_as_nothing() -> None:
    layout = space()
    vector = layout.vector(np.zeros((1, 32, 32), np.float32), np.zeros((32, 32), np.uint8))
    assert not vector.any(), "it has no pose to be measured in"
