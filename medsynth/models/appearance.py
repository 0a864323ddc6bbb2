"""What images look like, as one vector of statistics a patient: intensity by label, distance and position.

The mean of that vector over patients is released by one Gaussian mechanism; phantoms dressed with it are public from
then on, and any number of them may train the denoiser.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from medsynth.config import Appearance, Grid
from medsynth.imaging.phantom import scale, smooth_field

Array = NDArray[np.float64]

_OUTSIDE = (1.0, 2.0, 4.0, 8.0)  # voxels from the foreground at which an outer region ends
_INSIDE = (1.0, 2.0)  # voxels of depth at which an inner region ends
_POSITION_WEIGHT = 3.0  # weight of the mean image against the region means in the clipped norm
_FINE_TEXTURE = 0.6  # share of the texture that is finer than a blur of one voxel
_FIELD_KNOTS = 6


@dataclass(frozen=True)
class AppearanceStatistics:
    """Released means.

    Attributes:
        level: (region, channel) mean intensity.
        level_spread: (region, channel) standard deviation of it between patients.
        texture: (region,) standard deviation of intensity inside a region.
        position: (channel, \\*coefficient) cosine coefficients of what regions leave unexplained.
    """

    level: Array
    level_spread: Array
    texture: Array
    position: Array


class AppearanceSpace:
    """The public layout of the statistics on one grid; holds no data."""

    def __init__(self, grid: Grid, settings: Appearance) -> None:
        self.grid = grid
        self.kept = settings.coefficients
        self.regions = len(_OUTSIDE) + 1 + (grid.classes - 1) * (len(_INSIDE) + 1)
        self._scale = _POSITION_WEIGHT / np.sqrt(np.prod(grid.shape))

    @property
    def size(self) -> int:
        """Length of a patient's vector."""
        return 1 + self.regions * (2 * self.grid.channels + 1) + self.grid.channels * int(np.prod(self.kept))

    def vector(self, image: NDArray[np.float32], label: NDArray[np.uint8]) -> Array:
        """Return the statistics of one image.

        Args:
            image: (channel, \\*spatial) in [-1, 1].
            label: (\\*spatial) integers.
        """
        region = self.region_map(label).reshape(-1)
        flat = image.reshape(self.grid.channels, -1).astype(float)
        present = np.bincount(region, minlength=self.regions)
        counts = np.maximum(present, 1)
        level = np.stack([np.bincount(region, plane, self.regions) / counts for plane in flat], axis=1)
        rest = flat - level.T[:, region]
        texture = np.sqrt(sum(np.bincount(region, p**2, self.regions) for p in rest) / counts / self.grid.channels)
        # An absent region counts as mid grey: a public value, so that nobody else's statistics are needed.
        waves = [self._compress(plane.reshape(self.grid.shape)) for plane in flat]
        parts = [np.ones(1), level.reshape(-1), (level**2).reshape(-1), texture, *(w.reshape(-1) for w in waves)]
        return np.concatenate(parts)

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
        waves = mean[1 + 2 * n + self.regions :].reshape(channels, *self.kept)
        spread = np.sqrt(np.clip(square - level**2, 0.02**2, 0.5**2))
        return AppearanceStatistics(level, spread, texture, _shrink(waves, noise_sd) / self._scale)

    def render(
        self, label: NDArray[np.uint8], statistics: AppearanceStatistics, rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """Return an image (channel, \\*spatial) in [-1, 1] of a label map, dressed with released statistics."""
        region = self.region_map(label)
        common = rng.standard_normal()
        planes = []
        for channel in range(self.grid.channels):
            own = rng.standard_normal(self.regions)
            shift = statistics.level_spread[:, channel] * (0.7 * common + 0.7 * own)
            painted = (statistics.level[:, channel] + shift)[region]
            painted = ndimage.gaussian_filter(painted, 0.7)
            planes.append(painted + self._position(statistics, label, channel))
        image = np.stack(planes) + self._texture(statistics.texture[region], rng)
        return scale(image.astype(np.float32), self.grid.intensity_percentiles)

    def region_map(self, label: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Return the region (by distance outside, by label and depth inside) of every voxel."""
        inside = label > 0
        if not inside.any():
            return np.full(label.shape, len(_OUTSIDE), dtype=np.int64)
        region = np.digitize(ndimage.distance_transform_edt(~inside), _OUTSIDE, right=True)
        depth = np.digitize(ndimage.distance_transform_edt(inside), _INSIDE, right=True)
        first = len(_OUTSIDE) + 1
        step = len(_INSIDE) + 1
        return np.where(inside, first + (label.astype(np.int64) - 1) * step + depth, region)

    def _position(self, statistics: AppearanceStatistics, label: NDArray[np.uint8], channel: int) -> Array:
        # The mean image holds what regions explain already: only its part beyond this label's own mean is added.
        mean_image = self._expand(statistics.position[channel])
        painted = statistics.level[:, channel][self.region_map(label)]
        explained = self._expand(self._compress(painted) / self._scale)
        far = np.clip(ndimage.distance_transform_edt(label == 0) / 3.0, 0, 1)
        return np.asarray((mean_image - explained) * far)

    def _texture(self, sd: Array, rng: np.random.Generator) -> Array:
        fields = []
        for _ in range(self.grid.channels):
            white = rng.standard_normal(self.grid.shape)
            soft = ndimage.gaussian_filter(white, 1.0)
            soft = soft / soft.std()
            coarse = smooth_field(rng, self.grid.shape, _FIELD_KNOTS)
            grain = _FINE_TEXTURE * white * 0.5 + 0.6 * soft + 0.6 * coarse
            fields.append(sd * grain / grain.std())
        return np.stack(fields)

    def _compress(self, plane: Array) -> Array:
        return np.asarray(fft.dctn(plane, norm="ortho")[tuple(slice(n) for n in self.kept)]) * self._scale

    def _expand(self, coefficients: Array) -> Array:
        full = np.zeros(self.grid.shape)
        full[tuple(slice(n) for n in self.kept)] = coefficients
        return np.asarray(fft.idctn(full, norm="ortho"))


def _shrink(waves: Array, noise_sd: float) -> Array:
    # Wiener's filter with the signal's power taken from the noisy coefficients themselves.
    power = waves**2
    return np.asarray(waves * np.maximum(power - noise_sd**2, 0) / np.maximum(power, 1e-12))
