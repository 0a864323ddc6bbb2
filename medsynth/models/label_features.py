"""What a label map says about every voxel: features of position and distance, and public least squares on them.

Features of a voxel are low-pass cosines of its place around the foreground; (fewer) cosines of its place in the
foreground's canonical frame in bands of signed distance to the foreground, so that edges follow the label; and one
indicator a label. Where the latter tell enough of an organ's inside, the former fade in outside of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medsynth.config import Grid
from medsynth.models.pose import Array, Pose, PoseFrame
from medsynth.models.shrinkage import signal_share

Singles = NDArray[np.float32]

_BANDS = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0)  # voxels from the foreground, inside negative
_WIDE_SD, _NARROW_SD = 4.0, 2.5  # half widths of the frames; beyond them the cosines keep their edge
_FADE = 2.0  # voxels outside the foreground over which position alone fades in: what is beside must not show inside
_FADES_FROM = 6  # cosines along the frame's finest axis; fewer tell too little of the inside (docs/log.md)
_ISOTROPY = 0.5  # of the wide frame: what surrounds an organ stretches less than the organ does
_GROUPS = 8  # frequency bands that are shrunk together
_RIDGE = 0.02  # of the mean square of a feature: holds back what hardly any label map shows
_GRAM_VOXELS = 3000  # drawn a label map
_BLOCK = 4096  # voxels at a time
_NEAR = 4.0  # voxels from the foreground at which a voxel counts half: there are many far ones, and they matter less


class LabelFeatures:
    """The features of one label map on one grid; holds no data.

    Args:
        grid: the public voxel grid.
        wide: cosines an axis of the position.
        narrow: cosines an axis inside each distance band.
    """

    def __init__(self, grid: Grid, wide: Sequence[int], narrow: Sequence[int]) -> None:
        self.grid = grid
        self._frame = PoseFrame(grid, tuple(narrow), 1.0)
        self._wide, wide_radius = low_pass(wide)
        self._narrow, narrow_radius = low_pass(narrow)
        self.fine = max(narrow) >= _FADES_FROM
        """Whether the foreground's own frame tells enough of its inside, so that position alone fades in outside."""
        self._bands = len(_BANDS) - 1  # the last, far one is left to position alone
        near = _GROUPS + np.tile(_group(narrow_radius), self._bands)
        labels = np.full(grid.classes - 1, 2 * _GROUPS)
        self.groups: NDArray[np.int64] = np.concatenate([_group(wide_radius), near, labels])

    @property
    def size(self) -> int:
        """Number of features."""
        return len(self.groups)

    def project(self, values: NDArray[np.floating], label: NDArray[np.uint8]) -> Array:
        """Return weighted means of features times ``values`` (value, \\*spatial): (value, feature)."""
        place = self._place(label)
        flat = values.reshape(len(values), -1).astype(np.float32) * place.shares
        total = np.zeros((len(values), self.size))
        for block in _blocks(label.size):
            wide, narrow, bands, labels = self._parts(place, block)
            row = flat[:, block]
            near = (row[:, None] * bands).reshape(-1, bands.shape[1]) @ narrow.T
            total += np.hstack([row @ wide.T, near.reshape(len(row), -1), row @ labels.T])
        return total

    def combine(self, weights: Array, label: NDArray[np.uint8]) -> Array:
        """Return the weighted sums of features at every voxel: weights (value, feature) to (value, \\*spatial)."""
        place = self._place(label)
        cut, end = len(self._wide), len(self._wide) + self._bands * len(self._narrow)
        far, near, flat = np.split(weights.astype(np.float32), [cut, end], axis=1)
        near = near.reshape(-1, len(self._narrow))
        total = np.empty((len(weights), label.size))
        for block in _blocks(label.size):
            wide, narrow, bands, labels = self._parts(place, block)
            banded = (near @ narrow).reshape(len(weights), *bands.shape) * bands
            total[:, block] = far @ wide + banded.sum(1) + flat @ labels
        return total.reshape(len(weights), *label.shape)

    def gram(self, labels: Sequence[NDArray[np.uint8]]) -> Array:
        """Return the weighted mean product of features over label maps, on voxels drawn by a fixed seed."""
        total, rng = np.zeros((self.size, self.size)), np.random.default_rng(0)
        for label in labels:
            voxels = rng.permutation(label.size)[:_GRAM_VOXELS]
            place = self._place(label)
            wide, narrow, bands, parts = self._parts(place, voxels)
            rows = np.concatenate([wide, (bands[:, None] * narrow[None]).reshape(-1, len(voxels)), parts])
            counts = place.shares[voxels]
            total += (rows * (counts / counts.sum())) @ rows.T
        return total / len(labels)

    def has_pose(self, label: NDArray[np.uint8]) -> bool:
        """Return whether there is a foreground to measure from."""
        return bool((label > 0).any())

    def _place(self, label: NDArray[np.uint8]) -> _Place:
        distance = signed_distance(label > 0).reshape(-1)
        counts = (1 / (1 + np.square(np.maximum(distance, 0) / _NEAR))).astype(np.float32)
        return _Place(self._pose(label), label.reshape(-1), distance, counts / counts.sum())

    def _parts(self, place: _Place, voxels: slice | NDArray[np.int64]) -> tuple[Singles, Singles, Singles, Singles]:
        """Return wide and narrow cosines, band weights and label indicators, (feature, voxel)."""
        pose, distance = place.pose, place.distance[voxels]
        offset = self._frame.voxels[:, voxels] - pose.centre[:, None]
        wide = cosine_products(_places(_tempered(pose.stretch), offset, _WIDE_SD), self._wide)
        narrow = cosine_products(_places(pose.stretch, offset, _NARROW_SD), self._narrow)
        if self.fine:
            wide *= np.clip(distance / _FADE, 0, 1).astype(np.float32)
        bands = hats(distance, _BANDS)[: self._bands]
        parts = np.stack([place.label[voxels] == value for value in range(1, self.grid.classes)])
        return wide, narrow, bands, parts.astype(np.float32)

    def _pose(self, label: NDArray[np.uint8]) -> Pose:
        vector = self._frame.pose_vector(label)
        if vector is None:
            raise ValueError("a label map without foreground has no pose: draw another")
        return self._frame.pose(vector)


@dataclass(frozen=True)
class _Place:
    """Where the voxels of a label map lie: ``label``, ``distance`` to the foreground and ``shares`` are (voxel,)."""

    pose: Pose
    label: NDArray[np.uint8]
    distance: Array
    shares: Singles


class LeastSquares:
    """Linear regression on features of label maps when only the patients' side needs a mechanism.

    A patient's vector is the product of features and values, whitened by the Gram matrix of label maps that are
    public or released; the solution is that matrix applied once more. Nothing but the vector reads an image.

    Args:
        features: the layout.
        maps: label maps (map, \\*spatial) from the mask generator, never from patients.
    """

    def __init__(self, features: LabelFeatures, maps: Sequence[NDArray[np.uint8]]) -> None:
        self.features = features
        gram = features.gram(maps)
        self._whiten = whitening(gram, _RIDGE)

    def vector(self, values: NDArray[np.floating], label: NDArray[np.uint8]) -> Array:
        """Return the whitened moments (value, feature), about as long as the (weighted) root mean square."""
        return self.features.project(values, label) @ self._whiten

    def shrunk(self, vectors: Array, noise_sd: float) -> Array:
        """Return noisy mean vectors (value, feature), each frequency band shrunk by its noise.

        Wiener's filter (1949) with the signal's power taken from the noisy coefficients themselves.
        """
        groups = self.features.groups
        sizes = np.maximum(np.bincount(groups), 1)
        powers = [np.bincount(groups, vector**2) / sizes for vector in vectors]
        return np.stack(
            [vector * signal_share(power, noise_sd)[groups] for vector, power in zip(vectors, powers, strict=True)]
        )

    def solve(self, vectors: Array, noise_sd: float) -> Array:
        """Return the weights (value, feature) of noisy mean vectors, :meth:`shrunk`."""
        return self.shrunk(vectors, noise_sd) @ self._whiten


def whitening(gram: Array, ridge: float) -> Array:
    """Return the symmetric root of the inverse of a Gram matrix; ``ridge`` of its mean square is added first."""
    values, vectors = np.linalg.eigh(gram + ridge * np.trace(gram) / len(gram) * np.eye(len(gram)))
    return np.asarray((vectors / np.sqrt(values)) @ vectors.T)


def signed_distance(mask: NDArray[np.bool_]) -> Array:
    """Return voxels to the surface of a mask, negative inside, half a voxel at the voxels that touch it."""
    inside, outside = ndimage.distance_transform_edt(mask), ndimage.distance_transform_edt(~mask)
    return np.asarray(np.where(mask, 0.5 - inside, outside - 0.5))


def low_pass(counts: Sequence[int]) -> tuple[NDArray[np.int64], Array]:
    """Return the frequencies (wave, axis) inside an ellipsoid of ``counts`` an axis, and their radius in (0, 1)."""
    waves = np.stack(np.meshgrid(*map(np.arange, counts), indexing="ij"), -1).reshape(-1, len(counts))
    radius = np.sqrt(np.square(waves / np.array(counts)).sum(1))
    return waves[radius < 1], radius[radius < 1]


def _blocks(voxels: int) -> Iterator[slice]:
    """Yield slices whose features stay in a core's cache, which takes half the time of all voxels at once."""
    return (slice(start, start + _BLOCK) for start in range(0, voxels, _BLOCK))


def _group(radius: Array) -> NDArray[np.int64]:
    return np.asarray((radius * _GROUPS).astype(np.int64))


def _tempered(stretch: Array) -> Array:
    """Return a stretch whose axes differ less, at the same volume."""
    values, vectors = np.linalg.eigh(stretch)
    tempered = values ** (1 - _ISOTROPY) * np.exp(np.log(values).mean()) ** _ISOTROPY
    return np.asarray((vectors * tempered) @ vectors.T)


def _places(stretch: Array, offset: Array, half_width: float) -> Singles:
    """Return places (axis, voxel) in [-1, 1] of a frame."""
    return np.clip(np.linalg.solve(stretch, offset) / half_width, -1, 1).astype(np.float32)


def _cosines(line: Singles, count: int) -> Singles:
    """Return cosines of unit mean square (frequency, voxel) of places in [-1, 1]."""
    order = np.arange(count, dtype=np.float32)[:, None]
    return np.asarray(np.cos(np.pi / 2 * order * (line + 1)) * np.where(order > 0, np.sqrt(2.0), 1.0), np.float32)


def cosine_products(places: Singles, waves: NDArray[np.int64]) -> Singles:
    """Return products of cosines (wave, voxel) of places."""
    cosines = [_cosines(line, count) for line, count in zip(places, waves.max(0) + 1, strict=True)]
    product = cosines[0][waves[:, 0]]
    for line, order in zip(cosines[1:], waves.T[1:], strict=True):
        product = product * line[order]
    return product


def hats(distance: Array, knots: Sequence[float]) -> Singles:
    """Return piecewise linear weights (knot, voxel) that add up to one."""
    place = np.clip(distance, knots[0], knots[-1])
    return np.stack([np.interp(place, knots, row) for row in np.eye(len(knots))]).astype(np.float32)
