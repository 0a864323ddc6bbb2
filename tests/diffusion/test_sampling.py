"""Sampling: every scheduler, any rank, each row from its own seed alone."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from medsynth.config import Train
from medsynth.diffusion.objective import training_schedule
from medsynth.diffusion.sampling import Scheduler, sample_latents
from medsynth.models.denoiser import Denoiser, Preconditioning

SETTINGS = Train(channels=(8, 8), norm_groups=4, head_channels=4, noise_steps=1000)
SCHEDULERS = get_args(Scheduler)


def denoiser(rank: int) -> Denoiser:
    torch.manual_seed(0)
    known = Preconditioning(training_schedule(SETTINGS).alphas_cumprod.sqrt(), [1.0, 0.5], rank)
    model = Denoiser(known, 2, 1, rank, SETTINGS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def masks(rank: int, count: int = 3) -> torch.Tensor:
    return torch.rand(count, 1, *(4,) * rank, generator=torch.Generator().manual_seed(1)).round()


class Oracle(nn.Module):
    """The velocity of data that is one known latent."""

    def __init__(self, clean: torch.Tensor) -> None:
        super().__init__()
        self.clean = clean
        self.signal = training_schedule(SETTINGS).alphas_cumprod.sqrt()

    def forward(self, noisy: torch.Tensor, steps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        signal = self.signal[steps].view(-1, *(1,) * (noisy.ndim - 1))
        sigma = (1 - signal.square()).sqrt()
        return signal * (noisy - signal * self.clean) / sigma - sigma * self.clean


class GaussianOracle(nn.Module):
    """The expected velocity of data that is Gaussian with a known spread."""

    def __init__(self, spread: float) -> None:
        super().__init__()
        self.known = Preconditioning(training_schedule(SETTINGS).alphas_cumprod.sqrt(), [spread], 2)

    def forward(self, noisy: torch.Tensor, steps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.known(steps)[1] * noisy


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("rank", [2, 3])
def test_every_scheduler_runs_at_every_rank_and_is_repeatable(rank: int, name: Scheduler) -> None:
    model = denoiser(rank)
    first, second = (sample_latents(model, masks(rank), 2, [5, 6, 7], SETTINGS, name, 5) for _ in range(2))
    assert first.shape == (3, 2, *(4,) * rank) and torch.isfinite(first).all()
    assert torch.equal(first, second)
    assert not torch.allclose(first[0], first[1])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_row_does_not_know_its_neighbours(name: Scheduler) -> None:
    model, planes = denoiser(2), masks(2)
    row = sample_latents(model, planes, 2, [5, 6, 7], SETTINGS, name, 4)[0]
    others = torch.cat([planes[:1], 1 - planes[1:]])
    assert torch.equal(sample_latents(model, others, 2, [5, 8, 9], SETTINGS, name, 4)[0], row)
    moved = torch.cat([1 - planes[1:], planes[:1]])
    assert torch.equal(sample_latents(model, moved, 2, [8, 9, 5], SETTINGS, name, 4)[2], row)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_perfect_denoiser_gives_the_data_back(name: Scheduler) -> None:
    clean = torch.randn(2, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    found = sample_latents(Oracle(clean), masks(2, 2), 2, [1, 2], SETTINGS, name, 20)
    torch.testing.assert_close(found, clean, atol=0.05, rtol=0)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_perfect_denoiser_of_a_spread_gives_that_spread(name: Scheduler) -> None:
    found = sample_latents(GaussianOracle(0.5), torch.zeros(1, 1, 64, 64), 1, [1], SETTINGS, name, 50)
    assert found.std().item() == pytest.approx(0.5, rel=0.1)


def test_guidance_of_one_is_the_conditional_model_and_zero_forgets_the_mask() -> None:
    model, planes = denoiser(2), masks(2)

    class Blind(nn.Module):
        def forward(self, noisy: torch.Tensor, steps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return model(noisy, steps, torch.zeros_like(mask))

    def drawn(net: nn.Module, guidance: float) -> torch.Tensor:
        return sample_latents(net, planes, 2, [1, 2, 3], SETTINGS, "ddim", 4, guidance)

    torch.testing.assert_close(drawn(model, 1.0), drawn(model, 1.0 + 1e-7), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(drawn(model, 0.0), drawn(Blind(), 1.0))
    assert (drawn(model, 3.0) - drawn(model, 1.0)).abs().max() > 1e-3


@pytest.mark.parametrize("name", SCHEDULERS)
def test_sampling_starts_at_pure_noise_and_takes_the_steps_asked_for(name: Scheduler) -> None:
    asked: list[int] = []

    class Watch(nn.Module):
        def forward(self, noisy: torch.Tensor, steps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            asked.append(int(steps[0]))
            return torch.zeros_like(noisy)

    sample_latents(Watch(), masks(2), 2, [1, 2, 3], SETTINGS, name, 10)
    assert asked[0] == 999 and asked == sorted(asked, reverse=True)
    assert len(set(asked)) == 10


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_draft_shows_the_more_the_later_sampling_starts(name: str) -> None:
    drafts = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    likeness = []
    for start in (0.2, 0.6, 1.0):
        found = sample_latents(
            GaussianOracle(1.0), torch.zeros(2, 1, 32, 32), 1, [1, 2], SETTINGS, name, 20, drafts=drafts, start=start
        )
        likeness.append(float(torch.corrcoef(torch.stack([found.flatten(), drafts.flatten()]))[0, 1]))
    assert likeness[0] > 0.8 and likeness[0] > likeness[1] + 0.1 and abs(likeness[2]) < 0.1
    kept = sample_latents(
        GaussianOracle(1.0), torch.zeros(2, 1, 32, 32), 1, [1, 2], SETTINGS, name, 20, 1.0, drafts, 0.0
    )
    assert torch.equal(kept, drafts)
