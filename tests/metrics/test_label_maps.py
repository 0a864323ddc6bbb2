"""Measures of label maps: known shapes have known values, strange maps are found strange, real ones are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from medsynth.config import Grid
from medsynth.imaging.phantom import sample_label_maps
from medsynth.metrics.label_maps import MEASURES, anatomy, compare


def mesh(rank: int, size: int = 40) -> list[np.ndarray]:
    return np.meshgrid(*[np.arange(size) - (size - 1) / 2] * rank, indexing="ij")


def ball(rank: int, radius: float, size: int = 40) -> np.ndarray:
    return (sum(axis**2 for axis in mesh(rank, size)) <= radius**2).astype(np.uint8)


def of(label: np.ndarray, kind: str, value: int = 1, classes: int = 3, spacing: Any = None) -> float:
    return float(anatomy([label], classes, spacing).measures[kind][0, value - 1])


def test_a_ball_and_a_disc_have_their_volume_and_surface() -> None:
    assert of(ball(3, 12), "volume") == pytest.approx(4 / 3 * np.pi * 12**3, rel=0.02)
    assert of(ball(3, 12), "surface") == pytest.approx(4 * np.pi * 12**2, rel=0.1)
    assert of(ball(2, 12), "volume") == pytest.approx(np.pi * 12**2, rel=0.02)
    assert of(ball(2, 12), "surface") == pytest.approx(2 * np.pi * 12, rel=0.1)


@pytest.mark.parametrize("rank", [2, 3])
def test_spacing_is_taken_axis_by_axis(rank: int) -> None:
    box = np.zeros((24,) * rank, np.uint8)
    box[(slice(6, 18),) * rank] = 1
    spacing = (2.0, 1.0, 0.5)[:rank]
    sides = 12 * np.array(spacing)
    surface = 2 * sides.sum() if rank == 2 else 2 * sum(sides.prod() / side for side in sides)
    assert of(box, "volume", spacing=spacing) == pytest.approx(sides.prod())
    assert of(box, "surface", spacing=spacing) == pytest.approx(surface, rel=0.06)


@pytest.mark.parametrize("rank", [2, 3])
def test_parts_are_counted_and_corners_join(rank: int) -> None:
    label = np.zeros((12,) * rank, np.uint8)
    label[(2,) * rank] = label[(3,) * rank] = 1
    assert of(label, "components") == 1
    label[(8,) * rank] = 1
    assert of(label, "components") == 2


@pytest.mark.parametrize("rank", [2, 3])
def test_neighbours_are_shares_of_the_border(rank: int) -> None:
    label = ball(rank, 12)
    label[mesh(rank)[0] > 0] *= 2
    found = anatomy([label], 4)
    np.testing.assert_allclose(found.borders[0, :2].sum(1), 1)
    assert found.borders[0, 0, 2] == pytest.approx(found.borders[0, 1, 1]) and 0.1 < found.borders[0, 0, 2] < 0.5
    assert found.touch(1, 2).all() and not found.enclosed(1, 2).any()
    assert np.isnan(found.borders[0, 2]).all() and found.touch(1, 3).size == 0


@pytest.mark.parametrize("rank", [2, 3])
def test_a_cut_is_as_long_however_it_lies_to_the_axes(rank: int) -> None:
    axes, whole = mesh(rank), ball(rank, 16)
    straight, oblique = (np.where(side > 0.1, 2, 1) * whole for side in (axes[0], axes[0] + axes[1]))
    one, other = (of(label, "touching") for label in (straight, oblique))
    # A disc's share of half a ball's surface is 1/3; in 2D the diameter's is 2 / (2 + pi).
    assert one == pytest.approx(1 / 3 if rank == 3 else 2 / (2 + np.pi), rel=0.1)
    assert other == pytest.approx(one, rel=0.1)


@pytest.mark.parametrize("rank", [2, 3])
def test_what_lies_inside_another_label_is_enclosed_by_it(rank: int) -> None:
    label = ball(rank, 12) + ball(rank, 6)
    found = anatomy([label], 3)
    assert found.enclosed(2, 1).all() and not found.enclosed(1, 2).any()
    assert found.measures["touching"][0, 1] == pytest.approx(1.0)
    label[(0,) * rank] = 2
    assert not anatomy([label], 3).enclosed(2, 1).any()


def test_what_the_border_of_the_grid_cuts_is_closed_there() -> None:
    assert of(np.ones((10, 10), np.uint8), "surface", classes=2) == pytest.approx(40, rel=0.1)
    assert of(np.ones((10, 10), np.uint8), "touching", classes=2) == 0


def crowd(rank: int, seed: int, classes: int = 3, count: int = 24) -> list[np.ndarray]:
    grid = Grid(
        spatial_dims=2 if rank == 2 else 3,
        shape=(32,) * rank,
        spacing_mm=(1.0,) * rank,
        labels={value: f"label {value}" for value in range(classes)},
    )
    return list(sample_label_maps(grid, count, seed))


def report(real: list[np.ndarray], drawn: list[np.ndarray], train: list[np.ndarray], classes: int = 3) -> Any:
    names = [f"label {value}" for value in range(1, classes)]
    return compare(*(anatomy(maps, classes, (1.0,) * real[0].ndim) for maps in (real, drawn, train)), names)


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("rank", [2, 3])
def test_maps_of_one_kind_are_near_each_other_and_strange_ones_are_not(rank: int, classes: int) -> None:
    real, same, train = (crowd(rank, seed, classes) for seed in (1, 2, 3))
    rng = np.random.default_rng(0)
    strange = [np.where(rng.random(label.shape) < 0.1, 1, label) for label in same]
    near, far = report(real, same, train, classes), report(real, strange, train, classes)
    assert set(near["labels"]["label 1"]["measures"]) == set(MEASURES)
    assert near["plausible"]["synthetic"] >= 0.3 and near["plausible"]["train"] == far["plausible"]["train"]
    assert far["plausible"]["synthetic"] == 0
    for kind in ("surface", "volume"):
        one, other = (found["labels"]["label 1"]["measures"][kind] for found in (near, far))
        assert one["wasserstein_sd"] < 1 < other["wasserstein_sd"]
        assert one["real"]["p5"] <= one["real"]["p50"] <= one["real"]["p95"]


def test_the_crowd_itself_is_plausible_and_at_no_distance() -> None:
    real = crowd(3, 1)
    found = report(real, real, real)
    assert found["plausible"] == {"synthetic": 1.0, "train": 1.0}
    assert all(
        one["wasserstein"] == 0 and one["wasserstein_sd"] == 0
        for label in found["labels"].values()
        for one in label["measures"].values()
    )


def test_a_lost_label_and_lost_relations_are_found() -> None:
    inner, outer = ball(3, 6), ball(3, 12)
    real = [outer + inner] * 20
    moved = outer.copy()
    moved[0:4, 0:4, 0:4] = 2
    found = report(real, [outer + inner, moved], real)
    assert found["relations"]["nested"] == {"label 2 in label 1": 0.5} and found["relations"]["worst"] == 0.5
    assert found["relations"]["touching"] == {"label 1 and label 2": 0.5}
    without = report(real, [outer], real)
    assert without["plausible"]["synthetic"] == 0 and without["labels"]["label 2"]["present"]["synthetic"] == 0
    assert "wasserstein" not in without["labels"]["label 2"]["measures"]["volume"]


def test_labels_that_never_touch_are_expected_apart() -> None:
    apart = np.zeros((20, 20), np.uint8)
    apart[2:6, 2:6], apart[12:16, 12:16] = 1, 2
    together = np.roll(np.where(apart == 2, 0, apart), 10, (0, 1)) + np.where(apart == 2, 2, 0)
    together[together == 3] = 2
    together[11, 12:16] = 1
    found = report([apart] * 5, [apart, together], [apart])
    assert found["relations"]["apart"] == {"label 1 and label 2": 0.5}


def test_a_map_without_a_label_that_everybody_has_is_not_plausible() -> None:
    apart = np.zeros((20, 20), np.uint8)
    apart[2:6, 2:6], apart[12:16, 12:16] = 1, 2
    found = report([apart] * 5, [apart, np.where(apart == 2, 0, apart)], [apart])
    assert found["plausible"] == {"synthetic": 0.5, "train": 1.0}
    sometimes = report([apart, np.where(apart == 2, 0, apart)], [apart, np.where(apart == 2, 0, apart)], [apart])
    assert sometimes["plausible"]["synthetic"] == 1.0


def test_no_maps_at_all_are_no_error() -> None:
    found = report([ball(2, 5)], [ball(2, 5)], [])
    assert found["plausible"]["train"] is None and "train" not in found["labels"]["label 1"]["measures"]["volume"]
