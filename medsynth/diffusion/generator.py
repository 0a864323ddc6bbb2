"""The whole generator: codec, mask encoder and denoiser together, from label maps to images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from medsynth.config import Grid, Synthesise, Train
from medsynth.diffusion.conditioning import MaskEncoder
from medsynth.diffusion.objective import training_schedule
from medsynth.diffusion.sampling import sample_latents
from medsynth.errors import StoreError
from medsynth.models.adapters import add_adapters
from medsynth.models.autoencoder import Codec, load_codec
from medsynth.models.denoiser import Denoiser, Preconditioning
from medsynth.models.drafting import Drafting, open_drafting
from medsynth.models.labelling import Labeller, load_labeller

WEIGHTS = "denoiser.safetensors"
SETTINGS = "generator.json"
APPEARANCE = "appearance.npz"


@dataclass(frozen=True)
class Dresser:
    """Released appearance statistics with the layout that reads them: drafts of images for label maps."""

    space: Drafting
    statistics: Any

    def draft(self, label: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.float32]:
        """Return an image (channel, \\*spatial) in [-1, 1] of one label map."""
        return self.space.render(label, self.statistics, rng)


@dataclass(frozen=True)
class Generator:
    """Everything that renders a pair.

    Attributes:
        denoiser: predicts the noise of latents.
        codec: to latents and back.
        masks: how label maps reach the denoiser.
        settings: of its training.
        dresser: who drafts; None where no appearance was released.
        labeller: who outlines what images show; None where pairs keep the label maps that they were drawn for.
    """

    denoiser: Denoiser
    codec: Codec
    masks: MaskEncoder
    settings: Train
    dresser: Dresser | None = None
    labeller: Labeller | None = None

    def render(
        self, labels: Int[Tensor, "batch *spatial"], seeds: Sequence[int], how: Synthesise
    ) -> Float[Tensor, "batch channel *spatial"]:
        """Return images in [-1, 1] of label maps; a row depends on its own label map and seed.

        Args:
            labels: label maps on the grid.
            seeds: one a row.
            how: scheduler, steps, guidance and where sampling starts.
        """
        encoded = self.masks(labels)
        drafts = self._drafts(labels, seeds) if how.start < 1 else None
        if drafts is not None and how.start == 0:
            return drafts
        latents = sample_latents(
            self.denoiser,
            encoded,
            self.codec.channels,
            seeds,
            self.settings,
            how.scheduler,
            how.steps,
            how.guidance,
            None if drafts is None else self.codec.encode(drafts),
            how.start,
        )
        return self.codec.decode(latents)

    def outline(
        self, images: Float[Tensor, "batch channel *spatial"], labels: Int[Tensor, "batch *spatial"]
    ) -> Int[Tensor, "batch *spatial"]:
        """Return the label maps that go with rendered images: those they were drawn for, or what a labeller sees.

        Args:
            images: from :meth:`render`.
            labels: what they were drawn for.
        """
        return labels if self.labeller is None else self.labeller.outline(images).to(labels)

    def _drafts(self, labels: Tensor, seeds: Sequence[int]) -> Tensor:
        if self.dresser is None:
            raise StoreError("the generator folder holds no appearance statistics: synthesise.start must be 1")
        maps = labels.cpu().numpy().astype(np.uint8)
        drawn = [self.dresser.draft(x, np.random.default_rng(seed)) for x, seed in zip(maps, seeds, strict=True)]
        return torch.from_numpy(np.stack(drawn)).to(labels.device)

    def to(self, device: torch.device) -> Generator:
        """Return the same generator on ``device`` (the modules move in place)."""
        moved = self.denoiser.to(device), self.codec.to(device), self.masks.to(device)
        labeller = None if self.labeller is None else self.labeller.to(device)
        return Generator(*moved, self.settings, self.dresser, labeller)


def build_generator(grid: Grid, settings: Train, codec: Codec) -> Generator:
    """Return a generator whose denoiser has fresh weights (no adapters yet)."""
    masks = MaskEncoder(grid.spatial_dims, grid.classes, codec.factor.bit_length() - 1)
    signal = training_schedule(settings).alphas_cumprod.sqrt()
    preconditioning = Preconditioning(signal, codec.spread.tolist(), grid.spatial_dims)
    denoiser = Denoiser(preconditioning, codec.channels, masks.channels, grid.spatial_dims, settings)
    return Generator(denoiser, codec, masks, settings)


def save_generator(generator: Generator, grid: Grid, folder: Path) -> None:
    """Write the denoiser and its settings into ``folder``."""
    weights = {name: value.detach().cpu().contiguous() for name, value in generator.denoiser.state_dict().items()}
    save_file(weights, folder / WEIGHTS)
    settings = {"grid": grid.model_dump(mode="json"), "train": generator.settings.model_dump(mode="json")}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def load_generator(folder: Path, autoencoder: Path) -> Generator:
    """Read the generator that stage ``train`` wrote, ready for sampling.

    Raises:
        StoreError: the folder holds no generator.
    """
    try:
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        weights = load_file(folder / WEIGHTS)
    except (OSError, json.JSONDecodeError) as error:
        raise StoreError("the generator folder holds no denoiser: run `medsynth train` again") from error
    train = Train.model_validate(settings["train"])
    grid = Grid.model_validate(settings["grid"])
    generator = build_generator(grid, train, load_codec(autoencoder))
    if train.trainable == "lora":
        add_adapters(generator.denoiser, train.lora_rank)
    generator.denoiser.load_state_dict(weights)
    generator.denoiser.eval().requires_grad_(False)
    generator = replace(generator, labeller=load_labeller(folder, grid, train.labelling))
    if not (folder / APPEARANCE).is_file():
        return generator
    return replace(generator, dresser=load_dresser(folder, open_drafting(grid, train.appearance)))


def load_dresser(folder: Path, space: Drafting) -> Dresser:
    """Read the released appearance statistics of a generator folder.

    Raises:
        StoreError: another version of medsynth wrote them.
    """
    with np.load(folder / APPEARANCE) as arrays:
        found = {name: arrays[name] for name in arrays.files}
    other = StoreError(
        "another version of medsynth wrote the appearance statistics: start the run again in a new folder"
    )
    try:
        statistics = space.statistics_type(**found)
    except TypeError as error:
        raise other from error
    if not space.fits(statistics):
        raise other
    return Dresser(space, statistics)
