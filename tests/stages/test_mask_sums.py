"""The two sums of label maps: what they say is unbiased, the second sharpens the first, noise is told and held back."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest

from medsynth.config import Appearance, Grid, Masks, Privacy, Study, Train
from medsynth.imaging.phantom import sample_label_maps
from medsynth.models import shape_reader
from medsynth.models.mask_generator import MaskStatistics, ShapeSpace
from medsynth.privacy.entropy import Entropy, open_entropy
from medsynth.privacy.mechanism import GaussianSum
from medsynth.stages import mask_sums
from medsynth.stages.mask_sums import MaskSums, plan_sums

PATIENTS = 24  # 0.8 of those declared


def study_of(rank: int, epsilon: float = 8, **masks: object) -> Study:
    grid = Grid(spatial_dims=2 if rank == 2 else 3, shape=(24,) * rank, labels={0: "none", 1: "head", 2: "tail"})
    privacy = Privacy(epsilon=epsilon, delta=1e-3, declared_patients=30)
    train = Train(appearance=Appearance(coefficients=(5,) * rank))
    return Study(
        name="sums-nonprivate", grid=grid, privacy=privacy, masks=Masks(coefficients=(5,) * rank, **masks), train=train
    )


def one_organ(rank: int, seed: int = 0) -> list[np.ndarray]:
    """Return label maps (1, *spatial) of one organ, of another size and place in each patient."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.arange(24) + 0.5] * rank, indexing="ij")
    labels = []
    for _ in range(PATIENTS):
        centre, size = 12 + rng.normal(0, 0.6, rank), rng.uniform(0.85, 1.15)
        far = sum(((axis - c) / (r * size)) ** 2 for axis, c, r in zip(axes, centre, (8, 4, 5), strict=False))
        labels.append(np.where(far <= 1, 1 + (axes[0] > centre[0] + 1), 0).astype(np.uint8)[None])
    return labels


def true_means(sums: MaskSums, labels: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    poses = np.stack([sums.space.pose_vector(label[0]) for label in labels])
    return poses.mean(0), shapes_of(sums, labels, poses).mean(0)


def shapes_of(sums: MaskSums, labels: list[np.ndarray], poses: np.ndarray) -> np.ndarray:
    frames = [sums.space.pose(pose, poses.mean(0)) for pose in poses]
    return np.stack([sums.space.shape_vector(label[0], frame) for label, frame in zip(labels, frames, strict=True)])


def sums_of(study: Study, noise: float, **fixed: float) -> MaskSums:
    sums = plan_sums(study, ShapeSpace(study.grid, study.masks), noise)
    return replace(sums, mean=replace(sums.mean, **fixed), spread=replace(sums.spread, **fixed)) if fixed else sums


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
@pytest.mark.parametrize("rank", [2, 3])
def test_without_noise_they_are_the_patients_means_and_spread(rank: int, covariance: str) -> None:
    study, labels = study_of(rank, float("inf"), covariance=covariance), one_organ(rank)
    sums = sums_of(study, 0.0)
    found = sums.measure(labels, open_entropy("test_only"))
    pose, shape = true_means(sums, labels)
    np.testing.assert_allclose(found.pose_mean, pose, atol=1e-5)
    np.testing.assert_allclose(found.shape_mean, shape, atol=1e-4)
    poses = np.stack([sums.space.pose_vector(label[0]) for label in labels])
    np.testing.assert_allclose(found.pose_covariance, np.cov(poses.T, bias=True), atol=1e-5)
    assert not found.noise.any()
    deviations = shapes_of(sums, labels, poses) - shape
    if covariance == "diagonal":
        np.testing.assert_allclose(found.spread, np.mean([sums.space.band_sums(d) for d in deviations], 0), atol=1e-4)
    else:
        both = np.hstack([poses - pose, deviations])
        np.testing.assert_allclose(found.spread @ found.spread.T, np.cov(both.T, bias=True), atol=1e-3)


@pytest.mark.parametrize(("covariance", "linked"), [("full", True), ("diagonal", False)])
def test_a_full_covariance_draws_shapes_that_fit_their_pose(covariance: str, linked: bool) -> None:
    x, y = np.meshgrid(*[np.arange(24) - 11.5] * 2, indexing="ij")
    sizes = np.linspace(0.7, 1.3, PATIENTS)
    labels = [  # the larger the organ, the smaller the share of its tail
        np.where((x / 8 / size) ** 2 + (y / 5 / size) ** 2 <= 1, 1 + (x > 20 * (size - 1)), 0).astype(np.uint8)[None]
        for size in sizes
    ]
    sums = sums_of(study_of(2, float("inf"), covariance=covariance), 0.0)
    found, rng = sums.measure(labels, open_entropy("test_only")), np.random.default_rng(0)
    drawn = [sums.space.sample(found, rng) for _ in range(60)]
    link = np.corrcoef([np.sum(label > 0) for label in drawn], [np.mean(label[label > 0] == 2) for label in drawn])
    assert (link[0, 1] < -0.5) == linked


def test_organs_that_are_turned_differ_in_their_pose_and_not_in_their_shape() -> None:
    study, turns = study_of(2, float("inf")), np.linspace(-0.4, 0.4, PATIENTS)
    x, y = np.meshgrid(*[np.arange(24) - 11.5] * 2, indexing="ij")
    labels = []
    for turn in turns:
        along, across = x * np.cos(turn) + y * np.sin(turn), y * np.cos(turn) - x * np.sin(turn)
        bend = across - 0.03 * along**2 + 1  # a symmetric one would look alike upside down
        labels.append(np.where((along / 9) ** 2 + (bend / 3) ** 2 <= 1, 1 + (along > 2), 0).astype(np.uint8)[None])
    sums = sums_of(study, 0.0)
    found = sums.measure(labels, open_entropy("test_only"))
    straight = [shape for label in labels for _, shape in mask_sums._measured(sums.space, label)]
    apart = np.square(straight - np.mean(straight, axis=0)).sum() / PATIENTS
    assert found.spread @ sums.space.band_sizes < 0.4 * apart
    # Drawn under the pose of the one most turned, the mean shape lies as that one does.
    pose = sums.space.pose_vector(labels[-1][0])
    assert pose is not None
    drawn = sums.space.label_map(found.shape_mean, sums.space.pose(pose, found.pose_mean))
    assert np.mean((drawn > 0) == (labels[-1][0] > 0)) > 0.97


@pytest.mark.parametrize("rank", [2, 3])
def test_the_second_sum_sharpens_the_mean_of_the_first(rank: int) -> None:
    """Taken around what was released before, it needs 0.6 of the clip; its weight on the pose is twice that."""
    study, labels = study_of(rank), one_organ(rank)
    sums = sums_of(study, 1.0)
    assert sums.spread.clip_norm == pytest.approx(0.6 * sums.mean.clip_norm)
    pose, shape = true_means(sums, labels)
    without = replace(sums, spread=replace(sums.spread, noise_multiplier=1e6))
    both, first = ([one.measure(labels, open_entropy("test_only")) for _ in range(12)] for one in (sums, without))

    def error(found: list[MaskStatistics], name: str, true: np.ndarray) -> float:
        return float(np.mean([np.linalg.norm(getattr(one, name) - true) for one in found]))

    assert error(both, "pose_mean", pose) < 0.5 * error(first, "pose_mean", pose)
    assert error(both, "shape_mean", shape) < 0.8 * error(first, "shape_mean", shape)


@pytest.mark.parametrize("rank", [2, 3])
def test_a_mean_shape_is_read_as_occupancies(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no organ can look like is noise: beside Wiener's filter alone the error falls by a tenth and more."""
    study, labels = study_of(rank), one_organ(rank)
    sums = sums_of(study, 0.5)
    _, shape = true_means(sums, labels)

    def error() -> float:
        found = [sums.measure(labels, entropy) for entropy in [open_entropy("test_only")] for _ in range(8)]
        return float(np.mean([np.linalg.norm(one.shape_mean - shape) for one in found]))

    believed = error()
    monkeypatch.setattr(ShapeSpace, "believed_shape", lambda self, shape, noise_sd, expected: shape)
    assert believed < 0.9 * error()


def test_the_level_of_spreads_is_believed_no_further_than_its_noise() -> None:
    study, labels = study_of(2), one_organ(2)
    truth = sums_of(study_of(2, float("inf")), 0.0).measure(labels, open_entropy("test_only")).spread
    quiet = sums_of(study, 1e-8, clip_norm=1e3).measure(labels, open_entropy("test_only")).spread
    np.testing.assert_allclose(quiet, truth, atol=0.01 * truth.max())
    draws = [sums_of(study, 30.0).measure(labels, entropy) for entropy in [open_entropy("test_only")] for _ in range(8)]
    loud = np.array([draw.spread.sum() for draw in draws])
    assert loud.min() > 10 * truth.sum() and loud.max() < 1.2 * loud.min()


@pytest.mark.parametrize("rank", [2, 3])
def test_noise_that_drowns_everything_leaves_what_is_publicly_believed(rank: int) -> None:
    study, labels = study_of(rank), one_organ(rank)
    sums = sums_of(study, 10.0)
    found = sums.measure(labels, open_entropy("test_only"))
    assert found.noise[0] > 1
    np.testing.assert_allclose(np.diag(found.pose_covariance)[:rank], 0.06**2)
    np.testing.assert_allclose(np.diag(found.pose_covariance)[rank:], 0.02)
    spread = found.spread.reshape(2, -1)
    assert np.all(np.diff(spread, axis=1) <= 1e-9) and np.all(spread >= 0)


def test_noise_is_told_from_signal_by_what_was_released() -> None:
    """The share that the doctor reads is the error that the mean really has."""
    study, labels = study_of(2), one_organ(2)
    sums = sums_of(study, 0.5)
    pose, _ = true_means(sums, labels)
    found = [sums.measure(labels, entropy) for entropy in [open_entropy("test_only")] for _ in range(40)]
    error = np.sqrt(np.mean([np.square(one.pose_mean - pose).sum() for one in found]))
    told = np.mean([one.noise[0] * np.sqrt(np.trace(one.pose_covariance)) for one in found])
    assert told == pytest.approx(error, rel=0.3)
    quiet = sums_of(study, 0.005).measure(labels, open_entropy("test_only"))
    assert np.all(quiet.noise[:2] < 0.1 * np.mean([one.noise[:2] for one in found], axis=0))


def test_a_noisy_count_is_believed_no_further_than_its_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is divided by it: at low epsilon a count that is all noise would scale every mean."""
    study, labels = study_of(2), one_organ(2)
    release = GaussianSum.release

    def with_a_wrong_count(self: GaussianSum, units: object, entropy: Entropy) -> np.ndarray:
        found = release(self, units, entropy)  # type: ignore[arg-type]
        found[0] *= 1.8
        return found

    sums = sums_of(study, 1e-6)
    pose, _ = true_means(sums, labels)
    right = np.linalg.norm(pose - sums.pose)
    for noise, believed in ((1e-6, True), (3.0, False)):
        draws = []
        for patch in (False, True):
            with monkeypatch.context() as here:
                if patch:
                    here.setattr(GaussianSum, "release", with_a_wrong_count)
                one = replace(
                    sums,
                    mean=replace(sums.mean, noise_multiplier=noise),
                    spread=replace(sums.spread, noise_multiplier=noise),
                )
                draws.append(one.measure(labels, open_entropy("test_only")).pose_mean)
        moved = np.linalg.norm(draws[0] - draws[1]) / right
        assert (moved > 0.2) == believed


def test_clip_norms_are_public_and_the_configuration_may_set_them() -> None:
    given = plan_sums(study_of(2, mean_clip_norm=3.0), ShapeSpace(study_of(2).grid, study_of(2).masks), 1.0)
    assert (given.mean.clip_norm, given.spread.clip_norm) == (3.0, pytest.approx(1.8))
    study = study_of(2)
    space = ShapeSpace(study.grid, study.masks)
    norms = [
        np.linalg.norm(vector)
        for vector in plan_sums(study, space, 1.0).first_vectors(
            [label[None] for label in sample_label_maps(study.grid, 100, 1)]
        )
    ]
    assert 0.6 < np.mean(np.array(norms) <= plan_sums(study, space, 1.0).mean.clip_norm) < 1


@pytest.fixture
def quick_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask_sums, "_READER_PHANTOMS", 40)
    monkeypatch.setattr(shape_reader, "_COHORTS", 256)


def test_a_reader_is_fitted_only_where_noise_is_large_enough_to_matter(quick_reader: None) -> None:
    assert sums_of(study_of(2), 1.0).reader is None
    with_one = study_of(2, reader_steps=3)
    assert sums_of(with_one, 0.001).reader is None
    assert sums_of(with_one, 1.0).reader is sums_of(with_one, 1.0).reader is not None  # an audit plans often


def test_a_reader_brings_the_mean_shape_nearer_to_the_patients(quick_reader: None) -> None:
    study, labels = study_of(2, reader_steps=200), one_organ(2)
    sums = sums_of(study, 2.5)
    _, shape = true_means(sums, labels)

    def error(one: MaskSums) -> float:
        found = [one.measure(labels, entropy) for entropy in [open_entropy("test_only")] for _ in range(8)]
        return float(np.mean([np.linalg.norm(draw.shape_mean - shape) for draw in found]))

    assert error(sums) < 0.9 * error(replace(sums, reader=None))


@pytest.mark.parametrize("reader_steps", [0, 3])
def test_the_second_vector_of_a_patient_depends_on_releases_and_himself_alone(
    reader_steps: int, quick_reader: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured around anything that was not released, it would move with the other patients."""
    sums, labels = sums_of(study_of(2, reader_steps=reader_steps), 1.0), one_organ(2)
    transcript = sums.mean.release(sums.first_vectors(labels), open_entropy("test_only"))
    release, seen = GaussianSum.release, []

    def watched(self: GaussianSum, units: Iterable[np.ndarray], entropy: Entropy) -> np.ndarray:
        vectors = list(units)
        if self.name == sums.mean.name:
            return transcript  # the same for both cohorts
        seen.append(vectors)
        return release(self, vectors, entropy)

    monkeypatch.setattr(GaussianSum, "release", watched)
    for cohort in (labels, labels[7:]):
        sums.measure(cohort, open_entropy("test_only"))
    np.testing.assert_array_equal(seen[0][7:], seen[1])
