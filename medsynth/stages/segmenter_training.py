"""The one recipe by which segmentation networks are trained: stages ``segment`` and ``train``, ``medsynth compare``."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from monai.losses.dice import DiceCELoss
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

from medsynth import logs
from medsynth.config import Grid, SegmenterRecipe
from medsynth.errors import MedsynthError
from medsynth.imaging.augmentation import strong_augmentation
from medsynth.imaging.cohort import Patient
from medsynth.models.segmenter import Segmenter, build_segmenter

_ROTATION_RAD, _SCALE, _SHIFT = 0.15, 0.10, 0.06  # largest affine changes; the shift in fractions of half an axis
_GAIN, _OFFSET, _GAMMA, _NOISE = 0.2, 0.15, 0.35, 0.08  # largest intensity changes of an image in [-1, 1]
_WARM_UP = 0.1  # share of the steps in which the learning rate rises
_GRADIENT_NORM = 5.0


@dataclass(frozen=True)
class Training:
    """Everything that one training needs; sent to a worker, so paths instead of arrays.

    Attributes:
        name: what messages call it.
        grid: shape, channels and labels.
        segment: architecture, steps, batch size, learning rate, and whether to augment.
        stream: seed of weights, draws and augmentation.
        pools: files of :func:`write_pool`; each row of a batch comes from one of them, all as likely.
        units: of the first pool, the only ones to draw from; None: all.
        strong: augment strongly instead of as usual.
    """

    name: str
    grid: Grid
    segment: SegmenterRecipe
    stream: int
    pools: tuple[Path, ...]
    units: tuple[int, ...] | None = None
    strong: bool = False


@dataclass(frozen=True)
class Network:
    """One network to train, and the folder that it goes to."""

    training: Training
    folder: Path

    @property
    def name(self) -> str:
        """What messages call it."""
        return self.training.name

    @property
    def weights(self) -> Path:
        """The file of its weights."""
        return self.folder / f"{self.name}.safetensors"


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Job = TypeVar("Job", bound=_Named)
Result = TypeVar("Result")


def write_pool(path: Path, images: Tensor, labels: Tensor, counts: Tensor) -> None:
    """Write the records of a pool and where each unit (patient or pair) begins and ends.

    Args:
        path: safetensors file.
        images: ``(record, channel, *spatial)`` in [-1, 1], a unit's records together.
        labels: ``(record, *spatial)``.
        counts: ``(unit,)`` records of each unit.
    """
    ends = counts.cumsum(0)
    values = {"images": images.float(), "labels": labels.to(torch.uint8), "starts": ends - counts, "ends": ends}
    save_file({name: value.contiguous() for name, value in values.items()}, path)


def write_patients(path: Path, patients: Sequence[Patient]) -> None:
    """Write a pool whose units are patients, in the order given."""
    counts = torch.tensor([len(patient.images) for patient in patients])
    write_pool(path, torch.cat([p.images for p in patients]), torch.cat([p.labels for p in patients]), counts)


def side_by_side(
    work: Callable[[Job, str], Result], jobs: Sequence[Job], device: str, workers: int, what: str
) -> Iterator[tuple[Job, Result]]:
    """Yield each job with its result as it is done: in processes on a CPU, one after another on a GPU.

    Args:
        work: does one job on a device; importable by name, because workers import it.
        jobs: in the order in which they are started.
        device: ``"cpu"`` or the GPU.
        workers: processes; one thread each.
        what: the name of the stage, for progress and messages.

    Raises:
        MedsynthError: a job failed; the message names it.
    """
    if device != "cpu" or workers == 1 or len(jobs) <= 1:
        yield from logs.progress(((job, _attempt(work, job, device)) for job in jobs), what, len(jobs))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), context, initializer=_start_worker) as pool:
        try:
            futures = {pool.submit(_attempt, work, job, device): job for job in jobs}
            yield from logs.progress(((futures[f], f.result()) for f in as_completed(futures)), what, len(jobs))
        except BrokenProcessPool:
            raise MedsynthError(
                f"a worker of stage '{what}' was killed, most likely for memory: lower compute.workers"
            ) from None
        except (GeneratorExit, KeyboardInterrupt, SystemExit):
            for worker in multiprocessing.active_children():  # it would train to its end first
                worker.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()

    def leave_with_parent() -> None:  # a killed pipeline must not leave trainings behind
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _attempt(work: Callable[[Job, str], Result], job: Job, device: str) -> Result:
    try:
        return work(job, device)
    except MedsynthError:
        raise
    except Exception as error:
        reason = type(error).__name__ if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise MedsynthError(f"training of the segmenter '{job.name}' failed ({reason})") from error


def train_segmenter(job: Training, device: torch.device) -> tuple[Segmenter, list[float]]:
    """Return a trained network and its loss at each step."""
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
    for images, labels in logs.progress(batches(job), f"training segmenter '{job.name}'", steps, inner=True):
        loss = loss_of(model(images.to(device, memory_format=layout)), labels[:, None].to(device))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), _GRADIENT_NORM)
        optimiser.step()
        rate.step()
        losses.append(float(loss.detach()))
    return model, losses


def batches(job: Training) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the training batches: each row a pool, a unit of it and one of its records, all drawn evenly."""
    pools = [load_file(path) for path in job.pools]
    if job.units is not None:
        pools[0] |= {end: pools[0][end][list(job.units)] for end in ("starts", "ends")}
    random = torch.Generator().manual_seed(job.stream)
    change = strong_augmentation(job.grid.spatial_dims, job.stream) if job.strong else None
    for _ in range(job.segment.steps):
        rows = [_draw(pools, random) for _ in range(job.segment.batch_size)]
        if change is not None:
            rows = [change(*row) for row in rows]
        images, labels = torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])
        if job.segment.augment and change is None:
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
