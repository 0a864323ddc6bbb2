"""One private step over several processes: each rank clips its share of patients, one reduction, noise drawn once.

Rank 0 alone has the coins and the noise; the others get the drawn indices and the noisy mean from it. So no seed is
shared, nothing is drawn twice, and all ranks take bit for bit the same step (pitfall 22). Sums are reduced in float64
before the noise, whatever backend made them; the process group is opened with gloo, on CPU tensors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from medsynth.errors import PrivacyError
from medsynth.privacy.entropy import Entropy
from medsynth.privacy.gradients import ClippedSum
from medsynth.privacy.mechanism import DpSgd

Item = TypeVar("Item")

# Rank 0 may pre-train for hours while the others wait for the first step.
_PATIENCE = timedelta(days=7)


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a step; see :func:`open_ranks`.

    *Guarantees*: :meth:`noisy_mean` adds the mechanism's noise once to the sum over all ranks, from rank 0's entropy.
    Every patient of :meth:`draw` is in exactly one rank's :meth:`share`, so the sum has the sensitivity of one
    process's. A rank without patients takes part with zeros. That each rank clips rightly is its backend's promise.

    Attributes:
        rank: 0 for the one that draws, writes and accounts.
        size: number of processes; 1 needs no process group.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that draws, writes and accounts."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Return this rank's items: every ``size``-th, so that shares differ by at most one."""
        return list(items[self.rank :: self.size])

    def draw(self, mechanism: DpSgd, n_units: int, entropy: Entropy | None) -> list[int]:
        """Return the patients of one step, drawn by rank 0, on every rank.

        Args:
            mechanism: the plan.
            n_units: number of patients.
            entropy: source of the coins on rank 0; others pass None.
        """
        drawn = mechanism.draw(n_units, self._own(entropy)) if self.first else []
        if self.size == 1:
            return drawn
        sent: list[list[int]] = [drawn]
        dist.broadcast_object_list(sent, src=0)
        return sent[0]

    def reduce_clipped_sum(self, found: ClippedSum) -> ClippedSum:
        """Return the sum over all ranks, and the norms in the order of the list that was shared; on every rank.

        Args:
            found: the clipped sum of :meth:`share`; zeros and no norms where the share was empty.
        """
        if self.size == 1:
            return found
        flat = torch.cat([part.detach().reshape(-1).to("cpu", torch.float64) for part in found.tensors])
        dist.all_reduce(flat)
        gathered: list[list[float]] = [[] for _ in range(self.size)]
        dist.all_gather_object(gathered, found.norms)
        norms = [0.0] * sum(map(len, gathered))
        for rank, part in enumerate(gathered):
            norms[rank :: self.size] = part
        return ClippedSum(_unpack(flat, found.tensors), norms)

    def noisy_mean(self, mechanism: DpSgd, found: ClippedSum, entropy: Entropy | None) -> list[Tensor]:
        """Return ``(sum over ranks + noise) / denominator`` on every rank; call it once a step, empty or not.

        Args:
            mechanism: the plan.
            found: this rank's clipped sum, NOT reduced.
            entropy: source of the noise on rank 0; others pass None.
        """
        if self.size == 1:
            return mechanism.noisy_mean(found.tensors, self._own(entropy))
        flat = torch.cat([part.detach().reshape(-1).to("cpu", torch.float64) for part in found.tensors])
        dist.reduce(flat, dst=0)
        if self.first:
            noisy = mechanism.noisy_mean([flat], self._own(entropy))[0]
        else:
            noisy = torch.empty(flat.shape, dtype=torch.float32)
        dist.broadcast(noisy, src=0)
        return _unpack(noisy, found.tensors)

    def take_weights(self, model: nn.Module) -> None:
        """Give every rank the parameters and buffers of rank 0, in place."""
        if self.size > 1:
            for tensor in [*model.parameters(), *model.buffers()]:
                held = tensor.detach().cpu().contiguous()
                dist.broadcast(held, src=0)
                with torch.no_grad():
                    tensor.copy_(held)

    def _own(self, entropy: Entropy | None) -> Entropy:
        if entropy is None:
            raise PrivacyError("rank 0 needs the entropy: it alone draws patients and noise")
        return entropy


def open_ranks() -> Ranks:
    """Return this process's place under ``torchrun`` (gloo), or the only one when started otherwise.

    Raises:
        PrivacyError: ``torchrun``'s variables are incomplete.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return Ranks()
    if not dist.is_initialized():
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise PrivacyError(f"WORLD_SIZE is {size} but {', '.join(missing)} is not set: start it with torchrun")
        dist.init_process_group("gloo", timeout=_PATIENCE)
    return Ranks(dist.get_rank(), dist.get_world_size())


def close_ranks() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _unpack(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return ``flat`` in pieces of the shapes and on the devices of ``like``."""
    pieces = flat.split([part.numel() for part in like])
    return [piece.view(part.shape).to(part.device) for piece, part in zip(pieces, like, strict=True)]
