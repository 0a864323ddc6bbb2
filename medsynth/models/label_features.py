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
from scipy.optimize import isotonic_regression

from medsynth.config import Grid
from medsynth.models.pose import Array, Pose, PoseFrame, turned
from medsynth.models.shrinkage import signal_share

Singles = NDArray[np.float32]

_BANDS = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0, 8.0)  # voxels from the foreground, inside negative
_WIDE_SD, _NARROW_SD = 4.0, 2.5  # half widths of the frames; beyond them the cosines keep their edge
_FADE = 2.0  # voxels outside the foreground over which position alone fades in: what is beside must not show inside
_FADES_FROM = 6  # cosines along the frame's finest axis; fewer tell too little of the inside (docs/log.md)
_ISOTROPY = 0.5  # of the wide frame: what surrounds an organ stretches less than the organ does
_LEAST_POWER = 0.05  # of the values' mean, which each of them is taken to have
_NOTHING = 1e-12
_RIDGE = 0.02  # of the mean square of a feature: holds back what hardly any label map shows
_GRAM_VOXELS = 3000  # drawn a label map
_BLOCK = 4096  # voxels at a time
_NEAR = 4.0  # voxels from the foreground at which a voxel counts half: there are many far ones, and they matter less


class LabelFeatures:
    """The features of one label map on one grid; holds no data.

    Where a method is given a ``mean`` pose vector (public or released) the frames turn with the organ from that pose.

    Args:
        grid: the public voxel grid.
        wide: cosines an axis of the position.
        narrow: cosines an axis inside each distance band.
    """

    def __init__(self, grid: Grid, wide: Sequence[int], narrow: Sequence[int]) -> None:
        self.grid = grid
        self.frame = PoseFrame(grid, tuple(narrow), 1.0)
        """Reads poses, and holds the centres of the grid's voxels."""
        self._wide, _ = low_pass(wide)
        self._narrow, _ = low_pass(narrow)
        self.fine = max(narrow) >= _FADES_FROM
        """Whether the foreground's own frame tells enough of its inside, so that position alone fades in outside."""
        self._bands = len(_BANDS) - 1  # the last, far one is left to position alone
        self.size: int = len(self._wide) + self._bands * len(self._narrow) + grid.classes - 1
        """Number of features."""

    def project(self, values: NDArray[np.floating], label: NDArray[np.uint8], mean: Array | None = None) -> Array:
        """Return weighted means of features times ``values`` (value, \\*spatial): (value, feature)."""
        place = self.place(label, mean)
        flat = values.reshape(len(values), -1).astype(np.float32) * place.shares
        total = np.zeros((len(values), self.size))
        for block in _blocks(label.size):
            wide, narrow, bands, labels = self._parts(place, block)
            row = flat[:, block]
            near = (row[:, None] * bands).reshape(-1, bands.shape[1]) @ narrow.T
            total += np.hstack([row @ wide.T, near.reshape(len(row), -1), row @ labels.T])
        return total

    def combine(self, weights: Array, label: NDArray[np.uint8], mean: Array | None = None) -> Array:
        """Return the weighted sums of features at every voxel: weights (value, feature) to (value, \\*spatial)."""
        place = self.place(label, mean)
        cut, end = len(self._wide), len(self._wide) + self._bands * len(self._narrow)
        far, near, flat = np.split(weights.astype(np.float32), [cut, end], axis=1)
        near = near.reshape(-1, len(self._narrow))
        total = np.empty((len(weights), label.size))
        for block in _blocks(label.size):
            wide, narrow, bands, labels = self._parts(place, block)
            banded = (near @ narrow).reshape(len(weights), *bands.shape) * bands
            total[:, block] = far @ wide + banded.sum(1) + flat @ labels
        return total.reshape(len(weights), *label.shape)

    def gram(self, labels: Sequence[NDArray[np.uint8]], mean: Array | None = None) -> Array:
        """Return the weighted mean product of features over label maps, on voxels drawn by a fixed seed."""
        total, rng = np.zeros((self.size, self.size)), np.random.default_rng(0)
        for label in labels:
            voxels = rng.permutation(label.size)[:_GRAM_VOXELS]
            place = self.place(label, mean)
            rows = self._rows(place, voxels)
            counts = place.shares[voxels]
            total += (rows * (counts / counts.sum())) @ rows.T
        return total / len(labels)

    def sampled(
        self, label: NDArray[np.uint8], mean: Array, count: int, rng: np.random.Generator
    ) -> tuple[Array, Singles]:
        """Return voxels of a label map drawn as often as they count: where they lie, and their features.

        Returns:
            (voxel, axis) mm as :meth:`places` has them, and (feature, voxel).
        """
        place = self.place(label, mean)
        shares = place.shares.astype(float)
        voxels = rng.choice(label.size, count, p=shares / shares.sum())
        return self._millimetres(place, voxels, mean), self._rows(place, voxels)

    def places(self, label: NDArray[np.uint8], mean: Array) -> Array:
        """Return where voxels (flat) lie in the organ under the pose ``mean``: (voxel, axis) mm from its centre.

        Raises:
            ValueError: the grid has no spacing.
        """
        return self._millimetres(self.place(label, mean), slice(None), mean)

    def has_pose(self, label: NDArray[np.uint8]) -> bool:
        """Return whether there is a foreground to measure from."""
        return bool((label > 0).any())

    def mean_pose(self, labels: Sequence[NDArray[np.uint8]]) -> Array:
        """Return the mean pose vector of label maps that show anything."""
        poses = [vector for label in labels if (vector := self.frame.pose_vector(label)) is not None]
        return np.mean(poses, axis=0)

    def place(self, label: NDArray[np.uint8], mean: Array | None) -> Place:
        """Return where the voxels of a label map that shows anything lie."""
        distance = signed_distance(label > 0).reshape(-1)
        counts = (1 / (1 + np.square(np.maximum(distance, 0) / _NEAR))).astype(np.float32)
        pose = self._pose(label)
        wide, narrow = _tempered(pose.stretch), pose.stretch
        if mean is not None:
            follow = self.frame.pose(mean).stretch
            wide, narrow = turned(wide, _tempered(follow)), turned(narrow, follow)
        return Place(pose.centre, wide, narrow, label.reshape(-1), distance, counts / counts.sum())

    def _parts(self, place: Place, voxels: slice | NDArray[np.int64]) -> tuple[Singles, Singles, Singles, Singles]:
        """Return wide and narrow cosines, band weights and label indicators, (feature, voxel)."""
        distance, offset = place.distance[voxels], self.frame.voxels[:, voxels] - place.centre[:, None]
        wide = cosine_products(_places(place.wide, offset, _WIDE_SD), self._wide)
        narrow = cosine_products(_places(place.narrow, offset, _NARROW_SD), self._narrow)
        if self.fine:
            wide *= np.clip(distance / _FADE, 0, 1).astype(np.float32)
        bands = hats(distance, _BANDS)[: self._bands]
        parts = np.stack([place.label[voxels] == value for value in range(1, self.grid.classes)])
        return wide, narrow, bands, parts.astype(np.float32)

    def _millimetres(self, place: Place, voxels: slice | NDArray[np.int64], mean: Array) -> Array:
        if self.grid.spacing_mm is None:
            raise ValueError("a grid without spacing has no millimetres")
        inside = np.linalg.solve(place.narrow, self.frame.voxels[:, voxels] - place.centre[:, None])
        halves = np.array(self.grid.shape) / 2 * np.array(self.grid.spacing_mm)
        return np.asarray((self.frame.pose(mean).stretch @ inside).T * halves)

    def _rows(self, place: Place, voxels: NDArray[np.int64]) -> Singles:
        """Return all features (feature, voxel)."""
        wide, narrow, bands, labels = self._parts(place, voxels)
        return np.concatenate([wide, (bands[:, None] * narrow[None]).reshape(-1, len(voxels)), labels])

    def _pose(self, label: NDArray[np.uint8]) -> Pose:
        vector = self.frame.pose_vector(label)
        if vector is None:
            raise ValueError("a label map without foreground has no pose: draw another")
        return self.frame.pose(vector)


@dataclass(frozen=True)
class Place:
    """Where the voxels of a label map lie: ``label``, ``distance`` to the foreground and ``shares`` are (voxel,).

    ``centre`` (axes,) and the stretches of both frames (axes, axes) are in half grids.
    """

    centre: Array
    wide: Array
    narrow: Array
    label: NDArray[np.uint8]
    distance: Array
    shares: Singles


class LeastSquares:
    """Linear regression on features of label maps when only the patients' side needs a mechanism.

    A patient's vector is the product of features and values along the principal directions of the features over label
    maps that are public or released, most varied first, each brought to unit mean square. Nothing but the vector reads
    an image.

    Args:
        features: the layout.
        maps: label maps (map, \\*spatial) from the mask generator, never from patients.
    """

    def __init__(self, features: LabelFeatures, maps: Sequence[NDArray[np.uint8]]) -> None:
        self.features = features
        self.mean_pose = features.mean_pose(maps)
        gram = features.gram(maps, self.mean_pose)
        spreads, directions = np.linalg.eigh(gram + _RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)))
        self._directions = (directions / np.sqrt(spreads))[:, ::-1]

    def vector(self, values: NDArray[np.floating], label: NDArray[np.uint8]) -> Array:
        """Return the moments (value, direction), about as long as the (weighted) root mean square."""
        return self.features.project(values, label, self.mean_pose) @ self._directions

    def shrunk(self, vectors: Array, noise_sd: float) -> Array:
        """Return noisy mean vectors (value, direction), shrunk by their noise.

        Wiener's filter (1949). The signal's power is taken from the noisy vectors themselves, as that of the value
        times that of the direction, which falls from the most varied to the least (Barlow et al. 1972).
        """
        if not noise_sd:
            return vectors
        signal = np.square(vectors) - noise_sd**2
        values = signal.mean(1, keepdims=True)
        values = np.maximum(values, _LEAST_POWER * max(float(values.mean()), 0))
        directions = np.maximum(isotonic_regression(signal.mean(0), increasing=False).x, 0)
        power = values * directions / max(float(directions.mean()), _NOTHING)
        return vectors * signal_share(power + noise_sd**2, noise_sd)

    def sampled(self, label: NDArray[np.uint8], count: int, rng: np.random.Generator) -> tuple[Array, Singles]:
        """Return voxels of a label map: where they lie (:meth:`LabelFeatures.sampled`), what a value of 1 there adds.

        Returns:
            (voxel, axis) mm and (voxel, direction); vectors are means of the latter, times the values.
        """
        places, rows = self.features.sampled(label, self.mean_pose, count, rng)
        return places, np.asarray(rows.T @ self._directions, np.float32)

    def solve(self, vectors: Array) -> Array:
        """Return the weights (value, feature) of mean vectors, :meth:`shrunk` before where they are noisy."""
        return vectors @ self._directions.T


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
