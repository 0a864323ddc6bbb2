"""The downstream segmentation network, the ruler that real and synthetic pairs are measured with."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from monai.networks.nets.unet import UNet
from monai.transforms.post.array import KeepLargestConnectedComponent
from safetensors.torch import load_file, save
from torch import Tensor, nn

from medsynth.config import Grid, SegmenterRecipe
from medsynth.errors import StoreError
from medsynth.files import replace_bytes


class Segmenter(UNet):
    """A residual U-Net, and how its predictions are cleaned.

    Args:
        grid: gives rank, input channels and classes.
        segment: gives the width of each level, and ``largest_component``.
    """

    def __init__(self, grid: Grid, segment: SegmenterRecipe) -> None:
        super().__init__(
            spatial_dims=grid.spatial_dims,
            in_channels=grid.channels,
            out_channels=grid.classes,
            channels=segment.channels,
            strides=(2,) * (len(segment.channels) - 1),
            num_res_units=2,
            norm=("instance", {"affine": True}),
        )
        self._labels = list(range(1, grid.classes)) if segment.largest_component else []

    def clean(self, labels: Tensor) -> Tensor:
        """Return label maps ``(record, *spatial)`` whose foreground is one connected part, if the study says so."""
        if not self._labels:
            return labels
        keep = KeepLargestConnectedComponent(self._labels, is_onehot=False, independent=False)
        # The transform writes into what it is given.
        return torch.stack([torch.as_tensor(keep(record[None].clone()))[0].to(labels.dtype) for record in labels])


def build_segmenter(grid: Grid, segment: SegmenterRecipe) -> Segmenter:
    """Build a residual U-Net of any rank (Kerfoot et al. 2018, "Left-ventricle quantification using residual U-Net").

    Args:
        grid: gives rank, input channels and classes; every axis must divide by 2^(levels - 1), as every study's does.
        segment: gives the width of each level.

    Returns:
        A module from images ``(batch, channel, *spatial)`` in [-1, 1] to logits ``(batch, class, *spatial)``.
    """
    return Segmenter(grid, segment)


def save_segmenter(model: nn.Module, path: Path) -> None:
    """Write the weights as safetensors, whole or not at all."""
    replace_bytes(path, save({name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}))


def load_segmenter(grid: Grid, segment: SegmenterRecipe, path: Path, stage: str = "segment") -> Segmenter:
    """Build the network and load its weights, ready to predict.

    Args:
        grid: as in :func:`build_segmenter`.
        segment: likewise.
        path: written by :func:`save_segmenter`.
        stage: who wrote it, for the message.

    Raises:
        StoreError: the file is missing or holds another architecture.
    """
    model = build_segmenter(grid, segment)
    try:
        model.load_state_dict(load_file(path))
    except (OSError, RuntimeError) as error:
        raise StoreError(f"'{path.name}' is no segmenter of this configuration: run the stage {stage} again") from error
    return model.eval()


@torch.no_grad()
def predict(model: Segmenter, images: Tensor, batch_size: int = 8) -> Tensor:
    """Return the most likely label of each voxel, cleaned as the study says (:meth:`Segmenter.clean`).

    Args:
        model: from :func:`build_segmenter`.
        images: ``(record, channel, *spatial)`` in [-1, 1], the whole grid.
        batch_size: records at a time.

    Returns:
        Labels ``(record, *spatial)``, uint8, on the CPU.
    """
    labels = torch.cat([logits.argmax(dim=1).to(torch.uint8).cpu() for logits in _outputs(model, images, batch_size)])
    return model.clean(labels)


@torch.no_grad()
def bottleneck_features(model: nn.Module, images: Tensor, batch_size: int = 8) -> Tensor:
    """Return what the deepest level of the network makes of images, averaged over space: our own image features.

    Args:
        model: from :func:`build_segmenter`.
        images: ``(record, channel, *spatial)`` in [-1, 1], the whole grid.
        batch_size: records at a time.

    Returns:
        ``(record, feature)`` on the CPU; as many features as the deepest level has channels.
    """
    parts: list[Tensor] = []
    block: nn.Module = model.get_submodule("model")
    while isinstance(block, nn.Sequential):  # MONAI nests the levels: down, skip connection around the next, up
        block = block[1].get_submodule("submodule")
    hook = block.register_forward_hook(lambda _module, _inputs, output: parts.append(output.flatten(2).mean(2).cpu()))
    try:
        for _ in _outputs(model, images, batch_size):
            pass
    finally:
        hook.remove()
    return torch.cat(parts)


def _outputs(model: nn.Module, images: Tensor, batch_size: int) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    model.eval()
    for start in range(0, len(images), batch_size):
        yield model(images[start : start + batch_size].to(device))
