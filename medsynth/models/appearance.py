"""What images look like given their label map, as one vector of statistics a patient.

The mean of that vector over patients is released by two noisy sums, the second around the first. It gives the
distribution of grey values at each voxel of a label map: coefficients of a cosine series in the grey value, each a
least-squares fit on features of position and distance. An image is drawn by reading one smooth random field as
quantiles of these distributions. Where patients show either of two tissues the image shows one or the other with an
edge between them, not their average under noise. Without privacy the field may be mixed from patients' own
(:mod:`medsynth.models.score_fields`). Label maps dressed with what mechanisms released are public from then on, and any
number of them may train the denoiser.

Sources: orthogonal series for densities, Chentsov (1962); a Gaussian field read as quantiles, Nelsen (2006), ch. 2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import ndtr, ndtri

from medsynth.config import Appearance, Grid
from medsynth.imaging.template import mni152
from medsynth.models.label_features import LabelFeatures, LeastSquares, Singles, signed_distance
from medsynth.models.pose import Array
from medsynth.models.score_fields import ScoreFields, mean_foreground, measured_scores, mixed_scores
from medsynth.models.shrinkage import joined, joint_sd
from medsynth.models.template import Template

_COUNT_WEIGHT = 0.35  # of the entry that counts patients, under one clip with the rest
_LATER_COUNT_WEIGHT = 0.2  # the same in the second vector
_LEAST_COUNT = 0.2  # a noisy count below this share of the denominator is taken as this share
_LEAST_DENSITY = 0.03  # of the even one: truncated and noisy series go below zero
# Power of a density: takes away the grey values that truncation and noise add everywhere, but where features are few
# and noise is high also what patients do show (docs/log.md).
_SHARPENING, _LESS_SHARPENING = 3.0, 2.0
_CELLS = 24  # of the grey values' range, within which a density is even
_NEAR_SHARE = 2 / 3  # of the coefficients an axis, for what follows the surface
_FINE, _COARSE = (1.0, 0.6), (6.0, 0.8)  # correlation length (mm; voxels where there is no spacing) and weight
_COARSE_FADE = 4.0  # voxels outside the foreground over which the coarse field fades in: organs are alike inside
_GRAIN = 0.06  # public: standard deviation of the fine noise of an image in [-1, 1]
_GRAIN_LENGTH = 0.5  # voxels
_MIXED_SOFT = 0.6  # voxels by which mixed scores are softened
_LEAST_RANK = 1e-4  # and as far from 1: keeps normal scores finite


@dataclass(frozen=True)
class AppearanceStatistics:
    """What was released, ready to dress label maps.

    Attributes:
        density: (channel, level, feature) weights of the cosine coefficients of the grey values' density.
        pose: (pose,) mean of drawn label maps, from which the features' frames turn.
        score_mean: with the other three a :class:`medsynth.models.score_fields.ScoreFields`; each (0,) where one public
            random field stands for what patients show.
        score_beside: see there.
        score_patient: see there.
        chart: see there.
    """

    density: Array
    pose: Array
    score_mean: Singles = field(default_factory=lambda: np.zeros(0, np.float32))
    score_beside: NDArray[np.float16] = field(default_factory=lambda: np.zeros(0, np.float16))
    score_patient: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    chart: NDArray[np.uint8] = field(default_factory=lambda: np.zeros(0, np.uint8))

    @property
    def fields(self) -> ScoreFields:
        """What patients show beside their distributions."""
        return ScoreFields(self.score_mean, self.score_beside, self.score_patient, self.chart)


class AppearanceSpace:
    """The public layout of the statistics on one grid; holds no data.

    Args:
        grid: the public voxel grid.
        settings: coefficients of position and of the grey value.
        maps: label maps of the mask generator (public or released, never patients'), which stand for the patients'
            when the least squares are solved; needed for :meth:`vector` and :meth:`statistics`.
    """

    statistics_type = AppearanceStatistics

    def __init__(self, grid: Grid, settings: Appearance, maps: Sequence[NDArray[np.uint8]] = ()) -> None:
        self.grid = grid
        self.levels = settings.levels
        near = tuple(int(np.ceil(_NEAR_SHARE * count)) for count in settings.cosines)
        self.features = LabelFeatures(grid, settings.cosines, near)
        self._power = _SHARPENING if self.features.fine else _LESS_SHARPENING
        self._maps = maps
        # Where patients will be measured it is read at once, so that a wrong place stops a study before that.
        named = settings.template_centre_mm
        self._image = mni152(named) if named is not None and len(maps) else None
        self.mixed = settings.mixed_patients
        """How many patients a draft mixes, which needs :meth:`with_scores`; 0: none."""
        edges = np.linspace(-1, 1, _CELLS + 1)
        self._edge_waves = waves(edges, self.levels).astype(np.float32)
        self._spacing = np.array(grid.spacing_mm or (1.0,) * len(grid.shape))

    @property
    def size(self) -> int:
        """Length of a patient's vector."""
        return 1 + self.grid.channels * self.levels * self.features.size

    @cached_property
    def _fit(self) -> LeastSquares:
        return LeastSquares(self.features, self._maps)

    @cached_property
    def _template(self) -> Template | None:
        if self._image is None:
            return None
        return Template(self._image, self._fit, self._maps, partial(waves, levels=self.levels))

    def vector(self, image: NDArray[np.float32], label: NDArray[np.uint8]) -> Array:
        """Return the statistics of one image, zeros for one without foreground.

        Args:
            image: (channel, \\*spatial) in [-1, 1].
            label: (\\*spatial) integers.
        """
        if not self.features.has_pose(label):
            return np.zeros(self.size)
        series = waves(np.asarray(image), self.levels).swapaxes(0, 1).reshape(-1, *label.shape)
        moments = self._fit.vector(series, label) / np.sqrt(self.grid.channels)
        return np.concatenate([[_COUNT_WEIGHT], moments.reshape(-1)])

    def centre(self, mean: Array, noise_sd: float) -> Array:
        """Return what a released mean of :meth:`vector` says that vectors are, shrunk by its noise.

        Around what the template says, where there is one.

        Args:
            mean: as in :meth:`statistics`.
            noise_sd: likewise.
        """
        scale = _scale(mean, _COUNT_WEIGHT)
        vectors, sd = mean[1:].reshape(-1, self.features.size) * scale, noise_sd * scale
        guess = self._template.guess(vectors, sd) if self._template is not None and sd else np.zeros_like(vectors)
        return (guess + self._fit.shrunk(vectors - guess, sd)).reshape(-1)

    def around(self, vector: Array, centre: Array) -> Array:
        """Return a patient's vector measured around a released centre; zeros stay zeros."""
        present = vector[0] / _COUNT_WEIGHT
        return np.concatenate([[present * _LATER_COUNT_WEIGHT], vector[1:] - present * centre])

    def joined(self, means: tuple[Array, Array], centre: Array, noise_sds: tuple[float, float]) -> tuple[Array, float]:
        """Return the mean of :meth:`vector` that two released means say together, and the noise in it.

        Args:
            means: of :meth:`vector` and of :meth:`around`.
            centre: what the second was measured around.
            noise_sds: standard deviations of the noise in each entry of both.
        """
        scales = _scale(means[0], _COUNT_WEIGHT), _scale(means[1], _LATER_COUNT_WEIGHT)
        sds = (noise_sds[0] * scales[0], noise_sds[1] * scales[1])
        both = joined(means[0][1:] * scales[0], centre + means[1][1:] * scales[1], sds)
        return np.concatenate([[_COUNT_WEIGHT], both]), float(joint_sd(*sds))

    def statistics(self, mean: Array, noise_sd: float) -> AppearanceStatistics:
        """Read the released mean of :meth:`vector` (a sum over a public denominator) back into statistics.

        Args:
            mean: the released vector; its first entry says, with noise, how many patients there are beside the
                denominator and how far the clip shortened them.
            noise_sd: standard deviation of the noise in each entry (public), for shrinking.
        """
        believed = self.centre(mean, noise_sd).reshape(-1, self.features.size)
        weights = self._fit.solve(believed * np.sqrt(self.grid.channels))
        return AppearanceStatistics(weights.reshape(self.grid.channels, self.levels, -1), self._fit.mean_pose)

    def with_scores(
        self, statistics: AppearanceStatistics, records: Iterable[tuple[NDArray[np.float32], NDArray[np.uint8], int]]
    ) -> AppearanceStatistics:
        """Return statistics with what records show beside their distributions; not private.

        Args:
            statistics: what :meth:`statistics` returned.
            records: image, label map, and the patient's number.

        Raises:
            InputError: no label map shows anything.
        """
        shown = ((image, label, patient) for image, label, patient in records if self.features.has_pose(label))
        scored = ((self._scores(image, label, statistics), label, patient) for image, label, patient in shown)
        chart = mean_foreground(self.features, self._maps, statistics.pose)
        found = measured_scores(self.features, chart, statistics.pose, scored)
        return replace(
            statistics, score_mean=found.mean, score_beside=found.beside, score_patient=found.patient, chart=chart
        )

    def fits(self, statistics: AppearanceStatistics) -> bool:
        """Return whether statistics are of this layout."""
        fields = (self.grid.channels, *self.grid.shape) if self.mixed else (0,)
        density = (self.grid.channels, self.levels, self.features.size)
        return statistics.density.shape == density and statistics.score_mean.shape == fields

    def render(
        self, label: NDArray[np.uint8], statistics: AppearanceStatistics, rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """Return an image (channel, \\*spatial) in [-1, 1] of a label map, dressed with released statistics.

        All channels share one field: light and tissue change colours together. Mixed from patients, each channel has
        its own, and no grain.
        """
        if self.mixed:
            drawn = mixed_scores(self.features, statistics.fields, statistics.pose, label, self.mixed, rng)
            # Read in steep distributions, single voxels of a mixture would be grains of other tissues.
            soft = ndimage.gaussian_filter(drawn, (0, *(_MIXED_SOFT,) * label.ndim), mode="nearest")
            return self._read_as_ranks(soft, label, statistics).astype(np.float32)
        fields = np.broadcast_to(self._smooth_field(label, rng), (self.grid.channels, *label.shape))
        grain = _standard(ndimage.gaussian_filter(rng.standard_normal(self.grid.shape), _GRAIN_LENGTH))
        image = self._read_as_ranks(fields, label, statistics) + _GRAIN * grain
        return np.clip(image, -1, 1).astype(np.float32)

    def _read_as_ranks(self, fields: Array, label: NDArray[np.uint8], statistics: AppearanceStatistics) -> Singles:
        """Return the grey values (channel, \\*spatial) whose normal scores are ``fields``."""
        ranks = ndtr(fields).astype(np.float32).reshape(len(fields), -1, 1)
        rows = (self._distribution(row, label, statistics.pose) for row in statistics.density)
        return np.stack([quantile(row, rank) for row, rank in zip(rows, ranks, strict=True)]).reshape(fields.shape)

    def _scores(self, image: NDArray[np.float32], label: NDArray[np.uint8], statistics: AppearanceStatistics) -> Array:
        """Return the normal scores (channel, \\*spatial) of an image's grey values."""
        rows = (self._distribution(row, label, statistics.pose) for row in statistics.density)
        ranks = np.stack([rank_of(row, plane.reshape(-1)) for row, plane in zip(rows, image, strict=True)])
        return np.asarray(ndtri(np.clip(ranks, _LEAST_RANK, 1 - _LEAST_RANK))).reshape(image.shape)

    def _distribution(self, weights: Array, label: NDArray[np.uint8], mean: Array | None) -> Singles:
        """Return the cumulative distribution (voxel, edge) of grey values at each voxel."""
        series = self.features.combine(weights, label, mean).reshape(self.levels, -1).astype(np.float32)
        density = np.maximum(1 + series.T @ self._edge_waves, _LEAST_DENSITY) ** self._power
        return cumulative(density)

    def _smooth_field(self, label: NDArray[np.uint8], rng: np.random.Generator) -> Array:
        """Return a field of unit variance: around the foreground tissues that go on for a while, elsewhere each time.

        Inside it is fine alone: with a coarse part there some images would have a bright organ, and others a dark one.
        """
        far = np.clip(signed_distance(label > 0) / _COARSE_FADE, 0, 1)
        total, variance = np.zeros(self.grid.shape), np.zeros(self.grid.shape)
        for (length, weight), shown in ((_FINE, 1.0), (_COARSE, far)):
            noise = ndimage.gaussian_filter(rng.standard_normal(total.shape), length / self._spacing, mode="wrap")
            total += weight * shown * _standard(noise)
            variance += np.square(weight * shown)
        return total / np.sqrt(variance)


def _scale(mean: Array, count_weight: float) -> float:
    """Return what undoes that fewer patients came than the denominator says, and that the clip shortened them."""
    return float(1 / max(mean[0] / count_weight, _LEAST_COUNT))


def waves(values: NDArray[np.floating], levels: int) -> Array:
    """Return cosines (level, \\*values) of grey values in [-1, 1], of unit mean square over that range."""
    orders = np.arange(1, levels + 1).reshape(-1, *(1,) * values.ndim)
    return np.asarray(np.sqrt(2.0) * np.cos(np.pi / 2 * orders * (values + 1)))


def cumulative(density: NDArray[Any]) -> NDArray[Any]:
    """Return the distribution (voxel, edge) of densities (voxel, edge), linear between edges."""
    cells = np.cumsum(density[:, 1:] + density[:, :-1], axis=1)
    return np.pad(cells / cells[:, -1:], ((0, 0), (1, 0)))


def quantile(distribution: Singles, rank: Singles) -> Singles:
    """Return the grey value (voxel,) at each voxel's rank (voxel, 1) in its distribution (voxel, edge)."""
    rows = np.arange(len(rank))
    cells = distribution.shape[1] - 1
    cell = np.clip((distribution < rank).sum(1) - 1, 0, cells - 1)
    low, high = distribution[rows, cell], distribution[rows, cell + 1]
    return np.asarray(-1 + 2 / cells * (cell + (rank[:, 0] - low) / np.maximum(high - low, 1e-6)), np.float32)


def rank_of(distribution: Singles, values: Singles) -> Singles:
    """Return the rank (voxel,) of grey values (voxel,) in distributions (voxel, edge); undoes :func:`quantile`."""
    cells = distribution.shape[1] - 1
    places = (values + 1) / 2 * cells
    cell = np.clip(places.astype(np.int64), 0, cells - 1)
    low, high = (np.take_along_axis(distribution, edge[:, None], 1)[:, 0] for edge in (cell, cell + 1))
    return np.asarray(low + (high - low) * (places - cell), np.float32)


def _standard(field: Array) -> Array:
    return np.asarray(field / np.maximum(field.std(), 1e-12))
