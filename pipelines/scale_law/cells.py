"""One cell of the table: a public denoiser, DP-SGD on phantom patients, pairs, a segmentation network, its Dice."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from medsynth import logs
from medsynth.config import Appearance, Encode, Masks, Privacy, Segment, Synthesise, Train
from medsynth.diffusion.fitting import fit, open_ema
from medsynth.diffusion.generator import Generator, build_generator
from medsynth.diffusion.objective import Batch, noise_rows, row_loss
from medsynth.imaging.phantom import phantom_pairs, sample_label_maps
from medsynth.metrics.overlap import constant_prediction, mean_shape, patient_dice, patient_means
from medsynth.models.autoencoder import build_codec
from medsynth.models.denoiser import Denoiser
from medsynth.models.segmenter import predict
from medsynth.privacy.budget import plan_budget
from medsynth.privacy.entropy import open_entropy
from medsynth.privacy.gradients import open_backend
from medsynth.privacy.mechanism import DpSgd
from medsynth.randomness import derive_seed
from medsynth.stages.private_training import choose_trainable
from medsynth.stages.segmenter_training import Training, train_segmenter, write_pool
from pipelines.scale_law.cohort import GRID, patients

Trainable = Literal["bias_norm", "lora", "all"]
_PATIENTS, _HELD_OUT, _PUBLIC = 0, 1, 2  # seeds of three cohorts that share nobody
_RATES: dict[Trainable, float] = {"bias_norm": 1e-2, "lora": 5e-3, "all": 2e-3}
"""Learning rates of DP-SGD's Adam: public constants, the same for every cohort and epsilon."""
_LORA_RANK = 2
_LARGEST_PART = 32
_PUBLIC_NETWORKS = 8  # of the public generator, from which the gain of every cell is counted
_GRADIENTS = 16  # public phantoms whose median gradient norm is the clip


@dataclass(frozen=True)
class Effort:
    """How much work a cell is; the same for all cells of a table.

    Attributes:
        public: phantoms that the denoiser is pre-trained on.
        pretrain_steps: of that.
        steps: of DP-SGD.
        sampling_rate: of a patient, as far as ``rows`` allows.
        rows: of a step on average; fewer patients get more noise draws each, up to four.
        pairs: rendered for the segmentation network.
        segment_steps: of each segmentation network.
        seeds: segmentation networks a cell.
        real: phantom patients that the ceiling is trained on.
        test: phantom patients that every network is tested on.
    """

    public: int = 2000
    pretrain_steps: int = 2000
    steps: int = 40
    sampling_rate: float = 0.25
    rows: int = 256
    pairs: int = 400
    segment_steps: int = 300
    seeds: int = 1
    real: int = 1000
    test: int = 300


QUICK = Effort(public=32, pretrain_steps=10, steps=3, rows=32, pairs=8, segment_steps=3, seeds=1, real=8, test=8)


@dataclass(frozen=True)
class Cell:
    """Which cell: ``patients`` 0 is the public generator without DP-SGD; ``epsilon`` inf adds no noise but clips."""

    patients: int
    epsilon: float
    trainable: Trainable
    repeat: int = 0

    @property
    def name(self) -> str:
        """Its file's name."""
        return f"{self.patients}-{self.epsilon:g}-{self.trainable}-{self.repeat}" if self.patients else "public"


def measure(cell: Cell, effort: Effort, folder: Path) -> dict[str, Any]:
    """Return what one cell reaches.

    Args:
        cell: which.
        effort: how much work.
        folder: of the whole table; keeps what cells share.
    """
    began = time.process_time()
    ruler = _ruler(effort, folder)
    built = _public_generator(effort, folder)
    found: dict[str, Any] = {
        "patients": cell.patients,
        "epsilon": cell.epsilon if math.isfinite(cell.epsilon) else "inf",
        "trainable": cell.trainable,
        "repeat": cell.repeat,
        "parameters": 0,
    }
    if cell.patients:
        found["parameters"] = choose_trainable(_train(cell, effort), built)
        found |= _train_privately(cell, effort, built, folder)
    networks = effort.seeds if cell.patients else _PUBLIC_NETWORKS * effort.seeds
    dice = _dice(*_pairs(built, effort), effort, networks)
    low, real = ruler["floor"], ruler["real"]
    skill = (statistics.fmean(dice) - low) / (real - low)
    return {**found, **ruler, "dice": dice, "skill": skill, "cpu_s": round(time.process_time() - began, 1)}


def _train(cell: Cell, effort: Effort) -> Train:
    """Return the section of a cell, a function of the declared size of its cohort."""
    rate = min(effort.sampling_rate, effort.rows / cell.patients) if cell.patients else 1.0
    return Train(
        channels=(16, 32),
        norm_groups=8,
        head_channels=8,
        trainable=cell.trainable,
        lora_rank=_LORA_RANK,
        steps=effort.steps,
        sampling_rate=rate,
        learning_rate=_RATES[cell.trainable],
        draws=min(4, max(1, round(effort.rows / (rate * cell.patients)))) if cell.patients else 1,
        ema_decay=0.9,
        appearance=Appearance(enabled=False),
    )


def _public_generator(effort: Effort, folder: Path) -> Generator:
    settings = _train(Cell(0, math.inf, "all"), effort)
    torch.manual_seed(0)
    images, labels = phantom_pairs(GRID, effort.public, _PUBLIC)
    codec = build_codec(GRID, Encode(levels=2)).eval()
    codec.calibrate(torch.from_numpy(images))
    built = build_generator(GRID, settings, codec)
    kept = folder / "public.safetensors"
    if not kept.is_file():
        latents, masks = _encoded(built, torch.from_numpy(images), torch.from_numpy(labels))

        def draw(stream: torch.Generator) -> tuple[Tensor, Tensor]:
            rows = torch.randint(0, len(latents), (32,), generator=stream)
            return latents[rows], masks[rows]

        what, steps = "pre-training on phantoms", effort.pretrain_steps
        stream = torch.Generator().manual_seed(0)
        public = settings.model_copy(update={"ema_decay": 0.99})
        fit(built.denoiser, draw, what, steps, 2e-3, public, stream, lambda _losses: None)
        save_file({k: v.detach().contiguous() for k, v in built.denoiser.state_dict().items()}, kept)
    built.denoiser.load_state_dict(load_file(kept))
    return built


def _encoded(built: Generator, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return built.codec.encode(images), built.masks(labels)


def _train_privately(cell: Cell, effort: Effort, built: Generator, folder: Path) -> dict[str, Any]:
    """Take the steps of DP-SGD on the first patients of the phantom cohort and return what they cost."""
    settings = _train(cell, effort)
    privacy = Privacy(epsilon=cell.epsilon, delta=1 / (10 * cell.patients), declared_patients=cell.patients)
    plan = plan_budget(privacy, settings, Masks(source="public_shapes", coefficients=(8, 8)))
    model = built.denoiser.train()
    clip_norm = _public_norm(built, settings)
    mechanism = DpSgd(
        "denoiser",
        settings.sampling_rate,
        settings.steps,
        plan.training_noise_multiplier,
        clip_norm,
        settings.sampling_rate * cell.patients,
    )
    latents, masks = _encoded(built, *patients(cell.patients, _PATIENTS, folder / "patients.safetensors"))
    backend, entropy = open_backend("bookkeeping", model, row_loss, clip_norm), open_entropy("os")
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer, ema = torch.optim.Adam(parameters, lr=settings.learning_rate), open_ema(model, settings.ema_decay)
    for step in logs.progress(range(settings.steps), f"{cell.name}: DP-SGD", settings.steps):
        drawn = mechanism.draw(cell.patients, entropy)
        stream = torch.Generator().manual_seed(derive_seed(cell.repeat, "scale-law", "rows", step))
        units = list(_units(latents[drawn], masks[drawn], model, settings, stream))
        sums = [backend.clipped_sum(part).tensors for part in _in_powers_of_two(units)]
        total = [torch.stack(parts).sum(0) for parts in zip(*sums, strict=True)]
        for parameter, gradient in zip(parameters, mechanism.noisy_mean(total, entropy), strict=True):
            parameter.grad = gradient.reshape(parameter.shape)
        optimizer.step()
        ema.step(parameters)
    ema.copy_to(parameters)
    return {
        "noise_multiplier": plan.training_noise_multiplier,
        "sampling_rate": settings.sampling_rate,
        "steps": settings.steps,
        "clip_norm": clip_norm,
    }


def _in_powers_of_two(units: Sequence[Batch]) -> Iterator[Sequence[Batch]]:
    """Yield all units in parts of few different sizes: the backend times its rules anew for every size it meets."""
    first, size = 0, _LARGEST_PART
    while first < len(units):
        while size > len(units) - first:
            size //= 2
        yield units[first : first + size]
        first += size
    if not units:
        yield units


def _units(
    latents: Tensor, masks: Tensor, model: Denoiser, settings: Train, stream: torch.Generator
) -> Iterator[Batch]:
    """Yield one batch a patient: its one record at as many noise levels as ``draws``."""
    draws, known = settings.draws, model.preconditioning
    rows = [part.repeat_interleave(draws, dim=0) for part in (latents, masks)]
    if not len(latents):
        return
    noised = noise_rows(rows[0], rows[1], known, settings.mask_dropout, stream)
    for first in range(0, len(rows[0]), draws):
        yield {name: value[first : first + draws] for name, value in noised.items()}


def _public_norm(built: Generator, settings: Train) -> float:
    images, labels = phantom_pairs(GRID, _GRADIENTS, _PUBLIC + 1)
    latents, masks = _encoded(built, torch.from_numpy(images), torch.from_numpy(labels))
    stream = torch.Generator().manual_seed(0)
    backend = open_backend("unit", built.denoiser, row_loss, 1.0)
    norms = backend.clipped_sum(list(_units(latents, masks, built.denoiser, settings, stream))).norms
    return max(float(np.median(norms)), 1e-6)


def _pairs(built: Generator, effort: Effort) -> tuple[Tensor, Tensor]:
    """Return rendered pairs; the label maps are public shapes, the same in every cell."""
    built.denoiser.eval()
    how = Synthesise(scheduler="dpm-solver++", steps=10)
    labels = torch.from_numpy(sample_label_maps(GRID, effort.pairs, derive_seed(_PUBLIC, "pairs")))
    images = [
        built.render(part, [derive_seed(0, "scale-law", "pair", first + row) for row in range(len(part))], how)
        for first, part in ((first, labels[first : first + 100]) for first in range(0, len(labels), 100))
    ]
    return torch.cat(images).clamp(-1, 1), labels


def _dice(images: Tensor, labels: Tensor, effort: Effort, networks: int) -> list[float]:
    """Return the Dice of networks trained on these pairs, one a seed, on phantom patients kept for this."""
    settings = Segment(channels=(8, 16, 32), steps=effort.segment_steps, batch_size=16, learning_rate=4e-3)
    test, truth = _test(effort)
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        pool = Path(scratch) / "pool.safetensors"
        write_pool(pool, images, labels, torch.ones(len(images), dtype=torch.int64))
        for seed in range(networks):
            job = Training("scale-law", GRID, settings, derive_seed(seed, "scale-law", "segment"), (pool,))
            model, _ = train_segmenter(job, torch.device("cpu"))
            seen = predict(model, test, batch_size=100)
            table = patient_dice(list(seen[:, None]), list(truth[:, None]), GRID.classes)
            found.append(float(np.nanmean(patient_means(table))))
    return found


def _test(effort: Effort) -> tuple[Tensor, Tensor]:
    with tempfile.TemporaryDirectory() as scratch:
        return patients(effort.test, _HELD_OUT, Path(scratch) / "test.safetensors")


def _ruler(effort: Effort, folder: Path) -> dict[str, float]:
    """Return the Dice of real-only training and of the image-blind floor; measured once a table."""
    kept = folder / "ruler.json"
    if not kept.is_file():
        images, labels = patients(effort.real, derive_seed(_HELD_OUT, "real"), folder / "real.safetensors")
        _, truth = _test(effort)
        shape = mean_shape(list(labels[:, None]), GRID.classes)
        blind = patient_dice(constant_prediction(shape, list(truth[:, None])), list(truth[:, None]), GRID.classes)
        real = _dice(images, labels, effort, effort.seeds)
        kept.write_text(json.dumps({"floor": float(np.nanmean(blind)), "real": statistics.fmean(real)}) + "\n")
    found: dict[str, float] = json.loads(kept.read_text(encoding="utf-8"))
    return found
