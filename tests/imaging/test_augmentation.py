"""Strong augmentation: image and labels move together, the seed decides everything, shapes and types stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from medsynth.imaging.augmentation import mirrored, strong_augmentation


def _pair(rank: int, channels: int) -> tuple[Tensor, Tensor]:
    label = torch.zeros(*[24] * rank, dtype=torch.uint8)
    label[(slice(8, 16),) * rank] = 1
    return (1.6 * label.float() - 0.8).expand(channels, *label.shape).clone(), label


@pytest.mark.parametrize(("rank", "channels"), [(2, 1), (2, 3), (3, 1)])
def test_image_and_labels_move_together(rank: int, channels: int) -> None:
    image, label = _pair(rank, channels)
    change = strong_augmentation(rank, 0)
    contrasts, moved = [], 0
    for _ in range(20):
        changed, mask = change(image, label)
        assert type(changed) is Tensor and changed.shape == image.shape and changed.dtype == torch.float32
        assert mask.shape == label.shape and mask.dtype == torch.uint8 and set(mask.unique().tolist()) <= {0, 1}
        contrasts.append(float(changed[:, mask == 1].mean() - changed[:, mask == 0].mean()))
        moved += not torch.equal(mask, label)
    assert moved >= 15 and min(contrasts) > 0.2 and sum(contrasts) / len(contrasts) > 0.9


def test_the_seed_decides_everything_and_nothing_is_written_to() -> None:
    image, label = _pair(3, 1)
    kept = image.clone()
    first, again, other = (strong_augmentation(3, seed) for seed in (1, 1, 2))
    for _ in range(6):
        one, two, three = first(image, label), again(image, label), other(image, label)
        assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1]) and not torch.equal(one[0], three[0])
    assert torch.equal(image, kept)


@pytest.mark.parametrize(
    ("shape", "turned", "images"), [((5, 5), True, 8), ((5, 5), False, 4), ((4, 6), False, 4), ((3, 3, 3), True, 8)]
)
def test_a_mirrored_pair_is_one_of_its_mirror_images_and_its_label_map_goes_with_it(
    shape: tuple[int, ...], turned: bool, images: int
) -> None:
    label = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).view(shape)
    image = torch.stack([label * 2.0, label + 0.5])
    random = torch.Generator().manual_seed(0)
    found = [mirrored(image, label, random, turned=turned) for _ in range(200)]
    assert all(torch.equal(seen[0], 2.0 * moved) and torch.equal(seen[1], moved + 0.5) for seen, moved in found)
    assert all(moved.shape == label.shape for _, moved in found)
    kinds = {tuple(moved.flatten().tolist()) for _, moved in found}
    assert len(kinds) == images and tuple(label.flatten().tolist()) in kinds
