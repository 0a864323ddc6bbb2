"""Factors between patients: known differences come back, in drafts and under noise."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Literal

import numpy as np
import pytest

from medsynth.config import Appearance, Grid
from medsynth.imaging.phantom import sample_label_maps, smooth_field
from medsynth.models.drafting import open_drafting
from medsynth.models.image_factors import FactorSpace
from medsynth.models.label_features import signed_distance


def grid(rank: int = 2, channels: int = 3) -> Grid:
    return Grid(
        spatial_dims=2 if rank == 2 else 3,
        shape=(48,) * rank if rank == 2 else (24,) * rank,
        channels=3 if channels == 3 else 1,
        labels={0: "none", 1: "lesion"},
    )


@lru_cache
def space(rank: int = 2, channels: int = 3) -> FactorSpace:
    public = grid(rank, channels)
    layout = open_drafting(public, Appearance(coefficients=(4,) * rank, factors=8), sample_label_maps(public, 24, 1))
    assert isinstance(layout, FactorSpace)
    return layout


def pairs(
    rank: int = 2, channels: int = 3, count: int = 40, colour: float = 0.08
) -> tuple[list[np.ndarray], np.ndarray]:
    """Coloured images, as bright as one normal number a patient, whose lesions are brighter or darker by another."""
    labels, images, rng = sample_label_maps(grid(rank), count, 2), [], np.random.default_rng(0)
    for index, label in enumerate(labels):
        light, contrast = 0.3 * rng.standard_normal(), rng.choice([-0.3, 0.3])
        texture = 0.1 * smooth_field(np.random.default_rng(index), label.shape, 24)
        grey = np.repeat((light + contrast * (label > 0) + texture)[None], channels, 0)
        shades = [
            colour * smooth_field(np.random.default_rng([index, row]), label.shape, 24) for row in range(channels)
        ]
        images.append((grey + np.stack(shades)).clip(-1, 1))
    return [image.astype(np.float32) for image in images], labels


@lru_cache
def released(rank: int = 2, channels: int = 3, colour: float = 0.08) -> np.ndarray:
    images, labels = pairs(rank, channels, colour=colour if channels > 1 else 0)
    return np.mean([space(rank, channels).vector(x, y) for x, y in zip(images, labels, strict=True)], axis=0)


def drafts(
    noise_sd: float = 0.0, rank: int = 2, channels: int = 3, count: int = 60, colour: float = 0.08
) -> tuple[np.ndarray, np.ndarray]:
    layout, rng = space(rank, channels), np.random.default_rng(3)
    mean = released(rank, channels, colour)
    found = layout.statistics(mean + noise_sd * rng.standard_normal(mean.size), noise_sd)
    labels = sample_label_maps(grid(rank), count, 9)
    return np.stack([layout.render(label, found, rng) for label in labels]), labels


@pytest.mark.parametrize(("rank", "channels", "noise_sd"), [(2, 3, 0.0), (2, 3, 1e-3), (2, 1, 0.0), (3, 1, 0.0)])
def test_drafts_differ_as_patients_do(rank: int, channels: int, noise_sd: float) -> None:
    images, labels = drafts(noise_sd, rank, channels)
    assert images.shape[1] == channels and images.dtype == np.float32 and np.abs(images).max() <= 1
    light = np.array([image[:, label == 0].mean() for image, label in zip(images, labels, strict=True)])
    contrast = [
        image[:, label > 0].mean() - image[:, label == 0].mean() for image, label in zip(images, labels, strict=True)
    ]
    assert 0.15 < light.std() < 0.45, "patients: 0.3"
    assert abs(np.mean(contrast)) < 0.12
    assert 0.15 < np.std(contrast) < 0.45, "patients: 0.3; their mean alone would give none"


def test_what_goes_together_in_patients_does_so_in_drafts() -> None:
    """Bright patients have bright lesions here, dark patients dark ones."""
    labels, layout, rng = sample_label_maps(grid(), 40, 2), space(), np.random.default_rng(0)
    lights = 0.3 * rng.standard_normal(len(labels))
    images = [np.repeat((light * (1 + (label > 0)))[None], 3, 0) for light, label in zip(lights, labels, strict=True)]
    vectors = [layout.vector(x.astype(np.float32), y) for x, y in zip(images, labels, strict=True)]
    found, drawn = layout.statistics(np.mean(vectors, axis=0), 0.0), sample_label_maps(grid(), 60, 9)
    drafted = [layout.render(label, found, rng) for label in drawn]
    light = [image[:, label == 0].mean() for image, label in zip(drafted, drawn, strict=True)]
    contrast = [image[:, label > 0].mean() - rest for image, label, rest in zip(drafted, drawn, light, strict=True)]
    assert np.corrcoef(light, contrast)[0, 1] > 0.4


def test_what_varies_no_more_than_its_noise_is_not_drawn() -> None:
    """Alike patients: at most the noise in their squares could be taken for differences between them."""
    images, labels = pairs()
    one = space().vector(images[0], labels[0])
    drawn = [np.random.default_rng(seed).normal(0, 0.01, one.size) for seed in range(64)]
    rests = [space().statistics(one + noise, 0.01).rest for noise in drawn]
    assert np.mean(np.square(rests)) < 0.05 * 0.01 / 1.2


def test_under_noise_the_edge_keeps_its_contrast_and_no_rings_appear_around() -> None:
    """Patients differ in the contrast of a sharp foreground by 0.3, and at other distances in nothing."""
    contrast, steps = [], []
    for image, label in zip(*drafts(3e-3), strict=True):
        distance, grey = signed_distance(label > 0), image.mean(0)
        contrast.append(grey[distance < 0].mean() - grey[(distance > 1) & (distance < 3)].mean())
        steps.append(np.diff([grey[(distance > near) & (distance < near + 2)].mean() for near in (3, 5, 7, 9)]))
    assert np.std(contrast) > 0.15
    assert np.std(steps, axis=0).max() < 0.03


def test_a_lit_surface_shows_the_rim_of_domes_where_noise_shows_none() -> None:
    """Their light is what patients' profiles say; the dark line where they rise is the scene's."""
    settings = Appearance(coefficients=(4, 4), factors=8, texture="lit_surface")
    lit, found = open_drafting(grid(), settings), space().statistics(released(), 0.0)
    radius = np.hypot(*(np.indices((48, 48)) - 24))
    label = (radius < 12).astype(np.uint8)
    inner, rim, outer = ((radius >= near) & (radius < near + 3) for near in (7, 11, 15))
    seen = []
    for layout in (space(), lit):
        images = [layout.render(label, found, np.random.default_rng(seed)) for seed in range(40)]
        seen.append(np.mean([x[:, rim].mean() - x[:, inner].mean() / 2 - x[:, outer].mean() / 2 for x in images]))
    assert seen[1] < seen[0] - 0.03
    assert np.isfinite(seen).all()


@pytest.mark.parametrize("texture", ["noise", "lit_surface"])
def test_a_draft_follows_its_seed(texture: Literal["noise", "lit_surface"]) -> None:
    layout = open_drafting(grid(), Appearance(coefficients=(4, 4), factors=8, texture=texture))
    label = sample_label_maps(grid(), 1, 9)[0]
    found = layout.statistics(released(), 0.0)
    first, again, other = (layout.render(label, found, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_drafts_need_no_label_maps_beside_what_was_released() -> None:
    layout, label = space(), sample_label_maps(grid(), 1, 9)[0]
    found = layout.statistics(released(), 0.0)
    later = open_drafting(grid(), Appearance(coefficients=(4, 4), factors=8))
    drafted = [each.render(label, found, np.random.default_rng(1)) for each in (layout, later)]
    np.testing.assert_array_equal(*drafted)


def test_grey_patients_give_grey_drafts() -> None:
    images, _ = drafts(colour=0)
    assert np.abs(images[:, 0] - images[:, 2]).mean() < 0.03


def test_colours_vary_beside_brightness_about_as_much_as_in_patients() -> None:
    """One field in all channels would leave the background of one colour, and every edge of a colour a lesion's."""
    images, labels = pairs(colour=0.12)
    seen = []
    for pictures, maps in ((images, labels), drafts(colour=0.12)):
        opposed = [image[0] - image[2] for image in pictures]
        seen.append(
            [(np.diff(line[:, :8]).std(), line[label == 0].std()) for line, label in zip(opposed, maps, strict=True)]
        )
    fine, whole = np.median(seen[1], axis=0) / np.median(seen[0], axis=0)
    assert 0.6 < fine < 1.6 and 0.6 < whole < 1.6


def test_a_dark_frame_of_some_patients_is_in_as_many_drafts() -> None:
    images, labels = pairs()
    for image in images[::2]:
        image[:, :16, :16] = -1
    vectors = [space().vector(x, y) for x, y in zip(images, labels, strict=True)]
    found, rng = space().statistics(np.mean(vectors, axis=0), 0.0), np.random.default_rng(0)
    corners = np.stack([space().render(label, found, rng)[:, 2:12, 2:12].max((0, 1, 2)) for label in labels])
    assert 0.25 < np.mean(corners < -0.8) < 0.75, "half of the patients"


def test_a_frame_leaves_the_foreground_out() -> None:
    """A lesion in the dark, which no patient has, would be labelled and not seen. Where all are dark it may be."""
    found, rng = space().statistics(released(), 0.0), np.random.default_rng(0)
    shares = np.zeros_like(found.frame)
    shares[:, :4], shares[:, 4:8] = 0.99, 0.8
    inside, reaching, beside = (
        (np.hypot(*(np.indices((48, 48)) - [[[24]], [[column]]])) < 6).astype(np.uint8) for column in (24, 17, 38)
    )
    for label, dark_there in ((inside, False), (reaching, True), (beside, False)):
        images = [space().render(label, replace(found, frame=shares), rng) for _ in range(20)]
        dark = np.array([image.max(0) < -0.9 for image in images])
        assert dark[:, 24, 4].mean() > 0.9, "where nearly all are"
        assert dark[:, label > 0].any() == dark_there
        often = dark[:, 8, 24].mean()
        assert often == 0 if label is not beside else 0.5 < often < 1, "of patients 0.8, where no foreground reaches it"


@pytest.mark.parametrize("texture", ["noise", "lit_surface"])
@pytest.mark.parametrize("framed", [False, True])
def test_texture_says_nothing_that_the_smooth_part_says(texture: Literal["noise", "lit_surface"], framed: bool) -> None:
    """Else its coarse part would count as strength, and drafts would have less of the rest than patients."""
    layout = open_drafting(grid(), Appearance(coefficients=(4, 4), factors=8, texture=texture))
    assert isinstance(layout, FactorSpace)
    found, none = layout.statistics(released(), 0.0), np.zeros(layout.coefficients)
    frame = np.zeros_like(found.frame)
    frame[:, :3] = 0.99 * framed
    flat = replace(found, mean=none, factors=none[:, None], rest=none, frame=frame)
    again = []
    for seed, label in enumerate(sample_label_maps(grid(), 16, 9)):
        image = layout.render(label, flat, np.random.default_rng(seed))
        again.append(layout.statistics(layout.vector(image, label), 0.0).mean)
    rows = 6 * 3  # of each colour one strength and five bands
    assert np.mean([np.linalg.norm(mean[:-rows]) for mean in again]) < (0.1 if texture == "noise" else 0.2)
    brightness = np.mean([mean[-rows] for mean in again]) / 0.5
    assert abs(brightness) < 0.1, "logarithm of how much stronger than drawn"


def test_noise_alone_gives_no_factor_and_a_signal_above_it_does() -> None:
    rng, layout = np.random.default_rng(0), space()
    noise = rng.normal(0, 0.01, layout.size)
    noise[0] = released()[0]
    assert layout.statistics(noise, 0.01).factors.shape[1] <= 1
    assert 1 <= layout.statistics(released() + rng.normal(0, 1e-3, layout.size), 1e-3).factors.shape[1] <= 8


def test_a_vector_is_bounded_whatever_the_image() -> None:
    layout, label = space(), sample_label_maps(grid(), 1, 9)[0]
    rng = np.random.default_rng(0)
    hostile = [rng.choice([-1.0, 1.0], (3, 48, 48)), np.ones((3, 48, 48)), rng.uniform(-1, 1, (3, 48, 48))]
    for image in hostile:
        assert np.linalg.norm(layout.vector(image.astype(np.float32), label)) < 3


def test_an_image_without_labels_or_without_light_counts_as_nothing() -> None:
    layout, label = space(), sample_label_maps(grid(), 1, 9)[0]
    assert not layout.vector(np.zeros((3, 48, 48), np.float32), np.zeros((48, 48), np.uint8)).any()
    assert not layout.vector(np.full((3, 48, 48), -1, np.float32), label).any()


@pytest.mark.parametrize("size", [0.1, 100.0])
def test_any_noise_still_gives_an_image(size: float) -> None:
    layout, rng = space(), np.random.default_rng(0)
    found = layout.statistics(rng.normal(0, size, layout.size), size)
    image = layout.render(sample_label_maps(grid(), 1, 9)[0], found, rng)
    assert np.isfinite(image).all() and np.abs(image).max() <= 1
