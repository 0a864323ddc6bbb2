"""Where a stage computes: CPU threads or a GPU, alone or beside the other processes of ``torchrun``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from medsynth.config import Compute
from medsynth.errors import ConfigError

if TYPE_CHECKING:
    import torch


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


def open_device(compute: Compute) -> torch.device:
    """Return the device of ``compute`` and set the number of CPU threads.

    Processes that share a machine under ``torchrun`` take one thread each, unless ``compute.threads`` or
    ``OMP_NUM_THREADS`` says otherwise, and one GPU each where there are several.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    import torch

    several = rank_and_size()[1] > 1
    if compute.threads or (several and "OMP_NUM_THREADS" not in os.environ):
        torch.set_num_threads(compute.threads or 1)
    if compute.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("compute.device is cuda, but torch finds no GPU: set it to auto or cpu")
    use_gpu = compute.device == "cuda" or (compute.device == "auto" and torch.cuda.is_available())
    if use_gpu and several:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK") or 0) % torch.cuda.device_count())
    return torch.device("cuda" if use_gpu else "cpu")
