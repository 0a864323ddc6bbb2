"""The segmentation network: features of its deepest level, and predictions of one organ."""

from __future__ import annotations

import pytest
import torch

from medsynth.config import Grid, Segment
from medsynth.models.segmenter import bottleneck_features, build_segmenter, predict


@pytest.mark.parametrize(("rank", "channels"), [(2, (4, 8)), (3, (4, 8)), (2, (4, 6, 10))])
def test_features_come_from_the_deepest_level_and_do_not_depend_on_the_batch(
    rank: int, channels: tuple[int, ...]
) -> None:
    grid = Grid(spatial_dims=rank, shape=(16,) * rank, labels={0: "none", 1: "organ"})
    torch.manual_seed(0)
    model = build_segmenter(grid, Segment(channels=channels))
    images = torch.randn(5, 1, *[16] * rank)
    features = bottleneck_features(model, images, batch_size=2)
    assert features.shape == (5, channels[-1]) and not features.requires_grad
    assert torch.allclose(features, bottleneck_features(model, images, batch_size=5), atol=1e-5)
    assert not torch.allclose(features[0], features[1], atol=1e-3)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("rank", [2, 3])
def test_one_organ_is_the_largest_connected_part_of_all_labels_together(rank: int) -> None:
    grid = Grid(spatial_dims=rank, shape=(16,) * rank, labels={0: "none", 1: "head", 2: "tail"})
    found = torch.zeros(2, *grid.shape, dtype=torch.uint8)
    rows = [slice(1, 6), slice(6, 9)]
    for row, value in zip(rows, (1, 2), strict=True):  # one organ whose labels touch
        found[:, row, 2:6] = value
    organ = found.clone()
    found[0, 12:15, 12:15] = 2  # and what lies apart, also in the empty record's place
    organ[1] = found[1] = 0
    before = found.clone()
    cleaned = build_segmenter(grid, Segment(channels=(4, 8), largest_component=True)).clean(found)
    assert torch.equal(cleaned, organ) and cleaned.dtype == torch.uint8
    assert torch.equal(found, before)
    assert torch.equal(build_segmenter(grid, Segment(channels=(4, 8))).clean(found), found)


@pytest.mark.parametrize("rank", [2, 3])
def test_predictions_are_cleaned_where_the_study_says_so(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = Grid(spatial_dims=rank, shape=(16,) * rank, labels={0: "none", 1: "organ"})
    organ = torch.zeros(3, 1, *grid.shape)
    organ[:, :, 2:9, 2:9] = 1
    seen = organ.clone()
    seen[1, :, 12:15, 12:15] = 1
    for largest, wanted in ((False, seen), (True, organ)):
        model = build_segmenter(grid, Segment(channels=(4, 8), largest_component=largest))
        monkeypatch.setattr(model, "forward", lambda images: torch.cat([0.5 - images, images - 0.5], dim=1))
        assert torch.equal(predict(model, seen, batch_size=2), wanted[:, 0].to(torch.uint8))
