"""Where a stage computes: CPU threads or a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medsynth.config import Compute
from medsynth.errors import ConfigError

if TYPE_CHECKING:
    import torch


def open_device(compute: Compute) -> torch.device:
    """Return the device of ``compute`` and set the number of CPU threads.

    Raises:
        ConfigError: a GPU was asked for and there is none.
    """
    import torch

    if compute.threads:
        torch.set_num_threads(compute.threads)
    if compute.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("compute.device is cuda, but torch finds no GPU: set it to auto or cpu")
    use_gpu = compute.device == "cuda" or (compute.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if use_gpu else "cpu")
