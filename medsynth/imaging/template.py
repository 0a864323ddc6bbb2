"""Public images of anatomy that come with a library, so that nothing is fetched and no patient is in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medsynth.errors import ConfigError

Array = NDArray[np.float64]

_PERCENTILES = (0.5, 99.5)
_AROUND_MM = 30.0  # of the centre: the grey values there are brought to [-1, 1]


@dataclass(frozen=True)
class PublicImage:
    """A public image.

    Attributes:
        voxels: (x, y, z) grey values, about [-1, 1] around the centre.
        to_voxels: (3, 4) from RAS+ millimetres to voxel indices.
        centre: (3,) where the organ lies, RAS+ millimetres.
    """

    voxels: NDArray[np.float32]
    to_voxels: Array
    centre: Array

    def at(self, points: Array) -> Array:
        """Return the grey values (point,) in [-1, 1] at RAS+ millimetres (point, 3)."""
        places = points @ self.to_voxels[:, :3].T + self.to_voxels[:, 3]
        return np.asarray(np.clip(ndimage.map_coordinates(self.voxels, places.T, order=1, mode="nearest"), -1, 1))


def mni152(centre_mm: tuple[float, float, float]) -> PublicImage:
    """Return the T1-weighted ICBM 152 nonlinear symmetric template at 1 mm (Fonov et al. 2009, 2011), from nilearn.

    Args:
        centre_mm: where the organ lies in it, RAS+ millimetres.

    Raises:
        ConfigError: there is no brain at that place.
    """
    from nilearn.datasets import load_mni152_template

    image = load_mni152_template(resolution=1)
    inverse, centre = np.linalg.inv(image.affine), np.array(centre_mm)
    voxels = np.asarray(image.dataobj, np.float32)
    middle = np.round(inverse[:3, :3] @ centre + inverse[:3, 3]).astype(int)
    reach = int(_AROUND_MM)
    near = voxels[tuple(slice(max(place - reach, 0), max(place + reach + 1, 0)) for place in middle)]
    low, high = np.percentile(near, _PERCENTILES) if near.size else (0.0, 0.0)
    if not high > low:
        named = ", ".join(f"{place:g}" for place in centre_mm)
        raise ConfigError(
            f"the MNI152 template shows no brain at train.appearance.template_centre_mm [{named}]: give the centre of "
            "the organ in millimetres (right, anterior, superior of the origin)"
        )
    scaled = np.asarray((voxels - low) / (high - low) * 2 - 1, np.float32)
    return PublicImage(scaled, inverse[:3], centre)
