"""The two noisy sums behind the statistics of label maps, and how they are read back.

The first gives the mean pose and shape, measured from the mean of public phantoms. The second is taken around what
the first released: what that still misses of the mean, which is short, so that its clip and with it its noise are
small, and how patients differ. What both say of the mean is joined, and each statistic is pulled towards a public
belief by the share that noise has in it. A mean shape is read as what it must be, occupancies, or by a network that
learnt from phantoms what organs look like.

Sources: Wiener (1949) for the shrinkage of means; Robbins (1956) for the posterior mean of occupancies; James and Stein
(1961) for the shrinkage of the pose's covariance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from medsynth import logs
from medsynth.config import Grid, Masks, Study
from medsynth.models.mask_generator import MaskStatistics, ShapeSpace, covariance_root, positive_part
from medsynth.models.pose import Array
from medsynth.models.shrinkage import RINGING, joined, joint_sd, signal_share
from medsynth.randomness import derive_seed

if TYPE_CHECKING:
    from medsynth.models.shape_reader import ShapeReader
    from medsynth.privacy.entropy import Entropy
    from medsynth.privacy.mechanism import GaussianSum

# Weights balance, under one clip, entries of different length; all public.
_COUNT_WEIGHT = 6.0
_POSE_WEIGHT = 10.0
_LATER_COUNT_WEIGHT = 4.0
_LATER_POSE_WEIGHT = 20.0
_SQUARE_WEIGHT = 14.0
_BAND_WEIGHT = 0.5
_LATER_CLIP = 0.6  # of the first clip norm: patients differ from their mean by less than from public phantoms
_COUNT_SD = 0.1  # public belief: as many patients as declared, give or take a tenth
_LEAST_COUNT = 0.25  # a noisy count below this share of the denominator is taken as this share
_PLACE_VARIANCE, _STRETCH_VARIANCE = 0.06**2, 0.02  # public beliefs on the spread of poses
_SHAPE_VARIANCE = 0.03  # public belief: of all patients' shapes together, over the mean square of the public ball
_FALL, _DOUBT = 4.3, 0.7  # of shapes' variances over the frequency bands: smooth shapes; how far to doubt both
_LEAST_VARIANCE = 0.02
_PHANTOMS = 64
_READER_PHANTOMS = 600
_READER_ROOM = 1.4  # noise that the reader learns goes so far beyond what is planned: the count is noisy, too
_CLIP_QUANTILE = 0.9
_FULL_RANK = 150


@dataclass(frozen=True)
class MaskSums:
    """The mechanisms and the public layout of their vectors; holds no data.

    Attributes:
        space: geometry of poses and shapes.
        pose: (pose,) mean pose of public phantoms.
        shape: (plane * coefficient,) their mean shape.
        mean: the first sum: count, pose and shape.
        spread: the second: count, the same once more around what the first released, and their squares.
        reader: reads a noisy mean shape; None: each voxel is read by itself.
    """

    space: ShapeSpace
    pose: Array
    shape: Array
    mean: GaussianSum
    spread: GaussianSum
    reader: ShapeReader | None = None

    def measure(self, labels: Sequence[np.ndarray], entropy: Entropy) -> MaskStatistics:
        """Release both sums and return what they say.

        Args:
            labels: one array (record, \\*spatial) of integers a patient.
            entropy: where the noise comes from.
        """
        first_sd, second_sd = self.mean.noise_sd, self.spread.noise_sd
        first = self.mean.release(self.first_vectors(labels), entropy)
        count = _believed(first[0] / _COUNT_WEIGHT, first_sd / _COUNT_WEIGHT)
        pose, shape = self._early(first / count)
        shape = self._read_shape(shape, first_sd / count)
        second = self.spread.release(self.second_vectors(labels, pose, shape), entropy)
        count_sds = (first_sd / _COUNT_WEIGHT, second_sd / _LATER_COUNT_WEIGHT)
        both = joined(first[0] / _COUNT_WEIGHT, second[0] / _LATER_COUNT_WEIGHT, count_sds)
        count = _believed(float(both), float(joint_sd(*count_sds)))
        return self._read(first / count, second / count, (pose, shape), (first_sd / count, second_sd / count))

    def first_vectors(self, labels: Sequence[np.ndarray]) -> Iterator[Array]:
        """Yield (count, pose, shape) of each patient: the mean over the patient's records that show anything."""
        for records in logs.progress(labels, "measuring label maps", len(labels)):
            found = [
                np.concatenate([[_COUNT_WEIGHT], (pose - self.pose) * _POSE_WEIGHT, shape - self.shape])
                for pose, shape in _measured(self.space, records)
            ]
            yield np.mean(found, axis=0) if found else np.zeros(self.mean.dimensions)

    def second_vectors(self, labels: Sequence[np.ndarray], pose_mean: Array, shape_mean: Array) -> Iterator[Array]:
        """Yield (count, pose, shape, pose x pose, shape spread) of each patient around a released mean.

        Args:
            labels: one array (record, \\*spatial) a patient.
            pose_mean: (pose,) released, measured from that of the phantoms.
            shape_mean: (plane * coefficient,) likewise.
        """
        for records in logs.progress(labels, "measuring their spread", len(labels)):
            found = []
            for given_pose, given_shape in _measured(self.space, records, self.pose + pose_mean):
                pose, shape = given_pose - self.pose - pose_mean, given_shape - self.shape - shape_mean
                square = np.outer(pose, pose).reshape(-1) * _SQUARE_WEIGHT
                first = [[_LATER_COUNT_WEIGHT], pose * _LATER_POSE_WEIGHT, shape]
                found.append(np.concatenate([*first, square, self._spread(pose, shape) * _BAND_WEIGHT]))
            yield np.mean(found, axis=0) if found else np.zeros(self.spread.dimensions)

    def _spread(self, pose: Array, shape: Array) -> Array:
        """Return the squares of a deviation: of the shape in each band, or of pose and shape with each other."""
        if self.space.settings.covariance == "diagonal":
            return self.space.band_sums(shape)
        both = np.concatenate([pose * _LATER_POSE_WEIGHT, shape])
        return np.outer(both, both).reshape(-1)

    def _early(self, first: Array) -> tuple[Array, Array]:
        """Return pose and shape of the first sum over the count."""
        cut = 1 + self.space.pose_size
        return first[1:cut] / _POSE_WEIGHT, first[cut:]

    def _kept(self, shape: Array, noise: Array | float) -> Array:
        """Return what Wiener's filter keeps of each band, its share of signal; ``noise`` of each entry."""
        return signal_share(self.space.band_sums(shape), noise)

    def _read_shape(self, shape: Array, noise: float) -> Array:
        """Return what is left of a noisy mean shape (from that of the phantoms): each band's share, as occupancies."""
        if self.reader is not None:
            return self.reader.read(self.space, self.shape + shape, noise) - self.shape
        share = self._kept(shape, noise)[self.space.bands]
        left = np.sqrt(share) * noise  # what Wiener's filter leaves in doubt
        return self.space.believed_shape(self.shape + shape * share, left, self.shape) - self.shape

    def _read(
        self, first: Array, second: Array, around: tuple[Array, Array], sds: tuple[float, float]
    ) -> MaskStatistics:
        """Return what both sums over the count say; ``around`` is what the second was taken around."""
        space, cut = self.space, 1 + self.space.pose_size
        start = cut + space.shape_size
        end = start + space.pose_size**2
        pose, shape = self._early(first)
        pose_sds = (sds[0] / _POSE_WEIGHT, sds[1] / _LATER_POSE_WEIGHT)
        pose = joined(pose, around[0] + second[1:cut] / _LATER_POSE_WEIGHT, pose_sds)
        shape = joined(shape, around[1] + second[cut:start], sds)
        shape_sd = float(joint_sd(*sds))
        shape_noise = np.sqrt(self._kept(shape, shape_sd)) * shape_sd
        shape = self._read_shape(shape, shape_sd)
        # The squares were taken around a mean that is known better now: take the difference out.
        square = second[start:end].reshape(space.pose_size, -1) / _SQUARE_WEIGHT
        square = square - np.outer(pose - around[0], pose - around[0])
        covariance = positive_part(self._pose_covariance(square, sds[1] / _SQUARE_WEIGHT))
        moved = self._spread(pose - around[0], shape - around[1])
        spread, spread_sd = second[end:] / _BAND_WEIGHT - moved, sds[1] / _BAND_WEIGHT
        if space.settings.covariance == "full":
            size = space.pose_size + space.shape_size
            root = covariance_root(spread.reshape(size, size), min(_FULL_RANK, size))
            root[: space.pose_size] /= _LATER_POSE_WEIGHT
            return MaskStatistics(self.pose + pose, covariance, self.shape + shape, root)
        spread = self._variances(spread, spread_sd)
        noises = (joint_sd(*pose_sds), shape_noise, spread_sd)
        return MaskStatistics(
            self.pose + pose, covariance, self.shape + shape, spread, self._noise(covariance, spread, noises)
        )

    def _noise(self, covariance: Array, spread: Array, sds: tuple[Array, Array, float]) -> Array:
        """Return :attr:`MaskStatistics.noise`; ``sds`` of an entry of the pose, of each band's shape, of a variance."""
        sizes = self.space.band_sizes
        return np.array(
            [
                sds[0] * np.sqrt(self.space.pose_size) / max(np.sqrt(np.trace(covariance)), 1e-9),
                np.sqrt((sds[1] ** 2 * sizes).sum() / max((spread * sizes).sum(), 1e-9)),
                sds[2] * np.sqrt(self.space.band_count) / max(np.linalg.norm(spread), 1e-9),
            ]
        )

    def _pose_covariance(self, square: Array, sd: float) -> Array:
        """Pull places, stretches and what links them to a public belief, each block by the share of noise in it."""
        axes = self.space.grid.spatial_dims
        belief = np.diag([_PLACE_VARIANCE] * axes + [_STRETCH_VARIANCE] * (self.space.pose_size - axes))
        result = square.copy()
        place, stretch = slice(axes), slice(axes, None)
        for block in ((place, place), (stretch, stretch), (place, stretch), (stretch, place)):
            far, size = np.square(square[block] - belief[block]).sum(), square[block].size
            # Noise alone gets so far in one case of forty; what is left of it would widen every pose.
            noise = (size + 2 * np.sqrt(2 * size)) * sd**2
            weight = max(0.0, 1 - noise / max(far, 1e-12))
            result[block] = weight * square[block] + (1 - weight) * belief[block]
        return result

    def _variances(self, measured: Array, sd: float) -> Array:
        """Pull variances to the fall over frequencies that smooth shapes have, its level to a public one, by noise."""
        count = self.space.bands_a_plane
        fall = np.tile(np.exp(-_FALL * (np.arange(count) + 0.5) / count), self.space.planes)
        power = float(fall @ fall)
        public = _SHAPE_VARIANCE * self.space.ball_energy / float(fall @ self.space.band_sizes)
        level = _pulled(float(measured @ fall) / power, sd / np.sqrt(power), public, _DOUBT * public)
        belief = np.maximum(level, _LEAST_VARIANCE) * fall
        return np.maximum(_pulled(measured, sd, belief, _DOUBT * belief), 0)


def plan_sums(config: Study, space: ShapeSpace, noise_multiplier: float) -> MaskSums:
    """Return both mechanisms from public constants: clip norms come from the configuration or from public phantoms.

    Args:
        config: sections ``grid``, ``privacy``, ``ingest``, ``masks``.
        space: the layout.
        noise_multiplier: of each of both sums.
    """
    from medsynth.privacy.mechanism import NO_CLIP, GaussianSum

    denominator = config.declared_in_training
    public = config.grid.model_dump_json(), config.masks.model_dump_json(), config.encode.phantoms.seed
    poses, shapes = _public_vectors(*public, _PHANTOMS)
    pose, shape = poses.mean(0), shapes.mean(0)
    clip = later = NO_CLIP
    if config.privacy.private:
        rows = np.hstack([(poses - pose) * _POSE_WEIGHT, shapes - shape])
        norms = np.sqrt(np.square(rows).sum(1) + _COUNT_WEIGHT**2)
        clip = config.masks.mean_clip_norm or float(np.quantile(norms, _CLIP_QUANTILE))
        later = config.masks.spread_clip_norm or _LATER_CLIP * clip
    mean = GaussianSum("mask_means", 1 + space.pose_size + space.shape_size, clip, noise_multiplier, denominator)
    spread = GaussianSum("mask_spread", _second_size(space), later, noise_multiplier, denominator)
    least = float(joint_sd(mean.noise_sd, spread.noise_sd))
    in_a_voxel = least * np.sqrt(np.prod(space.frame.coefficients) / np.prod(space.frame.shape))
    reader = None
    if config.masks.reader_steps and in_a_voxel > RINGING:
        reader = _public_reader(*public, least / _READER_ROOM, mean.noise_sd * _READER_ROOM)
    return MaskSums(space, pose, shape, mean, spread, reader)


def _second_size(space: ShapeSpace) -> int:
    first = 1 + space.pose_size + space.shape_size
    wide = space.settings.covariance == "full"
    return first + space.pose_size**2 + ((space.pose_size + space.shape_size) ** 2 if wide else space.band_count)


def _measured(space: ShapeSpace, records: np.ndarray, mean: Array | None = None) -> Iterator[tuple[Array, Array]]:
    """Yield pose and shape of each label map (record, \\*spatial) that shows anything, in frames turned from a mean."""
    for label in records:
        pose = space.pose_vector(label)
        if pose is not None:
            yield pose, space.shape_vector(label, space.pose(pose, mean))


@lru_cache(maxsize=8)  # audits plan the same sums many times
def _public_vectors(grid: str, masks: str, seed: int, count: int) -> tuple[Array, Array]:
    """Return poses and shapes (phantom, entry) of public phantoms."""
    from medsynth.imaging.phantom import sample_label_maps

    public = Grid.model_validate_json(grid)
    labels = sample_label_maps(public, count, derive_seed(seed, "masks", "clip"))
    poses, shapes = zip(*_measured(ShapeSpace(public, Masks.model_validate_json(masks)), labels), strict=True)
    return np.stack(poses), np.stack(shapes)


@lru_cache(maxsize=4)
def _public_reader(grid: str, masks: str, seed: int, least: float, most: float) -> ShapeReader:
    """Return a reader of mean shapes for noise between ``least`` and ``most`` (standard deviation of an entry)."""
    from medsynth.models.shape_reader import fit_reader

    settings = Masks.model_validate_json(masks)
    space = ShapeSpace(Grid.model_validate_json(grid), settings)
    _, shapes = _public_vectors(grid, masks, derive_seed(seed, "masks", "reader"), _READER_PHANTOMS)
    return fit_reader(space, shapes, (least, most), settings.reader_steps, derive_seed(seed, "masks", "reader", "fit"))


def _believed(count: float, sd: float) -> float:
    """Return a noisy count over the denominator, pulled to 1 by the share that noise has in it."""
    return max(float(_pulled(count, sd, 1.0, _COUNT_SD)), _LEAST_COUNT)


def _pulled(measured: Array | float, sd: float, belief: Array | float, doubt: Array | float) -> Array:
    """Return the posterior mean of what was measured with noise of ``sd`` under a normal belief (mean, deviation)."""
    return np.asarray((measured * np.square(doubt) + belief * sd**2) / (np.square(doubt) + sd**2))
