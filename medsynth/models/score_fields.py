"""What patients show at every voxel beside its distribution, and mixtures of it: without privacy.

A grey value's *normal score* is the normal quantile of its rank in the distribution of its voxel. Scores of all
patients are carried into one chart, the mean foreground of drawn label maps, voxel to voxel
(:mod:`medsynth.models.correspondence`). There a field is drawn as their mean and a random mixture of what a few
patients show beside it, of unit length. It has the mean and the covariance of patients' own, from voxel to voxel, and
the fewer are mixed, the more of what covariances do not tell: edges, folds. It is carried back to any label map.
Nothing bounds what one patient adds.

Sources: appearance models in a mean shape, Cootes et al. (2001); normal scores, van der Waerden (1952); mixtures of few
examples, Chawla et al. (2002).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medsynth.models.correspondence import corresponding, sampled
from medsynth.models.label_features import LabelFeatures, Singles, signed_distance
from medsynth.models.pose import Array

_CUBIC = 3  # order of splines: lower ones blur
_EVEN = 2.0  # of the Dirichlet distribution of squared weights: none is much larger than the others


@dataclass(frozen=True)
class ScoreFields:
    """What records show beside their distributions, in one chart.

    Attributes:
        mean: (channel, \\*spatial) mean over patients.
        beside: (record, channel, \\*spatial) what each record shows beside it.
        shares: (record,) how much each counts; they add up to one.
        chart: (\\*spatial) foreground in whose voxels they are known.
    """

    mean: Singles
    beside: NDArray[np.float16]
    shares: Array
    chart: NDArray[np.uint8]


def mean_foreground(features: LabelFeatures, maps: Sequence[NDArray[np.uint8]], mean: Array) -> NDArray[np.uint8]:
    """Return the foreground (\\*spatial) under the pose ``mean`` whose distances are the mean of those of label maps.

    Args:
        features: the layout.
        maps: label maps of the mask generator, never patients'.
        mean: pose vector.
    """
    frame = features.frame
    pose = frame.pose(mean)
    half = np.array(frame.grid.shape)[:, None] / 2
    offset = np.linalg.solve(pose.stretch, frame.voxels - pose.centre[:, None])
    total = np.zeros(frame.voxels.shape[1])
    for label in maps:
        if features.has_pose(label):
            place = features.place(label, mean)
            points = (place.narrow @ offset + place.centre[:, None] + 1) * half - 0.5
            total += sampled(signed_distance(label > 0), points, 1)
    return np.asarray(total < 0, np.uint8).reshape(frame.grid.shape)


def measured_scores(
    features: LabelFeatures,
    chart: NDArray[np.uint8],
    mean: Array,
    records: Iterable[tuple[Array, NDArray[np.uint8], float]],
) -> ScoreFields:
    """Return what records show in a chart.

    Args:
        features: the layout.
        chart: (\\*spatial) foreground.
        mean: pose vector from which frames turn.
        records: scores (channel, \\*spatial), label map that shows anything, and how much the record counts.
    """
    place, rows, weights = features.place(chart, mean), [], []
    for scores, label, weight in records:
        points = corresponding(features.frame.voxels, chart.shape, place, features.place(label, mean))
        rows.append(np.stack([sampled(plane, points, _CUBIC) for plane in scores]).astype(np.float16))
        weights.append(weight)
    shares = np.array(weights) / np.sum(weights)
    centre = np.zeros(rows[0].shape, np.float32)
    for row, share in zip(rows, shares, strict=True):
        centre += np.float32(share) * row
    shape = (-1, *chart.shape)
    beside = np.stack([(row - centre).astype(np.float16).reshape(shape) for row in rows])
    return ScoreFields(centre.reshape(shape), beside, shares, chart)


def mixed_scores(
    features: LabelFeatures,
    fields: ScoreFields,
    mean: Array,
    label: NDArray[np.uint8],
    count: int,
    rng: np.random.Generator,
) -> Array:
    """Return a field (channel, \\*spatial) beside a label map, mixed from records.

    Args:
        features: the layout.
        fields: what :func:`measured_scores` found.
        mean: pose vector from which frames turn.
        label: (\\*spatial) label map that shows anything.
        count: how many records are mixed.
        rng: chooses them and their weights.
    """
    chosen = rng.choice(len(fields.shares), min(count, len(fields.shares)), replace=False, p=fields.shares)
    weights = np.sqrt(rng.dirichlet(np.full(len(chosen), _EVEN))).astype(np.float32)
    field = fields.mean + np.tensordot(weights, fields.beside[chosen].astype(np.float32), 1)
    places = features.place(label, mean), features.place(fields.chart, mean)
    points = corresponding(features.frame.voxels, label.shape, *places)
    return np.stack([sampled(plane, points, _CUBIC).reshape(label.shape) for plane in field])
