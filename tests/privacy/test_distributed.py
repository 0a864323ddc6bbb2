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

from medsynth.errors import PrivacyError
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
    found: dict[str, Any] = {}
    for count in (PATIENTS, 1, 0):  # the second leaves rank 1 without patients, the third both
        part = backend.clipped_sum(ranks.share(_patients(count)))
        whole = ranks.reduce_clipped_sum(part)
        found[f"sum{count}"], found[f"norms{count}"] = whole.tensors, whole.norms
        found[f"exact{count}"] = ranks.noisy_mean(_plan(0.0), part, entropy)
        found[f"noisy{count}"] = ranks.noisy_mean(_plan(1.0), part, entropy)
    found["draws"] = [ranks.draw(_plan(1.0), 40, entropy) for _ in range(3)]
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
def test_two_ranks_give_the_sum_and_norms_of_one(both: list[dict[str, Any]], count: int) -> None:
    alone = open_backend("unit", _model(), _loss, CLIP).clipped_sum(_patients(count))
    assert len(alone.norms) == count
    for found in both:
        for got, want in zip(found[f"sum{count}"], alone.tensors, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)
        for got, want in zip(found[f"exact{count}"], alone.tensors, strict=True):
            torch.testing.assert_close(got, (want / 4.0).float(), rtol=1e-5, atol=1e-7)
        assert found[f"norms{count}"] == pytest.approx(alone.norms, rel=1e-5)


@pytest.mark.parametrize("count", [PATIENTS, 0])
def test_pitfall_22_noise_is_added_once_and_is_the_same_on_all_ranks(both: list[dict[str, Any]], count: int) -> None:
    first, second = (torch.cat([part.flatten() for part in found[f"noisy{count}"]]) for found in both)
    assert torch.equal(first, second)
    exact = torch.cat([part.flatten() for part in both[0][f"exact{count}"]])
    spread = float((first - exact).std()) / (CLIP / 4.0)
    # Noise of every rank would give sqrt(2); 155 parameters estimate the spread to 6 %.
    assert abs(spread - 1) < 4 / math.sqrt(2 * first.numel()), spread


def test_pitfall_22_other_ranks_draw_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Tensor] = []
    monkeypatch.setattr(torch.distributed, "reduce", lambda tensor, dst: sent.append(tensor.clone()))
    monkeypatch.setattr(torch.distributed, "broadcast", lambda tensor, src: tensor.fill_(7.0))
    part = open_backend("unit", _model(), _loss, CLIP).clipped_sum(_patients(3))
    noisy = Ranks(1, 2).noisy_mean(_plan(1.0), part, open_entropy("test_only"))
    assert torch.equal(sent[0], torch.cat([total.flatten() for total in part.tensors]))
    assert all(bool((piece == 7.0).all()) for piece in noisy)


def test_all_ranks_get_the_draws_of_rank_0_and_they_differ_by_step(both: list[dict[str, Any]]) -> None:
    assert both[0]["draws"] == both[1]["draws"]
    assert len({tuple(draw) for draw in both[0]["draws"]}) == 3


def test_every_patient_is_in_exactly_one_share() -> None:
    for size in (1, 2, 3, 7):
        shares = [Ranks(rank, size).share(list(range(5))) for rank in range(size)]
        assert sorted(index for share in shares for index in share) == list(range(5))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_one_process_needs_no_group_and_rank_0_needs_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = open_ranks()
    assert ranks == Ranks(0, 1) and ranks.first
    alone = open_backend("unit", _model(), _loss, CLIP).clipped_sum(_patients(2))
    assert ranks.reduce_clipped_sum(alone) is alone
    with pytest.raises(PrivacyError, match="rank 0 needs the entropy"):
        ranks.noisy_mean(_plan(1.0), alone, None)


def test_incomplete_variables_of_torchrun_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PrivacyError, match="start it with torchrun"):
        open_ranks()
