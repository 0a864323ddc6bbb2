"""Images that differ between patients as a whole: light, colours and contrast by factors, texture by a distribution.

Photographs share little: one is reddish, one is lit from the left, in one the lesion is paler than what surrounds it,
in the next darker. The distribution of grey values at a place (:mod:`medsynth.models.appearance`) mixes all patients,
so that their differences come out as texture. Here a patient's image becomes a few coefficients (low-pass cosines of
the grid, profiles of the distance to the foreground), how strong and how fine the rest is, which part of the grid the
frame leaves dark, and the distribution of the rest at each place. Mean and second moments of the coefficients give
factors: directions in which patients differ, as many as stand out of the noise.

Sources: factor analysis, Lawley, Maxwell (1962); which eigenvalues stand out of noise and how far to shrink them,
Benaych-Georges, Nadakuditi (2011); the distribution as in :mod:`medsynth.models.appearance`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage
from scipy.special import ndtri

from medsynth.config import Appearance, Grid
from medsynth.imaging.lit_surface import lit_surface, pigment
from medsynth.models.appearance import cumulative, quantile, waves
from medsynth.models.label_features import Singles, cosine_products, hats, low_pass, signed_distance
from medsynth.models.pose import Array
from medsynth.models.shrinkage import signal_share

_KNOTS = (-16.0, -8.0, -4.0, -1.5, 1.5, 4.0, 8.0, 16.0)  # voxels from the foreground, inside negative: of the rest
_EDGE, _DEPTH, _AROUND = 1.5, 12.0, 12.0  # voxels over which the profiles of the distance change
_PROFILES = 3  # that _profiles returns
_COLOUR_SHARE = 0.5  # of the coefficients an axis, for what is no brightness: colours change slowly over an image
_RINGS = 6  # of the cosines' frequencies, within which coefficients vary alike
_INNER_PROFILES = 2  # edge and depth alone are tilted, and have colours
_REST_WAVES = 4  # cosines an axis for the distribution of what the coefficients leave
_RIDGE, _REST_RIDGE = 0.01, 0.02
_DARK = -0.8  # below it in all channels a voxel belongs to the frame
_RIM = 3  # voxels beside the frame, half dark, that tell nothing
_CELL = 4  # voxels an axis over which the frame is averaged
_WIDTHS = (1.0, 2.0, 4.0, 8.0)  # voxels, between the bands of texture
_SOFT_CELLS, _LEAST_FRAME = 0.7, 0.15  # against noise: widths of a blur, least share of patients that is drawn
_ALWAYS = 0.95  # share from which on a place is dark even if the foreground reaches it
_REACH = 4.0  # standard deviations of the rest that its distribution covers
_LOG_REST, _LOG_COLOUR = -2.0, -3.0  # public centres of the logarithm of the rest's strength
_LOG_WEIGHT, _BAND_WEIGHT = 0.5, 0.25  # of that logarithm; of the bands of colours
_EVEN = 1 / np.sqrt(len(_WIDTHS) + 1)  # public centre of the strength of each band of texture
_LONGEST = 1.1  # a patient's coefficients are shortened to this norm before they are squared
_COUNT, _MEAN, _FRAME, _MOMENTS, _SQUARE = 0.3, 0.35, 0.5, 0.12, 1.2  # weights of the parts under one clip
_LEAST_COUNT = 0.3
_THIN = 3  # every third voxel is enough for a fit
_LEAST_SHARE = 0.02  # of the voxels must be outside the frame
_CELLS, _LEAST_DENSITY, _SHARPENING = 32, 0.02, 1.5
_GRAIN = 0.02
_SHARED = (-0.2, 0.3)  # mean and spread of the correlation of colours with the light that falls on them


@dataclass(frozen=True)
class FactorStatistics:
    """What was released, ready to dress label maps.

    Attributes:
        mean: (coefficient,) of all patients.
        factors: (coefficient, factor) directions in which patients differ, as long as they do.
        rest: (coefficient,) standard deviation beside the factors.
        frame: (\\*cell) share of patients whose image is dark there.
        density: (channel * level, feature) weights of the distribution of what the coefficients leave.
        bright: (feature, feature) what makes features orthogonal over drawn label maps (public).
        slow: the same for the features that colours have.
    """

    mean: Array
    factors: Array
    rest: Array
    frame: Array
    density: Array
    bright: Array
    slow: Array


class FactorSpace:
    """The public layout of the statistics on one grid; holds no data.

    Args:
        grid: the public voxel grid.
        settings: coefficients an axis, levels of the distribution, most factors.
        maps: label maps of the mask generator (public or released, never patients'), which stand for the patients'
            when features are made orthogonal.
    """

    statistics_type = FactorStatistics

    def __init__(self, grid: Grid, settings: Appearance, maps: Sequence[NDArray[np.uint8]] = ()) -> None:
        self.grid, self.levels, self.most = grid, settings.levels, settings.factors
        self._lit = settings.texture == "lit_surface"
        self._lattice = np.indices(grid.shape).reshape(grid.spatial_dims, -1).astype(np.float32)
        self._waves, radius = _grid_waves(grid, settings.cosines)
        self._rest_waves, _ = _grid_waves(grid, (_REST_WAVES,) * grid.spatial_dims)
        inner = len(radius) + np.arange(_INNER_PROFILES)
        self._slow = np.concatenate([np.flatnonzero(radius < _COLOUR_SHARE), inner])
        self._features = len(radius) + _PROFILES + grid.spatial_dims * _INNER_PROFILES
        self._rest_features = len(self._rest_waves) + len(_KNOTS) - 1
        self._groups = self._coefficient_groups(radius)
        self._colours = fft.dct(np.eye(grid.channels), norm="ortho", axis=0)  # brightness first, then what opposes
        self._log_rest, self._band_weights = np.full(grid.channels, _LOG_COLOUR), np.full(grid.channels, _BAND_WEIGHT)
        self._log_rest[0], self._band_weights[0] = _LOG_REST, 1
        self._cells = tuple(size // _CELL for size in grid.shape)
        self._whiten = self._orthogonal(maps)

    @property
    def coefficients(self) -> int:
        """Number of coefficients of an image."""
        return len(self._groups)

    @property
    def size(self) -> int:
        """Length of a patient's vector."""
        fixed = 1 + self.coefficients + int(np.prod(self._cells))
        return fixed + self._moments_size + _triangle(self.coefficients)[0].size

    def vector(self, image: NDArray[np.float32], label: NDArray[np.uint8]) -> Array:
        """Return the statistics of one image, zeros for one without foreground or all dark.

        Args:
            image: (channel, \\*spatial) in [-1, 1].
            label: (\\*spatial) integers.
        """
        frame = ndimage.median_filter((image.max(0) < _DARK).astype(np.uint8), 3) > 0
        shown = _outside(frame)
        if not (label > 0).any() or shown.mean() < _LEAST_SHARE:
            return np.zeros(self.size)
        features, rest_features = self._parts(label)
        planes = self._colours @ image.reshape(self.grid.channels, -1)
        smooth, rest = _separated(planes, self._bases(features, self._whiten), np.flatnonzero(shown)[::_THIN])
        rest *= shown
        # Bands overlap: their norm, which drafts are given back, is not the standard deviation.
        bands = _band_strengths(_bands(rest.reshape(image.shape)), shown)
        strengths = np.linalg.norm(bands, axis=1) + 1e-3
        deviations = np.sqrt(np.square(rest[:, shown]).mean(1)) + 1e-3
        scales = bands / strengths[:, None]
        logarithms = _LOG_WEIGHT * np.clip(np.log(strengths) - self._log_rest, -1, 1)
        texture = self._band_weights[:, None] * (scales - _EVEN)
        coefficients = np.concatenate([smooth, logarithms, texture.reshape(-1)])
        coefficients *= min(1.0, _LONGEST / np.linalg.norm(coefficients))
        moments = self._moments(rest / (_REACH * deviations[:, None]), rest_features, shown)
        rows, columns, weight = _triangle(self.coefficients)
        return np.concatenate(
            [
                [_COUNT],
                _MEAN * coefficients,
                _FRAME * _averaged(frame, self._cells).reshape(-1) / np.sqrt(np.prod(self._cells)),
                _MOMENTS * moments.reshape(-1) / np.sqrt(self.grid.channels / 3),
                _SQUARE * weight * coefficients[rows] * coefficients[columns],
            ]
        )

    def statistics(self, mean: Array, noise_sd: float) -> FactorStatistics:
        """Read the released mean of :meth:`vector` (a sum over a public denominator) back into statistics.

        Args:
            mean: the released vector; its first entry is the noisy ratio of patients to the denominator.
            noise_sd: standard deviation of the noise in each entry (public), for shrinking.
        """
        count = max(mean[0] / _COUNT, _LEAST_COUNT)
        size, cells = self.coefficients, int(np.prod(self._cells))
        centre, frame, moments, square = np.split(mean[1:] / count, np.cumsum([size, cells, self._moments_size]))
        noise_sd = noise_sd / count
        centre = centre / _MEAN
        rows, columns, weight = _triangle(size)
        second = np.zeros((size, size))
        second[rows, columns] = second[columns, rows] = square / (_SQUARE * weight)
        # The mean's own noise is in its square too: take that (public) part out again.
        covariance = second - np.outer(centre, centre) + np.eye(size) * (noise_sd / _MEAN) ** 2
        factors = _factors(covariance, noise_sd / _SQUARE, self.most)
        sizes = np.bincount(self._groups)
        left = np.bincount(self._groups, np.diag(covariance) - np.square(factors).sum(1)) / sizes
        # Less one standard deviation of the noise that the squares have: what is no more than that is not drawn.
        left -= noise_sd / _SQUARE / np.sqrt(sizes)
        density = _shrunk(moments.reshape(-1, self._rest_features) * np.sqrt(self.grid.channels / 3), noise_sd)
        return FactorStatistics(
            _shrunk_groups(centre, self._groups, noise_sd / _MEAN),
            factors,
            np.sqrt(np.maximum(left, 0))[self._groups],
            frame.reshape(self._cells) * np.sqrt(cells) / _FRAME,
            density / _MOMENTS @ self._whiten[2],
            *self._whiten[:2],
        )

    def fits(self, statistics: FactorStatistics) -> bool:
        """Return whether statistics are of this layout."""
        rest = (self.grid.channels * self.levels, self._rest_features)
        return statistics.mean.shape == (self.coefficients,) and statistics.density.shape == rest

    def render(
        self, label: NDArray[np.uint8], statistics: FactorStatistics, rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """Return an image (channel, \\*spatial) in [-1, 1] of a label map, dressed with released statistics."""
        drawn = statistics.mean + statistics.factors @ rng.standard_normal(statistics.factors.shape[1])
        drawn = drawn + statistics.rest * rng.standard_normal(len(drawn))
        cuts = self.coefficients - np.array([len(_WIDTHS) + 2, len(_WIDTHS) + 1]) * self.grid.channels
        smooth, logarithms, bands = np.split(drawn, cuts)
        scales = bands.reshape(self.grid.channels, -1) / self._band_weights[:, None] + _EVEN
        frame = self._frame(label, statistics.frame, rng)
        shown = _outside(frame)
        if shown.mean() < _LEAST_SHARE:
            shown[:] = True
        features, rest_features = self._parts(label)
        bases = self._bases(features, (statistics.bright, statistics.slow))
        series = (statistics.density @ rest_features).reshape(self.grid.channels, self.levels, -1)
        planes = self._texture(self._scenes(label, rng), series, np.maximum(scales, 0.02), bases, shown)
        planes *= np.exp(np.clip(logarithms / _LOG_WEIGHT, -1, 1) + self._log_rest)[:, None]
        planes += _smooth(smooth, bases)
        image = np.maximum(self._colours.T @ planes, _DARK).reshape(-1, *label.shape)
        image = np.where(frame, -1.0, image)
        return np.clip(image + _GRAIN * rng.standard_normal(label.shape), -1, 1).astype(np.float32)

    @property
    def _moments_size(self) -> int:
        return self.grid.channels * self.levels * self._rest_features

    def _coefficient_groups(self, radius: Array) -> NDArray[np.int64]:
        """Return the group of each coefficient: what varies alike where no factor speaks of it, smooth things more."""
        ring = np.minimum((radius * _RINGS).astype(np.int64), _RINGS - 1)
        tilts = np.tile(np.arange(_INNER_PROFILES), self.grid.spatial_dims)
        bright = np.concatenate([ring, _RINGS + np.arange(_PROFILES), _RINGS + _PROFILES + tilts])
        most = int(bright.max()) + 1
        parts = [bright, *(row * most + bright[self._slow] for row in range(1, self.grid.channels))]
        # Of the texture: brightness, and all opposing colours alike; first strengths, then bands.
        strengths = self.grid.channels * most + np.minimum(np.arange(self.grid.channels), 1)
        bands = np.repeat(strengths + 2, len(_WIDTHS) + 1)
        return np.asarray(np.unique(np.concatenate([*parts, strengths, bands]), return_inverse=True)[1])

    def _parts(self, label: NDArray[np.uint8], chosen: Any = slice(None)) -> tuple[Singles, Singles]:
        """Return the features of the smooth part and of the rest, (feature, voxel) each."""
        distance = signed_distance(label > 0).reshape(-1)[chosen]
        bands = hats(distance, _KNOTS)[:-1]
        inside = self._lattice[:, label.reshape(-1) > 0]
        centre, width = inside.mean(1, keepdims=True), 2 * (inside.std(1).mean() + 2)
        tilt = np.sin(np.pi / 2 * np.clip((self._lattice[:, chosen] - centre) / width, -1, 1))
        profiles = _profiles(distance)
        tilted = (profiles[:_INNER_PROFILES] * line for line in tilt)
        smooth = np.concatenate([self._waves[:, chosen], profiles, *tilted])
        return smooth.astype(np.float32), np.concatenate([self._rest_waves[:, chosen], bands])

    def _orthogonal(self, maps: Sequence[NDArray[np.uint8]]) -> tuple[Array, Array, Array]:
        """Return what whitens all smooth features, the slow ones and those of the rest."""
        smooth, rest = np.eye(self._features), np.eye(self._rest_features)
        if len(maps):
            pairs = [self._parts(label, slice(None, None, 2 * _THIN + 1)) for label in maps]
            smooth = np.mean([a @ a.T / a.shape[1] for a, _ in pairs], axis=0)
            rest = np.mean([b @ b.T / b.shape[1] for _, b in pairs], axis=0)
        slow = smooth[np.ix_(self._slow, self._slow)]
        return _whitening(smooth, _RIDGE), _whitening(slow, _RIDGE), _whitening(rest, _REST_RIDGE)

    def _bases(self, features: Singles, whiten: tuple[Array, ...]) -> list[Array]:
        """Return the whitened features (feature, voxel) of brightness and of each opposing colour."""
        bright, slow = whiten[0] @ features, whiten[1] @ features[self._slow]
        return [bright, *[slow] * (self.grid.channels - 1)]

    def _frame(self, label: NDArray[np.uint8], shares: Array, rng: np.random.Generator) -> NDArray[np.bool_]:
        """Return which voxels a frame leaves dark: where it often is; of the foreground what is dark in nearly all."""
        zoom = [size / cells for size, cells in zip(label.shape, shares.shape, strict=True)]
        softened = ndimage.gaussian_filter(shares, _SOFT_CELLS, mode="nearest")
        share = ndimage.zoom(softened, zoom, order=1, mode="nearest", grid_mode=True)
        beside = min(share[label > 0].max(initial=0), _ALWAYS)
        return np.asarray(share > max(rng.random(), _LEAST_FRAME, beside))

    def _moments(self, rest: Array, features: Singles, shown: NDArray[np.bool_]) -> Array:
        """Return mean products (colour, level, feature) of features and cosines of the rest, in [-1, 1]."""
        whitened = (self._whiten[2] @ features)[:, shown]
        values = np.clip(rest[:, shown], -1, 1)
        return np.stack([waves(line, self.levels) @ whitened.T for line in values]) / shown.sum()

    def _scenes(self, label: NDArray[np.uint8], rng: np.random.Generator) -> Array:
        """Return what the rest shows in each colour (colour, \\*spatial), about normal in its values."""
        shape = (self.grid.channels, *label.shape)
        if not self._lit:
            return rng.standard_normal(shape)
        light = lit_surface(label, rng)
        scenes = [np.asarray(ndtri(_ranks(light)))]
        for _ in range(self.grid.channels - 1):
            shared = np.clip(rng.normal(*_SHARED), -0.9, 0.9)
            scenes.append(shared * light + np.sqrt(1 - shared**2) * pigment(label.shape, rng))
        return np.stack(scenes)

    def _texture(
        self, scenes: Array, series: Array, scales: Array, bases: list[Array], shown: NDArray[np.bool_]
    ) -> Array:
        """Return the rest (colour, voxel) in [-1, 1]: a field for each colour, as quantiles of its distribution.

        A field is as strong where it is shown as the patient drawn, and about as fine; what it shows is noise or a
        public scene. What the smooth part could say of it is taken out, as it is of patients' rest.

        Args:
            scenes: (colour, \\*spatial).
            series: (colour, level, voxel) distribution of the rest at each place.
            scales: (colour, band) strengths.
            bases: features of the smooth part.
            shown: (voxel,) what no frame hides.
        """
        chosen = np.flatnonzero(shown)
        left = _separated(scenes.reshape(len(scenes), -1), bases, chosen)[1]
        bands = _bands(left.reshape(scenes.shape))
        fields = np.einsum("cb,bc...->c...", scales / (_band_strengths(bands, shown) + 1e-9), bands)
        edges = waves(np.linspace(-1, 1, _CELLS + 1), self.levels)
        planes = []
        for field, lines in zip(fields, series, strict=True):
            values = np.maximum(1 + lines.T @ edges, _LEAST_DENSITY) ** _SHARPENING
            rank = _ranks(field).astype(np.float32).reshape(-1, 1)
            planes.append(quantile(cumulative(values).astype(np.float32), rank))
        texture = _separated(np.stack(planes).astype(float), bases, chosen)[1]
        strengths = _band_strengths(_bands(texture.reshape(scenes.shape)), shown)
        return np.asarray(texture / (np.linalg.norm(strengths, axis=1, keepdims=True) + 1e-9))


def _separated(planes: Array, bases: list[Array], chosen: NDArray[np.intp]) -> tuple[Array, Array]:
    """Return the coefficients of the smooth part of planes (colour, voxel), and what it leaves of them.

    By ridge regression of each plane on its features, over the voxels ``chosen``.
    """
    found = []
    for plane, basis in zip(planes, bases, strict=True):
        part = basis[:, chosen]
        gram = part @ part.T / len(chosen) + _RIDGE * np.eye(len(part))
        found.append(np.linalg.solve(gram, part @ plane[chosen] / len(chosen)))
    coefficients = np.concatenate(found)
    return coefficients, planes - _smooth(coefficients, bases)


def _smooth(coefficients: Array, bases: list[Array]) -> Array:
    """Return the smooth part (colour, voxel)."""
    cuts = np.cumsum([len(basis) for basis in bases])[:-1]
    return np.stack([part @ basis for part, basis in zip(np.split(coefficients, cuts), bases, strict=True)])


def _outside(frame: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return the voxels that a frame and its half dark rim leave, flat."""
    return ~ndimage.binary_dilation(frame, iterations=_RIM).reshape(-1)


def _band_strengths(bands: Array, shown: NDArray[np.bool_]) -> Array:
    """Return the root mean square (channel, band) of bands (band, channel, \\*spatial) at some voxels."""
    return np.asarray(np.sqrt(np.square(bands.reshape(*bands.shape[:2], -1)[..., shown]).mean(2)).T)


def _ranks(field: Array) -> Array:
    """Return for each value the share, in (0, 1), of all values that are below it."""
    order = np.empty(field.size)
    order[np.argsort(field, axis=None, kind="stable")] = (np.arange(field.size) + 0.5) / field.size
    return order.reshape(field.shape)


def _profiles(distance: Array) -> Singles:
    """Return how grey values go with the distance to the foreground (profile, voxel), inner ones first.

    The step at its edge, how they change with the depth inside, and what surrounds it. Free bands of the distance
    would follow any course, and so, under noise, show rings that no patient has. The constants make the profiles about
    as large as the cosines.
    """
    inside, outside = np.clip(-distance, 0, None), np.clip(distance, 0, None)
    edge = 1 - np.clip(distance / _EDGE, -1, 1)
    depth = 3 * np.clip(inside / _DEPTH, 0, 1)
    around = 2 * np.exp(-outside / _AROUND)
    return np.stack([edge, depth, around]).astype(np.float32)


def _whitening(gram: Array, ridge: float) -> Array:
    """Return the symmetric root of the inverse of a Gram matrix; ``ridge`` of its mean square is added first."""
    values, vectors = np.linalg.eigh(gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram)))
    return np.asarray((vectors / np.sqrt(values)) @ vectors.T)


def _grid_waves(grid: Grid, counts: Sequence[int]) -> tuple[Singles, Array]:
    """Return low-pass cosines (wave, voxel) of the place on the grid, and the radius of their frequencies."""
    chosen, radius = low_pass(counts)
    lines = [(2 * np.arange(size) + 1) / size - 1 for size in grid.shape]
    places = np.stack(np.meshgrid(*lines, indexing="ij")).reshape(grid.spatial_dims, -1)
    return cosine_products(places.astype(np.float32), chosen), radius


def _triangle(size: int) -> tuple[NDArray[np.intp], NDArray[np.intp], Array]:
    """Return rows and columns of the upper triangle, and weights that keep the norm of the symmetric matrix."""
    rows, columns = np.triu_indices(size)
    return rows, columns, np.where(rows == columns, 1.0, np.sqrt(2.0))


def _bands(images: Array) -> Array:
    """Return what ``images`` (channel, \\*spatial) show in each band of fineness, first axis; they add up to them."""
    layers = [images]
    for width in _WIDTHS:
        layers.append(ndimage.gaussian_filter(images, [0, *[width] * (images.ndim - 1)], mode="nearest"))
    return np.stack([*(fine - coarse for fine, coarse in pairwise(layers)), layers[-1]])


def _averaged(frame: NDArray[np.bool_], cells: tuple[int, ...]) -> Array:
    cut = frame[tuple(slice(count * _CELL) for count in cells)]
    split = cut.reshape([side for count in cells for side in (count, _CELL)])
    return np.asarray(split.mean(tuple(range(1, 2 * len(cells), 2))))


def _factors(covariance: Array, noise_sd: float, most: int) -> Array:
    """Return the directions (coefficient, factor) that stand out of the noise, each as long as without it.

    Args:
        covariance: symmetric, with noise of ``noise_sd`` on the diagonal and of ``noise_sd / sqrt(2)`` beside it.
        noise_sd: 0 keeps all that are positive.
        most: at most so many.
    """
    edge = noise_sd * np.sqrt(2 * len(covariance))
    values, vectors = np.linalg.eigh(covariance)
    kept = np.flatnonzero(values > max(edge, 1e-9))[-most:]
    lengths = (values[kept] + np.sqrt(values[kept] ** 2 - edge**2)) / 2
    return np.asarray(vectors[:, kept] * np.sqrt(lengths))


def _shrunk_groups(values: Array, groups: NDArray[np.int64], noise_sd: float) -> Array:
    """Shrink each group of values by its share of signal (Wiener 1949)."""
    power = np.bincount(groups, values**2) / np.bincount(groups)
    return np.asarray(values * signal_share(power, noise_sd)[groups])


def _shrunk(moments: Array, noise_sd: float) -> Array:
    """Shrink each row by its share of signal (Wiener 1949)."""
    power = np.square(moments).mean(1, keepdims=True)
    return np.asarray(moments * signal_share(power, noise_sd))
