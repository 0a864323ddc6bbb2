"""Several ranks take the private step of one: same sum to rounding, each coordinate's noise once, by its owner."""

from __future__ import annotations

import atexit
import faulthandler
import math
import os
import queue
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from medsynth.accidents import end_at_once
from medsynth.errors import ConfigError, MedsynthError, PrivacyError
from medsynth.privacy.distributed import Ranks, Replica, open_ranks
from medsynth.privacy.entropy import open_entropy
from medsynth.privacy.gradients import Batch, ClippedSum, open_backend
from medsynth.privacy.mechanism import DpSgd

PATIENTS = 5
ILL = -1  # in the place of a number of patients: 5, of whom the fourth (rank 1's) is not finite
CLIP = 0.5


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(48, 2))


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean(1)


def _patients(count: int) -> list[Batch]:
    g = torch.Generator().manual_seed(1)
    rows = [1 + index % 3 for index in range(PATIENTS if count == ILL else count)]
    patients = [{"x": torch.randn(n, 2, 4, 4, generator=g), "y": torch.randn(n, 2, generator=g)} for n in rows]
    if count == ILL:
        patients[3]["x"][0, 0] = float("nan")
    return patients


def _plan(noise: float, denominator: float = 4.0) -> DpSgd:
    return DpSgd("test", 0.5, 10, noise, CLIP, denominator)


def _copy(found: ClippedSum) -> ClippedSum:
    return ClippedSum([part.clone() for part in found.tensors], found.norms)


def _rank(rank: int, size: int, port: int, name: str, out: str) -> None:
    faulthandler.enable()  # says where, should gloo abort
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if rank == 0:
        atexit.register(_note_threads, Path(out, "threads"))  # registered first, called last
    ranks = open_ranks()
    entropy = ranks.open_entropy("test_only")
    model = _model(seed=rank)  # different weights, until rank 0's are taken
    ranks.take_weights(model)
    backend = open_backend(name, model, _loss, CLIP)
    found: dict[str, Any] = {"weights": [parameter.detach().clone() for parameter in model.parameters()]}
    for count in (PATIENTS, ILL, 1, 0):  # the third leaves rank 1 without patients, the last both
        part = backend.clipped_sum(ranks.share(_patients(count)))
        found[f"norms{count}"] = ranks.gather_norms(part.norms)
        found[f"sum{count}"] = ranks.noisy_mean(_plan(0.0, 1.0), _copy(part), entropy)
        found[f"noisy{count}"] = ranks.noisy_mean(_plan(1.0), part, entropy)
    found["trained"] = _train(ranks, name)
    told = {"step": 3, "drawn": [1, 2]}
    ranks.call(told) if ranks.first else None
    found["told"] = told if ranks.first else ranks.await_call()
    mixed = [torch.full((2, 3), float(rank)), torch.full((2,), rank), torch.full((4,), float(rank))]
    ranks.take(mixed)
    found["taken"] = mixed
    torch.save(found, f"{out}/{rank}.pt")
    if ranks.first:
        ranks.call(None)
    elif ranks.await_call() is None:
        end_at_once(SystemExit(0))  # as an assistant of the command line does


def _note_threads(path: Path) -> None:
    path.write_text(" ".join(name.read_text() for name in Path("/proc/self/task").glob("*/comm")))


def _train(ranks: Ranks, name: str) -> dict[str, Any]:
    """Take steps with an optimizer that rank 0 has used before, then move a weight of the last rank by one bit."""
    model = _model(seed=ranks.rank)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    replica = Replica(ranks, model, optimizer, _plan(1.0), ranks.open_entropy("test_only"))
    backend = open_backend(name, model, _loss, CLIP)
    if ranks.first:
        backend.clipped_sum(_patients(2))
        Replica(Ranks(), model, optimizer, _plan(1.0), replica.entropy).step(backend.clipped_sum(_patients(2)))
    replica.join()
    for count in (PATIENTS, 1, 0):
        replica.step(backend.clipped_sum(ranks.share(_patients(count))))
    found: dict[str, Any] = {"alike": replica.align()}
    found["weights"] = [parameter.detach().clone() for parameter in model.parameters()]
    found["state"] = [part.clone() for state in optimizer.state.values() for part in state.values()]
    if not ranks.first:
        with torch.no_grad():
            model[0].weight.view(torch.int32)[0, 0, 0, 0] += 1
    found["after a bit"] = replica.align()
    found["aligned"] = [parameter.detach().clone() for parameter in model.parameters()]
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module", params=["unit", "bookkeeping"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(_rank, (2, _free_port(), request.param, str(folder)), nprocs=2)
    found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    found[0]["threads"] = (folder / "threads").read_text().split()
    return found


@pytest.mark.parametrize("count", [PATIENTS, ILL, 1, 0])
def test_two_ranks_have_the_sum_of_one_and_rank_0_the_norms(both: list[dict[str, Any]], count: int) -> None:
    alone = open_backend("unit", _model(), _loss, CLIP).clipped_sum(_patients(count))
    assert len(alone.norms) == len(_patients(count)) and alone.norms.count(0.0) == (count == ILL)
    first, second = both
    for one, other, want in zip(first[f"sum{count}"], second[f"sum{count}"], alone.tensors, strict=True):
        torch.testing.assert_close(one.double(), want, rtol=3e-6, atol=1e-7)  # the engine clips 1.5e-6 below
        assert torch.equal(one, other)
    assert first[f"norms{count}"] == pytest.approx(alone.norms, rel=1e-5)
    assert second[f"norms{count}"] == []


@pytest.mark.parametrize("count", [PATIENTS, 0])
def test_pitfall_22_noise_is_added_once(both: list[dict[str, Any]], count: int) -> None:
    noisy, whole = (torch.cat([part.flatten() for part in both[0][f"{name}{count}"]]) for name in ("noisy", "sum"))
    noise = (noisy - whole / 4.0) / (CLIP / 4.0)
    # Noise of every rank would give sqrt(2); 155 parameters estimate the spread to 6 %.
    assert abs(float(noise.std()) - 1) < 4 / math.sqrt(2 * noise.numel())
    mine, others = noise[:78], noise[78:]
    assert not torch.isclose(mine[:77], others, rtol=0, atol=1e-3).all()
    assert all(torch.equal(*pair) for pair in zip(both[0][f"noisy{count}"], both[1][f"noisy{count}"], strict=True))


def test_ranks_that_take_the_same_steps_keep_the_same_weights(both: list[dict[str, Any]]) -> None:
    first, second = (found["trained"] for found in both)
    assert first["alike"] and second["alike"]
    for name in ("weights", "state", "aligned"):
        assert all(torch.equal(one, other) for one, other in zip(first[name], second[name], strict=True))
    assert {int(step) for step in second["state"][::3]} == {4}  # one of them before rank 1 came
    assert not first["after a bit"] and not second["after a bit"]
    assert all(torch.equal(one, other) for one, other in zip(first["aligned"], first["weights"], strict=True))


def test_no_thread_of_the_group_outlives_it(both: list[dict[str, Any]]) -> None:
    left = both[0]["threads"]
    assert left and not [name for name in left if "gloo" in name or "store" in name]  # they abort a process that ends


class Threads:
    """Ranks as threads of this process, with what every collective sent, so that a guard can be taken out in both."""

    def __init__(self, size: int, patch: pytest.MonkeyPatch) -> None:
        self.size, self.place = size, threading.local()
        self.barrier = threading.Barrier(size, timeout=20)
        self.sent: dict[str, list[list[Tensor]]] = {}
        self.posted: dict[tuple[int, int], Tensor] = {}  # by sender and receiver
        self.boxes = {(src, dst): queue.Queue[Tensor]() for src in range(size) for dst in range(size)}
        for name in ("all_reduce", "isend", "irecv", "broadcast"):
            patch.setattr(torch.distributed, name, getattr(self, name))

    def run(self, act: Callable[[Ranks], Any]) -> list[Any]:
        found: list[Any] = [None] * self.size

        def one(rank: int) -> None:
            self.place.rank = rank
            try:
                found[rank] = act(Ranks(rank, self.size))
            except Exception as error:
                self.barrier.abort()
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        errors = [one for one in found if isinstance(one, Exception)]
        assert not errors, errors
        return found

    def all_reduce(self, tensor: Tensor, op: Any) -> None:
        assert op == torch.distributed.ReduceOp.MAX
        tensor.copy_(torch.stack(self._exchange("all_reduce", tensor)).amax(0))

    def isend(self, tensor: Tensor, dst: int) -> Any:
        way = self.place.rank, dst
        self.posted[way] = tensor.clone()
        self.boxes[way].put(self.posted[way])
        return SimpleNamespace(wait=lambda: None)

    def irecv(self, tensor: Tensor, src: int) -> Any:
        way = src, self.place.rank
        return SimpleNamespace(wait=lambda: tensor.copy_(self.boxes[way].get(timeout=20)))

    def broadcast(self, tensor: Tensor, src: int, async_op: bool) -> Any:
        tensor.copy_(self._exchange("broadcast", tensor)[src])
        return SimpleNamespace(wait=lambda: None)

    def _exchange(self, name: str, tensor: Tensor) -> list[Tensor]:
        slots = self._slots(name)
        slots[self.place.rank] = tensor.clone()
        self.barrier.wait()
        return slots

    def _slots(self, name: str) -> list[Tensor]:
        if self.barrier.wait() == 0:
            self.sent.setdefault(name, []).append([torch.empty(0)] * self.size)
        self.barrier.wait()
        return self.sent[name][-1]


class Mark:
    """In the place of noise: rank r adds r + 1 of its size."""

    kind = "test_only"

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def add_normal(self, total: Tensor, scale: float) -> None:
        total += (self.rank + 1) * scale


def _parts(size: int, *shapes: tuple[int, ...]) -> list[ClippedSum]:
    g = torch.Generator().manual_seed(2)
    return [ClippedSum([torch.randn(shape, generator=g) for shape in shapes], [1.0]) for _ in range(size)]


def _whole(parts: list[ClippedSum]) -> Tensor:
    return torch.stack([torch.cat([part.flatten() for part in one.tensors]) for one in parts]).sum(0)


@pytest.mark.parametrize("size", [2, 3, 5])
@pytest.mark.parametrize("shapes", [((4, 3), (7,)), ((2,),)])
def test_pitfall_22_each_coordinate_has_the_noise_of_its_owner_alone(
    size: int, shapes: tuple[tuple[int, ...], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, parts, plan = Threads(size, monkeypatch), _parts(size, *shapes), _plan(1.0)
    found = threads.run(lambda ranks: ranks.noisy_mean(plan, _copy(parts[ranks.rank]), Mark(ranks.rank)))
    results = [torch.cat([part.flatten() for part in one]) for one in found]
    assert all(torch.equal(result, results[0]) for result in results)
    assert [part.shape for part in found[0]] == [torch.Size(shape) for shape in shapes]
    noise = (results[0] * plan.denominator - _whole(parts)) / CLIP
    owners = torch.arange(len(noise)) // -(-len(noise) // size)
    torch.testing.assert_close(noise, owners + 1.0, rtol=0, atol=1e-4)


def test_pitfall_22_ranks_hand_in_their_sums_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    threads, parts = Threads(2, monkeypatch), _parts(2, (4, 3), (8,))
    threads.run(lambda ranks: ranks.noisy_mean(_plan(1.0), _copy(parts[ranks.rank]), Mark(ranks.rank)))
    assert set(threads.posted) == {(0, 1), (1, 0)}
    for (src, dst), piece in threads.posted.items():  # what the receiver owns, and no more
        assert torch.equal(piece, torch.cat([one.flatten() for one in parts[src].tensors]).chunk(2)[dst])
    # Whatever else is sent tells no sum without noise: one number, and slices that have theirs.
    assert [value.numel() for values in threads.sent["all_reduce"] for value in values] == [1, 1]
    for owner, values in enumerate(threads.sent["broadcast"]):
        assert not torch.isclose(values[owner] * 4.0, _whole(parts).chunk(2)[owner], atol=CLIP / 2).any()


def test_pitfall_22_no_two_ranks_have_the_same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("os", "test_only"):
        drawn = [Ranks(rank, 3).open_entropy(kind).normal(4) for rank in range(3)]
        assert len({tuple(one) for one in drawn}) == 3
    assert list(Ranks().open_entropy("test_only").normal(4)) == list(open_entropy("test_only").normal(4))


def test_sums_are_exchanged_in_the_precision_that_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    single, double = torch.float32, torch.float64
    none: list[float] = []
    for shares, expected in (
        ([(single, [1.0]), (single, [1.0])], single),
        ([(single, [1.0]), (double, [1.0])], double),
        ([(single, [1.0]), (double, none)], single),  # an empty share is zeros
        ([(double, none), (double, none)], double),
    ):
        threads = Threads(2, monkeypatch)
        parts = [ClippedSum([torch.zeros(3, dtype=kind)], norms) for kind, norms in shares]
        threads.run(lambda ranks, parts=parts: ranks.noisy_mean(_plan(0.0), parts[ranks.rank], Mark(ranks.rank)))
        assert [piece.dtype for piece in threads.posted.values()] == [expected, expected]


def test_other_ranks_hear_rank_0_and_take_its_values(both: list[dict[str, Any]]) -> None:
    first, second = both
    assert first["told"] == second["told"] == {"step": 3, "drawn": [1, 2]}
    for name in ("weights", "taken"):
        assert all(torch.equal(one, other) for one, other in zip(first[name], second[name], strict=True))
    assert all(not value.any() for value in second["taken"])


def test_a_rank_that_is_gone_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any, **__: Any) -> None:
        raise RuntimeError("[../third_party/gloo] Connection closed by peer [10.0.0.1]:4711")

    for name in ("all_reduce", "irecv", "broadcast", "broadcast_object_list", "gather_object"):
        monkeypatch.setattr(torch.distributed, name, closed)
    part, ranks = open_backend("unit", _model(), _loss, CLIP).clipped_sum(_patients(2)), Ranks(0, 2)
    for act in (
        lambda: ranks.noisy_mean(_plan(1.0), part, open_entropy("test_only")),
        lambda: ranks.take(part.tensors),
        lambda: ranks.agree([torch.zeros(2)]),
        lambda: ranks.gather_norms([1.0]),
    ):
        with pytest.raises(MedsynthError, match="assisted in the training has ended") as caught:
            act()
        assert "10.0.0.1" not in str(caught.value)
    with pytest.raises(MedsynthError, match="rank 0 has ended"):
        Ranks(1, 2).await_call()


def test_every_patient_is_in_exactly_one_share() -> None:
    for size in (1, 2, 3, 7):
        shares = [Ranks(rank, size).share(list(range(5))) for rank in range(size)]
        assert sorted(index for share in shares for index in share) == list(range(5))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = open_ranks()
    assert ranks == Ranks(0, 1) and ranks.first
    model = _model()
    alone = open_backend("unit", model, _loss, CLIP).clipped_sum(_patients(2))
    got = ranks.noisy_mean(_plan(1.0), _copy(alone), open_entropy("test_only"))
    want = _plan(1.0).noisy_mean(alone.tensors, open_entropy("test_only"))
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
    assert ranks.gather_norms(alone.norms) == alone.norms and ranks.agree(list(model.parameters()))
    ranks.call("nobody is there")
    ranks.take(alone.tensors)
    ranks.take_state(torch.optim.Adam(model.parameters()))


def test_incomplete_variables_of_torchrun_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PrivacyError, match="start it with torchrun"):
        open_ranks()


def test_variables_that_are_no_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match="whole numbers"):
        open_ranks()
