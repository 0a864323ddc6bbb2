"""The objective: the velocity and the noisy latent determine the clean one; rows do not mix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medsynth.config import Train
from medsynth.diffusion.conditioning import MaskEncoder
from medsynth.diffusion.objective import noise_rows, row_loss, training_schedule
from medsynth.models.denoiser import Preconditioning

SETTINGS = Train(noise_steps=50)


def preconditioning(rank: int = 2) -> Preconditioning:
    return Preconditioning(training_schedule(SETTINGS).alphas_cumprod.sqrt(), [1.5, 0.5], rank)


def rows(rank: int = 2, count: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    stream = torch.Generator().manual_seed(3)
    return torch.randn(count, 2, *(4,) * rank, generator=stream), torch.ones(count, 1, *(4,) * rank)


class Answer(nn.Module):
    """Give the same answer whatever is asked."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, noisy: torch.Tensor, steps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.value


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"])
@pytest.mark.parametrize("rank", [2, 3])
def test_noisy_and_velocity_give_the_clean_latent_back(rank: int, schedule: str) -> None:
    latents, masks = rows(rank)
    settings = Train.model_validate({"noise_steps": 50, "beta_schedule": schedule})
    known = Preconditioning(training_schedule(settings).alphas_cumprod.sqrt(), [1.5, 0.5], rank)
    batch = noise_rows(latents, masks, known, 0.0, torch.Generator().manual_seed(0))
    signal = known.signal[batch["steps"]].view(-1, *(1,) * (rank + 1))
    sigma = (1 - signal.square()).sqrt()
    torch.testing.assert_close(signal * batch["noisy"] - sigma * batch["target"], latents, atol=1e-5, rtol=1e-5)
    noise = sigma * batch["noisy"] + signal * batch["target"]
    assert noise.mean().abs() < 0.1 and (noise.std() - 1).abs() < 0.1


def test_noising_agrees_with_diffusers() -> None:
    latents, masks = rows()
    known, schedule = preconditioning(), training_schedule(SETTINGS)
    batch = noise_rows(latents, masks, known, 0.0, torch.Generator().manual_seed(0))
    signal = known.signal[batch["steps"]].view(-1, 1, 1, 1)
    noise = (1 - signal.square()).sqrt() * batch["noisy"] + signal * batch["target"]
    torch.testing.assert_close(schedule.add_noise(latents, noise, batch["steps"]), batch["noisy"])
    torch.testing.assert_close(schedule.get_velocity(latents, noise, batch["steps"]), batch["target"])


def test_every_step_is_drawn_and_no_other() -> None:
    latents, masks = rows(count=1000)
    batch = noise_rows(latents, masks, preconditioning(), 0.0, torch.Generator().manual_seed(0))
    assert sorted(set(batch["steps"].tolist())) == list(range(50))


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_masks_are_dropped_whole_and_at_the_rate(rate: float) -> None:
    latents, masks = rows(count=1000)
    dropped = noise_rows(latents, masks, preconditioning(), rate, torch.Generator().manual_seed(0))["mask"].flatten(1)
    assert all(len(set(row.tolist())) == 1 for row in dropped)
    assert (dropped[:, 0] == 0).float().mean().item() == pytest.approx(rate, abs=0.05)


def test_the_same_stream_gives_the_same_rows() -> None:
    latents, masks = rows()
    first, second = (
        noise_rows(latents, masks, preconditioning(), 0.5, torch.Generator().manual_seed(7)) for _ in range(2)
    )
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_right_answer_costs_nothing_and_a_wrong_row_costs_only_itself() -> None:
    latents, masks = rows(count=4)
    batch = noise_rows(latents, masks, preconditioning(), 0.0, torch.Generator().manual_seed(0))
    assert row_loss(Answer(batch["target"]), batch).tolist() == [0, 0, 0, 0]
    wrong = batch["target"].clone()
    wrong[2] += 1
    loss = row_loss(Answer(wrong), batch)
    assert (loss > 0).tolist() == [False, False, True, False]
    assert loss[2].item() == pytest.approx(batch["scale"][2].square().mean().item(), rel=1e-5)


@pytest.mark.parametrize("rank", [2, 3])
def test_an_encoded_mask_keeps_every_voxel_and_an_empty_one_is_the_dropped_one(rank: int) -> None:
    encoder = MaskEncoder(rank, 3, 2)
    labels = torch.randint(0, 3, (2, *(8,) * rank), generator=torch.Generator().manual_seed(0))
    encoded = encoder(labels)
    assert encoded.shape == (2, encoder.channels, *(2,) * rank)
    planes = encoder.haar.inverse(encoded)
    planes = planes / planes.max()
    assert torch.equal((planes[:, 0] > 0.5) + 2 * (planes[:, 1] > 0.5), labels)
    assert encoder(torch.zeros_like(labels)).abs().max() == 0
