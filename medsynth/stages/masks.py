"""Stage ``masks``: a generator of label maps from two Gaussian mechanisms (or from public shapes).

What is released: the mean pose and mean shape of the patients' label maps, then the spread around them. Every label
map that is drawn afterwards is post-processing; no patient's own mask is kept.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medsynth import logs, store
from medsynth.config import Grid, Masks, Study, Synthesise
from medsynth.models.label_volumes import resize_labels, volume_factors
from medsynth.models.mask_generator import (
    MaskStatistics,
    ShapeSpace,
    covariance_root,
    positive_part,
)
from medsynth.models.pose import Array
from medsynth.randomness import derive_seed
from medsynth.stages.inputs import config_digest, open_ledger, stage_inputs
from medsynth.store import Manifest
from medsynth.tracking import Tracker

if TYPE_CHECKING:
    from medsynth.imaging.cohort import Patient
    from medsynth.privacy.entropy import Entropy
    from medsynth.privacy.mechanism import GaussianSum

STATISTICS = "statistics.npz"
SETTINGS = "masks.json"
_POSE_WEIGHT = 10.0  # a pose vector is short beside a shape vector; this balances them under one clip
_COUNT_WEIGHT = 4.0
_SPREAD_POSE_WEIGHT = 10.0
_SPREAD_COUNT_WEIGHT = 1.0
_LEAST_COUNT = 0.25  # a noisy count below this share of the denominator is taken as this share
_PHANTOMS = 64
_VOLUME_MAPS = 300  # tell how large a label is unasked, its median to a few per cent
_CLIP_QUANTILE = 0.9
_FULL_RANK = 150
_POSE_VARIANCE = 0.02  # public: what is believed of a pose where noise leaves nothing to see
_NO_CLIP = 1e12  # a study without privacy has nothing to bound


@dataclass(frozen=True)
class _Sums:
    """The two mechanisms and the public layout of their vectors."""

    mean: GaussianSum
    spread: GaussianSum


def run(config: Study, inputs: Mapping[str, Path], out: Path, tracker: Tracker) -> Manifest:
    """Write ``masks/``: released statistics and a public preview of what they generate.

    Args:
        config: sections ``grid``, ``privacy``, ``masks``.
        inputs: ``cohort`` (read only for ``masks.source: statistics``) and ``ledger``.
        out: the new folder.
        tracker: receives volumes of generated label maps.
    """
    digest = config_digest(config, "masks")
    if config.masks.source == "public_shapes":
        with store.create(out, "masks", digest) as folder:
            _write_settings(config, folder.path)
            return folder.finish("public", details={"source": "public_shapes"})
    parents = stage_inputs(inputs, "cohort")
    with store.create(out, "masks", digest, parents, keep_partial=True) as folder:
        space = ShapeSpace(config.grid, config.masks)
        entry = _release(config, inputs, space, digest, folder.path)
        _write_settings(config, folder.path)
        _report(load_masks(folder.path), config.seed, tracker)
        sensitivity: store.Sensitivity = "released" if config.privacy.private else "internal"
        return folder.finish(sensitivity, ledger_entries=(entry,), details={"source": "statistics"})


class MaskGenerator:
    """Label maps from the finished ``masks/`` folder.

    Args:
        grid: the public grid.
        settings: the section that the folder was made with.
        statistics: what was released; None draws public shapes.
    """

    def __init__(self, grid: Grid, settings: Masks, statistics: MaskStatistics | None) -> None:
        self.grid = grid
        self.statistics = statistics
        self.space = ShapeSpace(grid, settings)
        self.factors: Mapping[int, float] = {}
        """Factor on the volume of each label that :meth:`ask` was told of, by label value."""

    def ask(self, how: Synthesise, seeds: Sequence[int]) -> MaskGenerator:
        """Return a generator of the label maps of this one, resized to the volumes that ``how`` asks for.

        Args:
            how: ``volume_scale`` and ``volume_median``.
            seeds: of the label maps that will be drawn; the first few hundred tell how large they are unasked.

        Raises:
            ConfigError: the volumes cannot be reached on the grid.
        """
        asked = copy.copy(self)
        if how.volume_scale or how.volume_median:
            asked.factors = volume_factors([self.draw(seed) for seed in seeds[:_VOLUME_MAPS]], self.grid, how)
        return asked

    def draw(self, seed: int) -> np.ndarray:
        """Return one label map (\\*spatial) uint8, a function of ``seed`` alone."""
        if self.statistics is None:
            from medsynth.imaging.phantom import sample_label_maps

            label = np.asarray(sample_label_maps(self.grid, 1, seed)[0])
        else:
            label = self.space.sample(self.statistics, np.random.default_rng(seed))
        return resize_labels(label, self.factors, self.grid.spacing_mm) if self.factors else label


def load_masks(folder: Path) -> MaskGenerator:
    """Read the generator that stage ``masks`` wrote."""
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    grid, masks = Grid.model_validate(settings["grid"]), Masks.model_validate(settings["masks"])
    if masks.source == "public_shapes":
        return MaskGenerator(grid, masks, None)
    with np.load(folder / STATISTICS) as arrays:
        statistics = MaskStatistics(**{name: arrays[name] for name in arrays.files})
    return MaskGenerator(grid, masks, statistics)


def noise_shares(statistics: MaskStatistics, space: ShapeSpace, mean_sd: float, spread_sd: float) -> dict[str, float]:
    """Return how large the privacy noise is beside what the released statistics say; reads no patient.

    Args:
        statistics: what was released, the covariance diagonal.
        space: their layout.
        mean_sd: standard deviation of the noise in each entry of the mean vector.
        spread_sd: the same of the spread.

    Returns:
        ``pose`` and ``shape``: expected error of the mean, noise and what shrinkage lost to it, over how far patients
        are from it (root mean squares); ``spread``: length of the noise in the variances over theirs.
    """
    sizes = space.band_sizes
    # _shrink keeps (1 - v) of a coefficient of power P, v = sd^2 / P; from the power S it left, P follows.
    left = np.bincount(space.bands, statistics.shape_mean**2, space.band_count) / sizes
    half = mean_sd**2 + left / 2
    kept = np.where(left > 0, 1 - mean_sd**2 / (half + np.sqrt(np.maximum(half**2 - mean_sd**4, 0))), 0.0)
    shape_noise = mean_sd * np.sqrt((kept * sizes).sum())  # the error of Wiener's filter
    pose_noise = mean_sd / _POSE_WEIGHT * np.sqrt(space.pose_size)
    spread_noise = spread_sd * np.sqrt(space.band_count)
    return {
        "pose": float(pose_noise / max(np.sqrt(np.trace(statistics.pose_covariance)), 1e-9)),
        "shape": float(shape_noise / max(np.sqrt((statistics.spread * sizes).sum()), 1e-9)),
        "spread": float(spread_noise / max(np.linalg.norm(statistics.spread), 1e-9)),
    }


def _release(config: Study, inputs: Mapping[str, Path], space: ShapeSpace, digest: str, folder: Path) -> str:
    from medsynth.imaging.cohort import load_patients
    from medsynth.privacy.budget import plan_budget
    from medsynth.privacy.entropy import open_entropy

    ledger, path = open_ledger(inputs), folder / STATISTICS
    cohort = {"cohort": store.read_manifest(inputs["cohort"]).digest}
    if path.is_file():
        before = ledger.completed(digest, cohort, {STATISTICS: store.digest_file(path)})
        if before is not None:
            logs.say("going on with the statistics that an interrupted run released")
            return before
        path.unlink()
    plan = plan_budget(config.privacy, config.train, config.masks)
    sums = _plan_sums(config, space, plan.masks_noise_multiplier)
    entry = ledger.reserve(
        "masks",
        [sums.mean, sums.spread],
        epsilon=config.privacy.epsilon,
        delta=config.privacy.delta,
        noise_source=config.privacy.entropy,
        config_digest=digest,
        parents=cohort,
        resume=True,
        trials=config.privacy.trials,
    )
    patients = load_patients(inputs["cohort"], config.grid, "train")
    statistics = _measure(patients, space, sums, open_entropy(config.privacy.entropy))
    released = io.BytesIO()
    np.savez(released, **vars(statistics))
    # Completed before anything is on disk: a killed run either released nothing, and goes on within its reservation,
    # or has used it up.
    ledger.complete(entry, {STATISTICS: hashlib.sha256(released.getvalue()).hexdigest()})
    path.write_bytes(released.getvalue())
    logs.say("mask statistics released", noise_multiplier=plan.masks_noise_multiplier, clip_norm=sums.mean.clip_norm)
    return entry


def rerun(config: Study, patients: list[Patient], wrap: Callable[[GaussianSum], GaussianSum]) -> None:
    """Run the stage's mechanisms once more for an audit, each wrapped by ``wrap``; nothing is written or released."""
    from medsynth.privacy.budget import plan_budget
    from medsynth.privacy.entropy import open_entropy

    space = ShapeSpace(config.grid, config.masks)
    sums = _plan_sums(config, space, plan_budget(config.privacy, config.train, config.masks).masks_noise_multiplier)
    _measure(patients, space, _Sums(wrap(sums.mean), wrap(sums.spread)), open_entropy("test_only"))


def _plan_sums(config: Study, space: ShapeSpace, noise_multiplier: float) -> _Sums:
    """Return both mechanisms; clip norms come from the configuration or from public phantoms."""
    from medsynth.privacy.mechanism import GaussianSum

    denominator = config.privacy.declared_patients * (1 - config.ingest.test_fraction)
    settings = config.masks
    mean_clip, spread_clip = settings.mean_clip_norm, settings.spread_clip_norm
    if not config.privacy.private:
        mean_clip = spread_clip = _NO_CLIP
    elif mean_clip is None or spread_clip is None:
        public_mean, public_spread = _public_norms(config, space)
        mean_clip, spread_clip = mean_clip or public_mean, spread_clip or public_spread
    mean_size = 1 + space.pose_size + space.shape_size
    spread_size = 1 + space.pose_size**2 + (space.shape_size**2 if settings.covariance == "full" else space.band_count)
    return _Sums(
        GaussianSum("mask_means", mean_size, mean_clip, noise_multiplier, denominator),
        GaussianSum("mask_spread", spread_size, spread_clip, noise_multiplier, denominator),
    )


def _public_norms(config: Study, space: ShapeSpace) -> tuple[float, float]:
    from medsynth.imaging.phantom import sample_label_maps

    seed = derive_seed(config.encode.phantoms.seed, "masks", "clip")
    labels = [label[None] for label in sample_label_maps(config.grid, _PHANTOMS, seed)]
    means = np.stack(list(_mean_vectors(labels, space)))
    centre = means.mean(0)
    spreads = list(_spread_vectors(labels, space, centre / centre[0] * _COUNT_WEIGHT, "diagonal"))
    norms = [np.linalg.norm(means, axis=1), np.linalg.norm(spreads, axis=1)]
    first, second = (float(np.quantile(values, _CLIP_QUANTILE)) for values in norms)
    return first, second


def _measure(patients: list[Patient], space: ShapeSpace, sums: _Sums, entropy: Entropy) -> MaskStatistics:
    covariance = space.settings.covariance
    labels = [patient.labels.numpy() for patient in patients]
    mean = sums.mean.release(_mean_vectors(labels, space), entropy)
    count = max(mean[0] / _COUNT_WEIGHT, _LEAST_COUNT)
    noise_sd = sums.mean.noise_multiplier * sums.mean.clip_norm / sums.mean.denominator / count
    mean = mean / count
    pose_mean, shape_mean = _split_mean(mean, space)
    shape_mean, kept = _shrink(shape_mean, space, noise_sd)
    centre = np.concatenate([[_COUNT_WEIGHT], pose_mean * _POSE_WEIGHT, shape_mean])
    spread = sums.spread.release(_spread_vectors(labels, space, centre, covariance), entropy)
    raw_sd = sums.spread.noise_multiplier * sums.spread.clip_norm / sums.spread.denominator
    # Both sums count the same patients: together they know it better, above all where the spread is clipped loosely.
    counts = (count, spread[0] / _SPREAD_COUNT_WEIGHT)
    spread_count = max(_joined(counts, (noise_sd * count / _COUNT_WEIGHT, raw_sd / _SPREAD_COUNT_WEIGHT)), _LEAST_COUNT)
    spread = spread / spread_count
    cut = 1 + space.pose_size**2
    pose_square = spread[1:cut].reshape(space.pose_size, -1) / _SPREAD_POSE_WEIGHT
    # Deviations were taken from noisy means: take that (public) noise out again.
    pose_square = pose_square - np.eye(space.pose_size) * (noise_sd / _POSE_WEIGHT) ** 2
    square_sd = raw_sd / spread_count
    pose = positive_part(_towards_public(pose_square, square_sd / _SPREAD_POSE_WEIGHT))
    if covariance == "full":
        return MaskStatistics(pose_mean, pose, shape_mean, _full_root(spread[cut:], space))
    return MaskStatistics(pose_mean, pose, shape_mean, np.maximum(spread[cut:] - kept * noise_sd**2, 0))


def _mean_vectors(labels: list[np.ndarray], space: ShapeSpace) -> Iterator[Array]:
    """Yield (count, pose, shape) of each patient: the mean over the patient's records that show anything."""
    for records in logs.progress(labels, "measuring label maps", len(labels)):
        vectors = [_record_vector(label, space) for label in records]
        found = [vector for vector in vectors if vector is not None]
        yield np.mean(found, axis=0) if found else np.zeros(1 + space.pose_size + space.shape_size)


def _record_vector(label: np.ndarray, space: ShapeSpace) -> Array | None:
    vector = space.pose_vector(label)
    if vector is None:
        return None
    shape = space.shape_vector(label, space.pose(vector))
    return np.concatenate([[_COUNT_WEIGHT], vector * _POSE_WEIGHT, shape])


def _spread_vectors(labels: list[np.ndarray], space: ShapeSpace, centre: Array, covariance: str) -> Iterator[Array]:
    """Yield (count, pose x pose, shape spread) around ``centre``, a released (or public) mean vector."""
    pose_mean, shape_mean = _split_mean(centre, space)
    wide = covariance == "full"
    shape_part = space.shape_size**2 if wide else space.band_count
    for records in logs.progress(labels, "measuring their spread", len(labels)):
        found = []
        for label in records:
            vector = _record_vector(label, space)
            if vector is None:
                continue
            pose, shape = _split_mean(vector, space)
            pose, shape = pose - pose_mean, shape - shape_mean
            part = np.outer(shape, shape).reshape(-1) if wide else space.band_sums(shape)
            square = np.outer(pose, pose).reshape(-1) * _SPREAD_POSE_WEIGHT
            found.append(np.concatenate([[_SPREAD_COUNT_WEIGHT], square, part]))
        yield np.mean(found, axis=0) if found else np.zeros(1 + space.pose_size**2 + shape_part)


def _split_mean(vector: Array, space: ShapeSpace) -> tuple[Array, Array]:
    cut = 1 + space.pose_size
    return vector[1:cut] / _POSE_WEIGHT, vector[cut:]


def _joined(values: tuple[float, float], noise_sds: tuple[float, float]) -> float:
    """Return the mean of two noisy measurements of one number, each weighted by the inverse of its variance."""
    first, second = (sd**2 for sd in noise_sds)
    return (values[0] * second + values[1] * first) / (first + second) if first + second else values[0]


def _shrink(shape_mean: Array, space: ShapeSpace, noise_sd: float) -> tuple[Array, Array]:
    """Shrink each band by its share of signal (Wiener 1949); return the mean and each band's squared weight."""
    power = np.bincount(space.bands, shape_mean**2, space.band_count) / space.band_sizes
    weight = np.maximum(power - noise_sd**2, 0) / np.maximum(power, 1e-12)
    return shape_mean * weight[space.bands], weight**2


def _towards_public(covariance: Array, noise_sd: float) -> Array:
    """Pull a noisy covariance to a public one by the noise's share: poses must not scatter because epsilon is small."""
    weight = _POSE_VARIANCE**2 / (_POSE_VARIANCE**2 + noise_sd**2)
    return np.asarray(weight * covariance + (1 - weight) * _POSE_VARIANCE * np.eye(len(covariance)))


def _full_root(square: Array, space: ShapeSpace) -> Array:
    return covariance_root(square.reshape(space.shape_size, -1), min(_FULL_RANK, space.shape_size))


def _write_settings(config: Study, folder: Path) -> None:
    settings = {"grid": config.grid.model_dump(mode="json"), "masks": config.masks.model_dump(mode="json")}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _report(generator: MaskGenerator, seed: int, tracker: Tracker) -> None:
    maps = [generator.draw(derive_seed(seed, "masks", "preview", index)) for index in range(16)]
    for value, name in list(generator.grid.labels.items())[1:]:
        volumes = [float((label == value).sum()) for label in maps]
        tracker.metrics({f"generated_{name}_voxels": float(np.mean(volumes))})
