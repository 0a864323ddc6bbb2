"""What a public image of the same anatomy says of patients' appearance: a guess that noise is not paid for.

The noisy mean vector of patients (:class:`medsynth.models.appearance.AppearanceSpace`) tells where the organ lies in
the public image: the similarity with a stretch along each axis under which the image explains most of the vector. How
grey values of the public image go with those of patients is a small matrix, least squares again. What is left of the
vector after that is shorter than the vector, and so loses less to the noise. Public data and released statistics alone
are read, so this is post-processing and costs no privacy.

Source: mutual information finds a place without knowing how grey values go together (Viola and Wells 1997); here the
energy that a linear map of cosines of the grey value explains does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from scipy.spatial.transform import Rotation

from medsynth.imaging.template import PublicImage
from medsynth.models.label_features import LeastSquares, Singles
from medsynth.models.pose import Array

Waves = Callable[[NDArray[np.floating]], Array]

_MAPS, _VOXELS = 16, 2000  # label maps, and voxels of each, that stand for all
_SEARCHED, _EVERY = 64, 4  # the place is found by so many directions, the most varied ones, on every fourth voxel
_PITCHES = (-0.4, 0.0, 0.4)  # radians about the left-right axis from which the search starts
_STEPS = np.array([4.0] * 3 + [0.2] * 3 + [0.1] * 3)  # mm, radians, logarithm of the stretch: what is a usual change
_ROUNDS = 6  # of Powell's method
_BELIEF = 0.02  # a usual change costs this share of the energy, once squared
_RIDGE = 0.01  # of the mean square of a predictor
_DOUBT = 0.5  # public belief: deviation of an entry of the matrix between grey values


class Template:
    """A public image beside released label maps.

    Args:
        image: the public image with the place (mm) near which the organ's centre lies.
        fit: the least squares whose vectors are guessed; its label maps are drawn ones.
        maps: label maps (map, \\*spatial) of the mask generator, never patients'.
        waves: cosines (level, \\*values) of grey values in [-1, 1].
    """

    def __init__(self, image: PublicImage, fit: LeastSquares, maps: Sequence[NDArray[np.uint8]], waves: Waves) -> None:
        self._image, self._waves = image, waves
        rng, shown = np.random.default_rng(0), [label for label in maps if fit.features.has_pose(label)]
        parts = [fit.sampled(label, _VOXELS, rng) for label in shown[:_MAPS]]
        self._places = np.concatenate([places for places, _ in parts])
        self._rows = np.concatenate([rows for _, rows in parts])

    def guess(self, vectors: Array, noise_sd: float) -> Array:
        """Return the mean vectors (level, direction) that the image leads to expect.

        Args:
            vectors: (level, direction) noisy mean vectors of patients.
            noise_sd: standard deviation of the noise in each entry.
        """
        found = [self._search(pitch, vectors[:, :_SEARCHED]) for pitch in _PITCHES]
        _, change = min(found, key=lambda one: one[0])
        return self._explained(self._predictors(change, self._places, self._rows), vectors, noise_sd)

    def _search(self, pitch: float, vectors: Array) -> tuple[float, Array]:
        """Return what is missed (share of energy, and a penalty on stretches) and the place, from one start on."""
        total = max(float(np.square(vectors).sum()), 1e-12)
        places, rows = self._places[::_EVERY], self._rows[::_EVERY, :_SEARCHED]

        def missed(step: Array) -> float:
            left = vectors - self._explained(self._predictors(step * _STEPS, places, rows), vectors, 0.0)
            return float(np.square(left).sum()) / total + _BELIEF * float(np.square(step[6:]).sum())

        start = np.zeros(len(_STEPS))
        start[3] = pitch / _STEPS[3]
        options = {"maxiter": _ROUNDS, "xtol": 0.02, "ftol": 1e-3}
        result = optimize.minimize(missed, start, method="Powell", options=options)
        return float(result.fun), np.asarray(result.x) * _STEPS

    def _predictors(self, change: Array, places: Array, rows: Singles) -> Array:
        """Return vectors (1 + level, direction) of a constant and of the image's grey values at one place.

        Args:
            change: shift (mm), rotation vector and logarithms of the stretch along the grid's axes.
            places: (voxel, axis) in the organ, mm.
            rows: (voxel, direction) what each adds to a vector.
        """
        turn = Rotation.from_rotvec(change[3:6]).as_matrix() * np.exp(change[6:])
        grey = self._image.at(self._image.centre + change[:3] + places @ turn.T)
        values = np.vstack([np.ones(len(grey)), self._waves(grey)]) / len(grey)
        return np.asarray(values.astype(np.float32) @ rows, np.float64)

    def _explained(self, predictors: Array, vectors: Array, noise_sd: float) -> Array:
        """Return the part of vectors (level, direction) that predictors (predictor, direction) explain linearly."""
        gram = predictors @ predictors.T
        held = _RIDGE * np.trace(gram) / len(gram) + (noise_sd / _DOUBT) ** 2
        matrix = np.linalg.solve(gram + held * np.eye(len(gram)), predictors @ vectors.T)
        return np.asarray(matrix.T @ predictors)
