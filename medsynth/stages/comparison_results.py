"""What the trainings of ``medsynth compare`` add up to: scores with their intervals, and the crowds of images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from medsynth.config import Grid
from medsynth.imaging.cohort import Patient
from medsynth.metrics.agreement import label_agreement
from medsynth.metrics.fidelity import crowd_discrepancy, frechet_distance, similarity_name, similarity_within
from medsynth.metrics.intervals import mean_of, paired_bootstrap, ratio_of, skill_of
from medsynth.metrics.memorisation import centred, coarse, copies, nearness, relative_distances
from medsynth.metrics.overlap import Estimate, constant_prediction, mean_shape, patient_means
from medsynth.models.segmenter import Segmenter, bottleneck_features, predict
from medsynth.randomness import derive_seed, generator
from medsynth.stages.comparison_schema import Fidelity, Kind, Measured, Memorisation, Scores, TrainingSet
from medsynth.stages.comparison_trainings import MEASURES, Arm, Ruler, Trained, measures

_THINNINGS = 5
_SSIM_PAIRS = 32
Statistic = Callable[..., np.ndarray]


@dataclass(frozen=True)
class Statistician:
    """How intervals are computed: labels by value, bootstrap samples, and the study's seed."""

    labels: Mapping[int, str]
    draws: int
    seed: int

    def measured(self, name: str, statistic: Statistic, *series: np.ndarray) -> Measured:
        """Return a statistic of ``(seed, patient)`` series with both intervals; ``name`` addresses the stream."""

        def estimate(over_seeds: bool) -> Estimate:
            random = generator(self.seed, "compare", "bootstrap", name)
            return paired_bootstrap(series, statistic, self.draws, random, over_seeds=over_seeds)

        patients, seeds = estimate(False), estimate(True)
        return Measured(mean=patients.mean, ci95=(patients.low, patients.high), ci95_with_seeds=(seeds.low, seeds.high))

    def scores(self, name: str, tables: np.ndarray) -> Scores:
        """Return the scores of ``(seed, patient, label)`` tables."""
        return Scores(
            all_labels=self.measured(name, mean_of, _overall(tables)),
            per_label={
                label: self.measured(f"{name}/{label}", mean_of, tables[:, :, value - 1])
                for value, label in sorted(self.labels.items())
                if value > 0
            },
        )


def _overall(tables: np.ndarray) -> np.ndarray:
    """Return each patient's mean over its labels, ``(seed, patient)``."""
    return np.stack([patient_means(table) for table in tables])


def floor_tables(train: Sequence[Patient], test: Sequence[Patient], grid: Grid, ruler: Ruler) -> dict[str, np.ndarray]:
    """Return the measures of one constant mean shape as if of one seed, ``(1, patient, label)`` each."""
    truth = [patient.labels for patient in test]
    shape = mean_shape([patient.labels for patient in train], grid.classes)
    dice, surfaces = measures(constant_prediction(shape, truth), truth, grid.classes, ruler)
    return {name: table[None] for name, table in zip(MEASURES, (dice, *surfaces), strict=True)}


def tables_of(trained: Sequence[Trained]) -> dict[str, np.ndarray]:
    """Return the measures of one arm's seeds, ``(seed, patient, label)`` each."""
    return {name: np.stack([getattr(one, name) for one in trained]) for name in MEASURES}


def training_sets(
    trained: Mapping[Arm, Sequence[Trained]],
    floor: Mapping[str, np.ndarray],
    images: Mapping[str, int],
    how: Statistician,
) -> tuple[TrainingSet, list[TrainingSet]]:
    """Return the scores of the floor and of every arm: by kind, then by run, then by number of patients.

    Args:
        trained: seeds of each arm.
        floor: from :func:`floor_tables`.
        images: synthetic images of each arm by its name.
        how: of the intervals.
    """
    most = max(arm.real_patients for arm in trained if arm.kind == "real_only")
    real = _overall(tables_of(trained[Arm("real_only", None, most)])["dice"])
    low = _overall(floor["dice"])

    def one(kind: Kind, arm: Arm, tables: Mapping[str, np.ndarray], seeds: Sequence[int]) -> TrainingSet:
        dice = _overall(tables["dice"])
        means = [float(np.nanmean(row)) if not np.isnan(row).all() else float("nan") for row in dice]
        return TrainingSet(
            kind=kind,
            run=arm.run,
            real_patients=arm.real_patients,
            synthetic_images=images.get(arm.name, 0),
            **{name: how.scores(f"{name}/{arm.name}", table) for name, table in tables.items()},
            skill=how.measured(f"skill/{arm.name}", skill_of, dice, low, real),
            relative_to_real=how.measured(f"ratio/{arm.name}", ratio_of, dice, real),
            dice_by_seed={str(seed): mean for seed, mean in zip(seeds, means, strict=False)},
        )

    blind = one("floor", Arm("floor", None, most), floor, ())
    kinds, runs = get_args(Kind), [arm.run for arm in trained]
    order = sorted(trained, key=lambda arm: (kinds.index(arm.kind), runs.index(arm.run), arm.real_patients))
    return blind, [one(arm.kind, arm, tables_of(trained[arm]), [s.seed for s in trained[arm]]) for arm in order]


def agreement(networks: Sequence[Segmenter], images: Tensor, labels: Tensor, label: str, how: Statistician) -> Scores:
    """Return how well real-trained networks find the label maps in synthetic images; the unit is the pair."""

    def table(network: Segmenter) -> np.ndarray:
        return label_agreement([lambda batch: predict(network, batch)], images, labels, len(how.labels))

    return how.scores(f"agreement/{label}", np.stack([table(network) for network in networks]))


@dataclass(frozen=True)
class Crowd:
    """Images ``(record, channel, *spatial)`` and what each of our own networks makes of them, ``(record, feature)``."""

    images: Tensor
    features: tuple[Tensor, ...]


def crowd_of(images: Tensor, networks: Sequence[Segmenter]) -> Crowd:
    """Return images with their features in networks that were trained on all real patients."""
    return Crowd(images, tuple(bottleneck_features(network, images) for network in networks))


def fidelity(train: Crowd, test: Crowd, synthetic: Crowd, seed: int) -> Fidelity:
    """Compare crowds of images in the features of our own networks; held-out patients are the yardstick.

    Args:
        train: what the generator was to imitate.
        test: held-out patients.
        synthetic: what it made.
        seed: of thinning, random features and pairs.
    """
    count = min(len(crowd.images) for crowd in (train, test, synthetic))
    rows = []
    for known, held_out, made in zip(train.features, test.features, synthetic.features, strict=True):
        for turn in range(_THINNINGS):
            stream = derive_seed(seed, "thinning", turn)
            mmd = [crowd_discrepancy(known, crowd, stream) for crowd in (made, held_out)]
            rows.append([*mmd, *(frechet_distance(known, crowd, count, stream) for crowd in (made, held_out))])
    mmd, mmd_held_out, fid, fid_held_out = np.mean(rows, axis=0).tolist()
    return Fidelity(
        mmd=mmd,
        mmd_held_out=mmd_held_out,
        fid=fid,
        fid_held_out=fid_held_out,
        fid_images=count,
        similarity=similarity_name(train.images.shape[2:]),
        similarity_within_synthetic=similarity_within(synthetic.images, _SSIM_PAIRS, seed),
        similarity_within_real=similarity_within(train.images, _SSIM_PAIRS, seed),
    )


def memorisation(
    train: Sequence[Patient], test: Sequence[Patient], images: Tensor, labels: Tensor, draws: int, seed: int
) -> Memorisation:
    """Return whether synthetic images crowd around train patients more than around held-out ones."""
    near = nearness(records(train), records(test), images)
    people = [*train, *test]
    known = [coarse(centred(patient.images, patient.labels)) for patient in people]
    distances = relative_distances(known, coarse(centred(images, labels)))
    trained = np.arange(len(people)) < len(train)
    found = copies(distances, trained, draws, generator(seed, "copies"))
    return Memorisation(
        median_ratio=near.median_ratio,
        nearer_than_held_out_p5=near.nearer_than_held_out,
        copies=found.share,
        copies_ci95=(found.low, found.high),
        copies_by_chance=found.chance,
    )


def records(patients: Sequence[Patient]) -> Tensor:
    """Return all images of patients, ``(record, channel, *spatial)``."""
    return torch.cat([patient.images for patient in patients])
