"""What patients show at every voxel beside its distribution, and mixtures of it: without privacy.

A grey value's *normal score* is the normal quantile of its rank in the distribution of its voxel. Scores of all
patients are carried into one chart, the mean foreground of drawn label maps, voxel to voxel
(:mod:`medsynth.models.correspondence`). There a field is drawn as their mean and a random mixture of what some
patients show beside it, with weights of unit length. It has the mean and the covariance of patients' own, from voxel to
voxel, and the fewer are mixed, the more of what covariances do not tell: edges, folds. It is carried back to any label
map. Nothing bounds what one patient adds.

Sources: appearance models in a mean shape, Cootes et al. (2001); normal scores, van der Waerden (1952); mixtures of few
examples, Chawla et al. (2002).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medsynth.errors import InputError
from medsynth.models.correspondence import corresponding
from medsynth.models.label_features import LabelFeatures, Singles
from medsynth.models.pose import Array, sampled, voxel_places

_CUBIC = 3  # order of splines: lower ones blur
_EVEN = 2.0  # of the Dirichlet distribution of squared weights: none is much larger than the others


@dataclass(frozen=True)
class ScoreFields:
    """What patients show beside their distributions, in one chart.

    Attributes:
        mean: (channel, \\*spatial) mean over patients.
        beside: (record, channel, \\*spatial) what each record shows beside it.
        patient: (record,) number of the patient whose record it is, from 0 on without gaps.
        chart: (\\*spatial) foreground in whose voxels they are known.
    """

    mean: Singles
    beside: NDArray[np.float16]
    patient: NDArray[np.int64]
    chart: NDArray[np.uint8]


def mean_foreground(features: LabelFeatures, maps: Sequence[NDArray[np.uint8]], mean: Array) -> NDArray[np.uint8]:
    """Return a foreground (\\*spatial) under the pose ``mean``, as large as those of label maps are in the mean.

    It holds the voxels that lie deepest in them in the mean, once each map lies under that pose.

    Args:
        features: the layout.
        maps: label maps of the mask generator, never patients'.
        mean: pose vector.
    """
    frame = features.frame
    pose = frame.pose(mean)
    offset = np.linalg.solve(pose.stretch, frame.voxels - pose.centre[:, None])
    shown = [label for label in maps if features.has_pose(label)]
    total = np.zeros(frame.voxels.shape[1])
    for label in shown:
        place = features.place(label, mean)
        points = voxel_places(place.narrow @ offset + place.centre[:, None], frame.grid.shape)
        total += sampled(place.distance.reshape(frame.grid.shape), points)
    found = np.zeros(total.shape, np.uint8)
    found[np.argsort(total, kind="stable")[: max(1, round(np.mean([np.count_nonzero(x) for x in shown])))]] = 1
    return found.reshape(frame.grid.shape)


def measured_scores(
    features: LabelFeatures,
    chart: NDArray[np.uint8],
    mean: Array,
    records: Iterable[tuple[Array, NDArray[np.uint8], int]],
) -> ScoreFields:
    """Return what records show in a chart.

    Args:
        features: the layout.
        chart: (\\*spatial) foreground.
        mean: pose vector from which frames turn.
        records: scores (channel, \\*spatial), label map that shows anything, and the patient's number.

    Raises:
        InputError: there is no record.
    """
    place, rows, owners = features.place(chart, mean), [], []
    for scores, label, owner in records:
        points = corresponding(features.frame.voxels, chart.shape, place, features.place(label, mean))
        rows.append(np.stack([sampled(plane, points, _CUBIC) for plane in scores]).astype(np.float16))
        owners.append(owner)
    if not rows:
        raise InputError("no patient to train on shows a label: there is nothing that drafts could mix")
    _, patient, counts = np.unique(owners, return_inverse=True, return_counts=True)
    centre = np.zeros(rows[0].shape, np.float32)
    for row, number in zip(rows, patient, strict=True):
        centre += row / np.float32(counts[number] * len(counts))
    shape = (-1, *chart.shape)
    beside = np.stack([(row - centre).astype(np.float16).reshape(shape) for row in rows])
    return ScoreFields(centre.reshape(shape), beside, patient, chart)


def mixed_scores(
    features: LabelFeatures,
    fields: ScoreFields,
    mean: Array,
    label: NDArray[np.uint8],
    count: int,
    rng: np.random.Generator,
) -> Array:
    """Return a field (channel, \\*spatial) beside a label map, mixed from patients.

    Args:
        features: the layout.
        fields: what :func:`measured_scores` found.
        mean: pose vector from which frames turn.
        label: (\\*spatial) label map that shows anything.
        count: how many patients are mixed, one record of each.
        rng: chooses them and their weights.
    """
    # Each by itself, so that now and then one comes twice: without that, weights would add up to less than the
    # patients' covariance, and to nothing where all are mixed.
    patients = rng.integers(fields.patient.max() + 1, size=count)
    chosen = [rng.choice(np.flatnonzero(fields.patient == patient)) for patient in patients]
    weights = np.sqrt(rng.dirichlet(np.full(count, _EVEN))).astype(np.float32)
    field = fields.mean + np.tensordot(weights, fields.beside[chosen].astype(np.float32), 1)
    places = features.place(label, mean), features.place(fields.chart, mean)
    points = corresponding(features.frame.voxels, label.shape, *places)
    return np.stack([sampled(plane, points, _CUBIC).reshape(label.shape) for plane in field])
