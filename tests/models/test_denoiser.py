"""The denoiser: preconditioned by the best linear guess, and obedient to the label map."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from medsynth.config import Train
from medsynth.diffusion.objective import training_schedule
from medsynth.models.conditioned_networks import position_codes
from medsynth.models.denoiser import Denoiser, Preconditioning

SETTINGS = Train(channels=(8, 8), norm_groups=4, head_channels=4, noise_steps=50)
SPREAD = (2.0, 1.0, 0.3)
WAYS = get_args(Train.model_fields["conditioning"].annotation)

every_network = pytest.mark.parametrize(("rank", "way"), [(rank, way) for rank in (2, 3) for way in WAYS])


def preconditioning(rank: int = 2) -> Preconditioning:
    return Preconditioning(training_schedule(SETTINGS).alphas_cumprod.sqrt(), SPREAD, rank)


def denoiser(rank: int, way: str = "concat", awake: bool = False) -> Denoiser:
    torch.manual_seed(0)
    model = Denoiser(preconditioning(rank), 3, 2, rank, SETTINGS.model_copy(update={"conditioning": way})).eval()
    if awake:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("step", [0, 10, 25, 40, 49])
def test_the_factors_are_those_of_a_linear_regression(step: int) -> None:
    known = preconditioning()
    stream = torch.Generator().manual_seed(step)
    scale, skip, rest = known(torch.tensor([step]))
    signal = known.signal[step].double()
    noise = (1 - signal.square()).sqrt()
    for channel, spread in enumerate(SPREAD):
        clean = torch.randn(200_000, generator=stream, dtype=torch.float64) * spread
        white = torch.randn(200_000, generator=stream, dtype=torch.float64)
        noisy, velocity = signal * clean + noise * white, signal * white - noise * clean
        slope = (noisy * velocity).mean() / noisy.square().mean()
        assert slope.item() == pytest.approx(skip[0, channel].item(), abs=0.02)
        assert (velocity - slope * noisy).std().item() == pytest.approx(rest[0, channel].item(), rel=0.02)
        assert noisy.std().item() == pytest.approx(1 / scale[0, channel].item(), rel=0.02)


def test_the_error_scale_gives_every_step_the_same_weight_and_coarse_bands_more() -> None:
    known = preconditioning()
    steps = torch.arange(50)
    weights = known.error_scale(steps) * known(steps)[2]
    torch.testing.assert_close(weights, weights[:1].expand_as(weights))
    torch.testing.assert_close(weights.square().mean(1), torch.ones_like(weights[:, 0]))
    assert weights[0, 0] > weights[0, 1] > weights[0, 2]


@every_network
def test_it_starts_as_the_best_linear_guess(rank: int, way: str) -> None:
    model = denoiser(rank, way)
    noisy, mask, steps = torch.randn(2, 3, *(8,) * rank), torch.randn(2, 2, *(8,) * rank), torch.tensor([3, 40])
    with torch.no_grad():
        torch.testing.assert_close(model(noisy, steps, mask), model.preconditioning(steps)[1] * noisy)


@every_network
def test_once_it_has_weights_it_listens_to_the_mask_the_step_and_the_image(rank: int, way: str) -> None:
    model = denoiser(rank, way, awake=True)
    with torch.no_grad():
        noisy, mask, steps = torch.randn(2, 3, *(8,) * rank), torch.zeros(2, 2, *(8,) * rank), torch.tensor([25, 25])
        plain = model(noisy, steps, mask)
        other = mask.clone()
        other[0, 0, :4] = 1
        changed = model(noisy, steps, other) - plain
        assert changed[0].abs().max() > 1e-3, "the mask is ignored"
        assert changed[1].abs().max() == 0, "a row's mask reaches its neighbour"
        assert (model(noisy, steps + 10, mask) - plain).abs().max() > 1e-3
        assert (model(noisy + 0.1, steps, mask) - plain - 0.1 * model.preconditioning(steps)[1]).abs().max() > 1e-3
        assert plain.shape == noisy.shape


@every_network
def test_where_the_mask_lies_matters_and_the_dropped_mask_still_denoises(rank: int, way: str) -> None:
    model = denoiser(rank, way, awake=True)
    with torch.no_grad():
        noisy, steps = torch.randn(1, 3, *(8,) * rank), torch.tensor([25])
        mask = torch.zeros(1, 2, *(8,) * rank)
        mask[:, 0, :4] = 1
        here, there = (model(noisy, steps, m) for m in (mask, mask.flip(2)))
        assert (here - there).abs().max() > 1e-3, "only how much of the mask there is matters"
        dropped = model(noisy, steps, torch.zeros_like(mask))
        assert dropped.isfinite().all()
        guess = model.preconditioning(steps)[1] * noisy
        assert (dropped - guess).std() > 1e-3, "without a mask the network says nothing"


@pytest.mark.parametrize("rank", [2, 3])
def test_networks_are_of_like_size(rank: int) -> None:
    def size(way: str) -> int:
        settings = Train.model_validate({"conditioning": way})
        model = Denoiser(preconditioning(rank), 3, 2 * 4**rank, rank, settings)
        return sum(p.numel() for p in model.parameters())

    sizes = [size(way) for way in WAYS]
    assert max(sizes) <= 1.5 * min(sizes)


@pytest.mark.parametrize("shape", [(8, 8), (3, 8, 5), (64, 48, 16)])
def test_every_place_has_a_code_of_its_own(shape: tuple[int, ...]) -> None:
    codes = position_codes(shape).flatten(1).T
    assert codes.shape[1] == 8 * len(shape) and codes.abs().max() <= 1
    assert len(torch.unique(codes.round(decimals=6), dim=0)) == len(codes)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("levels", [(False, False), (False, True), (True, True)])
def test_attention_levels_are_possible(way: str, levels: tuple[bool, ...]) -> None:
    settings = SETTINGS.model_copy(update={"attention_levels": levels, "conditioning": way})
    model = Denoiser(preconditioning(), 3, 2, 2, settings)
    assert model(torch.randn(1, 3, 8, 8), torch.tensor([1]), torch.randn(1, 2, 8, 8)).shape == (1, 3, 8, 8)


def test_constants_are_no_parameters_and_travel_with_the_weights() -> None:
    model = denoiser(2)
    assert not any(name.startswith("preconditioning") for name, _ in model.named_parameters())
    assert {"preconditioning.signal", "preconditioning.spread"} <= set(model.state_dict())
