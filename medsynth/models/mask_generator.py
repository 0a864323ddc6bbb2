"""A generator of label maps that is a handful of statistics: pose, mean shape and its spread.

A label map becomes two vectors. The *pose* is where the foreground lies and how it is stretched: its centroid and the
logarithm of the square root of its second central moments, in units of half the grid. The *shape* is what is left
once that pose is undone: low-frequency cosine coefficients of truncated signed distances in a canonical frame
(planes: the union of all labels, then each label from the second on). Both vectors have a public centre and a bounded
norm, so that their sums over patients can be released by Gaussian mechanisms; everything after that is free, also that
drawn labels meet in smooth borders.

Source: distance-map shape models after Leventon et al. (2000); the canonical frame follows from second moments.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medsynth.config import Grid, Masks
from medsynth.models.label_volumes import smooth_borders
from medsynth.models.pose import Array, Pose, PoseFrame
from medsynth.models.shrinkage import believed_occupancy

_FRAME_SD = 2.6  # half width of the canonical frame in standard deviations of the foreground
_FOREGROUND_AT = 0.45  # below one half, because truncated coefficients lose thin ends
_ROUGH_LENGTH = 1.0  # voxels over which ragged surfaces go on
_BANDS = 10  # radial frequency bands that share one spread


@dataclass(frozen=True)
class MaskStatistics:
    """What the mechanisms released (or, without privacy, the plain statistics).

    Attributes:
        pose_mean: (pose,) mean pose vector.
        pose_covariance: (pose, pose).
        shape_mean: (plane * coefficient,) mean shape vector.
        spread: ``diagonal``: (plane * band,) variance a coefficient in each band; ``full``: (pose + shape, rank) root
            of the covariance of both vectors together (see :func:`covariance_root`).
        noise: (3,) how large the privacy noise is beside the signal: expected error of the mean pose and of the mean
            shape (at most) over how far patients are from them (root mean squares), and length of the noise in the
            variances over theirs. Zeros without privacy.
    """

    pose_mean: Array
    pose_covariance: Array
    shape_mean: Array
    spread: Array
    noise: Array = field(default_factory=lambda: np.zeros(3))


class ShapeSpace:
    """The public geometry of poses and shapes on one grid; holds no data.

    Args:
        grid: the public voxel grid.
        settings: coefficients, truncation and clip norms.
    """

    def __init__(self, grid: Grid, settings: Masks) -> None:
        self.grid = grid
        self.settings = settings
        self.planes = max(1, grid.classes - 1)
        self.frame = PoseFrame(grid, settings.coefficients, _FRAME_SD)
        self.pose_size = self.frame.pose_size
        self.shape_size = self.planes * int(np.prod(settings.coefficients))
        self.bands = self._frequency_bands()
        self._public_centre = self._centre()

    def pose_vector(self, label: NDArray[np.uint8]) -> Array | None:
        """Return the pose vector of a label map (see :meth:`PoseFrame.pose_vector`)."""
        return self.frame.pose_vector(label)

    def pose(self, vector: Array, mean: Array | None = None) -> Pose:
        """Return the pose that a vector stands for, its frame turned with the organ from that of a ``mean`` vector."""
        return self.frame.pose(vector, mean)

    def shape_vector(self, label: NDArray[np.uint8], pose: Pose) -> Array:
        """Return the shape vector of a label map whose pose is ``pose``, relative to a public ball."""
        planes = [self._occupancy(label > 0), *(self._occupancy(label == k) for k in range(2, self.grid.classes))]
        return self.shape_of(np.stack([self.frame.enter(plane, pose) for plane in planes]))

    def label_map(self, shape: Array, pose: Pose, ragged: Array | float = 0.0) -> NDArray[np.uint8]:
        """Return the label map of a shape under a pose (the inverse of the two vectors, up to truncation).

        Args:
            shape: shape vector.
            pose: where it lies.
            ragged: (\\*spatial) added to the occupancy of the union, which falls from 1 to 0 across its surface.
        """
        planes = [self.frame.leave(volume, pose) for volume in self.volumes(shape)]
        label = (planes[0] + ragged >= _FOREGROUND_AT).astype(np.uint8)
        if self.planes > 1:
            others = np.stack(planes[1:])
            taken = (label > 0) & (others.max(0) >= 0.5 * planes[0])
            label[taken] = others.argmax(0)[taken] + 2
        # Truncated planes, and noise the more, meet in ragged borders that no anatomy has.
        return self._tidy(smooth_borders(label, self.settings.band_voxels))

    def sample(self, statistics: MaskStatistics, rng: np.random.Generator, attempts: int = 20) -> NDArray[np.uint8]:
        """Return one random label map; tries again while a draw comes out empty or out of the grid.

        Args:
            statistics: what was released.
            rng: public randomness.
            attempts: draws before the mean shape under the mean pose is returned.
        """
        for _ in range(attempts):
            pose, shape = self._draw(statistics, rng)
            label = self.label_map(shape, self.pose(pose, statistics.pose_mean), self._ragged(rng))
            if np.count_nonzero(label) >= max(1, self.settings.min_component_voxels) and not self._touches(label):
                return label
        mean = self.label_map(statistics.shape_mean, self.pose(statistics.pose_mean))
        # Statistics that are all noise may have an empty mean shape: the public ball is left.
        return mean if mean.any() else self.label_map(np.zeros(self.shape_size), self.pose(np.zeros(self.pose_size)))

    def volumes(self, shape: Array) -> Array:
        """Return the occupancies (plane, \\*canonical) that a shape vector stands for."""
        return np.stack([self.frame.expand(part.reshape(-1)) for part in self.coefficients_of(shape)])

    def coefficients_of(self, shape: Array) -> Array:
        """Return the cosine coefficients (plane, \\*coefficient) of the occupancies that a shape vector stands for."""
        return (shape + self._public_centre).reshape(self.planes, *self.settings.coefficients)

    def shape_of(self, volumes: Array) -> Array:
        """Return the shape vector of occupancies (plane, \\*canonical)."""
        return np.concatenate([self.frame.compress(volume) for volume in volumes]) - self._public_centre

    def believed_shape(self, shape: Array, noise_sd: Array, expected: Array) -> Array:
        """Return the shape vector that a noisy one is read as, knowing that its planes are occupancies.

        Args:
            shape: (plane * coefficient,) noisy shape vector.
            noise_sd: (plane * coefficient,) standard deviation of the noise in each entry.
            expected: (plane * coefficient,) public shape vector.
        """
        if not noise_sd.any():
            return shape
        # Cosines are orthonormal: this is the standard deviation in each voxel.
        sds = np.sqrt(np.square(noise_sd).reshape(self.planes, -1).sum(1) / np.prod(self.frame.shape))
        guesses = np.clip(self.volumes(expected), 0, 1)
        return self.shape_of(np.stack(list(map(believed_occupancy, self.volumes(shape), sds, guesses))))

    def band_sums(self, deviation: Array) -> Array:
        """Return the mean square of a deviation from the mean shape in each (plane, band)."""
        return np.bincount(self.bands, deviation**2, self.band_count) / self.band_sizes

    @property
    def ball_energy(self) -> float:
        """Sum of squares of the shape vector's public centre, a ball."""
        return float(np.square(self._public_centre).sum())

    @property
    def band_count(self) -> int:
        """Number of (plane, band) groups."""
        return self.planes * self.bands_a_plane

    @property
    def bands_a_plane(self) -> int:
        """Number of radial frequency bands."""
        return _BANDS

    @property
    def band_sizes(self) -> Array:
        """Coefficients in each (plane, band) group, at least 1."""
        return np.maximum(np.bincount(self.bands, minlength=self.band_count), 1).astype(float)

    def _ragged(self, rng: np.random.Generator) -> Array | float:
        """Return a fine random field that moves the surface by ``masks.roughness`` voxels (standard deviation)."""
        if not self.settings.roughness:
            return 0.0
        field = ndimage.gaussian_filter(rng.standard_normal(self.grid.shape), _ROUGH_LENGTH, mode="wrap")
        # The occupancy falls by 1 over twice the truncation of the distance.
        return np.asarray(field / field.std() * self.settings.roughness / (2 * self.settings.band_voxels))

    def _draw(self, statistics: MaskStatistics, rng: np.random.Generator) -> tuple[Array, Array]:
        """Return a random pose vector and shape vector."""
        spread = statistics.spread
        if spread.ndim == 2:
            pose, shape = np.split(spread @ rng.standard_normal(spread.shape[1]), [self.pose_size])
        else:
            pose = _normal(statistics.pose_covariance, rng)
            shape = np.sqrt(np.maximum(spread, 0))[self.bands] * rng.standard_normal(self.shape_size)
        return statistics.pose_mean + pose, statistics.shape_mean + shape

    def _centre(self) -> Array:
        # In the canonical frame every foreground has unit second moments: a ball of radius sqrt(axes + 2) has them too.
        radius = np.sqrt(np.square(self.frame.points).sum(0)).reshape(self.frame.shape)
        ball = self.frame.compress(np.clip(np.sqrt(self.grid.spatial_dims + 2) - radius + 0.5, 0, 1))
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

    def _touches(self, label: NDArray[np.uint8]) -> bool:
        faces = (np.take(label, end, axis).any() for axis in range(self.grid.spatial_dims) for end in (0, -1))
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


def _normal(covariance: Array, rng: np.random.Generator) -> Array:
    values, vectors = np.linalg.eigh(covariance)
    return np.asarray(vectors @ (np.sqrt(np.maximum(values, 0)) * rng.standard_normal(len(values))))
