"""Which statistics dress label maps: distributions of grey values alone, or factors between patients and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from medsynth.config import Appearance, Grid
from medsynth.models.appearance import AppearanceSpace
from medsynth.models.image_factors import FactorSpace
from medsynth.models.pose import Array


class Drafting(Protocol):
    """A public layout of statistics: from a patient to a vector, from the released mean of vectors to images."""

    @property
    def statistics_type(self) -> Any:
        """The frozen dataclass of arrays that :meth:`statistics` returns."""
        ...

    @property
    def size(self) -> int:
        """Length of a patient's vector."""
        ...

    def vector(self, image: NDArray[np.float32], label: NDArray[np.uint8]) -> Array:
        """Return the statistics of one image (channel, \\*spatial), zeros for one without foreground."""
        ...

    def statistics(self, mean: Array, noise_sd: float) -> Any:
        """Read the released mean of vectors, with noise of ``noise_sd`` in each entry, back into statistics."""
        ...

    def fits(self, statistics: Any) -> bool:
        """Return whether statistics are of this layout: another version of medsynth may have had another."""
        ...

    def render(self, label: NDArray[np.uint8], statistics: Any, rng: np.random.Generator) -> NDArray[np.float32]:
        """Return an image (channel, \\*spatial) in [-1, 1] of a label map."""
        ...


@runtime_checkable
class TwiceMeasured(Drafting, Protocol):
    """A layout whose vectors may be measured once more around what a first release says of them, with less noise."""

    def centre(self, mean: Array, noise_sd: float) -> Array:
        """Return what a released mean of vectors says that vectors are."""
        ...

    def around(self, vector: Array, centre: Array) -> Array:
        """Return a patient's vector measured around a released centre, as long as before."""
        ...

    def joined(self, means: tuple[Array, Array], centre: Array, noise_sds: tuple[float, float]) -> tuple[Array, float]:
        """Return the mean of vectors that both releases say together, and the noise in each of its entries."""
        ...


def open_drafting(grid: Grid, settings: Appearance, maps: Sequence[NDArray[np.uint8]] = ()) -> Drafting:
    """Return the layout that the settings ask for.

    Args:
        grid: the public voxel grid.
        settings: ``factors`` above 0 asks for factors between patients.
        maps: label maps of the mask generator, never patients'; needed to measure, not to render.
    """
    return (FactorSpace if settings.factors else AppearanceSpace)(grid, settings, maps)
