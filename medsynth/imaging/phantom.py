"""Public phantoms: random label maps and random-contrast images of them, in two or three dimensions.

Nothing here reads a patient; shapes and contrasts are drawn from fixed, published ranges. The rendering follows the
idea of SynthSeg (Billot et al., Medical Image Analysis 2023, section 3.1): a random intensity distribution a label,
unlabelled tissues around it, bias field, partial volume and noise.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medsynth.config import Grid
from medsynth.errors import ConfigError
from medsynth.randomness import generator

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.uint8]

SIZE_RANGE = (0.05, 0.30)
"""Semi-axis of one structure as a fraction of the grid's axis length."""
TISSUE_RANGE = (3, 6)
"""Number of unlabelled tissues around the structures."""
_MARGIN = 0.92
_TRIES = 12
_LEAST_VOXELS = 4
# Variance that cubic B-spline interpolation leaves of unit white coefficients, an axis (mean over the knot interval).
_SPLINE_VARIANCE = 0.479


def sample_label_maps(grid: Grid, count: int, seed: int) -> Labels:
    """Draw random smooth structures: one chain of touching, warped ellipsoids, labels 1 to ``grid.classes`` - 1.

    Args:
        grid: shape and labels; only public values are used.
        count: number of maps.
        seed: map ``i`` depends on ``seed`` and ``i`` only.

    Returns:
        ``(count, *shape)`` label values; every label occurs in every map, neighbours in the chain touch.

    Raises:
        ConfigError: the grid is too small for so many labels.
    """
    maps = np.empty((count, *grid.shape), np.uint8)
    for index in range(count):
        maps[index] = _label_map(grid.shape, grid.classes - 1, generator(seed, "phantom-label", index))
    return maps


def phantom_pairs(grid: Grid, count: int, seed: int) -> tuple[Floats, Labels]:
    """Draw label maps and render one image of each.

    Args:
        grid: the public grid.
        count: number of pairs.
        seed: pair ``i`` depends on ``seed`` and ``i`` only.

    Returns:
        images ``(count, channel, *shape)`` in [-1, 1] and labels ``(count, *shape)``.
    """
    labels = sample_label_maps(grid, count, seed)
    images = np.empty((count, grid.channels, *grid.shape), np.float32)
    for index, label in enumerate(labels):
        images[index] = render(label, grid, generator(seed, "phantom-image", index))
    return images, labels


def render(label: Labels, grid: Grid, rng: np.random.Generator, channels: int | None = None) -> Floats:
    """Render a label map with random contrast inside random unlabelled tissues.

    Args:
        label: ``(*spatial)`` label values; any shape of ``grid.spatial_dims`` axes.
        grid: names of the labels and the percentiles that map to -1 and 1.
        rng: all randomness of the image.
        channels: 1 grey, 3 colour; the grid's own by default.

    Returns:
        ``(channel, *spatial)`` in [-1, 1].
    """
    tissues = _surround(label, grid.classes, rng)
    count = int(tissues.max()) + 1
    if (grid.channels if channels is None else channels) == 3:
        image = _photograph(tissues, count, grid.classes, rng)
    else:
        means = _label_means(rng.uniform(0.05, 1.0, count), grid.classes, rng)
        spreads = rng.uniform(0.01, 0.10, count)
        image = acquire(paint(tissues, means, spreads, rng), rng, noise=float(rng.uniform(0.005, 0.05)))[None]
    return scale(image, grid.intensity_percentiles)


def smooth_field(rng: np.random.Generator, shape: tuple[int, ...], knots: int) -> Floats:
    """Draw a smooth random field: cubic B-splines over ``knots`` (at least 4) normal coefficients an axis.

    Returns:
        ``(*shape)`` of zero mean and about unit variance over draws.
    """
    field = rng.standard_normal((knots,) * len(shape), dtype=np.float32)
    for size in shape:
        field = np.tensordot(field, _spline_basis(size, knots), axes=([0], [1]))
    return np.asarray(field * _SPLINE_VARIANCE ** (-len(shape) / 2), np.float32)


def paint(
    tissues: npt.NDArray[np.integer],
    means: npt.NDArray[np.floating],
    spreads: npt.NDArray[np.floating],
    rng: np.random.Generator,
) -> Floats:
    """Give each tissue its mean and a texture of fine and coarse grain.

    Args:
        tissues: ``(*spatial)`` tissue indices.
        means: ``(tissue,)`` intensities around [0, 1].
        spreads: ``(tissue,)`` standard deviations of the texture.
        rng: randomness of the texture.
    """
    fine = rng.standard_normal(tissues.shape, dtype=np.float32)
    texture = 0.8 * fine + 0.6 * smooth_field(rng, tissues.shape, 10)
    return np.asarray(means.astype(np.float32)[tissues] + spreads.astype(np.float32)[tissues] * texture, np.float32)


def acquire(image: Floats, rng: np.random.Generator, noise: float, blur_voxels: float | None = None) -> Floats:
    """Imitate a scanner: partial volume, a smooth multiplicative bias field, Rician noise.

    Args:
        image: ``(*spatial)`` intensities around [0, 1].
        rng: all randomness.
        noise: standard deviation of the noise in each of the two channels of the receiver.
        blur_voxels: standard deviation of the point spread; drawn from 0.5 to 1 by default.
    """
    width = float(rng.uniform(0.5, 1.0)) if blur_voxels is None else blur_voxels
    blurred = ndimage.gaussian_filter(image, width, mode="nearest", truncate=2.5)
    bias = np.exp(float(rng.uniform(0.05, 0.2)) * smooth_field(rng, image.shape, 4))
    real, imaginary = noise * rng.standard_normal((2, *image.shape), dtype=np.float32)
    return np.asarray(np.hypot(np.clip(blurred, 0, None) * bias + real, imaginary), np.float32)


def scale(image: Floats, percentiles: tuple[float, float]) -> Floats:
    """Map the image's own lower and upper percentile to -1 and 1 and clip."""
    low, high = np.percentile(image, percentiles)
    return np.asarray(np.clip((image - low) * (2 / max(high - low, 1e-6)) - 1, -1, 1), np.float32)


def touching(label: Labels, first: int, second: int) -> bool:
    """Return whether two labels share a face somewhere."""
    for axis in range(label.ndim):
        below, above = np.swapaxes(label, 0, axis)[:-1], np.swapaxes(label, 0, axis)[1:]
        if np.any((below == first) & (above == second)) or np.any((below == second) & (above == first)):
            return True
    return False


@lru_cache(maxsize=64)
def _spline_basis(size: int, knots: int) -> Floats:
    """Return the ``(size, knots)`` matrix of uniform cubic B-splines."""
    position = np.linspace(0, knots - 3, size)[:, None] + 1 - np.arange(knots)
    far = np.abs(position)
    basis = np.where(far < 1, 2 / 3 - far**2 + far**3 / 2, np.clip(2 - far, 0, None) ** 3 / 6).astype(np.float32)
    basis.flags.writeable = False
    return basis


@lru_cache(maxsize=8)
def _coordinates(shape: tuple[int, ...]) -> Floats:
    """Return ``(axis, *shape)`` voxel centres in [-1, 1]."""
    axes = [(np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1 for size in shape]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"))
    grid.flags.writeable = False
    return grid


def _label_map(shape: tuple[int, ...], labels: int, rng: np.random.Generator) -> Labels:
    for attempt in range(_TRIES):
        # Later attempts draw from the larger half only: tiny structures are what fails on coarse grids.
        label = _chain(shape, labels, rng, smallest=SIZE_RANGE[0] * min(1 + attempt / 3, 3))
        present = np.bincount(label.ravel(), minlength=labels + 1)[1:].min() >= _LEAST_VOXELS
        if present and all(touching(label, k, k + 1) for k in range(1, labels)):
            return label
    raise ConfigError(f"grid.shape {shape} is too small for {labels} labels that touch: use a finer grid")


def _chain(shape: tuple[int, ...], labels: int, rng: np.random.Generator, smallest: float) -> Labels:
    """Draw one bent chain of warped ellipsoids; sizes in half axis lengths, so twice the fraction of the axis."""
    dims = len(shape)
    base = 2 * float(rng.uniform(smallest, SIZE_RANGE[1]))
    radii = base * rng.uniform(0.65, 1.0, dims) * rng.uniform(0.8, 1.2, (labels, dims))
    steps = rng.uniform(0.6, 0.85, labels - 1) * (radii[:-1, 0] + radii[1:, 0])
    along = np.concatenate([[0.0], np.cumsum(steps)])
    along -= along.mean()
    frame = np.linalg.qr(rng.standard_normal((dims, dims)))[0]
    extent = (np.abs(frame[:, :1] * along) + np.sqrt((frame**2) @ (radii**2).T)).max(axis=1)
    shrink = min(1.0, _MARGIN / float(extent.max()))
    radii, along, extent = radii * shrink, along * shrink, extent * shrink
    centre = rng.uniform(-0.8, 0.8, dims) * (1 - extent)

    shifted = _coordinates(shape) - centre.reshape(-1, *[1] * dims).astype(np.float32)
    local = np.tensordot(frame.T.astype(np.float32), shifted, axes=1)
    bend = rng.uniform(-0.35, 0.35) / max(float(np.abs(along).max() + base), 0.2)
    local[1] += np.float32(bend) * local[0] ** 2
    for axis in range(dims):
        local[axis] += np.float32(rng.uniform(0.05, 0.2) * radii.mean()) * smooth_field(rng, shape, 7)
    return _nearest(local, along, radii)


def _nearest(local: Floats, along: npt.NDArray[np.floating], radii: npt.NDArray[np.floating]) -> Labels:
    """Give a voxel to the ellipsoid it lies deepest in."""
    best = np.ones(local.shape[1:], np.float32)
    label = np.zeros(local.shape[1:], np.uint8)
    for index, (offset, semi) in enumerate(zip(along, radii, strict=True), start=1):
        depth = ((local[0] - np.float32(offset)) / np.float32(semi[0])) ** 2
        for axis in range(1, len(local)):
            depth += (local[axis] / np.float32(semi[axis])) ** 2
        inside = depth < best
        best[inside] = depth[inside]
        label[inside] = index
    return label


def _surround(label: Labels, classes: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Fill the background with random tissues, a few blobs and sometimes a thin shell around the structures."""
    shape = label.shape
    count = int(rng.integers(TISSUE_RANGE[0], TISSUE_RANGE[1] + 1))
    regions = np.stack([smooth_field(rng, shape, int(rng.integers(4, 8))) for _ in range(count - 1)])
    around = regions.argmax(axis=0).astype(np.uint8)
    for _ in range(int(rng.integers(0, 3))):
        around[_chain(shape, 1, rng, SIZE_RANGE[0]) > 0] = count - 1
    if rng.random() < 0.5:
        width = int(rng.integers(3, 6))
        around[ndimage.uniform_filter((label > 0).astype(np.float32), width, mode="nearest") > 0.05] = count - 1
    return np.where(label > 0, label, around + classes).astype(np.uint8)


def _label_means(means: npt.NDArray[np.floating], classes: int, rng: np.random.Generator) -> npt.NDArray[np.floating]:
    """In half of the draws the labelled structures are parts of one organ: nearly the same mean."""
    if classes > 2 and rng.random() < 0.5:
        means = means.copy()
        means[2:classes] = means[1] + rng.normal(0, 0.06, (classes - 2, *means.shape[1:]))
    return np.asarray(np.clip(means, 0.02, 1.1))


def _photograph(tissues: npt.NDArray[np.uint8], count: int, classes: int, rng: np.random.Generator) -> Floats:
    """Paint correlated colours with shading, grain, a dark frame now and then, and specular highlights."""
    shape = tissues.shape
    hue = np.sort(rng.uniform(0.3, 1.0, 3))[::-1] if rng.random() < 0.8 else rng.uniform(0.3, 1.0, 3)
    brightness = rng.uniform(0.45, 1.0, (count, 1))
    colours = _label_means(np.clip(hue * brightness + rng.normal(0, 0.05, (count, 3)), 0.02, 1), classes, rng)
    grain = 0.03 * smooth_field(rng, shape, max(4, min(shape) // 5)) + 0.02 * rng.standard_normal(shape, np.float32)
    relief = float(rng.uniform(0.05, 0.2)) * smooth_field(rng, shape, 5)
    light = np.exp(relief + grain)
    if rng.random() < 0.4:
        light *= (np.linalg.norm(_coordinates(shape), axis=0) < rng.uniform(1.0, 1.3)) * 0.98 + 0.02
    image = np.moveaxis(colours.astype(np.float32)[tissues], -1, 0) * light
    shine = smooth_field(rng, shape, max(5, min(shape) // 6))
    gloss = np.clip((shine - float(rng.uniform(2.2, 3.5))) * 4, 0, 1) * (light > 0.1)
    width = float(rng.uniform(0.4, 0.9))
    image = image + gloss * (1 - image)
    blurred = np.stack([ndimage.gaussian_filter(plane, width, mode="nearest", truncate=2.5) for plane in image])
    return np.asarray(np.clip(blurred + 0.01 * rng.standard_normal(blurred.shape, np.float32), 0, 1), np.float32)
