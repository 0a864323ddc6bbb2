"""Public scenes: an uneven wall under a lamp at the camera, as an endoscope sees it; nothing reads a patient.

A height over the image plane: a wall, folds around a lumen, a dome over each connected part of the foreground, and
seldom one without a label, so that not every dome is what a network looks for. It is lit by Lambert's law, with
highlights where it faces the lamp (Blinn 1977), shadows behind folds and beside domes, and vessels. Its colours are
patches that know no foreground. All sizes are drawn from fixed ranges.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse
from scipy.sparse.linalg import spsolve

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

_SIZE = 128.0  # pixels along the image for which lengths below are meant; they grow with the image
_PATCHES = 4  # kinds of patches a colour
_MARGIN = 16  # by which a dome goes on beyond the image
_UNLABELLED = 0.2  # domes an image that are no foreground
_TILT = 0.35  # standard deviation of how far the lamp is beside the camera
_VESSELS, _LUMEN = 0.6, 0.5  # shares of images with vessels and with a dark lumen
_ROUGH, _FLAT = 0.4, 0.5  # shares of domes


def lit_surface(label: NDArray[np.uint8], rng: np.random.Generator) -> Array:
    """Return brightness (row, column) of a drawn scene, of zero mean and unit variance.

    Args:
        label: (row, column) label map; what is above 0 bulges.
        rng: the draws.
    """
    scene = _Scene(label > 0, max(label.shape) / _SIZE, rng)
    folds, shade = scene.folds()
    hidden = 1 - scene.blurred(scene.mask * rng.uniform(0.5, 1), 0.7)  # domes stand before folds
    height = scene.wall() + folds * hidden
    for bulge in scene.bulges():
        height += scene.dome(bulge)
    height = scene.blurred(height, rng.uniform(0.6, 1.2))
    lamp = np.array([*rng.normal(0, _TILT, 2), 1.0])
    lamp /= np.linalg.norm(lamp)
    image = _standard(np.clip(_facing(height, lamp), 0, None) ** rng.uniform(0.8, 1.5))
    image -= 1.2 * shade * hidden + scene.crevice() + scene.vessels()
    image += rng.uniform(0, 0.03) * scene.field(rng.uniform(0.5, 1.2))
    return _standard(image + scene.highlights(height, lamp))


def pigment(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Return one colour (row, column) of a drawn wall, of zero mean and unit variance: patches with clear outlines.

    Args:
        shape: (row, column).
        rng: the draws.
    """
    scene = _Scene(np.zeros(shape, dtype=bool), max(shape) / _SIZE, rng)
    draw = rng.uniform
    image = draw(0.2, 1) * scene.field(draw(10, 25)) + draw(0, 0.15) * scene.field(draw(2, 6))
    for _ in range(_PATCHES):
        field = scene.field(draw(4, 14))
        patch = field > draw(0.5, 2.0)
        image += rng.normal() * scene.blurred(patch.astype(float), draw(0.4, 1.2)) * (1 + 0.3 * scene.field(8))
    return _standard(image - rng.normal(0, 0.7) * scene.vessels())


@dataclass(frozen=True)
class _Scene:
    """One scene in the making: the foreground, the length of a unit in pixels, the draws."""

    mask: Mask
    unit: float
    rng: np.random.Generator

    def blurred(self, image: NDArray[np.floating], width: float) -> Array:
        return np.asarray(ndimage.gaussian_filter(image, width * self.unit))

    def field(self, width: float) -> Array:
        """Return a smooth random field of unit variance."""
        return _standard(self.blurred(self.rng.standard_normal(self.mask.shape), width))

    def wall(self) -> Array:
        """Return the height of the wall: coarse and finer waves."""
        draw = self.rng.uniform
        coarse, fine = self.field(draw(10, 25)), self.field(draw(3, 6))
        return self.unit * (draw(1, 5) * coarse + draw(0, 0.15) * fine)

    def folds(self) -> tuple[Array, Array]:
        """Return height and shade of crescents around a lumen: each hides the wall behind it, which is dark there."""
        draw, size = self.rng.uniform, _SIZE
        rows, columns = np.indices(self.mask.shape) / self.unit
        middle, turn, squeeze = draw(-0.2, 1.2, 2) * size, draw(0, np.pi), draw(0.65, 1.5)
        x, y = columns - middle[0], rows - middle[1]
        along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        radius = np.hypot(along * squeeze, across / squeeze) + draw(2, 9) * self.field(draw(8, 20))
        angle = np.arctan2(across, along)
        height, shade = np.zeros(self.mask.shape), np.zeros(self.mask.shape)
        if self.rng.random() < _LUMEN:
            shade += draw(0.5, 4) * np.exp(-np.square(np.clip(radius, 0, None) / (draw(0.08, 0.35) * size)))
        last, place, share = 0.0, draw(0.08, 0.3) * size, self.rng.random()
        while place < 1.3 * size:
            if self.rng.random() < share:
                beyond, width = radius - place, draw(2, 8)
                arc = np.cos(angle - draw(0, 2 * np.pi))
                shown = np.clip(0.5 + draw(0.8, 2) * arc + draw(-0.4, 1), 0, 1)
                slope = np.where(beyond > 0, 2 * width, width)
                height += shown * draw(0.2, 1) * width * np.exp(-np.square(beyond / slope))
                reach = max(draw(0.4, 1) * (place - last), 3.0)
                edge = 1 / (1 + np.exp(np.clip(beyond / draw(0.4, 1.2), -30, 30)))
                shade += shown * draw(0.2, 1.5) * np.clip(1 + beyond / reach, 0, 1) * edge
            last, place = place, place + draw(0.08, 0.3) * size
        return self.unit * height, shade

    def bulges(self) -> list[Array]:
        """Return what domes rise from: each connected part of the foreground, and seldom a place without a label."""
        parts, count = ndimage.label(self.mask)
        whole = self.bulge(self.mask) if count else np.zeros(self.mask.shape)
        found = [whole * (parts == part) for part in range(1, count + 1)]
        for _ in range(self.rng.poisson(_UNLABELLED)):
            middle, squeeze = self.rng.uniform(0, 1, 2) * self.mask.shape, self.rng.uniform(0.6, 1.6)
            rows, columns = np.indices(self.mask.shape)
            radius = np.hypot((rows - middle[0]) * squeeze, (columns - middle[1]) / squeeze)
            place = radius + 2 * self.unit * self.field(6) < self.rng.uniform(0.04, 0.15) * _SIZE * self.unit
            if place.any():
                found.append(self.bulge(place))
        return found

    def bulge(self, mask: Mask) -> Array:
        return _bulge(mask, round(_MARGIN * self.unit))

    def dome(self, bulge: Array) -> Array:
        """Return the height of a dome: over a disc up to nine tenths of half a sphere, steep or blunt, or flat."""
        draw = self.rng.uniform
        top = float(bulge.max())
        share = bulge / top
        height = self.blurred(share ** draw(0.35, 0.9), draw(0.4, 1.2))
        if self.rng.random() < _ROUGH:
            height += draw(0.02, 0.1) * self.field(draw(2, 6)) * np.sqrt(share)
        part = draw(0, 0.25) if self.rng.random() < _FLAT else draw(0.2, 0.9)
        return np.asarray(part * 2 * np.sqrt(top) * height)

    def crevice(self) -> Array:
        """Return the shade around the foreground."""
        outside = ndimage.distance_transform_edt(~self.mask) / self.unit
        shade = self.rng.uniform(0, 0.7) * np.exp(-outside / self.rng.uniform(1, 4))
        return np.where(self.mask | ~self.mask.any(), 0, shade)

    def vessels(self) -> Array:
        """Return the shade of vessels, where there are any: lines along which a random field is zero, in patches."""
        total, draw = np.zeros(self.mask.shape), self.rng.uniform
        if self.rng.random() >= _VESSELS:
            return total
        for width in (draw(4, 8), draw(2, 4)):
            field = self.field(width)
            slope = np.hypot(*np.gradient(field)) * self.unit + 1e-3
            lines = np.exp(-np.square(field / slope / draw(0.4, 0.9)))
            total = np.maximum(total, lines * (self.field(10) > 0.2))
        return np.asarray(draw(0.2, 0.9) * total * np.where(self.mask, draw(0, 0.6), 1))

    def highlights(self, height: Array, lamp: Array) -> Array:
        """Return highlights: a small share of the wet surface that faces half way between lamp and camera."""
        draw = self.rng.uniform
        rippled = self.blurred(height, 1.0) + draw(0.3, 1) * self.unit * self.field(draw(2.5, 4))
        half = lamp + np.array([0, 0, 1.0])
        facing = _facing(rippled, half / np.linalg.norm(half))
        bright = facing > np.quantile(facing, 1 - draw(0.003, 0.025))
        return np.asarray(draw(2, 8) * self.blurred(bright.astype(float), 0.6))


def _bulge(mask: Mask, margin: int) -> Array:
    """Return the solution of Poisson's equation on a mask, zero at its edge: its root over a disc is half a sphere.

    What touches the edge of the image goes on beyond it for ``margin`` pixels.
    """
    wide = np.pad(np.pad(mask, margin, mode="edge"), 1)
    inside = np.flatnonzero(wide)
    number = np.full(wide.size, -1)
    number[inside] = np.arange(len(inside))
    near = [number[inside + step] for step in (1, -1, wide.shape[1], -wide.shape[1])]
    rows = np.concatenate([np.flatnonzero(other >= 0) for other in near])
    columns = np.concatenate([other[other >= 0] for other in near])
    shape = (len(inside), len(inside))
    laplacian = 4 * sparse.identity(shape[0], format="csc") - sparse.csc_matrix(
        (np.ones(len(rows)), (rows, columns)), shape=shape
    )
    solved = np.zeros(wide.size)
    solved[inside] = spsolve(laplacian, np.ones(shape[0]))
    edge = margin + 1
    return np.asarray(np.clip(solved.reshape(wide.shape)[edge:-edge, edge:-edge], 0, None))


def _facing(height: Array, direction: Array) -> Array:
    """Return the cosine between a surface's normal and a direction (column, row, towards the camera)."""
    down, right = np.gradient(height)
    return np.asarray((direction[2] - right * direction[0] - down * direction[1]) / np.sqrt(1 + right**2 + down**2))


def _standard(image: Array) -> Array:
    return np.asarray((image - image.mean()) / max(float(image.std()), 1e-9))
