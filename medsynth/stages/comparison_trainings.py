"""The trainings of ``medsynth compare``: what each learns from, and one small file each that outlives a kill."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from medsynth import logs
from medsynth.config import Grid, Segment
from medsynth.files import replace_bytes
from medsynth.imaging.cohort import Patient
from medsynth.imaging.phantom import render
from medsynth.metrics.overlap import patient_dice
from medsynth.metrics.surface import patient_surfaces
from medsynth.models.segmenter import predict, save_segmenter
from medsynth.randomness import derive_seed, generator
from medsynth.stages.comparison_schema import Kind
from medsynth.stages.segmenter_training import Training, side_by_side, train_segmenter, write_patients, write_pool

_CONTRAST_IMAGES = 400
"""Random-contrast images a run: a few contrasts of each released label map, at least one."""
_LAST = 0.05  # share of the steps whose mean is the final loss
MEASURES = ("dice", "surface_dice", "hd95")


@dataclass(frozen=True)
class Arm:
    """What one model is trained on.

    Attributes:
        kind: which images.
        run: label of the run that they come from; None for real patients alone.
        real_patients: how many of them.
    """

    kind: Kind
    run: str | None
    real_patients: int

    @property
    def name(self) -> str:
        """Name of a file, unique in a comparison."""
        parts = [self.kind, self.run, f"n{self.real_patients}" if self.real_patients else None]
        return "-".join(part for part in parts if part)


@dataclass(frozen=True)
class Ruler:
    """How a trained network is measured: the held-out patients, and surfaces in mm (or pixels)."""

    held_out: Path
    spacing: tuple[float, ...]
    tolerance: float


@dataclass(frozen=True)
class Trained:
    """What is kept of one training; tables are ``(held-out patient, label)``, NaN where nobody has the label."""

    arm: Arm
    seed: int
    loss: float
    elapsed_s: float
    dice: np.ndarray
    surface_dice: np.ndarray
    hd95: np.ndarray

    @property
    def means(self) -> dict[str, float]:
        """Return the mean of each measure over all that is known."""
        return {name: float(np.nanmean(table)) for name in MEASURES if not np.isnan(table := getattr(self, name)).all()}


@dataclass(frozen=True)
class _Job:
    """One training, sent to a worker."""

    arm: Arm
    seed: int
    training: Training
    ruler: Ruler
    network: Path | None

    @property
    def name(self) -> str:
        return self.training.name


@dataclass(frozen=True)
class Bench:
    """What all trainings of a comparison share.

    Attributes:
        seed: the study's.
        grid: of the study.
        segment: the recipe.
        train: patients in the order of the cohort's contents, so that subsets do not depend on pseudonyms.
        test: held-out patients.
        pairs: images and labels of each run's synthetic pairs.
        folder: the half-written output.
    """

    seed: int
    grid: Grid
    segment: Segment
    train: list[Patient]
    test: list[Patient]
    pairs: Mapping[str, tuple[Tensor, Tensor]]
    folder: Path


def arms_of(runs: Sequence[str], numbers: Sequence[int]) -> list[Arm]:
    """Return every training set, what all others are measured against first."""
    real = [Arm("real_only", None, number) for number in sorted(numbers, reverse=True)]
    strong = [Arm("strong_augmentation", None, number) for number in numbers]
    alone = [Arm(kind, run, 0) for run in runs for kind in _ALONE]
    return [*real, *alone, *strong, *(Arm("mixed", run, number) for run in runs for number in numbers)]


_ALONE: tuple[Kind, ...] = ("synthetic_only", "random_contrast")


def network_path(folder: Path, seed: int) -> Path:
    """Return where the network of all real patients lies: it judges synthetic images."""
    return folder / "networks" / f"real_only-s{seed}.safetensors"


def train_arms(
    bench: Bench, arms: Sequence[Arm], seeds: Sequence[int], ruler: Ruler, device: str, workers: int
) -> Iterator[tuple[Trained, bool]]:
    """Yield every training and whether it was done now; finished ones are read back.

    Args:
        bench: what all trainings share.
        arms: from :func:`arms_of`.
        seeds: of each arm.
        ruler: with ``held_out`` below the scratch folder; written here.
        device: ``"cpu"`` or the GPU.
        workers: processes side by side on a CPU.

    Raises:
        MedsynthError: a training failed; the others are kept.
    """
    kept = bench.folder / "trainings"
    kept.mkdir(exist_ok=True)
    network_path(bench.folder, 0).parent.mkdir(exist_ok=True)
    wanted = [(arm, seed) for arm in arms for seed in seeds]
    done = {pair: found for pair in wanted if (found := _finished(bench, *pair)) is not None}
    if done:
        logs.say("compare: going on where it stopped", finished=len(done), of=len(wanted))
    yield from ((found, False) for found in done.values())
    missing = [pair for pair in wanted if pair not in done]
    if not missing:
        return
    _write_pools(bench, {arm for arm, _ in missing}, ruler)
    jobs = [_job(bench, arm, seed, ruler) for arm, seed in missing]
    for _, found in side_by_side(_measure, jobs, device, workers, "compare"):
        _write(kept, found)
        yield found, True


def _job(bench: Bench, arm: Arm, seed: int, ruler: Ruler) -> _Job:
    scratch = ruler.held_out.parent
    pools = [scratch / "real.safetensors"] if arm.real_patients else []
    pools += [_pool(scratch, arm)] if arm.run else []
    units = None
    if arm.real_patients:
        # One order a seed: the patients of a small set are among those of a larger one, whatever else is learnt from.
        order = generator(bench.seed, "compare", "patients", seed).permutation(len(bench.train))
        units = tuple(int(index) for index in order[: arm.real_patients])
    name, stream = f"{arm.name}-s{seed}", derive_seed(bench.seed, "compare", arm.name, seed)
    strong = arm.kind == "strong_augmentation"
    training = Training(name, bench.grid, bench.segment, stream, tuple(pools), units, strong)
    network = network_path(bench.folder, seed) if _judges(bench, arm) else None
    return _Job(arm, seed, training, ruler, network)


def _judges(bench: Bench, arm: Arm) -> bool:
    """Whether the network is needed after its own training."""
    return arm.kind == "real_only" and arm.real_patients == len(bench.train)


def _finished(bench: Bench, arm: Arm, seed: int) -> Trained | None:
    if _judges(bench, arm) and not network_path(bench.folder, seed).is_file():
        return None
    return _read(bench.folder / "trainings", arm, seed)


def _pool(scratch: Path, arm: Arm) -> Path:
    return scratch / f"{'contrast' if arm.kind == 'random_contrast' else 'synthetic'}-{arm.run}.safetensors"


def _write_pools(bench: Bench, arms: set[Arm], ruler: Ruler) -> None:
    scratch = ruler.held_out.parent
    write_patients(ruler.held_out, bench.test)
    if any(arm.real_patients for arm in arms):
        write_patients(scratch / "real.safetensors", bench.train)
    for arm in arms:
        if arm.run is None or (path := _pool(scratch, arm)).exists():
            continue
        images, labels = bench.pairs[arm.run]
        copies = 1
        if arm.kind == "random_contrast":
            images, labels, copies = random_contrast(bench.grid, labels, bench.seed)
        write_pool(path, images, labels, torch.full((len(images) // copies,), copies))


def random_contrast(grid: Grid, labels: Tensor, seed: int) -> tuple[Tensor, Tensor, int]:
    """Paint label maps as SynthSeg does (Billot et al. 2023): what can be had from the released masks alone.

    A random intensity distribution a label, random structures around, blur, bias field and noise: no intensity of a
    patient goes in.

    Args:
        grid: the public grid.
        labels: released label maps ``(pair, *spatial)``.
        seed: of everything random.

    Returns:
        Images ``(record, channel, *spatial)``, labels ``(record, *spatial)``, and how many of them each map has.
    """
    copies = max(1, _CONTRAST_IMAGES // max(1, len(labels)))
    maps = labels.repeat_interleave(copies, dim=0)
    steps = logs.progress(maps.numpy(), "compare: random contrasts", len(maps))
    images = [render(label, grid, generator(seed, "compare", "contrast", at)) for at, label in enumerate(steps)]
    return torch.from_numpy(np.stack(images)), maps, copies


def _measure(job: _Job, device: str) -> Trained:
    """Train one network and measure it on the held-out patients."""
    started = time.monotonic()
    model, losses = train_segmenter(job.training, torch.device(device))
    patients = load_file(job.ruler.held_out)
    spans = list(zip(patients["starts"].tolist(), patients["ends"].tolist(), strict=True))
    predicted = [predict(model, patients["images"][start:end]) for start, end in spans]
    truth = [patients["labels"][start:end] for start, end in spans]
    if job.network is not None:
        save_segmenter(model, job.network)
    dice, surfaces = measures(predicted, truth, job.training.grid.classes, job.ruler)
    last = losses[-max(1, int(_LAST * len(losses))) :]
    elapsed_s = round(time.monotonic() - started, 1)
    return Trained(job.arm, job.seed, sum(last) / len(last), elapsed_s, dice, *surfaces)


def measures(
    predicted: list[Tensor], truth: list[Tensor], classes: int, ruler: Ruler
) -> tuple[np.ndarray, tuple[np.ndarray, np.ndarray]]:
    """Return Dice, and surface Dice with HD95, of each patient and label."""
    found = patient_surfaces(predicted, truth, classes, ruler.spacing, ruler.tolerance)
    return patient_dice(predicted, truth, classes), (found.dice, found.hd95)


def _write(folder: Path, found: Trained) -> None:
    """Write one small file in one step: it is there or not."""
    tables = {name: [[_json(x) for x in row] for row in getattr(found, name).tolist()] for name in MEASURES}
    values = {"loss": _json(found.loss), "elapsed_s": found.elapsed_s, **tables}
    replace_bytes(folder / f"{found.arm.name}-s{found.seed}.json", (json.dumps(values) + "\n").encode())


def _read(folder: Path, arm: Arm, seed: int) -> Trained | None:
    with contextlib.suppress(OSError, ValueError, KeyError):
        values: dict[str, Any] = json.loads((folder / f"{arm.name}-s{seed}.json").read_text(encoding="utf-8"))
        tables = [np.array(values[name], dtype=float) for name in MEASURES]
        loss = math.nan if values["loss"] is None else float(values["loss"])
        return Trained(arm, seed, loss, values["elapsed_s"], *tables)
    return None


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None
