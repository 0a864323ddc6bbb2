from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medsynth.config import Grid
from medsynth.errors import ConfigError
from medsynth.imaging import phantom

NAMES = {0: "background", 1: "a", 2: "b", 3: "c"}


def grid(shape: tuple[int, ...], classes: int = 3, channels: int = 1) -> Grid:
    labels = {value: NAMES[value] for value in range(classes)}
    return Grid(spatial_dims=len(shape), shape=shape, channels=channels, labels=labels)


GRIDS = [grid((24, 32, 24)), grid((48, 32), 4), grid((64, 64), 2, 3), grid((16, 16), 2)]


@pytest.mark.parametrize("one", GRIDS, ids=lambda one: f"{one.shape}-{one.classes}-{one.channels}")
def test_pairs_have_the_grids_shape_and_range(one: Grid) -> None:
    images, labels = phantom.phantom_pairs(one, 6, seed=1)
    assert images.shape == (6, one.channels, *one.shape) and images.dtype == np.float32
    assert labels.shape == (6, *one.shape) and labels.dtype == np.uint8
    assert np.isfinite(images).all() and images.min() >= -1 and images.max() <= 1
    assert all(image.std() > 0.1 for image in images)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), which=st.sampled_from(range(len(GRIDS))))
def test_every_label_occurs_and_neighbours_touch(seed: int, which: int) -> None:
    one = GRIDS[which]
    (label,) = phantom.sample_label_maps(one, 1, seed)
    assert np.unique(label).tolist() == list(range(one.classes))
    assert all(phantom.touching(label, k, k + 1) for k in range(1, one.classes - 1))


def test_structures_are_smooth_wholes_not_speckle() -> None:
    for label in phantom.sample_label_maps(grid((32, 40, 32)), 20, seed=3):
        sizes = np.bincount(ndimage.label(label > 0)[0].ravel())[1:]
        assert sizes.max() >= 0.95 * sizes.sum()


def test_a_pair_depends_on_its_seed_and_index_only() -> None:
    few, many = phantom.phantom_pairs(GRIDS[0], 2, seed=7), phantom.phantom_pairs(GRIDS[0], 4, seed=7)
    other = phantom.phantom_pairs(GRIDS[0], 2, seed=8)
    np.testing.assert_array_equal(few[0], many[0][:2])
    np.testing.assert_array_equal(few[1], many[1][:2])
    assert not np.array_equal(few[1], other[1])
    assert not np.array_equal(many[1][0], many[1][1])


def test_rendering_changes_neither_the_label_nor_asks_for_the_grids_size() -> None:
    label = phantom.sample_label_maps(GRIDS[0], 1, seed=0)[0]
    before = label.copy()
    crop = label[2:, 4:, 1:]
    image = phantom.render(crop, GRIDS[0], np.random.default_rng(0))
    assert image.shape == (1, *crop.shape)
    assert phantom.render(crop, GRIDS[0], np.random.default_rng(0), channels=3).shape == (3, *crop.shape)
    np.testing.assert_array_equal(label, before)


def test_a_structure_is_more_alike_inside_than_across_its_border() -> None:
    images, labels = phantom.phantom_pairs(grid((32, 32, 32), 2), 30, seed=5)
    contrasts = []
    for image, label in zip(images[:, 0], labels, strict=True):
        shell = ndimage.binary_dilation(label, iterations=3) & (label == 0)
        contrasts.append(abs(image[label > 0].mean() - image[shell].mean()))
    assert np.median(contrasts) > 0.15
    assert np.std(contrasts) > 0.05


def test_images_are_smooth_anatomy_rather_than_noise() -> None:
    images, _ = phantom.phantom_pairs(grid((32, 32, 32)), 10, seed=2)
    for image in images[:, 0]:
        near = np.corrcoef(image[:-2].ravel(), image[2:].ravel())[0, 1]
        assert near > 0.5


def test_a_grid_too_small_for_its_labels_is_refused() -> None:
    with pytest.raises(ConfigError, match="too small"):
        phantom.sample_label_maps(grid((3, 3), 4), 1, seed=0)
