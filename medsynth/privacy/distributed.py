"""One private step over several processes: each rank clips its share of patients, one reduction, noise drawn once.

Rank 0 alone has the coins, the noise and the optimizer; the others get the drawn indices from it, hand in the clipped
sum of their share and take over the parameters that it moved. So no seed is shared, nothing is drawn twice, and all
ranks hold bit for bit the same weights (pitfall 22). Sums are reduced before the noise, in float64 unless every rank's
is single-precision products; the process group is opened with gloo, on CPU tensors.
"""

from __future__ import annotations

import atexit
import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from medsynth.devices import rank_and_size
from medsynth.errors import MedsynthError, PrivacyError
from medsynth.privacy.gradients import ClippedSum

Item = TypeVar("Item")

_JOINING = timedelta(minutes=10)
# Rank 0 may pre-train for hours while the others wait for the first step; a rank that ends is noticed at once.
_PATIENCE = timedelta(days=7)
_ASSISTANT_GONE = (
    "a process that assisted in the training has ended or cannot be reached: its own message says why. Finished stages "
    "stay, and the same command goes on within the reservation, with any number of processes"
)
_FIRST_GONE = "rank 0 has ended or cannot be reached: its own message says why (this process only assisted)"


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a step; see :func:`open_ranks`.

    *Guarantees*: every item is in exactly one rank's :meth:`share`, so the sum over ranks has the sensitivity of one
    process's. A rank without patients takes part with zeros. Nothing here adds noise: it is added to the result of
    :meth:`reduce_clipped_sum`, which rank 0 alone gets. That each rank clips rightly is its backend's promise.

    Attributes:
        rank: 0 for the one that draws, adds the noise, moves the parameters, writes and accounts.
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

    def call(self, value: Any) -> None:
        """Tell the other ranks something (on rank 0); they wait for it in :meth:`await_call`."""
        if self.size > 1:
            with self._together():
                dist.broadcast_object_list([value], src=0)

    def await_call(self) -> Any:
        """Return what rank 0 tells (on the others), however long it takes.

        Raises:
            MedsynthError: rank 0 has ended.
        """
        heard: list[Any] = [None]
        with self._together():
            dist.broadcast_object_list(heard, src=0)
        return heard[0]

    def reduce_clipped_sum(self, found: ClippedSum) -> ClippedSum:
        """Return the sum over all ranks, and the norms in the order of the list that was shared.

        Args:
            found: the clipped sum of :meth:`share`; zeros and no norms where the share was empty.

        Returns:
            The whole on rank 0; nothing on the others.

        Raises:
            MedsynthError: another rank has ended.
        """
        if self.size == 1:
            return found
        # All ranks must take the same type; an empty share (0) does as the others do: its zeros are exact in both.
        needed = torch.tensor((1 + any(p.dtype == torch.float64 for p in found.tensors)) if found.norms else 0)
        gathered: list[list[float]] = [[] for _ in range(self.size)]
        with self._together():
            dist.all_reduce(needed, op=dist.ReduceOp.MAX)
            dtype = torch.float32 if needed == 1 else torch.float64
            flat = torch.cat([part.detach().reshape(-1).to("cpu", dtype) for part in found.tensors])
            dist.reduce(flat, dst=0)
            dist.gather_object(found.norms, gathered if self.first else None, dst=0)
        if not self.first:
            return ClippedSum([], [])
        norms = [0.0] * sum(map(len, gathered))
        for rank, part in enumerate(gathered):
            norms[rank :: self.size] = part
        return ClippedSum(_unpack(flat, found.tensors), norms)

    def take(self, tensors: Sequence[Tensor]) -> None:
        """Give every rank the values of rank 0, in place.

        Args:
            tensors: of the same shapes and types on all ranks.

        Raises:
            MedsynthError: another rank has ended.
        """
        if self.size == 1:
            return
        for kind in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor.detach() for tensor in tensors if tensor.dtype == kind]
            flat = torch.cat([tensor.reshape(-1).cpu() for tensor in alike])
            with self._together():
                dist.broadcast(flat, src=0)
            if not self.first:
                for tensor, piece in zip(alike, _unpack(flat, alike), strict=True):
                    tensor.copy_(piece)

    def take_weights(self, model: nn.Module) -> None:
        """Give every rank the parameters and buffers of rank 0, in place."""
        self.take([*model.parameters(), *model.buffers()])

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Say in our words that another process is gone; gloo raises a bare RuntimeError."""
        try:
            yield
        except RuntimeError as error:
            raise MedsynthError(_ASSISTANT_GONE if self.first else _FIRST_GONE) from error


def open_ranks() -> Ranks:
    """Return this process's place under ``torchrun`` (gloo), or the only one when started otherwise.

    Raises:
        ConfigError: ``torchrun``'s variables are no numbers.
        PrivacyError: they are incomplete.
        MedsynthError: the other processes did not come within ten minutes.
    """
    rank, size = rank_and_size()
    if size == 1:
        return Ranks()
    if not dist.is_initialized():
        missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing:
            raise PrivacyError(f"WORLD_SIZE is {size} but {', '.join(missing)} is not set: start it with torchrun")
        try:
            # Meeting has a short limit of its own: a rank 0 that failed before it came is not waited for.
            store, rank, size = next(iter(rendezvous("env://", rank, size, timeout=_JOINING)))
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_PATIENCE)
        except RuntimeError as error:
            raise MedsynthError(
                f"{size} processes were announced (WORLD_SIZE), but not all of them came: see their messages"
            ) from error
        # An error ends a process with its group open, and gloo may then abort it in the place of its exit code.
        atexit.register(_leave)
    return Ranks(rank, size)


def close_ranks() -> None:
    """Leave the process group, if there is one; all ranks leave together."""
    if dist.is_initialized():
        # gloo may abort a process whose connections the others close first; where one is gone, nobody is waited for.
        with contextlib.suppress(RuntimeError):
            dist.barrier()
        _leave()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _unpack(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return ``flat`` in pieces of the shapes and on the devices of ``like``."""
    pieces = flat.split([part.numel() for part in like])
    return [piece.view(part.shape).to(part.device) for piece, part in zip(pieces, like, strict=True)]
