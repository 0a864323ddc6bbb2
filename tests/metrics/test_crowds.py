"""Agreement, memorisation and fidelity: each must react to the fault that it is there for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from medsynth.metrics import agreement, fidelity, memorisation


def _blobs(count: int, seed: int, rank: int, radius: float = 0.35) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    axes = torch.stack(torch.meshgrid(*[torch.linspace(-1, 1, 16)] * rank, indexing="ij"))
    centres = 0.8 * (torch.rand(count, rank, *[1] * rank, generator=random) - 0.5)
    labels = ((axes - centres).square().sum(dim=1).sqrt() < radius).to(torch.uint8)
    noise = 0.2 * torch.randn(count, *[16] * rank, generator=random)
    return (labels.float() + noise - 0.5).clamp(-1, 1)[:, None], labels


def _threshold(images: Tensor) -> Tensor:
    return (images[:, 0] > 0).to(torch.uint8)


@pytest.mark.parametrize("rank", [2, 3])
def test_agreement_falls_when_images_get_each_others_labels(rank: int) -> None:
    images, labels = _blobs(10, 0, rank)
    obeyed = agreement.label_agreement([_threshold, _threshold], images, labels, 2)
    ignored = agreement.label_agreement([_threshold], images, labels.roll(1, dims=0), 2)
    assert obeyed.shape == (10, 1) and np.nanmean(obeyed) > np.nanmean(ignored) + 0.3


@pytest.mark.parametrize("rank", [2, 3])
def test_copies_of_training_images_are_seen_and_strangers_are_not(rank: int) -> None:
    train, held_out, strangers = (_blobs(n, seed, rank)[0] for n, seed in ((60, 1), (60, 2), (60, 3)))
    copies = train + 0.05 * torch.randn(train.shape, generator=torch.Generator().manual_seed(4))
    copied, fresh = memorisation.nearness(train, held_out, copies), memorisation.nearness(train, held_out, strangers)
    assert copied.median_ratio < 0.6 and copied.nearer_than_held_out > 0.9
    assert 0.8 < fresh.median_ratio < 1.25 and fresh.nearer_than_held_out < 0.25


@pytest.mark.parametrize("rank", [2, 3])
def test_discrepancy_is_near_zero_for_the_same_crowd_and_grows_with_a_fault(rank: int) -> None:
    real, same = _blobs(60, 5, rank)[0], _blobs(60, 6, rank)[0]
    blurred = (
        torch.nn.functional.avg_pool2d(same, 5, 1, 2) if rank == 2 else torch.nn.functional.avg_pool3d(same, 5, 1, 2)
    )
    assert abs(fidelity.discrepancy(real, same, 0)) < 0.3 * fidelity.discrepancy(real, blurred, 0)


@pytest.mark.parametrize(("rank", "size"), [(2, 16), (3, 12), (2, 64), (3, 48), (2, 6)])
def test_a_collapsed_generator_has_similar_images(rank: int, size: int) -> None:
    random = torch.Generator().manual_seed(7)
    varied = 2 * torch.rand(6, 1, *[size] * rank, generator=random) - 1
    collapsed = (varied[:1] + 0.02 * torch.randn(varied.shape, generator=random)).clamp(-1, 1)
    assert fidelity.similarity_within(collapsed, 4, 0) > 0.9 > fidelity.similarity_within(varied, 4, 0)


def test_one_image_alone_has_no_crowd() -> None:
    image = torch.zeros(1, 1, 16, 16)
    assert np.isnan(fidelity.similarity_within(image, 4, 0)) and np.isnan(fidelity.discrepancy(image, image, 0))
