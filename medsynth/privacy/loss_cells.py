"""Privacy losses of one access, cut into cells of one width: exact masses, and two certified readings of them.

The first half of the accountant in :mod:`medsynth.privacy.pld`, which says where each step comes from.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_ULP = float(np.finfo(np.float64).eps)


@dataclass(frozen=True)
class Access:
    """``count`` accesses with noise ``sigma`` at rate ``rate``."""

    rate: float
    sigma: float
    count: int


@dataclass(frozen=True)
class Cells:
    """Masses of the cells of one direction: cell j spans the losses ``(first + j) width`` to ``(first + j + 1) width``.

    The errors bound what rounding did to each mass; ``below`` and ``above`` are P's masses outside.
    """

    first: int
    width: float
    p: Array
    q: Array
    p_error: Array
    q_error: Array
    below: float
    above: float


@dataclass(frozen=True)
class Losses:
    """Loss of one access on the grid: ``mass[j]`` at ``(first + j) width``; ``correction[j]`` of merged cells."""

    first: int
    mass: Array
    infinite: float
    count: int
    correction: Array | None = None


def _log_ratio(access: Access, x: Array) -> Array:
    """Return log(M / N_0) at ``x``: M is the noisy output with the patient, N_0 without (Abadi et al. 2016, eq. 3)."""
    exponent = (2 * x - 1) / (2 * access.sigma**2)
    if access.rate == 1:
        return exponent
    return np.logaddexp(math.log1p(-access.rate), math.log(access.rate) + exponent)


def loss_range(access: Access, reach: float) -> tuple[float, float]:
    """Return the losses at ``reach`` standard deviations beyond the two means, as log(M / N_0)."""
    ends = np.array([-reach * access.sigma, 1 + reach * access.sigma])
    low, high = _log_ratio(access, ends)
    return float(low), float(high)


def variance(access: Access) -> float:
    """Return the variance of log(M / N_0) under M, roughly: it only chooses a grid."""
    z = np.linspace(-9, 9, 721)
    weight = np.exp(-z * z / 2)
    weight /= weight.sum()
    parts = [
        (1 - access.rate, _log_ratio(access, z * access.sigma)),
        (access.rate, _log_ratio(access, 1 + z * access.sigma)),
    ]
    mean = sum(share * float(weight @ loss) for share, loss in parts)
    return sum(share * float(weight @ (loss - mean) ** 2) for share, loss in parts)


def cells_of(access: Access, low: float, high: float, width: float) -> tuple[Cells, Cells]:
    """Return the cells of the pair (M, N_0), a patient removed, and of (N_0, M), a patient added."""
    first, last = math.floor(low / width), math.ceil(high / width)
    edges = _edges(access, width * np.arange(first, last + 1, dtype=np.float64))
    n0, n0_error, n0_out = _masses(edges / access.sigma)
    n1, n1_error, n1_out = _masses((edges - 1) / access.sigma)
    mixed = [(1 - access.rate) * without + access.rate * with_ for without, with_ in zip(n0_out, n1_out, strict=True)]
    m, m_error = (1 - access.rate) * n0 + access.rate * n1, (1 - access.rate) * n0_error + access.rate * n1_error
    removed = Cells(first, width, m, n0, m_error + _ULP * m, n0_error, mixed[0], mixed[1])
    added = Cells(-last, width, n0[::-1], m[::-1], n0_error[::-1], removed.p_error[::-1], n0_out[1], n0_out[0])
    return removed, added


def _edges(access: Access, losses: Array) -> Array:
    """Return the outputs ``x`` at which log(M / N_0) takes the given values (minus infinity below its infimum)."""
    if access.rate == 1:
        return losses * access.sigma**2 + 0.5
    inner = access.rate - (1 - access.rate) * np.expm1(-losses)
    positive = inner > 0
    safe = np.where(positive, inner / access.rate, 1.0)
    return np.where(positive, access.sigma**2 * (losses + np.log(safe)) + 0.5, -np.inf)


def _masses(z: Array) -> tuple[Array, Array, tuple[float, float]]:
    """Return the standard normal mass between neighbours of ``z``, a bound on its rounding, and both outer tails."""
    tail = np.fromiter(map(math.erfc, (np.abs(z) / math.sqrt(2)).tolist()), dtype=np.float64, count=z.size) / 2
    left, right = tail[:-1], tail[1:]
    mass = np.where(z[:-1] >= 0, left - right, np.where(z[1:] <= 0, right - left, 1 - left - right))
    below = float(tail[0] if z[0] <= 0 else 1 - tail[0])
    above = float(tail[-1] if z[-1] >= 0 else 1 - tail[-1])
    return np.maximum(mass, 0.0), 4 * _ULP * np.maximum(left, right), (below, above)


def split_cells(cells: Cells, count: int, negligible: float) -> Losses:
    """Return the losses of a pair that dominates: each cell's masses sit on its two ends (connect the dots)."""
    step = math.exp(-cells.width)
    growth = np.exp(cells.width * (cells.first + np.arange(cells.p.size)))
    to_lower = (cells.q * growth - step * cells.p) / (1 - step)
    # Rounding may only move mass up.
    to_lower -= (cells.q_error * growth + cells.p_error) / (1 - step)
    to_lower = np.clip(to_lower, 0.0, cells.p)
    mass = np.append(to_lower, 0.0)
    mass[1:] += cells.p - to_lower
    mass[0] += cells.below
    return Losses(cells.first, mass, cells.above, count)


def merge_cells(cells: Cells, count: int, negligible: float) -> Losses:
    """Return the losses of a dominated pair: a cell is one outcome, its loss the cell's middle and a correction.

    What lies below the grid, and cells of up to ``negligible`` mass in all, are left out (a loss of minus infinity);
    what lies above takes the last edge's loss.
    """
    middles = cells.width * (cells.first + 0.5 + np.arange(cells.p.size))
    with np.errstate(divide="ignore", invalid="ignore"):
        certain = np.log((cells.p - cells.p_error) / (cells.q + cells.q_error)) - middles
    half = cells.width / 2
    correction = np.clip(np.nan_to_num(certain, nan=-half, neginf=-half), -half, half)
    kept = cells.p - cells.p_error > negligible / cells.p.size
    mass = np.append(np.where(kept, cells.p - cells.p_error, 0.0), cells.above)
    return Losses(cells.first, mass, 0.0, count, np.append(correction, -half))


def correction_of(steps: Sequence[Losses], chance: float) -> float:
    """Return by how much merged cells overstate the summed loss at most, except with ``chance`` (Chernoff)."""
    parts = []
    for step in steps:
        if step.correction is not None:
            kept = step.mass > 0
            parts.append((step.count, step.mass[kept], step.correction[kept]))
    variance = sum(count * float(mass @ correction**2) for count, mass, correction in parts)
    if variance == 0:
        return 0.0
    best = math.inf
    for power in range(-12, 3):
        scale = 2.0**power * math.sqrt(-2 * math.log(chance) / variance)
        with np.errstate(over="ignore"):
            moment = sum(count * math.log(float(mass @ np.exp(-scale * c))) for count, mass, c in parts)
        best = min(best, (moment - math.log(chance)) / scale)
    return best
