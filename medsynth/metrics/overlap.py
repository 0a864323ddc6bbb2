"""Dice with patients as the unit, its confidence interval, and the image-blind floor that makes it readable."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.metrics.meandice import compute_dice
from torch import Tensor

_THRESHOLDS = np.linspace(0.1, 0.9, 17)
_LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over patients with its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float

    def to_json(self) -> dict[str, object]:
        """Return ``mean`` and ``ci95``."""
        return {"mean": self.mean, "ci95": [self.low, self.high]}


def patient_dice(predicted: Sequence[Tensor], truth: Sequence[Tensor], classes: int) -> np.ndarray:
    """Return the Dice coefficient of each patient and label, a patient's records pooled.

    Source: Dice (1945); pooled counts weigh a patient's slices by their size.

    Args:
        predicted: labels of each patient, ``(record, *spatial)``.
        truth: the same from the annotators.
        classes: labels, background included.

    Returns:
        ``(patient, classes - 1)`` in [0, 1]; NaN where a label is in neither map, 0 where it is only predicted.
    """
    rows = [_dice_of_one(p, t, classes) for p, t in zip(predicted, truth, strict=True)]
    return np.stack(rows) if rows else np.zeros((0, classes - 1))


def _dice_of_one(predicted: Tensor, truth: Tensor, classes: int) -> np.ndarray:
    labels = torch.arange(1, classes).reshape(1, -1, 1)
    wanted, got = truth.reshape(1, 1, -1) == labels, predicted.reshape(1, 1, -1) == labels
    dice = compute_dice(got.float(), wanted.float(), include_background=True, ignore_empty=False)[0]
    dice[~(wanted.any(dim=2) | got.any(dim=2))[0]] = torch.nan
    return np.asarray(dice.double().numpy())


def bootstrap(values: np.ndarray, draws: int, random: np.random.Generator) -> Estimate:
    """Return the mean over patients and its percentile bootstrap interval, patients drawn again (Efron 1979).

    Args:
        values: one number a patient; NaN is ignored.
        draws: bootstrap samples.
        random: the stream to draw from.
    """
    known = values[~np.isnan(values)]
    if not len(known):
        return Estimate(float("nan"), float("nan"), float("nan"))
    means = known[random.integers(len(known), size=(draws, len(known)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Estimate(float(known.mean()), float(low), float(high))


def patient_means(table: np.ndarray) -> np.ndarray:
    """Return each patient's mean over the labels that it has; NaN for a patient with none.

    Args:
        table: ``(patient, label)`` from :func:`patient_dice`.
    """
    return known_mean(table, axis=1)


def known_mean(values: np.ndarray, axis: int) -> np.ndarray:
    """Return the mean along ``axis`` of what is not NaN; NaN where nothing is left."""
    known = ~np.isnan(values)
    counts = known.sum(axis=axis)
    sums = np.where(known, values, 0.0).sum(axis=axis)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def mean_shape(labels: Sequence[Tensor], classes: int) -> Tensor:
    """Return the one label map that serves all patients best: what can be had without looking at an image.

    Each voxel where the frequency of any foreground reaches a threshold gets its most frequent foreground label; the
    threshold is the one with the best mean Dice on the patients that the frequencies come from.

    Args:
        labels: train patients' labels, ``(record, *spatial)`` each.
        classes: labels, background included.

    Returns:
        ``(*spatial)`` uint8.
    """
    one_hot = torch.arange(1, classes)
    shares = [
        torch.stack([(records == label).float().mean(dim=0) for label in one_hot]) for records in labels
    ]  # (label, *spatial) a patient
    frequency = torch.stack(shares).mean(dim=0)
    best, likely = frequency.sum(dim=0), (frequency.argmax(dim=0) + 1).to(torch.uint8)
    candidates = [torch.where(best >= threshold, likely, 0).to(torch.uint8) for threshold in _THRESHOLDS]
    return max(candidates, key=lambda shape: _mean_dice(shape, labels, classes))


def constant_prediction(shape: Tensor, truth: Sequence[Tensor]) -> list[Tensor]:
    """Return ``shape`` as the prediction for every record of every patient."""
    return [shape.expand_as(records) for records in truth]


def _mean_dice(shape: Tensor, labels: Sequence[Tensor], classes: int) -> float:
    return float(np.nanmean(patient_means(patient_dice(constant_prediction(shape, labels), labels, classes))))


def skill(dice: float, floor: float, real: float) -> float | None:
    """Return (dice - floor) / (real - floor): 0 learnt nothing from images, 1 is as good as real.

    None where real training does not beat the floor either.
    """
    return (dice - floor) / (real - floor) if real > floor else None
