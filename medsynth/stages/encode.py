"""Stage ``encode``: the latent codec, from public phantoms only, so that it costs no privacy."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from medsynth import logs, store
from medsynth.config import Encode, Study
from medsynth.devices import open_device
from medsynth.randomness import derive_seed
from medsynth.stages.inputs import config_digest
from medsynth.store import Manifest
from medsynth.tracking import Tracker

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from medsynth.models.autoencoder import Codec

_HELD_OUT = 32  # phantoms that measure the reconstruction and never train it
_LOG_EVERY = 25
_WEIGHT_DECAY = 0.01
_UNFINISHED = "training.pt"


def run(config: Study, inputs: Mapping[str, Path], out: Path, tracker: Tracker) -> Manifest:
    """Write ``autoencoder/``: weights, settings and the reconstruction error on phantoms it never saw.

    Args:
        config: sections ``grid`` and ``encode``.
        inputs: nothing is read; patients never reach this stage.
        out: the new folder.
        tracker: receives the training loss and the reconstruction error.
    """
    import torch

    from medsynth.imaging.phantom import phantom_pairs
    from medsynth.models.autoencoder import build_codec, save_codec

    del inputs
    device = open_device(config.compute)
    encode, grid = config.encode, config.grid
    losses: list[float] = []
    trains = encode.codec == "kl"
    with store.create(out, "encode", config_digest(config, "encode"), keep_partial=trains) as folder:
        images, _ = phantom_pairs(grid, encode.phantoms.count + _HELD_OUT, derive_seed(encode.phantoms.seed, "encode"))
        phantoms = torch.from_numpy(images).to(device)
        train, held_out = phantoms[:-_HELD_OUT], phantoms[-_HELD_OUT:]
        torch.manual_seed(derive_seed(config.seed, "encode", "weights"))
        codec = build_codec(grid, encode).to(device)
        if trains:
            folder.resume()
            losses = _train(codec, train, encode, config.seed, tracker, folder.path / _UNFINISHED)
        codec.eval().requires_grad_(False)
        codec.calibrate(train)
        quality = reconstruction(codec, held_out)
        save_codec(codec.cpu(), grid, encode, folder.path)
        text = json.dumps({"phantoms": quality, "loss": losses}, indent=1) + "\n"
        (folder.path / "reconstruction.json").write_text(text, encoding="utf-8")
        tracker.metrics({f"phantom_{name}": value for name, value in quality.items()})
        logs.say("codec ready", codec=encode.codec, latent_channels=codec.channels, **quality)
        details = {"codec": encode.codec, "reconstruction": quality}
        return folder.finish("public", details=details, scratch=[_UNFINISHED])


def reconstruction(codec: Codec, images: Tensor) -> dict[str, float]:
    """Return mean absolute error and PSNR (dB, peak-to-peak 2) of images passed through the codec.

    Args:
        codec: the codec.
        images: (batch, channel, \\*spatial) in [-1, 1]; of patients, the result is internal.
    """
    error = codec.decode(codec.encode(images)) - images
    mean_square = max(float(error.square().mean()), 1e-12)
    return {"mae": float(error.abs().mean()), "psnr_db": 10 * math.log10(4 / mean_square)}


def _train(codec: Codec, phantoms: Tensor, encode: Encode, seed: int, tracker: Tracker, keep: Path) -> list[float]:
    """Train the codec in place and return its loss, one value every :data:`_LOG_EVERY` steps."""
    import torch

    from medsynth.models.fitting import Recipe, fit

    generator = torch.Generator().manual_seed(derive_seed(seed, "encode", "batches"))

    def loss_of(stream: torch.Generator) -> torch.Tensor:
        rows = torch.randint(0, len(phantoms), (encode.batch_size,), generator=stream)
        return _loss(codec, phantoms[rows.to(phantoms.device)], encode.kl_weight)

    series: list[float] = []

    def report(losses: Sequence[float]) -> None:
        if (len(losses) - 1) % _LOG_EVERY == 0:
            tracker.metrics({"autoencoder_loss": losses[-1]}, step=len(losses) - 1)
        series[:] = losses[::_LOG_EVERY]

    recipe = Recipe(encode.steps, encode.learning_rate, weight_decay=_WEIGHT_DECAY)
    fit(codec, loss_of, "training the autoencoder on phantoms", recipe, generator, report, keep=keep)
    return series


def _loss(codec: Codec, batch: Tensor, kl_weight: float) -> torch.Tensor:
    """L1 reconstruction plus the KL divergence to the unit Gaussian (Kingma and Welling 2014, appendix B)."""
    decoded, mean, sigma = codec.transform(batch)
    kl = 0.5 * (mean.square() + sigma.square() - 2 * sigma.clamp(min=1e-6).log() - 1).sum(1).mean()
    loss: torch.Tensor = (decoded - batch).abs().mean() + kl_weight * kl
    return loss
