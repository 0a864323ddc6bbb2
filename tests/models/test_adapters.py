"""Adapters start as nothing, and the choice of what patients move is what it says."""

from __future__ import annotations

import copy
from typing import Literal

import pytest
import torch
from torch import nn

from medsynth.config import Train
from medsynth.diffusion.objective import training_schedule
from medsynth.errors import ConfigError
from medsynth.models.adapters import LoraConv, LoraLinear, add_adapters, select_trainable
from medsynth.models.denoiser import Denoiser, Preconditioning

SETTINGS = Train(channels=(8, 8), norm_groups=4, head_channels=4, noise_steps=20, attention_levels=(False, True))

every_way = pytest.mark.parametrize("way", ["concat", "spade", "cross_attention"])


def model(rank: int = 2, way: str = "concat") -> Denoiser:
    torch.manual_seed(0)
    known = Preconditioning(training_schedule(SETTINGS).alphas_cumprod.sqrt(), [1.0, 0.5], rank)
    built = Denoiser(known, 2, 1, rank, SETTINGS.model_copy(update={"conditioning": way}))
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built.eval()


def answer(built: Denoiser, rank: int = 2) -> torch.Tensor:
    stream = torch.Generator().manual_seed(1)
    noisy, mask = (torch.randn(2, n, *(8,) * rank, generator=stream) for n in (2, 1))
    return built(noisy, torch.tensor([2, 15]), mask)


@every_way
@pytest.mark.parametrize("rank", [2, 3])
def test_an_adapted_model_starts_as_the_model(rank: int, way: str) -> None:
    plain = model(rank, way)
    adapted = copy.deepcopy(plain)
    add_adapters(adapted, 2)
    with torch.no_grad():
        torch.testing.assert_close(answer(adapted, rank), answer(plain, rank))


def test_adapters_move_the_output_once_they_are_trained_and_nothing_else_moves() -> None:
    adapted = model()
    add_adapters(adapted, 2)
    select_trainable(adapted, "lora")
    before = {name: p.detach().clone() for name, p in adapted.named_parameters()}
    start = answer(adapted)
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        answer(adapted).square().mean().backward()
        optimizer.step()
    moved = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all(name.endswith(("up.weight", "down.weight")) for name in moved)
    assert (answer(adapted) - start).abs().max() > 1e-5


def test_all_means_all_and_counts_are_right() -> None:
    built = model()
    assert select_trainable(built, "all") == sum(p.numel() for p in built.parameters())


@every_way
def test_bias_norm_means_vectors_only(way: str) -> None:
    built = model(way=way)
    count = select_trainable(built, "bias_norm")
    chosen = [p for p in built.parameters() if p.requires_grad]
    assert count == sum(p.numel() for p in chosen) and all(p.ndim == 1 for p in chosen)
    norms = [p for m in built.modules() if isinstance(m, nn.GroupNorm) for p in m.parameters()]
    assert norms and all(p.requires_grad for p in norms)


@every_way
@pytest.mark.parametrize("rank", [1, 3])
def test_lora_counts_grow_with_the_rank(rank: int, way: str) -> None:
    built = model(way=way)
    layers = [m for m in built.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    expected = sum(
        rank * (m.in_features + m.out_features)
        if isinstance(m, nn.Linear)
        else rank * (m.in_channels * m.kernel_size[0] * m.kernel_size[1] + m.out_channels)
        for m in layers
    )
    add_adapters(built, rank)
    assert select_trainable(built, "lora") == expected
    assert sum(isinstance(m, LoraLinear | LoraConv) for m in built.modules()) == len(layers)


@pytest.mark.parametrize("choice", ["lora", "bias_norm"])
def test_a_choice_that_leaves_nothing_is_refused(choice: Literal["lora", "bias_norm"]) -> None:
    with pytest.raises(ConfigError, match=choice):
        select_trainable(nn.Sequential(nn.Linear(2, 2, bias=False)), choice)


def test_strided_and_grouped_convolutions() -> None:
    net = nn.Sequential(nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Conv2d(6, 6, 3, groups=6, padding=1))
    images = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        before = net(images)
        add_adapters(net, 2)
        torch.testing.assert_close(net(images), before)
    assert isinstance(net[0], LoraConv) and isinstance(net[1], nn.Conv2d)
