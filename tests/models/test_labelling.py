"""Networks that say what generated images show: their mean opinion, cleaned, and read back whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from medsynth.config import Grid, Labelling
from medsynth.errors import StoreError
from medsynth.models.labelling import Labeller, load_labeller, network_file
from medsynth.models.segmenter import Segmenter, build_segmenter, save_segmenter

RECIPE = Labelling(networks=2, channels=(4, 8))


def grid_of(rank: int) -> Grid:
    return Grid(spatial_dims=rank, shape=(16,) * rank, labels={0: "none", 1: "head", 2: "tail"})


class Says(Segmenter):
    """A network that says the same probabilities of every voxel where the image is above 0."""

    def __init__(self, grid: Grid, recipe: Labelling, *probabilities: float) -> None:
        super().__init__(grid, recipe)
        self.probabilities = probabilities

    def forward(self, x: Tensor) -> Tensor:
        seen = torch.tensor(self.probabilities).view(1, -1, *[1] * (x.ndim - 2)).log()
        nothing = torch.tensor([0.98, 0.01, 0.01]).view_as(seen).log()
        return torch.where(x > 0, seen, nothing)


@pytest.mark.parametrize("rank", [2, 3])
def test_a_voxel_gets_the_label_of_the_greatest_mean_probability_not_of_most_votes(rank: int) -> None:
    grid = grid_of(rank)
    images = -torch.ones(2, 1, *grid.shape)
    images[1, :, 3:7] = 1
    unsure = [Says(grid, RECIPE, 0.30, 0.36, 0.34), Says(grid, RECIPE, 0.30, 0.36, 0.34)]
    found = Labeller([*unsure, Says(grid, RECIPE, 0.01, 0.01, 0.98)]).outline(images)
    wanted = torch.zeros(2, *grid.shape, dtype=torch.uint8)
    wanted[1, 3:7] = 2
    assert torch.equal(found, wanted) and found.dtype == torch.uint8
    assert torch.equal(Labeller(unsure).outline(images), (wanted > 0).to(torch.uint8))


@pytest.mark.parametrize("rank", [2, 3])
def test_what_it_sees_is_cleaned_as_the_recipe_says(rank: int) -> None:
    grid = grid_of(rank)
    images = -torch.ones(1, 1, *grid.shape)
    images[:, :, 2:8, 2:8] = 1
    images[:, :, 11:13, 11:13] = 1
    whole = RECIPE.model_copy(update={"largest_component": True})
    found = {one: Labeller([Says(grid, one, 0.1, 0.8, 0.1)]).outline(images) for one in (RECIPE, whole)}
    assert torch.equal(found[RECIPE] > 0, images[:, 0] > 0)
    assert found[whole][:, 2:8, 2:8].all() and not found[whole][:, 11:13].any()


def test_networks_come_back_as_they_were_written(tmp_path: Path) -> None:
    grid, images = grid_of(2), torch.randn(3, 1, 16, 16)
    torch.manual_seed(1)
    networks = [build_segmenter(grid, RECIPE).eval() for _ in range(2)]
    for number, network in enumerate(networks):
        save_segmenter(network, network_file(tmp_path, number))
    found = load_labeller(tmp_path, grid, RECIPE)
    assert found is not None and torch.equal(found.outline(images), Labeller(networks).outline(images))
    assert not any(network.training for network in found.networks)
    network_file(tmp_path, 1).unlink()
    with pytest.raises(StoreError, match=r"labeller-1.*stage train again"):
        load_labeller(tmp_path, grid, RECIPE)
    assert load_labeller(tmp_path, grid, Labelling()) is None
