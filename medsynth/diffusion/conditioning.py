"""How a label map reaches the denoiser: one-hot, then the same orthonormal transform that makes wavelet latents.

The transform keeps every voxel of the mask (it is invertible) and brings it to the latent's axes, so that the denoiser
sees sub-latent edges.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from medsynth.models.autoencoder import HaarTransform


class MaskEncoder(nn.Module):
    """Encode label maps for the denoiser; no parameters.

    Args:
        spatial_dims: 2 or 3.
        classes: number of labels, the background included.
        levels: halvings between the label map's axes and the latent's.
    """

    def __init__(self, spatial_dims: int, classes: int, levels: int) -> None:
        super().__init__()
        self.classes = classes
        self.haar = HaarTransform(spatial_dims, levels)

    @property
    def channels(self) -> int:
        """Channels of an encoded label map."""
        return (self.classes - 1) * self.haar.bands

    @torch.no_grad()
    def forward(self, labels: Int[Tensor, "batch *spatial"]) -> Float[Tensor, "batch mask *small"]:
        """Return encoded label maps; an all-background map gives zeros, which is also the dropped mask."""
        planes = torch.stack([(labels == value).float() for value in range(1, self.classes)], dim=1)
        encoded: Tensor = self.haar(planes)
        # The inside of a label becomes 1, not the root of the block's size, beside which the image would fade.
        return encoded / self.haar.bands**0.5
