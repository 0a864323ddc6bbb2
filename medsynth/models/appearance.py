"""What images look like, as one vector of statistics a patient: intensity by label, distance and position.

The mean of that vector over patients is released by one Gaussian mechanism; phantoms dressed with it are public from
then on, and any number of them may train the denoiser.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medsynth.config import Appearance, Grid
from medsynth.imaging.phantom import scale, smooth_field
from medsynth.models.pose import Array, PoseFrame

_OUTSIDE = (1.0, 2.0, 4.0, 8.0)  # voxels from the foreground at which an outer region ends
_INSIDE = (1.0, 2.0)  # voxels of depth at which an inner region ends
_FRAME_SD = 4.5  # half width, in standard deviations of the foreground, of the frame of the mean image
_POSITION_WEIGHT = 8.0  # weight of the mean image against the region means in the clipped norm
_NEAR = 2.5  # voxels from the foreground within which regions, not the mean image, say the intensity
_FINE_SD = 0.06  # public: what is finer than any anatomy, in units of the intensity range [-1, 1]
_COARSE_KNOTS = 10
_TEXTURE_SHARE = 0.6  # the rest of the spread is structure that random fields would only blur


@dataclass(frozen=True)
class AppearanceStatistics:
    """Released means.

    Attributes:
        level: (region, channel) mean intensity.
        level_spread: (region, channel) standard deviation of it between patients.
        texture: (region,) standard deviation of intensity inside a region of one image.
        position: (channel, coefficient) the mean image in the foreground's canonical frame, cosine coefficients.
    """

    level: Array
    level_spread: Array
    texture: Array
    position: Array


class AppearanceSpace:
    """The public layout of the statistics on one grid; holds no data."""

    def __init__(self, grid: Grid, settings: Appearance) -> None:
        self.grid = grid
        self.frame = PoseFrame(grid, settings.coefficients, _FRAME_SD)
        self.regions = len(_OUTSIDE) + 1 + (grid.classes - 1) * (len(_INSIDE) + 1)
        self.waves = int(np.prod(settings.coefficients))
        self._scale = _POSITION_WEIGHT / np.sqrt(np.prod(self.frame.shape))

    @property
    def size(self) -> int:
        """Length of a patient's vector."""
        return 1 + self.regions * (2 * self.grid.channels + 1) + self.grid.channels * self.waves

    def vector(self, image: NDArray[np.float32], label: NDArray[np.uint8]) -> Array:
        """Return the statistics of one image, zeros for one without foreground.

        Args:
            image: (channel, \\*spatial) in [-1, 1].
            label: (\\*spatial) integers.
        """
        vector = self.frame.pose_vector(label)
        if vector is None:
            return np.zeros(self.size)
        pose = self.frame.pose(vector)
        region = self.region_map(label).reshape(-1)
        flat = image.reshape(self.grid.channels, -1).astype(float)
        # An absent region counts as mid grey: a public value, so that nobody else's statistics are needed.
        counts = np.maximum(np.bincount(region, minlength=self.regions), 1)
        level = np.stack([np.bincount(region, plane, self.regions) / counts for plane in flat], axis=1)
        rest = flat - level.T[:, region]
        squares = np.stack([np.bincount(region, plane**2, self.regions) for plane in rest]).sum(0)
        texture = np.sqrt(squares / counts / self.grid.channels)
        waves = [self.frame.compress(self.frame.enter(plane, pose)) * self._scale for plane in image]
        return np.concatenate([np.ones(1), level.reshape(-1), (level**2).reshape(-1), texture, *waves])

    def statistics(self, mean: Array, noise_sd: float) -> AppearanceStatistics:
        """Read the released mean of :meth:`vector` (a sum over a public denominator) back into statistics.

        Args:
            mean: the released vector; its first entry is the noisy ratio of patients to the denominator.
            noise_sd: standard deviation of the noise in each entry (public), for shrinking the mean image.
        """
        channels, n = self.grid.channels, self.regions * self.grid.channels
        mean = mean / max(mean[0], 0.2)
        level = np.clip(mean[1 : 1 + n], -1, 1).reshape(self.regions, channels)
        square = mean[1 + n : 1 + 2 * n].reshape(self.regions, channels)
        texture = np.clip(mean[1 + 2 * n : 1 + 2 * n + self.regions], 0.01, 1)
        waves = mean[1 + 2 * n + self.regions :].reshape(channels, self.waves)
        spread = np.sqrt(np.clip(square - level**2, 0.03**2, 0.4**2))
        return AppearanceStatistics(level, spread, texture, _shrink(waves, noise_sd) / self._scale)

    def render(
        self, label: NDArray[np.uint8], statistics: AppearanceStatistics, rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """Return an image (channel, \\*spatial) in [-1, 1] of a label map, dressed with released statistics."""
        vector = self.frame.pose_vector(label)
        if vector is None:
            raise ValueError("a label map without foreground has no pose: draw another")
        pose = self.frame.pose(vector)
        region = self.region_map(label)
        distance = ndimage.distance_transform_edt(label == 0)
        far = np.clip(distance / _NEAR - 0.5, 0, 1)
        common = rng.standard_normal()
        planes = []
        for channel in range(self.grid.channels):
            own = rng.standard_normal(self.regions)
            shift = statistics.level_spread[:, channel] * (0.7 * common + 0.7 * own)
            near = ndimage.gaussian_filter((statistics.level[:, channel] + shift)[region], 0.6)
            around = self.frame.leave(self.frame.expand(statistics.position[channel]), pose, "nearest")
            residual = self._unexplained(around, statistics, channel, region)
            planes.append(near * (1 - far) + (around + shift[0]) * far + self._texture(residual, region, rng))
        return scale(np.stack(planes).astype(np.float32), self.grid.intensity_percentiles)

    def region_map(self, label: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the region (by distance outside, by label and depth inside) of every voxel."""
        inside = label > 0
        if not inside.any():
            return np.full(label.shape, len(_OUTSIDE), dtype=np.int64)
        region = np.digitize(ndimage.distance_transform_edt(~inside), _OUTSIDE, right=True)
        depth = np.digitize(ndimage.distance_transform_edt(inside), _INSIDE, right=True)
        first, step = len(_OUTSIDE) + 1, len(_INSIDE) + 1
        return np.where(inside, first + (label.astype(np.int64) - 1) * step + depth, region)

    def _unexplained(
        self, around: Array, statistics: AppearanceStatistics, channel: int, region: NDArray[np.int64]
    ) -> Array:
        """Return the standard deviation (region,) that the mean image leaves of each outer region's texture."""
        counts = np.maximum(np.bincount(region.reshape(-1), minlength=self.regions), 1)
        offset = (around - statistics.level[:, channel][region]).reshape(-1)
        explained = np.bincount(region.reshape(-1), offset**2, self.regions) / counts
        outer = np.arange(self.regions) <= len(_OUTSIDE)
        left = np.where(outer, statistics.texture**2 - explained, statistics.texture**2)
        return np.sqrt(np.clip(left, _FINE_SD**2, None))

    def _texture(self, sd: Array, region: NDArray[np.int64], rng: np.random.Generator) -> Array:
        coarse = smooth_field(rng, self.grid.shape, _COARSE_KNOTS)
        middle = ndimage.gaussian_filter(rng.standard_normal(self.grid.shape), 1.2)
        mixed = _TEXTURE_SHARE * (0.8 * coarse / coarse.std() + 0.6 * middle / middle.std())
        smooth_sd = ndimage.gaussian_filter(sd[region], 1.0)
        return np.asarray(smooth_sd * mixed + _FINE_SD * rng.standard_normal(self.grid.shape))


def _shrink(waves: Array, noise_sd: float) -> Array:
    # Wiener's filter with the signal's power taken from the noisy coefficients themselves.
    power = waves**2
    return np.asarray(waves * np.maximum(power - noise_sd**2, 0) / np.maximum(power, 1e-12))
