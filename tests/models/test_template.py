"""A public image of the same anatomy: found under noise, of use where it is alike, harmless where it is not."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from medsynth.config import Appearance, Grid
from medsynth.errors import ConfigError
from medsynth.imaging.phantom import sample_label_maps, smooth_field
from medsynth.imaging.template import PublicImage, mni152
from medsynth.models import appearance
from medsynth.models.appearance import AppearanceSpace, waves
from medsynth.models.label_features import LabelFeatures, LeastSquares
from medsynth.models.template import Template

_GRID = Grid(spatial_dims=3, shape=(24, 32, 24), spacing_mm=(2.0,) * 3, labels={0: "none", 1: "organ"})
_LEVELS = 4


def public_image(seed: int) -> PublicImage:
    """Smooth tissues, 2 mm, the organ's centre in the middle."""
    field = smooth_field(np.random.default_rng(seed), (48, 48, 48), 6).clip(-2, 2) / 2
    return PublicImage(field.astype(np.float32), np.hstack([np.eye(3) / 2, np.full((3, 1), 24.0)]), np.zeros(3))


def fitted() -> tuple[LeastSquares, list[np.ndarray]]:
    maps = list(sample_label_maps(_GRID, 24, 1))
    return LeastSquares(LabelFeatures(_GRID, (4, 5, 4), (3, 4, 3)), maps), maps


def mean_vector(fit: LeastSquares, image: PublicImage) -> np.ndarray:
    """Of patients who show the image turned, moved and with other contrast, each under the pose of its organ."""
    turn, shift = Rotation.from_rotvec([0.15, -0.1, 0.05]).as_matrix(), np.array([3.0, -2.0, 2.0])
    vectors = []
    for label in sample_label_maps(_GRID, 12, 2):
        places = fit.features.places(label, fit.mean_pose)
        grey = -0.8 * image.at(shift + places @ turn.T).reshape(label.shape) + 0.1
        vectors.append(fit.vector(waves(grey, _LEVELS), label))
    return np.mean(vectors, axis=0)


def errors(fit: LeastSquares, maps: list[np.ndarray], image: PublicImage, template: PublicImage) -> tuple[float, float]:
    """Squared error of a noisy mean vector, shrunk alone and around what the template says, over its square."""
    true = mean_vector(fit, image)
    sd = float(np.sqrt(np.square(true).mean()))
    noisy = true + sd * np.random.default_rng(5).standard_normal(true.shape)
    guess = Template(template, fit, maps, partial(waves, levels=_LEVELS)).guess(noisy, sd)
    read = fit.shrunk(noisy, sd), guess + fit.shrunk(noisy - guess, sd)
    alone, around = (float(np.square(vector - true).sum() / np.square(true).sum()) for vector in read)
    return alone, around


def test_a_public_image_of_the_same_anatomy_takes_noise_away_whatever_its_place_and_contrast() -> None:
    fit, maps = fitted()
    alone, around = errors(fit, maps, public_image(3), public_image(3))
    assert around < 0.5 * alone


def test_a_public_image_of_something_else_does_little_harm() -> None:
    fit, maps = fitted()
    alone, around = errors(fit, maps, public_image(3), public_image(4))
    assert around < 1.2 * alone


def test_the_space_reads_noisy_means_around_the_template(monkeypatch: pytest.MonkeyPatch) -> None:
    image, (fit, maps) = public_image(3), fitted()
    monkeypatch.setattr(appearance, "mni152", lambda centre: image)
    vectors = mean_vector(fit, image)
    mean = np.concatenate([[appearance._COUNT_WEIGHT], vectors.reshape(-1)])
    sd = float(np.sqrt(np.square(vectors).mean()))
    noise = sd * np.random.default_rng(5).standard_normal(vectors.size)
    errors, densities = [], []
    for centre in (None, (0.0, 0.0, 0.0)):
        settings = Appearance(coefficients=(4, 5, 4), levels=_LEVELS, template_centre_mm=centre)
        space = AppearanceSpace(_GRID, settings, maps)
        assert space.features.size == fit.features.size
        read = space.centre(mean + np.concatenate([[0.0], noise]), sd)
        errors.append(float(np.square(read - vectors.reshape(-1)).sum()))
        densities.append(space.statistics(mean + np.concatenate([[0.0], noise]), sd).density)
    assert errors[1] < 0.5 * errors[0]
    assert not np.allclose(densities[0], densities[1])


def test_without_noise_nothing_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(appearance, "mni152", lambda centre: public_image(3))
    monkeypatch.setattr(Template, "guess", lambda *_: pytest.fail("there is nothing to guess"))
    maps = list(sample_label_maps(_GRID, 4, 1))
    space = AppearanceSpace(_GRID, Appearance(coefficients=(2, 2, 2), template_centre_mm=(0, 0, 0)), maps)
    mean = space.vector(smooth_field(np.random.default_rng(1), _GRID.shape, 6)[None].astype(np.float32), maps[0])
    assert np.isfinite(space.statistics(mean, 0.0).density).all()


@pytest.mark.parametrize("centre", [(0.0, 0.0, 300.0), (0.0, 0.0, -300.0), (-90.0, -120.0, -70.0)])
def test_a_place_outside_the_brain_is_said_before_any_patient_is_measured(centre: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match=r"no brain at train\.appearance\.template_centre_mm"):
        AppearanceSpace(_GRID, Appearance(coefficients=(2, 2, 2), template_centre_mm=centre), [np.ones(_GRID.shape)])


def test_the_template_comes_with_the_installation_and_shows_the_brain() -> None:
    image = mni152((-27.0, -21.0, -14.0))
    # White matter of the left centrum semiovale, grey matter of the left hippocampus, fluid of the left ventricle.
    white, grey, fluid = image.at(np.array([[-24.0, -20.0, 34.0], [-27.0, -21.0, -14.0], [-17.0, -34.0, 19.0]]))
    assert white > grey + 0.2 > fluid + 0.2
    assert image.at(np.array([[0.0, 0.0, 500.0]]))[0] == pytest.approx(-1)
