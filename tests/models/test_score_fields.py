"""What patients show beside distributions: carried from foreground to foreground, and mixed with its covariance."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
from scipy import ndimage

from medsynth.config import Appearance, Grid
from medsynth.errors import InputError
from medsynth.imaging.phantom import sample_label_maps, smooth_field
from medsynth.models import appearance
from medsynth.models.appearance import AppearanceSpace, AppearanceStatistics, quantile, rank_of
from medsynth.models.correspondence import corresponding
from medsynth.models.label_features import signed_distance
from medsynth.models.pose import sampled
from medsynth.models.score_fields import ScoreFields, mean_foreground, mixed_scores

_PATIENTS = 24


@lru_cache
def space(rank: int, channels: int = 1) -> AppearanceSpace:
    grid = Grid(
        spatial_dims=2 if rank == 2 else 3,
        shape=(32,) * rank,
        spacing_mm=(1.0,) * rank,
        channels=3 if channels == 3 else 1,
        labels={0: "none", 1: "organ", 2: "part"},
    )
    settings = Appearance(coefficients=(4,) * rank, mixed_patients=5)
    return AppearanceSpace(grid, settings, list(sample_label_maps(grid, 24, 1)))


def places_of(layout: AppearanceSpace, label: np.ndarray) -> np.ndarray:
    """Where voxels lie in the organ's frame, (axis, *spatial)."""
    mean = layout.features.mean_pose(layout._maps)
    place = layout.features.place(label, mean)
    inside = np.linalg.solve(place.narrow, layout.features.frame.voxels - place.centre[:, None])
    return np.asarray(inside).reshape(label.ndim, *label.shape)


def sides(layout: AppearanceSpace, label: np.ndarray) -> np.ndarray:
    """Voxels beside an organ: on one side of it (0) and on the other (1)."""
    distance, along = signed_distance(label > 0), places_of(layout, label)[0]
    around = (distance > 2) & (distance < 5)
    return np.stack([around & (along < -1), around & (along > 1)])


def records(layout: AppearanceSpace, count: int = _PATIENTS) -> list[tuple[np.ndarray, np.ndarray, int]]:
    """Patients who are bright on both sides of the organ, or dark on both: no distribution of one voxel tells it."""
    labels, made = sample_label_maps(layout.grid, count, 2), []
    for index, label in enumerate(labels):
        rng = np.random.default_rng(index)
        image = np.where(label > 0, 0.5, 0.0) + 0.05 * rng.standard_normal((layout.grid.channels, *label.shape))
        image[:, sides(layout, label).any(0)] += 0.6 * (-1) ** index
        made.append((image.clip(-1, 1).astype(np.float32), label, index))
    return made


def statistics(layout: AppearanceSpace, patients: list[tuple[np.ndarray, np.ndarray, int]]) -> AppearanceStatistics:
    mean = np.mean([layout.vector(image, label) for image, label, _ in patients], axis=0)
    return layout.with_scores(layout.statistics(mean, 0.0), patients)


@pytest.mark.parametrize("rank", [2, 3])
def test_places_that_correspond_are_as_far_from_the_surface(rank: int) -> None:
    layout = space(rank)
    mean = layout.features.mean_pose(layout._maps)
    first, second = sample_label_maps(layout.grid, 2, 7)
    here, there = layout.features.place(first, mean), layout.features.place(second, mean)
    points = corresponding(layout.features.frame.voxels, layout.grid.shape, here, there)
    found = sampled(signed_distance(second > 0), points, 1)
    near = np.abs(here.distance) < 3
    missed = np.abs(found - here.distance)[near]
    assert np.mean(missed) < 0.3 and np.quantile(missed, 0.95) < 1
    assert np.corrcoef(points[0, near], layout.features.frame.voxels[0, near])[0, 1] > 0.8, "and still on that side"


@pytest.mark.parametrize("rank", [2, 3])
def test_every_voxel_of_a_label_map_corresponds_to_itself(rank: int) -> None:
    layout = space(rank)
    place = layout.features.place(sample_label_maps(layout.grid, 1, 7)[0], layout.features.mean_pose(layout._maps))
    points = corresponding(layout.features.frame.voxels, layout.grid.shape, place, place)
    voxels = np.indices(layout.grid.shape).reshape(rank, -1)
    assert np.abs(points - voxels).max() < 1e-6


def test_ranks_are_undone_by_quantiles() -> None:
    rng = np.random.default_rng(0)
    edges = np.cumsum(rng.uniform(0.1, 1, (50, 9)), axis=1)
    distribution = ((edges - edges[:, :1]) / (edges[:, -1:] - edges[:, :1])).astype(np.float32)
    values = rng.uniform(-1, 1, 50).astype(np.float32)
    ranks = rank_of(distribution, values)
    assert ranks.min() > 0 and ranks.max() < 1
    np.testing.assert_allclose(quantile(distribution, ranks.reshape(-1, 1)), values, atol=1e-5)


@pytest.mark.parametrize(("rank", "channels"), [(2, 1), (2, 3), (3, 1)])
def test_what_goes_together_in_patients_goes_together_in_drafts(rank: int, channels: int) -> None:
    layout = space(rank, channels)
    found, label = statistics(layout, records(layout)), sample_label_maps(layout.grid, 1, 9)[0]
    draws = np.stack([layout.render(label, found, np.random.default_rng(seed)) for seed in range(40)])
    assert draws.shape == (40, channels, *label.shape) and draws.dtype == np.float32 and np.abs(draws).max() <= 1
    means = np.stack([draws[:, 0, side].mean(1) for side in sides(layout, label)])
    assert np.corrcoef(means)[0, 1] > 0.6, "a public field says nothing over that distance"
    assert means.std() > 0.2, "bright in some drafts, dark in others"
    assert draws[:, 0, ndimage.binary_erosion(label > 0)].mean(1).std() < 0.15, "patients' organs are alike inside"
    assert not np.array_equal(draws[0], draws[1])
    assert np.array_equal(layout.render(label, found, np.random.default_rng(0)), draws[0])


def test_patients_count_alike_however_many_records_they_have() -> None:
    layout = space(2)
    patients = records(layout, 6)
    base = layout.statistics(np.mean([layout.vector(*pair[:2]) for pair in patients], axis=0), 0.0)
    once = layout.with_scores(base, patients)
    often = layout.with_scores(base, [*patients[:1] * 9, *patients[1:]])
    np.testing.assert_allclose(often.score_mean, once.score_mean, atol=1e-3)
    first = [draw_of(layout, found.fields, 1, 300) for found in (once, often)]
    np.testing.assert_allclose(first[1].mean(0), first[0].mean(0), atol=0.35 * first[0].std())


def draw_of(layout: AppearanceSpace, found: ScoreFields, count: int, draws: int) -> np.ndarray:
    """Return some voxels of mixtures, read in their own chart, so that nothing is carried anywhere."""
    rng, mean = np.random.default_rng(0), layout.features.mean_pose(layout._maps)
    made = [mixed_scores(layout.features, found, mean, found.chart, count, rng)[0, ::4, ::4] for _ in range(draws)]
    return np.stack(made).reshape(draws, -1).astype(float)


@pytest.mark.parametrize("count", [1, 2, 5, _PATIENTS, 3 * _PATIENTS])
def test_mixtures_have_the_mean_and_the_covariance_of_patients(count: int) -> None:
    layout = space(2)
    found = statistics(layout, records(layout)).fields
    probed = draw_of(layout, found, count, 800)
    beside = found.beside[:, 0, ::4, ::4].reshape(_PATIENTS, -1).astype(float)
    want, have = beside.T @ beside / _PATIENTS, np.cov(probed.T)
    assert np.linalg.norm(have - want) < 0.2 * np.linalg.norm(want)
    assert np.trace(have) == pytest.approx(np.trace(want), rel=0.1)
    error = probed.mean(0) - found.mean[0, ::4, ::4].reshape(-1)
    assert np.sqrt(np.square(error).mean()) < 0.15 * np.sqrt(np.diag(want).mean())


def test_a_chart_is_as_large_as_label_maps_even_where_they_hardly_overlap() -> None:
    layout, rng = space(2), np.random.default_rng(0)
    maps = []
    for _ in range(12):
        label = np.zeros((32, 32), np.uint8)
        for row, column in rng.integers(4, 28, (4, 2)):
            label[row - 1 : row + 2, column - 1 : column + 2] = 1
        maps.append(label)
    for given in (maps, layout._maps):
        chart = mean_foreground(layout.features, given, layout.features.mean_pose(given))
        assert np.count_nonzero(chart) == pytest.approx(np.mean([np.count_nonzero(x) for x in given]), abs=1)


def test_patients_without_a_label_are_said_to_be_of_no_use() -> None:
    layout = space(2)
    base = layout.statistics(np.mean([layout.vector(*pair[:2]) for pair in records(layout, 6)], axis=0), 0.0)
    with pytest.raises(InputError, match="no patient to train on shows a label"):
        layout.with_scores(base, [(np.ones((1, 32, 32), np.float32), np.zeros((32, 32), np.uint8), 0)])


def test_a_record_without_foreground_adds_nothing() -> None:
    layout = space(2)
    patients = records(layout, 6)
    base = layout.statistics(np.mean([layout.vector(*pair[:2]) for pair in patients], axis=0), 0.0)
    empty = (np.ones((1, 32, 32), np.float32), np.zeros((32, 32), np.uint8), 6)
    np.testing.assert_array_equal(
        layout.with_scores(base, [*patients, empty]).score_beside, layout.with_scores(base, patients).score_beside
    )


def test_statistics_of_the_other_kind_do_not_fit() -> None:
    layout = space(2)
    patients = records(layout, 6)
    found = statistics(layout, patients)
    plain = AppearanceSpace(layout.grid, Appearance(coefficients=(4, 4)), layout._maps)
    assert layout.fits(found) and not plain.fits(found)
    base = plain.statistics(np.mean([plain.vector(*pair[:2]) for pair in patients], axis=0), 0.0)
    assert plain.fits(base) and not layout.fits(base)


def test_softened_mixtures_show_fewer_grains_of_other_tissues(monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the organ patients show patches of either of two tissues; a mixture of five is pepper and salt."""
    layout, patients = space(2), []
    for index, label in enumerate(sample_label_maps(layout.grid, _PATIENTS, 2)):
        rng = np.random.default_rng(index)
        patches = np.where(smooth_field(rng, label.shape, 8) > 0, 0.6, -0.6) + 0.1 * rng.standard_normal(label.shape)
        patients.append((np.where(label > 0, 0.1, patches)[None].clip(-1, 1).astype(np.float32), label, index))
    found = statistics(layout, patients)

    def grains(image: np.ndarray, label: np.ndarray) -> float:
        apart = np.abs(image[0] - ndimage.median_filter(image[0], 3)) > 0.5
        return float(apart[signed_distance(label > 0) > 1].mean())

    def drawn() -> float:
        labels = [label for _, label, _ in patients]
        images = [layout.render(label, found, np.random.default_rng(index)) for index, label in enumerate(labels)]
        return float(np.mean([grains(image, label) for image, label in zip(images, labels, strict=True)]))

    softened = drawn()
    monkeypatch.setattr(appearance, "_MIXED_SOFT", 1e-4)
    assert np.mean([grains(image, label) for image, label, _ in patients]) < softened < 0.6 * drawn()
