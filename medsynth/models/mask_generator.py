"""A generator of label maps that is a handful of statistics: pose, mean shape and its spread.

A label map becomes two vectors. The *pose* is where the foreground lies and how it is stretched: its centroid and the
logarithm of the square root of its second central moments, in units of half the grid. The *shape* is what is left
once that pose is undone: low-frequency cosine coefficients of truncated signed distances in a canonical frame
(planes: the union of all labels, then each label from the second on). Both vectors have a public centre and a bounded
norm, so that their sums over patients can be released by Gaussian mechanisms; everything after that is free.

Source: distance-map shape models after Leventon et al. (2000); the canonical frame follows from second moments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from medsynth.config import Grid, Masks

Array = NDArray[np.float64]

_FRAME_SD = 2.6  # half width of the canonical frame in standard deviations of the foreground
_FRAME_VOXELS = 3  # canonical voxels a kept coefficient
_PUBLIC_LOG_SCALE = float(np.log(0.25))  # public centre of the log half-width, in half grids
_MIN_VOXEL_SD = 0.6  # a foreground thinner than this has no usable second moment
_FOREGROUND_AT = 0.45  # below one half, because truncated coefficients lose thin ends
_BANDS = 10  # radial frequency bands that share one spread


@dataclass(frozen=True)
class Pose:
    """Where a foreground lies: ``centre`` (axes,) in half grids, ``stretch`` (axes, axes) symmetric, positive."""

    centre: Array
    stretch: Array


@dataclass(frozen=True)
class MaskStatistics:
    """What the mechanisms released (or, without privacy, the plain statistics).

    Attributes:
        pose_mean: (pose,) mean pose vector.
        pose_covariance: (pose, pose).
        shape_mean: (plane * coefficient,) mean shape vector.
        spread: ``diagonal``: (plane * band,) variance a coefficient in each band; ``full``: (plane * coefficient, rank)
            root of the covariance (see :func:`covariance_root`).
    """

    pose_mean: Array
    pose_covariance: Array
    shape_mean: Array
    spread: Array


class ShapeSpace:
    """The public geometry of poses and shapes on one grid; holds no data.

    Args:
        grid: the public voxel grid.
        settings: coefficients, truncation and clip norms.
    """

    def __init__(self, grid: Grid, settings: Masks) -> None:
        self.grid = grid
        self.settings = settings
        self.axes = grid.spatial_dims
        self.planes = max(1, grid.classes - 1)
        self.frame = tuple(_FRAME_VOXELS * c for c in settings.coefficients)
        lines = [(np.arange(n) + 0.5) / n * 2 - 1 for n in self.frame]
        self._canonical = np.stack(np.meshgrid(*lines, indexing="ij")).reshape(self.axes, -1) * _FRAME_SD
        self._half = np.array(grid.shape) / 2
        lines = [(np.arange(n) + 0.5) / n * 2 - 1 for n in grid.shape]
        self._voxels = np.stack(np.meshgrid(*lines, indexing="ij")).reshape(self.axes, -1)
        self._upper = np.triu_indices(self.axes)
        self.bands = self._frequency_bands()
        self._public_centre = self._centre()

    @property
    def pose_size(self) -> int:
        """Length of a pose vector."""
        return self.axes + len(self._upper[0])

    @property
    def shape_size(self) -> int:
        """Length of a shape vector."""
        return self.planes * int(np.prod(self.settings.coefficients))

    def pose_vector(self, label: NDArray[np.uint8]) -> Array | None:
        """Return the pose vector of a label map, or None when it has no foreground.

        Args:
            label: (\\*spatial) integers on the grid.
        """
        where = label.reshape(-1) > 0
        if not where.any():
            return None
        points = self._voxels[:, where]
        centre = points.mean(1)
        spread = points - centre[:, None]
        moments = spread @ spread.T / points.shape[1] + np.diag((_MIN_VOXEL_SD / self._half) ** 2)
        values, vectors = np.linalg.eigh(moments)
        log_stretch = (vectors * (0.5 * np.log(values))) @ vectors.T - _PUBLIC_LOG_SCALE * np.eye(self.axes)
        return np.concatenate([centre, self._flatten(log_stretch)])

    def pose(self, vector: Array) -> Pose:
        """Return the pose that a vector stands for, kept inside the grid."""
        log_stretch = np.zeros((self.axes, self.axes))
        log_stretch[self._upper] = vector[self.axes :] * self._unweight()
        log_stretch = log_stretch + log_stretch.T - np.diag(np.diag(log_stretch))
        values, vectors = np.linalg.eigh(log_stretch + _PUBLIC_LOG_SCALE * np.eye(self.axes))
        values = np.clip(values, np.log(0.02), np.log(0.6))
        return Pose(np.clip(vector[: self.axes], -0.8, 0.8), (vectors * np.exp(values)) @ vectors.T)

    def to_frame(self, volume: NDArray[Any], pose: Pose, order: int = 1) -> Array:
        """Return ``volume`` (\\*spatial) sampled in the canonical frame of ``pose``; outside, the nearest voxel."""
        points = pose.stretch @ self._canonical + pose.centre[:, None]
        return self._sample(volume, (points + 1) * self._half[:, None] - 0.5, self.frame, order, "nearest")

    def from_frame(self, volume: Array, pose: Pose, mode: Literal["nearest", "constant"] = "constant") -> Array:
        """Return a canonical ``volume`` put back on the grid under ``pose``; outside the frame 0 or the nearest."""
        points = np.linalg.solve(pose.stretch, self._voxels - pose.centre[:, None]) / _FRAME_SD
        half = np.array(self.frame) / 2
        return self._sample(volume, (points + 1) * half[:, None] - 0.5, self.grid.shape, 1, mode)

    def shape_vector(self, label: NDArray[np.uint8], pose: Pose) -> Array:
        """Return the shape vector of a label map whose pose is ``pose``, relative to a public ball."""
        planes = [self._occupancy(label > 0), *(self._occupancy(label == k) for k in range(2, self.grid.classes))]
        parts = [self._compress(self.to_frame(plane, pose)) for plane in planes]
        return np.concatenate(parts) - self._public_centre

    def label_map(self, shape: Array, pose: Pose) -> NDArray[np.uint8]:
        """Return the label map of a shape under a pose (the inverse of the two vectors, up to truncation)."""
        parts = (shape + self._public_centre).reshape(self.planes, *self.settings.coefficients)
        planes = [self.from_frame(self._expand(part), pose) for part in parts]
        label = (planes[0] >= _FOREGROUND_AT).astype(np.uint8)
        if self.planes > 1:
            others = np.stack(planes[1:])
            taken = (label > 0) & (others.max(0) >= 0.5 * planes[0])
            label[taken] = others.argmax(0)[taken] + 2
        return self._tidy(label)

    def sample(self, statistics: MaskStatistics, rng: np.random.Generator, attempts: int = 20) -> NDArray[np.uint8]:
        """Return one random label map; tries again while a draw comes out empty or out of the grid.

        Args:
            statistics: what was released.
            rng: public randomness.
            attempts: draws before the mean shape under the mean pose is returned.
        """
        for _ in range(attempts):
            pose = self.pose(statistics.pose_mean + _draw(statistics.pose_covariance, rng))
            label = self.label_map(statistics.shape_mean + self._draw_shape(statistics.spread, rng), pose)
            if np.count_nonzero(label) >= max(1, self.settings.min_component_voxels) and not self._touches(label):
                return label
        return self.label_map(statistics.shape_mean, self.pose(statistics.pose_mean))

    def band_sums(self, deviation: Array) -> Array:
        """Return the mean square of a deviation from the mean shape in each (plane, band)."""
        return np.bincount(self.bands, deviation**2, self.band_count) / self.band_sizes

    @property
    def band_count(self) -> int:
        """Number of (plane, band) groups."""
        return self.planes * _BANDS

    @property
    def band_sizes(self) -> Array:
        """Coefficients in each (plane, band) group, at least 1."""
        return np.maximum(np.bincount(self.bands, minlength=self.band_count), 1).astype(float)

    def _draw_shape(self, spread: Array, rng: np.random.Generator) -> Array:
        if spread.ndim == 2:
            return spread @ rng.standard_normal(spread.shape[1])
        return np.sqrt(np.maximum(spread, 0))[self.bands] * rng.standard_normal(self.shape_size)

    def _centre(self) -> Array:
        # In the canonical frame every foreground has unit second moments: a ball of radius sqrt(axes + 2) has them too.
        radius = np.sqrt(np.square(self._canonical).sum(0)).reshape(self.frame)
        ball = self._compress(np.clip(np.sqrt(self.axes + 2) - radius + 0.5, 0, 1))
        return np.concatenate([ball, *(ball / (self.planes + 1) for _ in range(1, self.planes))])

    def _frequency_bands(self) -> NDArray[np.int64]:
        lines = [np.arange(n) / n for n in self.settings.coefficients]
        radius = np.sqrt(np.add.reduce(np.square(np.meshgrid(*lines, indexing="ij"))))
        band = np.minimum((radius / radius.max() * _BANDS).astype(np.int64), _BANDS - 1).reshape(-1)
        return np.concatenate([band + _BANDS * plane for plane in range(self.planes)])

    def _occupancy(self, mask: NDArray[np.bool_]) -> Array:
        if not mask.any():
            return np.zeros(mask.shape)
        band = self.settings.band_voxels
        inside = ndimage.distance_transform_edt(mask)
        outside = ndimage.distance_transform_edt(~mask)
        distance = np.where(mask, inside - 0.5, 0.5 - outside)
        return np.asarray((np.clip(distance / band, -1, 1) + 1) / 2)

    def _compress(self, volume: Array) -> Array:
        kept = tuple(slice(n) for n in self.settings.coefficients)
        return np.asarray(fft.dctn(volume, norm="ortho")[kept]).reshape(-1)

    def _expand(self, coefficients: Array) -> Array:
        full = np.zeros(self.frame)
        full[tuple(slice(n) for n in self.settings.coefficients)] = coefficients
        return np.asarray(fft.idctn(full, norm="ortho"))

    def _flatten(self, matrix: Array) -> Array:
        return np.asarray(matrix[self._upper] / self._unweight())

    def _unweight(self) -> Array:
        # Off-diagonal entries count twice in the Frobenius norm, and so in the clip.
        return np.where(self._upper[0] == self._upper[1], 1.0, 1 / np.sqrt(2))

    def _sample(
        self,
        volume: NDArray[Any],
        points: Array,
        shape: tuple[int, ...],
        order: int,
        mode: Literal["nearest", "constant"],
    ) -> Array:
        values = ndimage.map_coordinates(np.asarray(volume, float), points, order=order, mode=mode)
        return np.asarray(values.reshape(shape))

    def _touches(self, label: NDArray[np.uint8]) -> bool:
        faces = (np.take(label, end, axis).any() for axis in range(self.axes) for end in (0, -1))
        # Photographs cut lesions at the border all the time; a volume crop does not cut its organ.
        return self.grid.spacing_mm is not None and any(faces)

    def _tidy(self, label: NDArray[np.uint8]) -> NDArray[np.uint8]:
        parts, count = ndimage.label(label > 0)
        if count <= 1:
            return label
        sizes = np.bincount(parts.reshape(-1))[1:]
        keep = np.zeros(count + 1, bool)
        keep[1 + int(sizes.argmax())] = True
        return np.where(keep[parts], label, 0).astype(np.uint8)


def positive_part(covariance: Array) -> Array:
    """Return the nearest positive semi-definite matrix (Higham 1988), which a noisy covariance is not."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    return np.asarray((vectors * np.maximum(values, 0)) @ vectors.T)


def covariance_root(covariance: Array, rank: int) -> Array:
    """Return ``root`` (size, rank) with ``root @ root.T`` the best approximation of a covariance at that rank."""
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    kept = np.argsort(values)[::-1][:rank]
    return np.asarray(vectors[:, kept] * np.sqrt(np.maximum(values[kept], 0)))


def _draw(covariance: Array, rng: np.random.Generator) -> Array:
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(vectors @ (np.sqrt(np.maximum(values, 0)) * rng.standard_normal(len(values))))
