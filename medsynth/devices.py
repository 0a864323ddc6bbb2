"""Where a stage computes: CPU threads or a GPU, alone or beside the other processes of ``torchrun``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from medsynth.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from medsynth.config import Compute

# Rounds that a thread of OpenMP spins before it sleeps; libgomp's own 300,000 are some milliseconds.
_SPINS = "5000"
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def share_cores() -> None:
    """Let threads that wait give their core away, so that other work on the machine does not stop the pipeline.

    With libgomp's default a step on 2 threads took 90 times as long beside one busy process on 2 cores, and 5 times
    as long with this; on an idle machine they are equal (docs/log.md). Call it before torch is imported;
    ``GOMP_SPINCOUNT`` and ``OMP_WAIT_POLICY`` in the environment stay.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)


def rank_and_size() -> tuple[int, int]:
    """Return this process's number among those that ``torchrun`` started, and how many they are; (0, 1) without it.

    Raises:
        ConfigError: ``RANK`` or ``WORLD_SIZE`` in the environment is no number.
    """
    try:
        size = int(os.environ.get("WORLD_SIZE") or 1)
        return (int(os.environ.get("RANK") or 0), size) if size > 1 else (0, 1)
    except ValueError:
        raise ConfigError(
            "RANK and WORLD_SIZE in the environment must be whole numbers: start it with torchrun"
        ) from None


def usable_cores() -> int:
    """Return how many cores this process may use at a time: by its affinity and its container's quota (cgroup v2).

    torch knows of affinity only: in a container it would start a thread a core of the machine, which then wait for
    each other's share of the quota.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text(encoding="ascii").split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return cores


def open_device(compute: Compute) -> torch.device:
    """Return the device of ``compute`` and set the number of CPU threads.

    Unless ``compute.threads`` or ``OMP_NUM_THREADS`` says otherwise, processes that share a machine under ``torchrun``
    take one thread each, and a process alone no more than the cores that it may use. One GPU each where there are
    several.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    import torch

    several = rank_and_size()[1] > 1
    threads = compute.threads
    if not threads and "OMP_NUM_THREADS" not in os.environ:
        threads = 1 if several else min(usable_cores(), torch.get_num_threads())
    if threads:
        torch.set_num_threads(threads)
    if compute.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("compute.device is cuda, but torch finds no GPU: set it to auto or cpu")
    use_gpu = compute.device == "cuda" or (compute.device == "auto" and torch.cuda.is_available())
    if not use_gpu:
        return torch.device("cpu")
    compute_exactly()
    place = int(os.environ.get("LOCAL_RANK") or 0) % torch.cuda.device_count() if several else 0
    return torch.device("cuda", place)


def compute_exactly() -> None:
    """Make a GPU multiply single precision in single precision.

    torch lets cuDNN round the factors of convolutions to TF32, 10 bits: weighted sums of gradients would then be 1e-4
    off their norms, far above what the clip allows (1e-6), and the preflight would refuse every private training.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
