"""A denoiser is more familiar with what it was fitted on, and the score of a patient is the patient's own."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from medsynth.diffusion.recognition import familiarity, resemblance
from medsynth.metrics.membership import attack
from medsynth.randomness import derive_seed
from medsynth.stages.audit_generator import copied_scores, overfitted_scores


@pytest.mark.slow
def test_an_overfitted_denoiser_knows_its_images() -> None:
    members, strangers = overfitted_scores(seed=5)
    found = attack(members, strangers, 1000, np.random.default_rng(0))
    assert found.auc > 0.9 and found.auc_low > 0.75


@pytest.mark.parametrize("study", [0, 1, 2, 10, 12, 19, 20, 28, 44, 59, 76, 93])
def test_drafts_of_a_patients_own_statistics_come_nearer_than_to_others(study: int) -> None:
    """A control that is missed refuses a certificate; most of these were, with streams that all patients shared."""
    members, strangers = copied_scores(derive_seed(study, "audit", "generator"))
    found = attack(members, strangers, 500, np.random.default_rng(0))
    assert found.auc > 0.8 and found.auc_low > 0.68


class Fixed:
    """Drafts of what they were seeded with, in the place of released statistics."""

    def __init__(self) -> None:
        self.streams: list[tuple[float, float, float]] = []

    def draft(self, label: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.float32]:
        self.streams.append((rng.random(), rng.standard_normal(2)[1], rng.normal(3, 1)))
        return np.full((1, *label.shape), 0.5 if len(self.streams) % 2 else -0.5, np.float32)


def test_resemblance_is_the_error_of_the_mean_draft_in_units_of_the_images_variance() -> None:
    image = np.array([[[[1.0, -1.0], [1.0, -1.0]]]], np.float32)
    label, dresser = np.ones((1, 2, 2), np.int64), cast(Any, Fixed())
    assert resemblance(dresser, image, label, (3,)) == pytest.approx(0.0, abs=1e-6)  # the mean draft is 0
    assert resemblance(dresser, image + 2, label, (3,)) == pytest.approx(-np.log(5), abs=1e-5)
    assert len(dresser.streams) == 8 and dresser.streams[:4] == dresser.streams[4:], "seeded"
    empty = np.zeros_like(label)
    assert resemblance(dresser, image, empty, (3,)) == 0.0 and len(dresser.streams) == 8, "nothing is drafted for it"
    both = np.concatenate([image + 2, image]), np.concatenate([label, empty])
    assert resemblance(dresser, *both, (3,)) == pytest.approx(-np.log(5), abs=1e-5)
    before = len(dresser.streams)
    resemblance(dresser, np.repeat(image, 100, 0), np.repeat(label, 100, 0), (3,))
    assert len(dresser.streams) - before <= 4 * 8, "a video has hundreds of records"


def test_drafts_come_in_opposite_pairs_anew_for_each_patient() -> None:
    image, label = np.zeros((1, 1, 2, 2), np.float32), np.ones((1, 2, 2), np.int64)
    mine, others = Fixed(), Fixed()
    for dresser, patient in ((mine, 0), (others, 1)):
        resemblance(cast(Any, dresser), image, label, (3, patient))
    for one, other in (mine.streams[:2], mine.streams[2:]):
        assert one[0] == other[0] and one[1] == -other[1] and one[2] + other[2] == pytest.approx(6)
    assert len({one[0] for one in (*mine.streams, *others.streams)}) == 4


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
