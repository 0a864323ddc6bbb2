"""One private step over several processes: each clips its share of patients and owns a slice of all coordinates.

A step has two exchanges. First each rank sends every other the piece of its clipped sum that lies in the other's slice,
and adds up what it gets: it alone knows the whole sum there, adds noise from its own entropy, once, and rounds. Then
all gather the noisy mean and take the same step, so that all hold bit for bit the same weights and none are sent.
The mechanism is that of one process (pitfall 22): coordinates have independent noise, whoever draws it. Rank 0 alone
has the coins and accounts. Pieces are exchanged before the noise, in float64 unless every rank's sum is a
single-precision product; the process group is opened with gloo, on CPU tensors.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
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
from medsynth.privacy.entropy import Entropy, open_entropy
from medsynth.privacy.gradients import ClippedSum, trainable
from medsynth.privacy.mechanism import DpSgd

Item = TypeVar("Item")

_JOINING = timedelta(minutes=10)
# Rank 0 may pre-train for hours while the others wait for the first step; a rank that ends is noticed at once.
_PATIENCE = timedelta(days=7)
_ASSISTANT_GONE = (
    "a process that assisted in the training has ended or cannot be reached: its own message says why. Finished stages "
    "stay, and the same command goes on within the reservation, with any number of processes"
)
_FIRST_GONE = (
    "rank 0 has ended, or another process that it needs, or it cannot be reached: its own message says why (this "
    "process only assisted)"
)


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a step; see :func:`open_ranks`.

    *Guarantees*: every item is in exactly one rank's :meth:`share`, so the sum over ranks has the sensitivity of one
    process's. A rank without patients takes part with zeros. :meth:`noisy_mean` is one release of the mechanism that
    all ranks were given; no rank learns a sum without noise outside its slice, but for its own share's. That each rank
    clips rightly is its backend's promise.

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

    def open_entropy(self, kind: str) -> Entropy:
        """Open this rank's own source of noise: ranks with one stream would add the same noise to their slices.

        Args:
            kind: ``os``, or ``test_only``, seeded with the rank.
        """
        return open_entropy(kind, self.rank if kind == "test_only" else 0)

    def noisy_mean(self, mechanism: DpSgd, found: ClippedSum, entropy: Entropy) -> list[Tensor]:
        """Return ``(sum of all ranks + noise) / denominator``, the same on every rank; call it once a step.

        *Guarantees*: the slices partition the coordinates, and each coordinate's noise is drawn by the one rank that
        owns it, by :meth:`DpSgd.noisy_mean`. The sensitivity of the whole is that of the sum over ranks, and the noise
        is that of one process if no two ranks' sources are the same (:meth:`open_entropy`).

        Args:
            mechanism: the plan, the same on all ranks.
            found: the clipped sum of :meth:`share`; zeros and no norms where the share was empty. Handed over.
            entropy: this rank's source of noise.

        Returns:
            One tensor a trainable parameter, in single precision.

        Raises:
            MedsynthError: another rank has ended.
        """
        if self.size == 1:
            return mechanism.noisy_mean(found.tensors, entropy)
        with self._together():
            flat = self._flat(found)
            (noisy,) = mechanism.noisy_mean([self._own_sum(flat)], entropy)
            mean = flat  # in single precision the noisy mean has taken the place of this rank's sum
            if flat.dtype != noisy.dtype:
                mean = torch.empty_like(flat, dtype=noisy.dtype)
                mean.split(noisy.numel())[self.rank].copy_(noisy)
            slices = mean.split(noisy.numel())
            for sent in [dist.broadcast(piece, src=rank, async_op=True) for rank, piece in enumerate(slices)]:
                sent.wait()
        return _unpack(mean, found.tensors)

    def gather_norms(self, norms: list[float]) -> list[float]:
        """Return all ranks' norms in the order of the list that was shared, on rank 0; nothing on the others.

        Args:
            norms: of the patients in :meth:`share`. Private.

        Raises:
            MedsynthError: another rank has ended.
        """
        if self.size == 1:
            return norms
        gathered: list[list[float]] = [[] for _ in range(self.size)]
        with self._together():
            dist.gather_object(norms, gathered if self.first else None, dst=0)
        whole = [0.0] * sum(map(len, gathered))
        for rank, part in enumerate(gathered):
            whole[rank :: self.size] = part
        return whole

    def agree(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all ranks hold the same values, by the sums of their bits; all ranks get the same answer.

        Args:
            tensors: in single precision, of the same shapes on all ranks.

        Raises:
            MedsynthError: another rank has ended.
        """
        if self.size == 1:
            return True
        sums = torch.stack([one.detach().view(torch.int32).sum(dtype=torch.int64).cpu() for one in tensors])
        extremes = torch.cat([sums, -sums])
        with self._together():
            dist.all_reduce(extremes, op=dist.ReduceOp.MAX)
        largest, smallest = extremes.split(len(sums))
        return torch.equal(largest, -smallest)

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

    def take_state(self, optimizer: torch.optim.Optimizer) -> None:
        """Give every rank the optimizer's state of rank 0, in place."""
        if self.size == 1:
            return
        if self.first:
            kept = io.BytesIO()
            torch.save(optimizer.state_dict(), kept)
            self.call(kept.getvalue())
        else:
            state = torch.load(io.BytesIO(self.await_call()), map_location="cpu", weights_only=True)
            optimizer.load_state_dict(state)

    def _flat(self, found: ClippedSum) -> Tensor:
        """Return this rank's sum as one vector, in the type that all ranks take, with zeros up to a multiple of size.

        An empty share (0) takes the type of the others: its zeros are exact in both.
        """
        needed = torch.tensor((1 + any(p.dtype == torch.float64 for p in found.tensors)) if found.norms else 0)
        dist.all_reduce(needed, op=dist.ReduceOp.MAX)
        dtype = torch.float32 if needed == 1 else torch.float64
        padding = torch.zeros(-sum(part.numel() for part in found.tensors) % self.size, dtype=dtype)
        return torch.cat([*(part.detach().reshape(-1).to("cpu", dtype) for part in found.tensors), padding])

    def _own_sum(self, flat: Tensor) -> Tensor:
        """Return this rank's slice of ``flat``, to which it adds the others'; each gets only the slice that it owns."""
        slices = flat.split(flat.numel() // self.size)
        own, others = slices[self.rank], [rank for rank in range(self.size) if rank != self.rank]
        received = [torch.empty_like(own) for _ in others]
        under_way = [dist.irecv(part, src=rank) for part, rank in zip(received, others, strict=True)]
        under_way += [dist.isend(slices[rank], dst=rank) for rank in others]
        for exchange in filter(None, under_way):  # None only for who is not in the group
            exchange.wait()
        for part in received:  # in the order of ranks, not in that of arrival
            own += part
        return own

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Say in our words that another process is gone; gloo raises a bare RuntimeError."""
        try:
            yield
        except RuntimeError as error:
            raise MedsynthError(_ASSISTANT_GONE if self.first else _FIRST_GONE) from error


@dataclass(frozen=True)
class Replica:
    """One rank's copy of a model in private training: all ranks join with that of rank 0, then take the same steps.

    Attributes:
        ranks: this process's place.
        model: its trainable parameters are moved, in place.
        optimizer: of those parameters.
        mechanism: the plan that is accounted for, the same on all ranks.
        entropy: this rank's source of noise, by :meth:`Ranks.open_entropy`.
    """

    ranks: Ranks
    model: nn.Module
    optimizer: torch.optim.Optimizer
    mechanism: DpSgd
    entropy: Entropy

    def join(self) -> None:
        """Take the weights and the optimizer's state of rank 0."""
        self.ranks.take_weights(self.model)
        self.ranks.take_state(self.optimizer)

    def step(self, found: ClippedSum) -> None:
        """Move the parameters by the noisy mean over all ranks.

        *Guarantees*: one release of the mechanism (:meth:`Ranks.noisy_mean`); what follows it is post-processing.

        Args:
            found: the clipped sum of this rank's share. Handed over.
        """
        noisy = self.ranks.noisy_mean(self.mechanism, found, self.entropy)
        for parameter, gradient in zip(trainable(self.model), noisy, strict=True):
            parameter.grad = gradient.reshape(parameter.shape)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # their memory serves the next step

    def align(self) -> bool:
        """Take the values of rank 0 where ranks differ, as unlike processors may round; return whether none did.

        No patient is better or worse protected by such a difference: all weights come from released values.
        """
        alike = self.ranks.agree(trainable(self.model))
        if not alike:
            self.join()
        return alike


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
        # Modules that optimizers load have the group as a default argument if it is open when they are loaded. It would
        # then outlive _leave, and its threads abort a process that ends.
        importlib.import_module("torch._dynamo")
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
    """Return the beginning of ``flat`` in pieces of the shapes and on the devices of ``like``."""
    sizes = [part.numel() for part in like]
    pieces = flat[: sum(sizes)].split(sizes)
    return [piece.view(part.shape).to(part.device) for piece, part in zip(pieces, like, strict=True)]
