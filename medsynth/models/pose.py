"""Poses: where a foreground lies and how it is stretched, and the canonical frame in which that is undone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from medsynth.config import Grid

Array = NDArray[np.float64]
Outside = Literal["nearest", "constant"]

_VOXELS = 3  # canonical voxels a kept coefficient
_PUBLIC_LOG_SCALE = float(np.log(0.25))  # public centre of the log half-width, in half grids
_MIN_VOXEL_SD = 0.6  # a foreground thinner than this has no usable second moment


@dataclass(frozen=True)
class Pose:
    """Where a foreground lies: ``centre`` (axes,) in half grids, ``stretch`` (axes, axes), a root of its moments."""

    centre: Array
    stretch: Array


class PoseFrame:
    """A canonical frame around a foreground, and its low-frequency cosine coefficients; holds no data.

    Args:
        grid: the public voxel grid.
        coefficients: kept an axis; the frame has three voxels a coefficient.
        half_width_sd: half width of the frame in standard deviations of the foreground.
    """

    def __init__(self, grid: Grid, coefficients: tuple[int, ...], half_width_sd: float) -> None:
        self.grid = grid
        self.coefficients = coefficients
        self.shape = tuple(_VOXELS * count for count in coefficients)
        self.points = _lattice(self.shape) * half_width_sd
        self._half_width_sd = half_width_sd
        self._half = np.array(grid.shape) / 2
        self.voxels = _lattice(grid.shape)
        self._upper = np.triu_indices(grid.spatial_dims)
        # Off-diagonal entries count twice in the Frobenius norm, and so in the clip.
        self._unweight = np.where(self._upper[0] == self._upper[1], 1.0, 1 / np.sqrt(2))

    @property
    def pose_size(self) -> int:
        """Length of a pose vector."""
        return self.grid.spatial_dims + len(self._upper[0])

    def pose_vector(self, label: NDArray[np.uint8]) -> Array | None:
        """Return centroid and log square root of the second moments of a foreground, or None when there is none.

        Args:
            label: (\\*spatial) integers on the grid.
        """
        where = label.reshape(-1) > 0
        if not where.any():
            return None
        points = self.voxels[:, where]
        centre = points.mean(1)
        spread = points - centre[:, None]
        moments = spread @ spread.T / points.shape[1] + np.diag((_MIN_VOXEL_SD / self._half) ** 2)
        values, vectors = np.linalg.eigh(moments)
        log_stretch = (vectors * (0.5 * np.log(values) - _PUBLIC_LOG_SCALE)) @ vectors.T
        return np.concatenate([centre, log_stretch[self._upper] / self._unweight])

    def pose(self, vector: Array, mean: Array | None = None) -> Pose:
        """Return the pose that a vector stands for, kept inside the grid.

        Args:
            vector: centroid and logarithm of the moments' root.
            mean: pose vector from whose frame this one turns with the organ (:func:`turned`); None: it does not turn.
        """
        axes = self.grid.spatial_dims
        log_stretch = np.zeros((axes, axes))
        log_stretch[self._upper] = vector[axes:] * self._unweight
        log_stretch = log_stretch + log_stretch.T - np.diag(np.diag(log_stretch))
        values, vectors = np.linalg.eigh(log_stretch)
        values = np.clip(values + _PUBLIC_LOG_SCALE, np.log(0.02), np.log(0.6))
        stretch = (vectors * np.exp(values)) @ vectors.T
        if mean is not None:
            stretch = turned(stretch, self.pose(mean).stretch)
        return Pose(np.clip(vector[:axes], -0.8, 0.8), stretch)

    def enter(self, volume: NDArray[Any], pose: Pose) -> Array:
        """Return ``volume`` (\\*spatial) sampled in the canonical frame of ``pose``; outside, the nearest voxel."""
        points = pose.stretch @ self.points + pose.centre[:, None]
        return sampled(np.asarray(volume, float), voxel_places(points, self.grid.shape)).reshape(self.shape)

    def leave(self, volume: Array, pose: Pose, outside: Outside = "constant") -> Array:
        """Return a canonical ``volume`` put back on the grid under ``pose``; outside the frame 0 or the nearest."""
        points = np.linalg.solve(pose.stretch, self.voxels - pose.centre[:, None]) / self._half_width_sd
        places = voxel_places(points, self.shape)
        return sampled(np.asarray(volume, float), places, outside=outside).reshape(self.grid.shape)

    def compress(self, volume: Array) -> Array:
        """Return the kept cosine coefficients (orthonormal DCT-II; Ahmed et al. 1974) of a canonical volume, flat."""
        kept = tuple(slice(n) for n in self.coefficients)
        return np.asarray(fft.dctn(volume, norm="ortho")[kept]).reshape(-1)

    def expand(self, coefficients: Array) -> Array:
        """Return the canonical volume of flat coefficients."""
        full = np.zeros(self.shape)
        full[tuple(slice(n) for n in self.coefficients)] = coefficients.reshape(self.coefficients)
        return np.asarray(fft.idctn(full, norm="ortho"))


def turned(stretch: Array, reference: Array) -> Array:
    """Return the root of the same second moments in whose frame an organ lies as the reference does in its own.

    The symmetric root leaves an organ as far turned in its frame as it is in the image. This one turns by the rotation
    nearest to the product of both second moments (Procrustes; Schoenemann 1966): long axes meet, and where axes are
    alike, so that a turn means nothing, it hardly turns.

    Args:
        stretch: (axes, axes) a root of second moments.
        reference: (axes, axes) the symmetric root of those to follow.
    """
    left, _, right = np.linalg.svd(stretch @ stretch.T @ reference @ reference.T)
    return np.asarray(stretch @ left @ right)


def _lattice(shape: tuple[int, ...]) -> Array:
    """Return voxel centres (axes, voxel) with the volume's faces at -1 and 1."""
    lines = [(np.arange(n) + 0.5) / n * 2 - 1 for n in shape]
    return np.stack(np.meshgrid(*lines, indexing="ij")).reshape(len(shape), -1)


def voxel_places(points: NDArray[np.floating], shape: tuple[int, ...]) -> Array:
    """Return where points (axis, point) in half volumes lie in a volume of ``shape``, in voxels."""
    return np.asarray((points + 1) * (np.array(shape) / 2)[:, None] - 0.5)


def sampled(volume: NDArray[np.floating], places: Array, order: int = 1, outside: Outside = "nearest") -> Array:
    """Return the values (point,) of a volume at places (axis, point) in voxels, by splines of ``order``."""
    return np.asarray(ndimage.map_coordinates(volume, places, order=order, mode=outside))
