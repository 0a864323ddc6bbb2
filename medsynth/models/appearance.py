"""What images look like given their label map, as one vector of statistics a patient.

The mean of that vector over patients is released by one Gaussian mechanism. It gives the expected image of a label map
(least squares on features of position and distance), how far images scatter around it at each voxel, and the spectrum
of what scatters. Label maps dressed with it are public from then on, and any number of them may train the denoiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from medsynth.config import Appearance, Grid
from medsynth.models.label_features import LabelFeatures, LeastSquares
from medsynth.models.pose import Array

# Weights under one clip, so that noise reaches each part in proportion to what it bears.
_COUNT_WEIGHT = 0.2
_SQUARE_WEIGHT = 0.5
_SPECTRUM_WEIGHT = 0.5
_LEAST_COUNT = 0.3  # a noisy count below this share of the denominator is taken as this share
_SD_RANGE = (0.05, 0.7)  # public: texture of an image in [-1, 1]
_OCTAVE_EDGES = (0.004, 0.012, 0.025, 0.045, 0.075, 0.12, 0.2)  # cycles a voxel at which a frequency bin ends
_STRENGTH = 0.75  # of the texture: what it holds of other anatomy only blurs edges as a random field
_LEAST_SHARE = 0.05  # of a bin's whole power that is texture, however much the expected image explains


@dataclass(frozen=True)
class AppearanceStatistics:
    """What was released, ready to dress label maps.

    Attributes:
        mean: (channel, feature) weights of the expected image.
        variance: (channel, feature) weights of the squared deviation from it.
        spectrum: (bin,) mean square of each cosine coefficient of the texture, whose variance is 1.
    """

    mean: Array
    variance: Array
    spectrum: Array


class AppearanceSpace:
    """The public layout of the statistics on one grid; holds no data.

    Args:
        grid: the public voxel grid.
        settings: coefficients of the expected image.
        maps: label maps of the mask generator (public or released, never patients'), which stand for the patients'
            when the least squares are solved; needed for everything but :attr:`size`.
    """

    def __init__(self, grid: Grid, settings: Appearance, maps: Sequence[NDArray[np.uint8]] = ()) -> None:
        half, quarter = (tuple(-(-n // share) for n in settings.coefficients) for share in (2, 4))
        self.grid = grid
        self.features = LabelFeatures(grid, settings.coefficients, half)
        self.square_features = LabelFeatures(grid, half, quarter)
        self._maps = maps
        self._bins = _frequency_bins(grid.shape)
        self._bin_sizes = np.bincount(self._bins.reshape(-1))

    @property
    def size(self) -> int:
        """Length of a patient's vector."""
        values = self.features.size + self.square_features.size
        return 1 + self.grid.channels * values + len(self._bin_sizes)

    @cached_property
    def _fits(self) -> tuple[LeastSquares, LeastSquares]:
        return LeastSquares(self.features, self._maps), LeastSquares(self.square_features, self._maps)

    def vector(self, image: NDArray[np.float32], label: NDArray[np.uint8]) -> Array:
        """Return the statistics of one image, zeros for one without foreground.

        Args:
            image: (channel, \\*spatial) in [-1, 1]; one of even histogram has a vector of norm 0.7.
            label: (\\*spatial) integers.
        """
        if not self.features.has_pose(label):
            return np.zeros(self.size)
        means, squares = self._fits
        share = 1 / np.sqrt(self.grid.channels)
        parts = [
            np.array([_COUNT_WEIGHT]),
            share * means.vector(image, label).reshape(-1),
            share * _SQUARE_WEIGHT * squares.vector(np.square(image), label).reshape(-1),
            # The root keeps weak, fine bins above the noise.
            _SPECTRUM_WEIGHT * np.sqrt(self._power(image)),
        ]
        return np.concatenate(parts)

    def statistics(self, mean: Array, noise_sd: float) -> AppearanceStatistics:
        """Read the released mean of :meth:`vector` (a sum over a public denominator) back into statistics.

        Args:
            mean: the released vector; its first entry is the noisy ratio of patients to the denominator.
            noise_sd: standard deviation of the noise in each entry (public), for shrinking.
        """
        count = max(mean[0] / _COUNT_WEIGHT, _LEAST_COUNT)
        values, noise, channels = mean[1:] / count, noise_sd / count, self.grid.channels
        unshare = np.sqrt(channels)
        first, end = channels * self.features.size, channels * (self.features.size + self.square_features.size)
        fit, square_fit = self._fits
        weights = fit.solve(unshare * values[:first].reshape(channels, -1), unshare * noise)
        expected = [self.features.combine(weights, label).clip(-1, 1) for label in self._maps]
        # The expected images' own squares and power are known from the label maps: what is left is scatter.
        explained = np.mean(
            [square_fit.vector(x**2, label) for x, label in zip(expected, self._maps, strict=True)], axis=0
        )
        squares = values[first:end].reshape(channels, -1) * unshare / _SQUARE_WEIGHT - explained
        variance = square_fit.solve(squares, unshare * noise / _SQUARE_WEIGHT)
        total = np.maximum(np.maximum(values[end:] / _SPECTRUM_WEIGHT, 0) ** 2 - (noise / _SPECTRUM_WEIGHT) ** 2, 0)
        return AppearanceStatistics(weights, variance, self._texture_spectrum(total, expected))

    def render(
        self, label: NDArray[np.uint8], statistics: AppearanceStatistics, rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """Return an image (channel, \\*spatial) in [-1, 1] of a label map, dressed with released statistics.

        All channels share one texture, each with its own strength: light and tissue change colours together.
        """
        expected = self.features.combine(statistics.mean, label)
        variance = self.square_features.combine(statistics.variance, label)
        spread = np.sqrt(np.clip(variance, _SD_RANGE[0] ** 2, _SD_RANGE[1] ** 2))
        waves = np.sqrt(statistics.spectrum)[self._bins] * rng.standard_normal(self.grid.shape)
        return np.clip(expected + _STRENGTH * spread * fft.idctn(waves, norm="ortho"), -1, 1).astype(np.float32)

    def _power(self, image: NDArray[np.floating]) -> Array:
        """Return each bin's share of the mean square of an image's grey values; the shares add up to it."""
        waves = fft.dctn(image.mean(0), norm="ortho")
        return np.bincount(self._bins.reshape(-1), np.square(waves).reshape(-1)) / waves.size

    def _texture_spectrum(self, total: Array, expected: Sequence[Array]) -> Array:
        explained = np.mean([self._power(image) for image in expected], axis=0)
        texture = np.maximum(total - explained, _LEAST_SHARE * total)
        if not texture.any():
            texture = self._bin_sizes.astype(float)  # all noise: white
        return np.asarray(texture / texture.sum() * self._bins.size / self._bin_sizes)


def _frequency_bins(shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Return the bin (\\*spatial) of each cosine coefficient: octaves an axis, jointly, numbered without gaps."""
    lines = [np.digitize(np.arange(size) / (2 * size), _OCTAVE_EDGES) for size in shape]
    joint = np.zeros(shape, dtype=np.int64)
    for line in np.meshgrid(*lines, indexing="ij"):
        joint = joint * (len(_OCTAVE_EDGES) + 1) + line
    return np.asarray(np.unique(joint, return_inverse=True)[1].reshape(shape), dtype=np.int64)
