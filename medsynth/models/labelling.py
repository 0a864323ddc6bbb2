"""Networks that say what generated images show: label maps for pairs of a study without privacy.

A generator does not quite draw what it is asked for, and a network that learns from its pairs learns the difference.
Networks that patients taught outline its images as they outline patients'; whoever learns from such pairs learns what
they know (Hinton, Vinyals, Dean 2015, "Distilling the knowledge in a neural network"; Xie et al. 2020, "Self-training
with noisy student improves ImageNet classification").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from medsynth.config import Grid, Labelling
from medsynth.models.segmenter import Segmenter, load_segmenter


@dataclass(frozen=True)
class Labeller:
    """Some networks of one recipe, whose mean opinion counts.

    Attributes:
        networks: ready to predict, one at least.
    """

    networks: Sequence[Segmenter]

    @torch.no_grad()
    def outline(self, images: Float[Tensor, "batch channel *spatial"]) -> UInt8[Tensor, "batch *spatial"]:
        """Return the label map of each image: at each voxel the label with the greatest mean probability.

        Args:
            images: in [-1, 1], the whole grid, on the networks' device.

        Returns:
            Label maps on the CPU, cleaned as the recipe says.
        """
        mean = sum((network(images).softmax(dim=1) for network in self.networks), torch.zeros((), device=images.device))
        return self.networks[0].clean(mean.argmax(dim=1).to(torch.uint8).cpu())

    def to(self, device: torch.device) -> Labeller:
        """Return the same labeller on ``device`` (the networks move in place)."""
        return Labeller([network.to(device) for network in self.networks])


def network_file(folder: Path, number: int) -> Path:
    """Return where network ``number`` of a labeller lies in a generator folder."""
    return folder / f"labeller-{number}.safetensors"


def load_labeller(folder: Path, grid: Grid, recipe: Labelling) -> Labeller | None:
    """Read the networks of a generator folder; None where the study asks for none.

    Raises:
        StoreError: a network is missing, or of another architecture.
    """
    paths = [network_file(folder, number) for number in range(recipe.networks)]
    return Labeller([load_segmenter(grid, recipe, path, "train") for path in paths]) if paths else None
