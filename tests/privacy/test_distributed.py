"""Two ranks take the same private step as one: same sum to rounding, noise once, empty shares included."""

from __future__ import annotations

import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

from medsynth.errors import ConfigError, MedsynthError, PrivacyError
from medsynth.privacy.distributed import Ranks, close_ranks, open_ranks
from medsynth.privacy.entropy import open_entropy
from medsynth.privacy.gradients import Batch, open_backend
from medsynth.privacy.mechanism import DpSgd

PATIENTS = 5
CLIP = 0.5


def _model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(48, 2))


def _loss(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean(1)


def _patients(count: int) -> list[Batch]:
    g = torch.Generator().manual_seed(1)
    rows = [1 + index % 3 for index in range(count)]
    return [{"x": torch.randn(n, 2, 4, 4, generator=g), "y": torch.randn(n, 2, generator=g)} for n in rows]


def _plan(noise: float) -> DpSgd:
    return DpSgd("test", 0.5, 10, noise, CLIP, 4.0)


def _rank(rank: int, size: int, port: int, name: str, out: str) -> None:
    import os

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = open_ranks()
    entropy = open_entropy("test_only") if ranks.first else None
    model = _model(seed=rank)  # different weights, until rank 0's are taken
    ranks.take_weights(model)
    backend = open_backend(name, model, _loss, CLIP)
    found: dict[str, Any] = {"name": name, "weights": [parameter.detach().clone() for parameter in model.parameters()]}
    for count in (PATIENTS, 1, 0):  # the second leaves rank 1 without patients, the third both
        part = backend.clipped_sum(ranks.share(_patients(count)))
        whole = ranks.reduce_clipped_sum(part)
        found[f"sum{count}"], found[f"norms{count}"] = whole.tensors, whole.norms
        if entropy is not None:
            found[f"noisy{count}"] = _plan(1.0).noisy_mean([t.clone() for t in whole.tensors], entropy)
    told = {"step": 3, "drawn": [1, 2]}
    ranks.call(told) if ranks.first else None
    found["told"] = told if ranks.first else ranks.await_call()
    mixed = [torch.full((2, 3), float(rank)), torch.full((2,), rank), torch.full((4,), float(rank))]
    ranks.take(mixed)
    found["taken"] = mixed
    torch.save(found, f"{out}/{rank}.pt")
    close_ranks()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module", params=["unit", "bookkeeping"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(_rank, (2, _free_port(), request.param, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("count", [PATIENTS, 1, 0])
def test_two_ranks_give_the_sum_and_norms_of_one_to_rank_0_alone(both: list[dict[str, Any]], count: int) -> None:
    alone = open_backend("unit", _model(), _loss, CLIP).clipped_sum(_patients(count))
    assert len(alone.norms) == count
    first, second = both
    for got, want in zip(first[f"sum{count}"], alone.tensors, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=1e-7)  # the engine clips 1.5e-6 below
    assert first[f"norms{count}"] == pytest.approx(alone.norms, rel=1e-5)
    assert second[f"sum{count}"] == [] and second[f"norms{count}"] == []


def test_sums_are_exchanged_in_the_precision_that_they_have(both: list[dict[str, Any]]) -> None:
    kinds = {count: {tensor.dtype for tensor in both[0][f"sum{count}"]} for count in (PATIENTS, 1, 0)}
    # Patients of several lengths take several products; one patient and an empty share take one.
    one = torch.float32 if both[0]["name"] == "bookkeeping" else torch.float64
    assert kinds == {PATIENTS: {torch.float64}, 1: {one}, 0: {torch.float64}}


@pytest.mark.parametrize("count", [PATIENTS, 0])
def test_pitfall_22_noise_is_added_once(both: list[dict[str, Any]], count: int) -> None:
    noisy, whole = (torch.cat([part.flatten() for part in both[0][f"{name}{count}"]]) for name in ("noisy", "sum"))
    spread = float((noisy - whole / 4.0).std()) / (CLIP / 4.0)
    # Noise of every rank would give sqrt(2); 155 parameters estimate the spread to 6 %.
    assert abs(spread - 1) < 4 / math.sqrt(2 * noisy.numel()), spread
    assert f"noisy{count}" not in both[1]


def test_pitfall_22_ranks_hand_in_their_sums_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Tensor] = []
    monkeypatch.setattr(torch.distributed, "reduce", lambda tensor, dst: sent.append(tensor.clone()))
    monkeypatch.setattr(torch.distributed, "gather_object", lambda part, gathered, dst: None)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: None)
    part = open_backend("unit", _model(), _loss, CLIP).clipped_sum(_patients(3))
    for rank in (0, 1):
        Ranks(rank, 2).reduce_clipped_sum(part)
        assert torch.equal(sent[rank], torch.cat([total.flatten() for total in part.tensors]))


def test_other_ranks_hear_rank_0_and_take_its_values(both: list[dict[str, Any]]) -> None:
    first, second = both
    assert first["told"] == second["told"] == {"step": 3, "drawn": [1, 2]}
    for name in ("weights", "taken"):
        assert all(torch.equal(one, other) for one, other in zip(first[name], second[name], strict=True))
    assert all(not value.any() for value in second["taken"])


def test_a_rank_that_is_gone_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any, **__: Any) -> None:
        raise RuntimeError("[../third_party/gloo] Connection closed by peer [10.0.0.1]:4711")

    for name in ("all_reduce", "reduce", "broadcast", "broadcast_object_list"):
        monkeypatch.setattr(torch.distributed, name, closed)
    part = open_backend("unit", _model(), _loss, CLIP).clipped_sum(_patients(2))
    for act in (lambda: Ranks(0, 2).reduce_clipped_sum(part), lambda: Ranks(0, 2).take(part.tensors)):
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
    alone = open_backend("unit", _model(), _loss, CLIP).clipped_sum(_patients(2))
    assert ranks.reduce_clipped_sum(alone) is alone
    ranks.call("nobody is there")
    ranks.take(alone.tensors)


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
