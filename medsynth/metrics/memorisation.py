"""Are synthetic images nearer to training patients than to others: a sanity check, and copy detection by patients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_CELLS = {2: 24, 3: 12}  # longest axis of the pooled space by rank: coarse enough to ignore noise
_NEAR_PERCENTILE = 5.0
_PERMUTATIONS = 10_000  # so that ten lie beyond the quantile that no honest study should pass
_BLOCK = 1_000_000  # patients times permutations at once


@dataclass(frozen=True)
class Nearness:
    """Distances to the nearest training image, root mean square over the pooled cells (unit: standard deviations).

    Attributes:
        synthetic: one a synthetic image.
        held_out: one a held-out patient's image, the yardstick.
    """

    synthetic: np.ndarray
    held_out: np.ndarray

    @property
    def median_ratio(self) -> float:
        """Median distance of synthetic images over that of held-out images; well below 1 hints at copies."""
        return float(np.median(self.synthetic) / max(float(np.median(self.held_out)), 1e-12))

    @property
    def nearer_than_held_out(self) -> float:
        """Share of synthetic images nearer than the 5th percentile of held-out ones; 0.05 is expected of strangers."""
        return float(np.mean(self.synthetic < np.percentile(self.held_out, _NEAR_PERCENTILE)))


def nearness(train: Tensor, held_out: Tensor, synthetic: Tensor) -> Nearness:
    """Measure how near synthetic and held-out images are to their nearest training image.

    Args:
        train: training images ``(image, channel, *spatial)``.
        held_out: held-out patients' images, same shape.
        synthetic: synthetic images, same shape.
    """
    known = coarse(train)
    return Nearness(_nearest(coarse(synthetic), known), _nearest(coarse(held_out), known))


def coarse(images: Tensor) -> Tensor:
    """Return images pooled to few cells and brought to zero mean, unit spread each: ``(image, cell)``.

    Args:
        images: ``(image, channel, *spatial)``.
    """
    rank = images.ndim - 2
    longest = max(images.shape[2:])
    cells: Any = tuple(max(1, round(size * min(1.0, _CELLS[rank] / longest))) for size in images.shape[2:])
    pool = nn.AdaptiveAvgPool2d(cells) if rank == 2 else nn.AdaptiveAvgPool3d(cells)
    flat: Tensor = pool(images).flatten(1)
    return (flat - flat.mean(dim=1, keepdim=True)) / flat.std(dim=1, keepdim=True).clamp_min(1e-6)


@dataclass(frozen=True)
class Copies:
    """Share of synthetic images nearer to their nearest training patient than to any held-out one.

    Attributes:
        share: that share.
        chance: its median when patients change sides at random.
        chance_high: 99.9 % of what chance gives; patients who are near to everything make it wide.
        low: lower end of the share's 95 % interval (bootstrap over synthetic images).
        high: upper end.
    """

    share: float
    chance: float
    chance_high: float
    low: float
    high: float

    def limit(self, effect: float) -> float:
        """Return the share from which on it is no chance: beyond all luck, and by ``effect`` at least."""
        return max(self.chance_high, self.chance + effect)


def copies(distances: np.ndarray, trained: np.ndarray, draws: int, random: np.random.Generator) -> Copies:
    """Measure whether synthetic images crowd around training patients.

    Args:
        distances: ``(patient, synthetic)`` from :func:`relative_distances`.
        trained: ``(patient,)`` whether the generator was trained on the patient.
        draws: bootstrap samples; permutations are 10,000 always, since a limit may not hang on a knob.
        random: the stream to draw from.
    """
    nearer = _nearer(distances, trained)
    chance = _chance(distances, trained, random)
    shares = nearer[random.integers(len(nearer), size=(draws, len(nearer)))].mean(axis=1)
    low, high = np.quantile(shares, [0.025, 0.975])
    middle, top = np.quantile(chance, [0.5, 0.999])
    return Copies(float(nearer.mean()), float(middle), float(top), float(low), float(high))


def relative_distances(patients: Sequence[Tensor], synthetic: Tensor) -> np.ndarray:
    """Return ``(patient, synthetic)`` distances in units of each patient's own median distance.

    The unit takes out that an ordinary patient is near to everything. A patient of several records counts by the
    nearest of them.

    Args:
        patients: features ``(record, feature)`` of each patient, see :func:`coarse`.
        synthetic: features ``(image, feature)``.
    """
    rows = [torch.cdist(records, synthetic).min(dim=0).values for records in patients]
    distances = torch.stack(rows).double().numpy()
    return np.asarray(distances / np.maximum(np.median(distances, axis=1, keepdims=True), 1e-12))


def centred(images: Tensor, labels: Tensor) -> Tensor:
    """Return images rolled so that the centroid of their labels lies in the middle of the grid.

    Args:
        images: ``(image, channel, *spatial)``.
        labels: ``(image, *spatial)``.
    """
    rolled = []
    for image, label in zip(images, labels, strict=True):
        points = label.nonzero().float()
        middle = points.mean(dim=0) if len(points) else torch.tensor(label.shape) / 2
        # Not round(), which takes halves to the even side: equal shapes would end up a voxel apart.
        shifts = [math.floor(size / 2 - float(at) + 0.5) for size, at in zip(label.shape, middle, strict=True)]
        rolled.append(torch.roll(image, shifts, tuple(range(1, image.ndim))))
    return torch.stack(rolled)


def _nearer(distances: np.ndarray, trained: np.ndarray) -> np.ndarray:
    return np.asarray(distances[trained].min(axis=0) < distances[~trained].min(axis=0), dtype=float)


def _chance(distances: np.ndarray, trained: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return ``(permutation,)`` the mean of :func:`_nearer` when patients change sides at random."""
    nearest = distances == distances.min(axis=0)  # several patients where they tie: all must have been trained on
    rows, counts = np.unique(nearest.T, axis=0, return_counts=True)  # about one row a patient, however many images
    members, block = rows.sum(axis=1), max(1, _BLOCK // len(trained))
    shares = []
    for start in range(0, _PERMUTATIONS, block):
        size = min(block, _PERMUTATIONS - start)
        sides = random.permuted(np.broadcast_to(trained, (size, len(trained))), axis=1)
        hit = sides.astype(np.float32) @ rows.T.astype(np.float32) == members
        shares.append(hit @ counts / distances.shape[1])
    return np.concatenate(shares)


def _nearest(queries: Tensor, known: Tensor) -> np.ndarray:
    distances = torch.cdist(queries, known).min(dim=1).values / known.shape[1] ** 0.5
    return np.asarray(distances.double().numpy())
