"""Which place beside one foreground is like which place beside another: by pose, and near the surface by distance."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from medsynth.models.label_features import Place
from medsynth.models.pose import Array, sampled, voxel_places

_NEAR, _FAR = 4.0, 10.0  # voxels from the surface up to which distances must agree, and from which on they need not
_STEPS, _LONGEST = 8, 2.0  # Newton's, and how far one may go
_SOFT = 0.7  # voxels by which distances are smoothed for their gradient
_FLAT = 0.3  # least square of a gradient: on a ridge of the distance there is no direction to go


def corresponding(voxels: Array, shape: tuple[int, ...], here: Place, there: Place) -> Array:
    """Return for each voxel of one label map the place that is like it in another, (axis, voxel) in voxels.

    The frames of both foregrounds say where it is about; then it moves along the gradient of the distance until it is
    as far from the surface as the voxel is (Newton 1669), so that both surfaces meet. That fades out where it is far.

    Args:
        voxels: (axis, voxel) centres in half grids, of all voxels.
        shape: of the grid.
        here: of the label map whose voxels are asked about.
        there: of the other.
    """
    offset = voxels - here.centre[:, None]
    near = np.clip((_FAR - np.abs(here.distance)) / (_FAR - _NEAR), 0, 1)
    close, wide = (
        end @ np.linalg.solve(start, offset) for start, end in ((here.narrow, there.narrow), (here.wide, there.wide))
    )
    points = voxel_places(near * close + (1 - near) * wide + there.centre[:, None], shape)
    moved = np.flatnonzero(near)
    points[:, moved] = _as_far(points[:, moved], here.distance[moved], near[moved], there.distance.reshape(shape))
    return points


def _as_far(points: Array, wanted: Array, weights: Array, distance: Array) -> Array:
    """Return points moved until ``distance`` is as ``wanted`` there, as far as ``weights`` say."""
    gradients = np.gradient(ndimage.gaussian_filter(distance, _SOFT))
    for _ in range(_STEPS):
        missing = np.clip(sampled(distance, points) - wanted, -_LONGEST, _LONGEST)
        slope = np.stack([sampled(part, points) for part in gradients])
        points = points - weights * missing * slope / np.maximum(np.square(slope).sum(0), _FLAT)
    return points
