"""Stage ``segment``: a downstream network a regime and seed, one recipe for real, synthetic and mixed pairs."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import torch
from monai.losses.dice import DiceCELoss
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from medsynth import logs, store
from medsynth.config import Grid, Segment, Study
from medsynth.devices import open_device
from medsynth.errors import InputError, MedsynthError
from medsynth.imaging.cohort import load_pairs, load_patients
from medsynth.models.segmenter import build_segmenter, save_segmenter
from medsynth.randomness import derive_seed
from medsynth.stages.inputs import config_digest, stage_inputs
from medsynth.store import Manifest
from medsynth.tracking import Tracker

POOLS: dict[str, tuple[str, ...]] = {
    "real_only": ("real",),
    "synthetic_only": ("synthetic",),
    "mixed": ("real", "synthetic"),
}
_POINTS = 100  # of a logged loss series
_ROTATION_RAD, _SCALE, _SHIFT = 0.15, 0.10, 0.06  # largest affine changes; the shift in fractions of half an axis
_GAIN, _OFFSET, _GAMMA, _NOISE = 0.2, 0.15, 0.35, 0.08  # largest intensity changes of an image in [-1, 1]
_WARM_UP = 0.1  # share of the steps in which the learning rate rises
_GRADIENT_NORM = 5.0


def run(config: Study, inputs: Mapping[str, Path], out: Path, tracker: Tracker) -> Manifest:
    """Train every regime and seed on the train patients and (or) the synthetic pairs.

    Args:
        config: uses ``seed``, ``grid``, ``segment`` and ``compute``.
        inputs: the finished folders ``cohort`` and ``synthetic``.
        out: folder to write: ``<regime>-<seed>.safetensors`` and ``training.json`` (losses), all internal.
        tracker: gets the loss series of each regime.

    Raises:
        InputError: no train patient or no synthetic pair.
        MedsynthError: a training failed; the message names regime and seed.
    """
    folders = stage_inputs(inputs, "cohort", "synthetic")
    with store.create(out, "segment", config_digest(config, "segment"), folders) as folder:
        with tempfile.TemporaryDirectory(dir=folder.path, prefix=".pools-") as scratch:
            _write_pools(config, folders, Path(scratch))
            jobs = [
                _Job(
                    config.grid, config.segment, regime, seed, _stream(config, regime, seed), Path(scratch), folder.path
                )
                for regime in config.segment.regimes
                for seed in config.segment.seeds
            ]
            losses = _train_all(jobs, open_device(config.compute).type, config.compute.workers)
        (folder.path / "training.json").write_text(json.dumps({"loss": losses}, indent=1) + "\n", encoding="utf-8")
        _report(losses, tracker)
        return folder.finish("internal", details={"networks": sorted(losses)})


@dataclass(frozen=True)
class _Job:
    """Everything that one training needs; sent to a worker, so paths instead of arrays."""

    grid: Grid
    segment: Segment
    regime: str
    seed: int
    stream: int
    pools: Path
    out: Path

    @property
    def name(self) -> str:
        return f"{self.regime}-{self.seed}"


def _stream(config: Study, regime: str, seed: int) -> int:
    return derive_seed(config.seed, "segment", regime, seed)


def _write_pools(config: Study, folders: Mapping[str, Path], scratch: Path) -> None:
    """Write images, labels and the first record of each unit (patient or pair) of both pools."""
    needed = {pool for regime in config.segment.regimes for pool in POOLS[regime]}
    if "real" in needed:
        patients = load_patients(folders["cohort"], config.grid, "train")
        if not patients:
            raise InputError(
                "the cohort has no train patient: more patients or a smaller ingest.test_fraction are needed"
            )
        counts = torch.tensor([len(patient.images) for patient in patients])
        images, labels = torch.cat([p.images for p in patients]), torch.cat([p.labels for p in patients])
        _write_pool(scratch / "real.safetensors", images, labels, counts)
    if "synthetic" in needed:
        images, labels = load_pairs(folders["synthetic"], config.grid)
        if not len(images):
            raise InputError("there is no synthetic pair to train on: synthesise.pairs must be at least 1")
        _write_pool(scratch / "synthetic.safetensors", images, labels, torch.ones(len(images), dtype=torch.int64))


def _write_pool(path: Path, images: Tensor, labels: Tensor, counts: Tensor) -> None:
    ends = counts.cumsum(0)
    values = {"images": images.float(), "labels": labels.to(torch.uint8), "starts": ends - counts, "ends": ends}
    save_file({name: value.contiguous() for name, value in values.items()}, path)


def _train_all(jobs: list[_Job], device: str, workers: int) -> dict[str, list[float]]:
    """Return the loss series by network; side by side in processes on a CPU, one after another on a GPU."""
    if device != "cpu" or workers == 1 or len(jobs) == 1:
        return {job.name: _attempt(job, device) for job in logs.progress(jobs, "segment", len(jobs))}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_start_worker) as pool:
        futures = {pool.submit(_attempt, job, device): job.name for job in jobs}
        try:
            done = {futures[f]: f.result() for f in logs.progress(as_completed(futures), "segment", len(jobs))}
        except BrokenProcessPool:
            raise MedsynthError(
                "a worker of stage 'segment' was killed, most likely for memory: lower compute.workers"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    return {job.name: done[job.name] for job in jobs}


def _start_worker() -> None:
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:  # a killed pipeline must not leave trainings behind
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _attempt(job: _Job, device: str) -> list[float]:
    try:
        return _train(job, torch.device(device))
    except MedsynthError:
        raise
    except Exception as error:
        reason = type(error).__name__ if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise MedsynthError(f"training of the segmenter '{job.name}' failed ({reason})") from error


def _train(job: _Job, device: torch.device) -> list[float]:
    """Train one network, write its weights, and return its loss at each step."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(job.stream)
        model = build_segmenter(job.grid, job.segment).to(device)
    # Channels-last is 1.2 to 1.3 times as fast on CPUs (measured on a 48x64x48 grid).
    layout = torch.channels_last if job.grid.spatial_dims == 2 else torch.channels_last_3d
    model.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stubs lack this overload
    loss_of = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=job.segment.learning_rate, weight_decay=1e-4)
    steps = job.segment.steps
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, job.segment.learning_rate, total_steps=steps + 1, pct_start=_WARM_UP
    )
    losses: list[float] = []
    model.train()
    for images, labels in _batches(job):
        loss = loss_of(model(images.to(device, memory_format=layout)), labels[:, None].to(device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _GRADIENT_NORM)
        optimiser.step()
        rate.step()
        losses.append(float(loss.detach()))
    save_segmenter(model, job.out / f"{job.name}.safetensors")
    return losses


def _batches(job: _Job) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the training batches: each row a pool, a unit of it and one of its records, all drawn evenly."""
    pools = [load_file(job.pools / f"{name}.safetensors") for name in POOLS[job.regime]]
    random = torch.Generator().manual_seed(job.stream)
    for _ in range(job.segment.steps):
        rows = [_draw(pools, random) for _ in range(job.segment.batch_size)]
        images, labels = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
        if job.segment.augment:
            images, labels = _augment(images, labels, random)
        yield images, labels


def _draw(pools: list[dict[str, Tensor]], random: torch.Generator) -> tuple[Tensor, Tensor]:
    pool = pools[int(torch.randint(len(pools), (), generator=random))]
    unit = int(torch.randint(len(pool["starts"]), (), generator=random))
    start, end = int(pool["starts"][unit]), int(pool["ends"][unit])
    record = start + int(torch.randint(end - start, (), generator=random))
    return pool["images"][record], pool["labels"][record]


def _augment(images: Tensor, labels: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rotate, scale and shift a little, and change contrast: no flips, because left is not right in a patient.

    Args:
        images: ``(batch, channel, *spatial)`` in [-1, 1].
        labels: ``(batch, *spatial)``.
        random: the stream to draw from.
    """
    batch, rank = len(images), images.ndim - 2
    transforms = _affines(batch, images.shape[2:], random)
    field = functional.affine_grid(transforms, [batch, 1, *images.shape[2:]], align_corners=False)
    images = functional.grid_sample(images, field, mode="bilinear", padding_mode="border", align_corners=False)
    maps = labels[:, None].float()
    moved = functional.grid_sample(maps, field, mode="nearest", padding_mode="border", align_corners=False)

    def uniform(largest: float) -> Tensor:
        return (2 * torch.rand(batch, *[1] * (rank + 1), generator=random) - 1) * largest

    unit = ((images + 1) / 2).clamp(1e-4, 1) ** torch.exp(uniform(_GAMMA))
    images = (2 * unit - 1) * (1 + uniform(_GAIN)) + uniform(_OFFSET)
    images = images + uniform(_NOISE) * torch.randn(images.shape, generator=random)
    return images, moved[:, 0].to(labels.dtype)


def _affines(batch: int, shape: torch.Size, random: torch.Generator) -> Tensor:
    """Return ``(batch, rank, rank + 1)`` matrices for ``affine_grid``: a small rotation, a scale and a shift each."""
    rank = len(shape)

    def uniform(*size: int) -> Tensor:
        return 2 * torch.rand(batch, *size, generator=random) - 1

    skew = torch.triu(uniform(rank, rank), diagonal=1) * _ROTATION_RAD
    turn = torch.linalg.matrix_exp(skew - skew.mT)
    sizes = torch.tensor(shape[::-1], dtype=torch.float32)  # affine_grid counts axes from the last, in half sizes
    turn = turn * sizes / sizes[:, None]
    return torch.cat([turn * (1 + _SCALE * uniform(1, 1)), _SHIFT * uniform(rank, 1)], dim=2)


def _report(losses: Mapping[str, list[float]], tracker: Tracker) -> None:
    for name, series in losses.items():
        width = max(1, len(series) // _POINTS)
        for start in range(0, len(series), width):
            part = series[start : start + width]
            tracker.metrics({f"loss/{name}": sum(part) / len(part)}, step=start)
