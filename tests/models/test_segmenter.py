"""The segmentation network: features of its deepest level."""

from __future__ import annotations

import pytest
import torch

from medsynth.config import Grid, Segment
from medsynth.models.segmenter import bottleneck_features, build_segmenter


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
