"""The reader of mean shapes: it learns from phantoms alone and gets nearer to the truth than voxels by themselves."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import pytest
import torch

from medsynth.config import Grid, Masks
from medsynth.imaging.phantom import sample_label_maps
from medsynth.models import shape_reader
from medsynth.models.mask_generator import ShapeSpace
from medsynth.models.shape_reader import ShapeReader, fit_reader

NOISE = (0.3, 1.0)


@pytest.fixture(autouse=True)
def few_cohorts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shape_reader, "_COHORTS", 256)


def space_of(rank: int) -> ShapeSpace:
    grid = Grid(spatial_dims=2 if rank == 2 else 3, shape=(24,) * rank, labels={0: "none", 1: "head", 2: "tail"})
    return ShapeSpace(grid, Masks(coefficients=(5, 6, 5)[:rank]))


@lru_cache
def shapes_of(rank: int, seed: int, count: int) -> np.ndarray:
    space = space_of(rank)
    labels = sample_label_maps(space.grid, count, seed)
    poses = [space.pose_vector(label) for label in labels]
    return np.stack([space.shape_vector(label, space.pose(pose)) for label, pose in zip(labels, poses, strict=True)])


def reader_of(rank: int, steps: int = 3, seed: int = 0) -> ShapeReader:
    return fit_reader(space_of(rank), shapes_of(rank, 1, 40), NOISE, steps, seed)


@pytest.mark.parametrize("rank", [2, 3])
def test_it_errs_less_than_reading_each_voxel_by_itself_on_phantoms_that_it_never_saw(rank: int) -> None:
    space, unseen, expected = space_of(rank), shapes_of(rank, 2, 24), shapes_of(rank, 1, 40).mean(0)
    reader, noise_sd = reader_of(rank, 200), 0.6
    rng = np.random.default_rng(0)
    noisy = [shape + noise_sd * rng.standard_normal(space.shape_size) for shape in unseen]

    def error(found: list[np.ndarray]) -> float:
        return float(np.sqrt(np.mean(np.square(np.stack(found) - unseen))))

    learnt = error([reader.read(space, shape, noise_sd) for shape in noisy])
    by_itself = error([space.believed_shape(shape, np.full(shape.size, noise_sd), expected) for shape in noisy])
    assert learnt < 0.85 * by_itself
    assert learnt < 0.6 * error(noisy)


@pytest.mark.parametrize("rank", [2, 3])
def test_coefficients_and_volumes_are_those_of_the_shape_space(rank: int) -> None:
    space, shape = space_of(rank), shapes_of(rank, 2, 24)[3]
    reader = reader_of(rank)
    parts = torch.tensor(space.coefficients_of(shape), dtype=torch.float32)[None]
    np.testing.assert_allclose(reader.expand(parts)[0], space.volumes(shape), atol=1e-5)
    np.testing.assert_allclose(reader.compress(reader.expand(parts)), parts, atol=1e-5)
    np.testing.assert_allclose(space.shape_of(space.volumes(shape)), shape, atol=1e-10)


@pytest.mark.parametrize("rank", [2, 3])
def test_what_has_hardly_any_noise_stays_as_it_is(rank: int) -> None:
    space, shape = space_of(rank), shapes_of(rank, 2, 24)[5]
    np.testing.assert_allclose(reader_of(rank).read(space, shape, 1e-4), shape, atol=2e-3)


@pytest.mark.parametrize("rank", [2, 3])
def test_reflected_coefficients_are_those_of_reflected_volumes(rank: int) -> None:
    space, shape = space_of(rank), shapes_of(rank, 2, 24)[5]
    parts = torch.tensor(space.coefficients_of(shape), dtype=torch.float32)[None]
    reader = reader_of(rank)
    drawn = shape_reader._reflected(parts.repeat_interleave(64, 0), torch.Generator().manual_seed(0))
    kinds = {tuple(np.round(one.flatten().tolist(), 4)) for one in drawn}
    volume = reader.expand(parts)
    flips = [[axis for axis in range(rank) if kind >> axis & 1] for kind in range(2**rank)]
    wanted = [reader.compress(volume.flip([2 + axis for axis in axes]))[0] for axes in flips]
    assert len(kinds) == 2**rank
    for one in drawn:
        assert min(float((one - kind).abs().max()) for kind in wanted) < 1e-4


@pytest.mark.parametrize("rank", [2, 3])
def test_a_deformation_of_no_voxels_changes_nothing_and_one_of_one_moves_by_about_one(rank: int) -> None:
    ramp = torch.arange(15.0).view(1, 1, -1, *(1,) * (rank - 1)).expand(8, 1, *(15,) * rank).contiguous()
    random = torch.Generator().manual_seed(0)
    np.testing.assert_allclose(shape_reader._deformed(ramp, 5, torch.zeros(8), random), ramp, atol=1e-4)
    moved = shape_reader._deformed(ramp, 5, torch.ones(8), random) - ramp
    inside = moved[:, :, 3:-3]
    assert 0.6 < float(inside.square().mean().sqrt()) < 1.4


def test_the_same_seed_gives_the_same_reader_and_other_streams_go_on_undisturbed() -> None:
    state = torch.random.get_rng_state()
    first, again, other = reader_of(2), reader_of(2), reader_of(2, seed=1)
    assert torch.equal(state, torch.random.get_rng_state())
    shape, space = shapes_of(2, 2, 24)[0], space_of(2)
    np.testing.assert_array_equal(first.read(space, shape, 0.5), again.read(space, shape, 0.5))
    assert not np.array_equal(first.read(space, shape, 0.5), other.read(space, shape, 0.5))
