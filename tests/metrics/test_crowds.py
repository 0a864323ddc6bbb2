"""Agreement, memorisation and fidelity: each must react to the fault that it is there for."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
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


def test_the_limit_of_copies_is_that_of_all_sides_however_few_bootstrap_samples_are_drawn() -> None:
    distances, trained = np.random.default_rng(0).uniform(0.5, 1.5, (16, 200)), np.arange(16) < 8
    sides = [np.isin(np.arange(16), of) for of in combinations(range(16), 8)]
    exact = np.quantile([memorisation._nearer(distances, side).mean() for side in sides], 0.999)
    found = [memorisation.copies(distances, trained, 100, np.random.default_rng(seed)) for seed in range(8)]
    assert [one.chance_high for one in found] == pytest.approx([exact] * 8, abs=0.01)
    many = memorisation.copies(distances, trained, 10_000, np.random.default_rng(0))
    assert (many.chance, many.chance_high) == (found[0].chance, found[0].chance_high)


def test_chance_counts_a_tie_of_both_sides_as_no_nearer_as_the_share_does() -> None:
    distances = np.array([[0.5, 0.5, 1.0], [0.5, 1.0, 0.5], [1.0, 0.5, 1.0], [1.0, 1.0, 0.5]])
    sides = [np.isin(np.arange(4), of) for of in combinations(range(4), 2)]
    expected = {memorisation._nearer(distances, side).mean() for side in sides}
    drawn = memorisation._chance(distances, sides[0], np.random.default_rng(0))
    assert set(drawn) == expected and len(expected) > 1
    assert drawn.mean() == pytest.approx(
        np.mean([memorisation._nearer(distances, side).mean() for side in sides]), abs=0.01
    )


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


def test_the_frechet_distance_is_the_textbook_s_and_sees_a_shift() -> None:
    random = torch.Generator().manual_seed(8)
    known, same = torch.randn(200, 4, generator=random), torch.randn(200, 4, generator=random)
    near = fidelity.frechet_distance(known, same, 200, 0)
    one, two = ((crowd / known.std(dim=0)).double().numpy() for crowd in (known, same))
    first, second = np.cov(one.T), np.cov(two.T)
    shared = np.trace(sqrtm(first @ second)).real
    apart = np.square(one.mean(0) - two.mean(0)).sum()
    assert near == pytest.approx(apart + np.trace(first) + np.trace(second) - 2 * shared, rel=1e-6)
    assert fidelity.frechet_distance(known, same + 1, 200, 0) > 10 * near
    assert fidelity.frechet_distance(known, known, 200, 0) == pytest.approx(0, abs=1e-6)


def test_a_crowd_smaller_than_its_features_has_a_distance_and_one_image_has_none() -> None:
    random = torch.Generator().manual_seed(9)
    known, query = (torch.randn(6, 20, generator=random) for _ in range(2))
    assert np.isfinite(fidelity.frechet_distance(known, query, 6, 0))
    assert np.isnan(fidelity.frechet_distance(known, query[:1], 6, 0))


@pytest.mark.parametrize(
    ("shape", "name"), [((8, 8), "SSIM"), ((24, 32, 24), "MS-SSIM with 3 scales"), ((48, 64, 48), "MS-SSIM with 4")]
)
def test_the_similarity_says_what_it_is(shape: tuple[int, ...], name: str) -> None:
    assert fidelity.similarity_name(shape).startswith(name)
