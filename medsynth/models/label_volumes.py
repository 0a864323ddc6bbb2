"""Label maps whose labels share their foreground anew: with volumes that were asked for, or with smooth borders.

A label map comes in and a label map goes out, so that this follows any generator of label maps; on maps drawn from
released statistics it is post-processing and costs no privacy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medsynth.config import Grid, Synthesise
from medsynth.errors import ConfigError

Array = NDArray[np.float64]
Labels = NDArray[np.uint8]

TOLERANCE = 0.1  # of the volume that was asked for, in the median over label maps
_SWEEPS = 1000  # over the labels, until each has its share of the foreground: 5 as a rule, 76 for one map in ten
_LONG_STEPS, _STRETCH = 100, 1.5  # after the first, so many sweeps go further: labels that pass voxels along creep
_CLOSE = 0.01  # of a label's share
_NO_SHARE = 1e-12
_NEARER = 1e-3  # weight of the distance to a label's centre, which decides between voxels that are equally near
_FIRST = 1e-6  # and where symmetry leaves a tie even so, the order of the voxels decides


def resize_labels(label: Labels, factors: Mapping[int, float], spacing: Sequence[float] | None = None) -> Labels:
    """Return a label map whose labels have ``factors`` times their volume; the others keep theirs.

    The foreground is scaled about its centre (about the border where it is cut there) until it has the new total
    volume. Inside it each voxel goes to the label to whose old region it is nearest once every region has grown by a
    distance of its own, the additively weighted Voronoi partition, whose weights are solved so that each label gets
    its volume (coordinate ascent on the dual of semi-discrete transport, Aurenhammer et al. 1998). Labels that touch
    or enclose one another go on doing so.

    Args:
        label: (\\*spatial) integers, 0 the background.
        factors: factor above 0 by label value; labels that the map does not show are passed over.
        spacing: voxel size an axis, any unit; None: cubes.
    """
    counts = np.bincount(label.reshape(-1))
    present = [value for value in range(1, len(counts)) if counts[value]]
    if all(factors.get(value, 1.0) == 1.0 for value in present):
        return label
    wanted = np.array([max(1.0, counts[value] * factors.get(value, 1.0)) for value in present])
    wanted *= min(1.0, label.size / wanted.sum())
    foreground = label > 0
    points = _scaled_lattice(foreground, float((wanted.sum() / foreground.sum()) ** (1 / label.ndim)))
    size = np.ones(label.ndim) if spacing is None else np.asarray(spacing, float)
    distance = _signed_distance(foreground, size, points)
    inside = np.argsort(distance, kind="stable")[: round(float(wanted.sum()))]
    result = np.zeros(label.size, np.uint8)
    result[inside] = np.array(present, np.uint8)[_share(label, present, wanted, size, points[:, inside])]
    return result.reshape(label.shape)


def smooth_borders(label: Labels, sigma: float) -> Labels:
    """Return a label map whose labels meet in smooth borders; outline and volumes stay as they are.

    Each voxel of the foreground goes to the label that fills most of its neighbourhood, once factors (solved as in
    :func:`resize_labels`) have given each label its old volume.

    Args:
        label: (\\*spatial) integers, 0 the background.
        sigma: standard deviation of the Gaussian neighbourhood, voxels.
    """
    counts = np.bincount(label.reshape(-1))
    present = [value for value in range(1, len(counts)) if counts[value]]
    inside = np.flatnonzero(label)
    if len(present) < 2:
        return label
    shares = [ndimage.gaussian_filter((label == value).astype(float), sigma).reshape(-1)[inside] for value in present]
    result = np.zeros(label.size, np.uint8)
    # In logarithms a small label is raised where it has a share, and nowhere else.
    rarity = -np.log(np.maximum(np.stack(shares), _NO_SHARE))
    result[inside] = np.array(present, np.uint8)[_divide(rarity, counts[present].astype(float))]
    return result.reshape(label.shape)


def volume_factors(maps: Sequence[Labels], grid: Grid, how: Synthesise) -> dict[int, float]:
    """Return the factor on each label's volume that gives what ``how`` asks for.

    Args:
        maps: label maps as the generator draws them unasked, (\\*spatial) each.
        grid: with the names of the labels and the spacing.
        how: ``volume_scale`` and ``volume_median``.

    Raises:
        ConfigError: a label is in hardly any map, or the grid is too small for the volume asked for.
    """
    voxel = float(np.prod(grid.spacing_mm or 1.0))
    factors: dict[int, float] = {}
    medians: dict[int, float] = {}
    for value, name in grid.labels.items():
        if name in how.volume_scale or name in how.volume_median:
            medians[value] = _median(maps, value)
            if not medians[value]:
                raise ConfigError(f"a volume is asked for '{name}', which the mask generator hardly ever draws")
            asked = how.volume_median.get(name)
            factors[value] = how.volume_scale[name] if asked is None else asked / voxel / medians[value]
    resized = [resize_labels(label, factors, grid.spacing_mm) for label in maps] if factors else []
    for value, factor in factors.items():
        reached = _median(resized, value) / medians[value]
        if abs(reached / factor - 1) > TOLERANCE:
            raise ConfigError(
                f"synthesise asks for {factor:.2f} times the volume of '{grid.labels[value]}' and the grid lets "
                f"{reached:.2f} times come out: ask for less, or enlarge grid.shape"
            )
    cut = [_is_cut(after) and not _is_cut(before) for before, after in zip(maps, resized, strict=False)]
    if sum(cut) > TOLERANCE * len(cut):
        raise ConfigError(
            f"with the volumes that synthesise asks for, the grid would cut {sum(cut)} of {len(cut)} label maps: ask "
            "for less, or enlarge grid.shape"
        )
    return factors


def _is_cut(label: Labels) -> bool:
    return any(np.take(label, end, axis).any() for axis in range(label.ndim) for end in (0, -1))


def _median(maps: Sequence[Labels], value: int) -> float:
    return float(np.median([np.count_nonzero(label == value) for label in maps]))


def _scaled_lattice(foreground: NDArray[np.bool_], factor: float) -> Array:
    """Return where in the old map each voxel of the new one lies, (axis, voxel) in voxels."""
    where = np.argwhere(foreground)
    last = np.array(foreground.shape) - 1
    low, high = where.min(0), where.max(0)
    # Scaling fixes the centre; where the grid cuts the foreground, the cut.
    fixed = np.where((low == 0) & (high < last), -0.5, np.where((high == last) & (low > 0), last + 0.5, where.mean(0)))
    new_low, new_high = fixed + (low - 0.5 - fixed) * factor, fixed + (high + 0.5 - fixed) * factor
    room = (low > 0) & (high < last) & (new_high - new_low <= last - 1)
    shift = np.where(room, np.maximum(0.5 - new_low, 0) - np.maximum(new_high - (last - 0.5), 0), 0.0)
    points = np.indices(foreground.shape).reshape(foreground.ndim, -1)
    return np.asarray((points - (fixed + shift)[:, None]) / factor + fixed[:, None])


def _signed_distance(mask: NDArray[np.bool_], spacing: Array, points: Array) -> Array:
    """Return the distance to the border of ``mask`` at ``points``, negative inside."""
    half = float(spacing.mean()) / 2
    inside, outside = (ndimage.distance_transform_edt(part, sampling=spacing) for part in (mask, ~mask))
    distance = np.where(mask, half - inside, outside - half)
    return np.asarray(ndimage.map_coordinates(distance, points, order=1, mode="nearest"))


def _share(label: Labels, present: Sequence[int], wanted: Array, spacing: Array, points: Array) -> NDArray[np.int64]:
    """Return for each point the index in ``present`` of the label that gets it; each gets about its ``wanted``."""
    fields = []
    order = np.linspace(0, _FIRST, points.shape[1])
    for index, value in enumerate(present):
        region = label == value
        centre = np.argwhere(region).mean(0)
        far = np.sqrt(np.square((points - centre[:, None]) * spacing[:, None]).sum(0))
        fields.append(_signed_distance(region, spacing, points) + _NEARER * far + index * order)
    return _divide(np.stack(fields), wanted)


def _divide(field: Array, wanted: Array) -> NDArray[np.int64]:
    """Return for each point the row of least ``field`` (label, point) after shifts that give each row its number."""
    growth = np.zeros(len(field))
    for sweep in range(_SWEEPS if len(field) > 1 else 0):
        for index in range(1, len(field)):  # only differences count: the first label does not grow
            others = np.delete(field - growth[:, None], index, axis=0).min(0)
            margin = np.sort(field[index] - others)
            cut = min(max(round(float(wanted[index])), 1), len(margin) - 1)
            step = (margin[cut - 1] + margin[cut]) / 2 - growth[index]
            growth[index] += step * (_STRETCH if 0 < sweep <= _LONG_STEPS else 1.0)
        found = np.bincount((field - growth[:, None]).argmin(0), minlength=len(field))
        if np.all(np.abs(found - wanted) <= np.maximum(1.0, _CLOSE * wanted)):
            break
    return (field - growth[:, None]).argmin(0)
