"""Are label maps anatomy: volume, surface, parts and neighbours of each label, beside those of real patients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, stats
from skimage import measure

Array = NDArray[np.float64]
Labels = NDArray[np.integer[Any]]

MEASURES = ("volume", "surface", "components", "touching")
"""Of one label in one map: mm^dims, mm^(dims - 1), a number, and the share of its surface that is another label's."""
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
ALWAYS = 0.95
"""A relation between labels that at least this share of real maps shows is taken for anatomy: annotators err too."""
ENCLOSED = 0.999
"""Share of a label's border that lies at one other label: what is enclosed but for a stray voxel."""


@dataclass(frozen=True)
class Anatomy:
    """What is measured on a crowd of label maps; NaN where a map does not show the label.

    Attributes:
        measures: by name (:data:`MEASURES`), (map, label) from label 1 on.
        borders: (map, label, other) share of the label's voxel faces at each value, the background 0 included.
    """

    measures: Mapping[str, Array]
    borders: Array

    def present(self) -> NDArray[np.bool_]:
        """Return (map, label): whether the map shows the label."""
        return ~np.isnan(self.measures["volume"])

    def touch(self, one: int, other: int) -> NDArray[np.bool_]:
        """Return whether two labels touch, for each map that shows both."""
        both = self.present()[:, one - 1] & self.present()[:, other - 1]
        return np.asarray(self.borders[both, one - 1, other] > 0)

    def enclosed(self, inner: int, outer: int) -> NDArray[np.bool_]:
        """Return whether ``inner`` lies in ``outer``, for each map that shows both."""
        both = self.present()[:, inner - 1] & self.present()[:, outer - 1]
        return np.asarray(self.borders[both, inner - 1, outer] >= ENCLOSED)


def anatomy(maps: Sequence[Labels], classes: int, spacing: Sequence[float] | None = None) -> Anatomy:
    """Measure label maps of two or three axes.

    Surface is that of marching cubes at half a voxel's occupancy (Lorensen and Cline 1987), in 2D the length of
    marching squares' outline; both run a few per cent above smooth shapes, alike for everybody. What the border of the
    grid cuts is closed there. Parts that meet at a corner are one.

    Args:
        maps: (\\*spatial) integers each.
        classes: labels, the background included.
        spacing: voxel size an axis, mm; None: 1.
    """
    rank = maps[0].ndim if len(maps) else 2
    size = np.ones(rank) if spacing is None else np.asarray(spacing, float)
    table = np.full((len(MEASURES), len(maps), classes - 1), np.nan)
    borders = np.full((len(maps), classes - 1, classes), np.nan)
    for row, label in enumerate(maps):
        faces = _faces(label, classes, size)
        for value in range(1, classes):
            mask = label == value
            if not mask.any():
                continue
            borders[row, value - 1] = faces[value] / max(faces[value].sum(), 1e-12)
            parts = int(ndimage.label(mask, np.ones((3,) * rank))[1])
            volume = np.count_nonzero(mask) * float(size.prod())
            table[:3, row, value - 1] = volume, _surface(mask, size), parts
        table[3, row] = _touching(label, faces, table[1, row], size)
    return Anatomy(dict(zip(MEASURES, table, strict=True)), borders)


def compare(real: Anatomy, synthetic: Anatomy, train: Anatomy, names: Sequence[str]) -> dict[str, Any]:
    """Return how far generated label maps are from those of held-out patients; train patients are the yardstick.

    Args:
        real: of held-out patients.
        synthetic: of generated label maps.
        train: of the patients that trained, as real as ``real``.
        names: of the labels, from 1 on.

    Returns:
        JSON values: ``labels`` (by name ``present`` and, by measure, quantiles, the Wasserstein distance in the
        measure's unit and in standard deviations of the real maps), ``plausible`` (share of maps that lie inside the
        real range in every measure of every label), ``relations`` (labels that in real maps always touch, never touch,
        or lie in one another, and in which share of the generated maps all of them still do).
    """
    crowds = {"real": real, "synthetic": synthetic, "train": train}
    labels = {}
    for index, name in enumerate(names):
        seen = {crowd: float(one.present()[:, index].mean()) for crowd, one in crowds.items() if len(one.borders)}
        measures = {
            kind: _distance({crowd: _known(one.measures[kind][:, index]) for crowd, one in crowds.items()})
            for kind in MEASURES
        }
        labels[name] = {"present": seen, "measures": measures}
    plausible = {crowd: _mean(_inside(real, one)) for crowd, one in crowds.items() if crowd != "real"}
    return {"labels": labels, "plausible": plausible, "relations": _relations(real, synthetic, names)}


def _known(values: Array) -> Array:
    return values[~np.isnan(values)]


def _mean(values: NDArray[np.bool_]) -> float | None:
    return float(values.mean()) if values.size else None


def _distance(values: Mapping[str, Array]) -> dict[str, Any]:
    """Return quantiles of each crowd and the distance of each to the real one."""
    found: dict[str, Any] = {
        crowd: dict(zip((f"p{100 * q:.0f}" for q in _QUANTILES), np.quantile(some, _QUANTILES).tolist(), strict=True))
        for crowd, some in values.items()
        if some.size
    }
    real = values["real"]
    spread = float(real.std()) if real.size > 1 else 0.0
    for crowd, key in (("synthetic", "wasserstein"), ("train", "wasserstein_train")):
        if real.size and values[crowd].size:
            apart = float(stats.wasserstein_distance(real, values[crowd]))
            found[key] = apart
            # Where all real maps are alike (one part each), there is no spread to measure by.
            found[f"{key}_sd"] = apart / spread if spread > 0 else (0.0 if apart == 0 else None)
    return found


def _inside(real: Anatomy, others: Anatomy) -> NDArray[np.bool_]:
    """Return for each map whether every measure of every label lies in the range of the real maps."""
    if not len(real.borders):
        return np.zeros(0, bool)
    inside = np.ones(len(others.borders), bool)
    needed, seen = real.present().all(0), real.present().any(0)
    present = others.present()
    inside &= (present | ~needed).all(1) & (~present | seen).all(1)
    for kind in MEASURES:
        for index in np.flatnonzero(seen):
            known, values = _known(real.measures[kind][:, index]), others.measures[kind][:, index]
            slack = 1e-9 * max(1.0, float(np.abs(known).max()))
            inside &= np.isnan(values) | ((values >= known.min() - slack) & (values <= known.max() + slack))
    return inside


def _relations(real: Anatomy, synthetic: Anatomy, names: Sequence[str]) -> dict[str, Any]:
    values = range(1, len(names) + 1)
    found: dict[str, Any] = {"touching": {}, "apart": {}, "nested": {}}
    for one, other in itertools.combinations(values, 2):
        known, drawn = real.touch(one, other), synthetic.touch(one, other)
        if known.size and known.mean() >= ALWAYS:
            found["touching"][f"{names[one - 1]} and {names[other - 1]}"] = _mean(drawn)
        elif known.size and known.mean() <= 1 - ALWAYS:
            found["apart"][f"{names[one - 1]} and {names[other - 1]}"] = _mean(~drawn)
    for inner, outer in itertools.permutations(values, 2):
        known = real.enclosed(inner, outer)
        if known.size and known.mean() >= ALWAYS:
            found["nested"][f"{names[inner - 1]} in {names[outer - 1]}"] = _mean(synthetic.enclosed(inner, outer))
    shares = [share for kind in found.values() for share in kind.values() if share is not None]
    return {**found, "worst": min(shares) if shares else None}


def _surface(mask: NDArray[np.bool_], size: Array) -> float:
    box = ndimage.find_objects(mask.astype(np.uint8))[0]
    solid = np.pad(mask[box], 1).astype(float)
    if solid.ndim == 3:
        vertices, triangles, _, _ = measure.marching_cubes(solid, 0.5, spacing=tuple(size))
        return float(measure.mesh_surface_area(vertices, triangles))
    outlines = measure.find_contours(solid, 0.5)
    return math.fsum(float(np.sqrt(np.square(np.diff(line, axis=0) * size).sum(1)).sum()) for line in outlines)


def _touching(label: Labels, faces: Array, surfaces: Array, size: Array) -> Array:
    """Return for each label the share of its surface that lies at other labels.

    Two labels share half of what their surfaces lose when they are one. Voxel faces would do only for borders along
    the axes: those of an oblique plane add up to half as much again.
    """
    shared = np.zeros(len(surfaces))
    for one, other in itertools.combinations(range(1, len(faces)), 2):
        if faces[one, other]:
            joined = _surface((label == one) | (label == other), size)
            area = max(0.0, (surfaces[one - 1] + surfaces[other - 1] - joined) / 2)
            shared[[one - 1, other - 1]] += area
    return np.where(np.isnan(surfaces), np.nan, np.clip(shared / np.maximum(surfaces, 1e-12), 0, 1))


def _faces(label: Labels, classes: int, size: Array) -> Array:
    """Return the area of voxel faces between each two values, (value, value), the diagonal 0."""
    table = np.zeros((classes, classes))
    whole = label.astype(np.int64)
    for axis in range(label.ndim):
        low = whole[tuple(slice(None, -1) if a == axis else slice(None) for a in range(label.ndim))]
        high = whole[tuple(slice(1, None) if a == axis else slice(None) for a in range(label.ndim))]
        pairs = np.bincount((low * classes + high).reshape(-1), minlength=classes**2).reshape(classes, classes)
        table += (pairs + pairs.T) * float(size.prod() / size[axis])
    np.fill_diagonal(table, 0)
    return table
