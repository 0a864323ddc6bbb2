"""The two sums of appearance: what they say is unbiased, and the second sharpens the first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from medsynth.config import Appearance, Grid, Masks, Privacy, Study, Train
from medsynth.imaging.cohort import Patient
from medsynth.imaging.phantom import sample_label_maps
from medsynth.models.appearance import AppearanceSpace
from medsynth.models.drafting import TwiceMeasured, open_drafting
from medsynth.privacy.entropy import Entropy, open_entropy
from medsynth.privacy.mechanism import GaussianSum
from medsynth.stages.appearance_sums import AppearanceSums, plan_sums

PATIENTS = 24  # 0.8 of those declared


def study_of(rank: int, channels: int = 1, epsilon: float = 8, factors: int = 0) -> Study:
    grid = Grid(
        spatial_dims=2 if rank == 2 else 3,
        shape=(32,) * rank,
        channels=3 if channels == 3 else 1,
        labels={0: "none", 1: "organ", 2: "part"},
    )
    privacy = Privacy(epsilon=epsilon, delta=1e-3, declared_patients=30)
    train = Train(appearance=Appearance(coefficients=(4,) * rank, factors=factors))
    masks = Masks(coefficients=(4,) * rank)
    return Study(name="sums-nonprivate", grid=grid, privacy=privacy, train=train, masks=masks)


def maps_of(study: Study, count: int) -> list[np.ndarray]:
    """Return label maps of one organ, a little farther on in each."""
    label, rng = sample_label_maps(study.grid, 1, 2)[0], np.random.default_rng(count)
    return [np.roll(label, rng.integers(-1, 2, label.ndim), tuple(range(label.ndim))) for _ in range(count)]


def patients_of(study: Study) -> list[Patient]:
    patients = []
    for index, label in enumerate(maps_of(study, PATIENTS)):
        texture = np.random.default_rng(index).standard_normal(label.shape)
        image = np.stack([np.array([-0.6, 0.2, 0.6])[label] + 0.3 * texture] * study.grid.channels).clip(-1, 1)
        patients.append(Patient(f"p{index}", torch.tensor(image[None]).float(), torch.tensor(label[None])))
    return patients


def sums_of(study: Study, noise: float, **fixed: float) -> AppearanceSums:
    space = open_drafting(study.grid, study.train.appearance, maps_of(study, 24))
    sums = plan_sums(study, space, noise)
    return replace(sums, mechanisms=tuple(replace(one, **fixed) for one in sums.mechanisms)) if fixed else sums


def density(sums: AppearanceSums, patients: list[Patient]) -> np.ndarray:
    """What is released of distributions, several times."""
    draws = [sums.measure(patients, entropy) for entropy in [open_entropy("test_only")] for _ in range(6)]
    return np.stack([draw.density for draw in draws])


@pytest.mark.parametrize(("rank", "channels"), [(2, 1), (2, 3), (3, 1)])
def test_next_to_no_noise_gives_the_patients_mean(rank: int, channels: int) -> None:
    study = study_of(rank, channels)
    patients = patients_of(study)
    (plain,) = density(sums_of(study_of(rank, channels, float("inf")), 0.0), patients)[:1]
    quiet = density(sums_of(study, 1e-9, clip_norm=1e3), patients)
    np.testing.assert_allclose(quiet[0], plain, atol=1e-3 * np.abs(plain).max())


@pytest.mark.parametrize(("rank", "channels"), [(2, 3), (3, 1)])
def test_the_second_sum_sharpens_the_first(rank: int, channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the first alone with as much budget; before it is shrunk, what is read back has the noise that is told."""
    study = study_of(rank, channels)
    patients = patients_of(study)

    def read(self: AppearanceSpace, mean: np.ndarray, noise_sd: float) -> SimpleNamespace:
        return SimpleNamespace(density=mean[1:] / mean[0], noise_sd=noise_sd / mean[0])

    monkeypatch.setattr(AppearanceSpace, "statistics", read)
    both = sums_of(study, 0.2)
    first = both.mechanisms[0]
    alone = replace(both, mechanisms=(replace(first, noise_multiplier=first.noise_multiplier / np.sqrt(2)),))
    noises = [density(sums, patients).std(0, ddof=1) for sums in (both, alone)]
    noises = [np.sqrt(np.square(noise).mean()) for noise in noises]
    assert noises[0] < 0.85 * noises[1]
    assert noises[0] == pytest.approx(both.measure(patients, open_entropy("test_only")).noise_sd, rel=0.2)


def test_a_patient_without_foreground_adds_nothing_to_either() -> None:
    study = study_of(2)
    empty = Patient("none", torch.zeros(1, 1, 32, 32), torch.zeros(1, 32, 32, dtype=torch.uint8))
    space = sums_of(study, 1.0).space
    assert isinstance(space, TwiceMeasured)
    vector = space.vector(empty.images[0].numpy(), empty.labels[0].numpy())
    centre = np.random.default_rng(0).standard_normal(space.size - 1)
    assert not vector.any() and not space.around(vector, centre).any()


def test_factors_and_studies_without_privacy_have_one_sum() -> None:
    names = [one.name for one in sums_of(study_of(2), 1.0).mechanisms]
    assert names == ["appearance", "appearance_again"]
    assert [one.name for one in sums_of(study_of(2, epsilon=float("inf")), 0.0).mechanisms] == ["appearance"]
    photographs = sums_of(study_of(2, channels=3, factors=2), 1.0)
    assert [one.name for one in photographs.mechanisms] == ["appearance"]
    assert not isinstance(photographs.space, TwiceMeasured)


def test_the_second_vector_of_a_patient_depends_on_releases_and_himself_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured around anything that was not released, it would move with the other patients."""
    study = study_of(2)
    sums, patients = sums_of(study, 1.0), patients_of(study)[:4]
    first = np.concatenate([[0.5], np.linspace(-0.1, 0.1, sums.space.size - 1)])
    seen: list[list[np.ndarray]] = []

    def release(self: GaussianSum, units: Iterable[np.ndarray], entropy: Entropy) -> np.ndarray:
        vectors = list(units)
        if self.name == "appearance_again":
            seen.append(vectors)
        return first  # the same transcript for both cohorts

    monkeypatch.setattr(GaussianSum, "release", release)
    for cohort in (patients, patients[1:]):
        sums.measure(cohort, open_entropy("test_only"))
    np.testing.assert_array_equal(seen[0][1:], seen[1])
