"""Do synthetic images as a crowd look like real ones, and do they differ from each other; no downloaded networks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from monai.metrics.mmd import MMDMetric
from monai.metrics.regression import MultiScaleSSIMMetric, SSIMMetric
from torch import Tensor, nn

_SCALES = (2, 4, 8)  # cells an axis
_FOURIER = 512  # random features of the Gaussian kernel
_KERNEL = 5  # voxels of the SSIM window; the usual 11 does not fit small volumes
_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, fine to coarse


def features(images: Tensor) -> Tensor:
    """Return average-pooled intensities at several scales and the spread within each cell: ``(image, feature)``.

    Args:
        images: ``(image, channel, *spatial)`` in [-1, 1].
    """
    parts = []
    for cells in _SCALES:
        size: Any = tuple(min(cells, axis) for axis in images.shape[2:])
        pool = nn.AdaptiveAvgPool2d(size) if images.ndim == 4 else nn.AdaptiveAvgPool3d(size)
        mean = pool(images)
        spread = (pool(images.square()) - mean.square()).clamp_min(0).sqrt()
        parts += [mean.flatten(1), spread.flatten(1)]
    return torch.cat(parts, dim=1)


def discrepancy(real: Tensor, others: Tensor, seed: int) -> float:
    """Return the unbiased squared maximum mean discrepancy with a Gaussian kernel (Gretton et al. 2012, equation 3).

    The kernel acts on :func:`features` in units of the real images' spread, through random Fourier features (Rahimi
    and Recht 2007); its width is the square root of their number. 0: same crowd; small negative values are noise.

    Args:
        real: ``(image, channel, *spatial)``, at least 2.
        others: the same of the crowd to compare; the larger crowd is thinned to the size of the smaller.
        seed: of the random features and the thinning.
    """
    return crowd_discrepancy(features(real), features(others), seed)


def crowd_discrepancy(known: Tensor, query: Tensor, seed: int) -> float:
    """Return :func:`discrepancy` in features of one's own choice: ``(image, feature)`` of both crowds."""
    count = min(len(known), len(query))
    if count < 2:
        return float("nan")
    random = torch.Generator().manual_seed(seed)
    centre, spread = known.mean(dim=0), known.std(dim=0).clamp_min(1e-3)
    width = math.sqrt(known.shape[1])
    frequencies = torch.randn(known.shape[1], _FOURIER, generator=random) / width

    def embed(values: Tensor) -> Tensor:
        phase = ((values - centre) / spread) @ frequencies
        return torch.cat([phase.cos(), phase.sin()], dim=1) / math.sqrt(_FOURIER)

    first = known[torch.randperm(len(known), generator=random)[:count]]
    second = query[torch.randperm(len(query), generator=random)[:count]]
    return float(MMDMetric(y_mapping=embed)(first, second))


def frechet_distance(known: Tensor, query: Tensor, count: int, seed: int) -> float:
    """Return the squared Fréchet distance between Gaussians fitted to two crowds (Heusel et al. 2017, equation 6).

    Features count in units of the known crowd's spread. Small crowds make it larger, so both are thinned to the same
    number, and a value means something only beside that of another crowd thinned alike.

    Args:
        known: ``(image, feature)`` of the real crowd.
        query: the same of the crowd to compare.
        count: images of each that are taken, at most; at least 2 must be there.
        seed: of the thinning.
    """
    count = min(count, len(known), len(query))
    if count < 2:
        return float("nan")
    random = torch.Generator().manual_seed(seed)
    spread = known.std(dim=0).clamp_min(1e-6)
    first, second = (
        (crowd[torch.randperm(len(crowd), generator=random)[:count]] / spread).double() for crowd in (known, query)
    )
    # MONAI's takes a general matrix root, which is complex for singular covariances (more features than images).
    root = _root(first.T.cov())
    shared = torch.linalg.eigvalsh(root @ second.T.cov() @ root).clamp_min(0).sqrt().sum()
    apart = (first.mean(dim=0) - second.mean(dim=0)).square().sum()
    return float(apart + first.T.cov().trace() + second.T.cov().trace() - 2 * shared)


def _root(matrix: Tensor) -> Tensor:
    """Return the square root of a symmetric positive semi-definite matrix."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def similarity_within(images: Tensor, pairs: int, seed: int) -> float:
    """Return the mean multi-scale SSIM of random pairs of different images: near 1 means that they are all alike.

    Source: Wang et al. 2003; as many of its five scales as the shape allows, plain SSIM when that is one.

    Args:
        images: ``(image, channel, *spatial)`` in [-1, 1].
        pairs: pairs to compare.
        seed: of the choice of pairs.
    """
    if len(images) < 2:
        return float("nan")
    random = np.random.default_rng(seed)
    chosen = np.stack([random.choice(len(images), size=2, replace=False) for _ in range(pairs)])
    metric = _ssim(images.ndim - 2, min(images.shape[2:]))
    values = [metric((images[a : a + 1] + 1) / 2, (images[b : b + 1] + 1) / 2) for a, b in chosen]
    return float(torch.as_tensor(torch.cat([torch.as_tensor(v).reshape(-1) for v in values])).mean())


def similarity_name(shape: Sequence[int]) -> str:
    """Return what :func:`similarity_within` measures on images of a shape: small ones have no room for scales."""
    scales = _scales(min(shape))
    return f"MS-SSIM with {scales} scales" if scales > 1 else "SSIM"


def _scales(smallest: int) -> int:
    # MONAI asks for smallest // (scales - 1)^2 >= kernel size.
    scales = max((n for n in range(2, 6) if smallest // (n - 1) ** 2 >= _KERNEL), default=1)
    return scales if smallest >= 2 * _KERNEL else 1


def _ssim(rank: int, smallest: int) -> MultiScaleSSIMMetric | SSIMMetric:
    scales = _scales(smallest)
    if scales == 1:
        return SSIMMetric(spatial_dims=rank, win_size=min(_KERNEL, smallest), kernel_sigma=1.0)
    weights = np.asarray(_WEIGHTS[:scales]) / sum(_WEIGHTS[:scales])
    return MultiScaleSSIMMetric(
        spatial_dims=rank, kernel_size=_KERNEL, kernel_sigma=1.0, weights=tuple(weights.tolist())
    )
