"""A denoiser is more familiar with what it was fitted on, and the score of a patient is the patient's own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from medsynth.diffusion.recognition import familiarity
from medsynth.metrics.membership import attack
from medsynth.stages.audit_results import overfitted_scores


@pytest.mark.slow
def test_an_overfitted_denoiser_knows_its_images() -> None:
    members, strangers = overfitted_scores(seed=5)
    found = attack(members, strangers, 1000, np.random.default_rng(0))
    assert found.auc > 0.9 and found.auc_low > 0.75


def test_the_linear_guess_alone_is_the_zero_of_the_score() -> None:
    from medsynth.config import Encode, Grid, Train
    from medsynth.diffusion.generator import build_generator
    from medsynth.models.autoencoder import build_codec

    space = Grid(spatial_dims=2, shape=(8, 8), labels={0: "background", 1: "organ"})
    built = build_generator(
        space, Train(channels=(8, 8), norm_groups=4, head_channels=4), build_codec(space, Encode(levels=1))
    )
    for parameter in built.denoiser.network.parameters():
        torch.nn.init.zeros_(parameter)
    latents, masks = torch.randn(3, 4, 4, 4), torch.zeros(3, 4, 4, 4)
    assert familiarity(built.denoiser, latents, masks, 0) == pytest.approx(0.0, abs=1e-5)
    with torch.no_grad():
        built.denoiser.network.out[-1].conv.bias += 0.5
    worse = familiarity(built.denoiser, latents, masks, 0)
    assert worse < -0.01 and worse == familiarity(built.denoiser, latents, masks, 0)
    assert worse != familiarity(built.denoiser, latents, masks, 1)
