"""Stage masks: two bounded mechanisms, paid for once, and label maps that are nobody's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from medsynth import config, store
from medsynth.config import Grid, Masks, Study, Synthesise
from medsynth.errors import BudgetError, ConfigError, PrivacyError, StoreError
from medsynth.models.mask_generator import MaskStatistics, ShapeSpace
from medsynth.privacy.ledger import Ledger
from medsynth.privacy.mechanism import GaussianSum, noise_grid
from medsynth.stages import masks
from medsynth.stages.mask_sums import MaskSums, plan_sums
from medsynth.tracking import Tracker

MakeCohort = Callable[..., Path]
Sums = dict[str, np.ndarray]
Source = Literal["statistics", "public_shapes"]


def inputs_of(root: Path) -> dict[str, Path]:
    return {"cohort": root / "cohort", "ledger": root / "ledger.jsonl"}


def watched(monkeypatch: pytest.MonkeyPatch, replay: Sums | None = None) -> tuple[Sums, dict[str, GaussianSum]]:
    """Record what the mechanisms release; with ``replay``, go on from those values, so that runs can be compared."""
    found: Sums = {}
    plans: dict[str, GaussianSum] = {}
    original = GaussianSum.release

    def release(self: GaussianSum, units: Iterable[np.ndarray], entropy: Any) -> np.ndarray:
        found[self.name], plans[self.name] = original(self, units, entropy), self
        return found[self.name] if replay is None else replay[self.name]

    monkeypatch.setattr(GaussianSum, "release", release)
    return found, plans


@pytest.mark.parametrize("rank", [2, 3])
def test_it_releases_statistics_and_pays_for_them(
    rank: int, tiny_study: Study, tiny_study_3d: Study, tmp_path: Path, make_cohort: MakeCohort
) -> None:
    study = tiny_study if rank == 2 else tiny_study_3d
    inputs = inputs_of(tmp_path)
    make_cohort(study, inputs["cohort"])
    manifest = masks.run(study, inputs, tmp_path / "masks", Tracker())
    assert manifest.sensitivity == "released" and set(manifest.files) == {masks.STATISTICS, masks.SETTINGS}
    (entry,) = Ledger(inputs["ledger"]).entries()
    assert manifest.ledger_entries == (entry["id"],) and entry["status"] == "complete"
    assert entry["outputs"] == {masks.STATISTICS: manifest.files[masks.STATISTICS]}
    assert entry["mechanisms"] == ["gaussian_sum:mask_means", "gaussian_sum:mask_spread"]
    generator = masks.load_masks(tmp_path / "masks")
    label = generator.draw(5)
    assert label.shape == study.grid.shape and label.any()
    assert np.array_equal(label, masks.load_masks(tmp_path / "masks").draw(5))


@pytest.mark.parametrize("records", [1, 4])
def test_pitfall_12_statistics_move_by_at_most_the_clip_norm_when_a_patient_leaves(
    records: int, tiny_study: Study, tmp_path: Path, make_cohort: MakeCohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No patient's mask is more than a bounded, noisy part of a sum; test_only entropy repeats the noise."""
    replay: Sums | None = None
    for without in (None, 2, 5):
        root = tmp_path / str(without)
        numbers = [number for number in range(6) if number != without]
        make_cohort(tiny_study, root / "cohort", numbers, records)
        found, plans = watched(monkeypatch, replay)
        masks.run(tiny_study, inputs_of(root), root / "masks", Tracker())
        monkeypatch.undo()
        if replay is None:
            replay = found
            continue
        for name, plan in plans.items():
            moved = np.linalg.norm(found[name] - replay[name])
            # Two releases lie on the public grid, each up to half a cell from its noisy sum in every coordinate.
            grid = noise_grid(plan.noise_multiplier * plan.clip_norm) * np.sqrt(plan.dimensions)
            assert 0 < moved * plan.denominator <= plan.clip_norm * (1 + 1e-9) + grid


def test_pitfall_03_plans_are_the_same_for_one_patient_more(
    tiny_study: Study, tmp_path: Path, make_cohort: MakeCohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for count in (6, 7):
        root = tmp_path / str(count)
        make_cohort(tiny_study, root / "cohort", range(count))
        _, plans = watched(monkeypatch)
        masks.run(tiny_study, inputs_of(root), root / "masks", Tracker())
        monkeypatch.undo()
        seen.append(plans)
    assert seen[0] == seen[1]
    assert seen[0]["mask_means"].denominator == pytest.approx(16 * 0.8)


def test_pitfall_01_many_slices_are_one_vector(tiny_study: Study, tmp_path: Path, make_cohort: MakeCohort) -> None:
    """A patient of the same slice nine times weighs as much as one of that slice once."""
    from medsynth.imaging.phantom import sample_label_maps

    sums = plan_sums(tiny_study, ShapeSpace(tiny_study.grid, tiny_study.masks), 1.0)
    label = sample_label_maps(tiny_study.grid, 1, 0)
    cohort = [label, np.repeat(label, 9, axis=0)]
    np.testing.assert_allclose(*sums.first_vectors(cohort))
    np.testing.assert_allclose(*sums.second_vectors(cohort, sums.pose, sums.shape))


def test_a_patient_who_shows_nothing_adds_nothing(tiny_study: Study) -> None:
    sums = plan_sums(tiny_study, ShapeSpace(tiny_study.grid, tiny_study.masks), 1.0)
    nothing = [np.zeros((2, 16, 16), np.uint8)]
    (first,), (second,) = sums.first_vectors(nothing), sums.second_vectors(nothing, sums.pose, sums.shape)
    assert not first.any() and first.shape == (sums.mean.dimensions,)
    assert not second.any() and second.shape == (sums.spread.dimensions,)


def test_public_shapes_read_no_patient_and_cost_nothing(tiny_study: Study, tmp_path: Path) -> None:
    study = tiny_study.model_copy(update={"masks": tiny_study.masks.model_copy(update={"source": "public_shapes"})})
    manifest = masks.run(study, {"ledger": tmp_path / "ledger.jsonl"}, tmp_path / "masks", Tracker())
    assert manifest.sensitivity == "public" and not manifest.parents and not manifest.ledger_entries
    assert not (tmp_path / "ledger.jsonl").exists()
    generator = masks.load_masks(tmp_path / "masks")
    assert np.array_equal(generator.draw(3), generator.draw(3)) and generator.draw(3).any()


@pytest.mark.parametrize("covariance", ["diagonal", "full"])
def test_without_privacy_it_is_internal_and_says_so(
    covariance: str, tiny_settings: dict[str, Any], tmp_path: Path, make_cohort: MakeCohort
) -> None:
    study = config.parse(
        {
            **tiny_settings,
            "name": "tiny-nonprivate",
            "privacy": {**tiny_settings["privacy"], "epsilon": float("inf")},
            "masks": {"coefficients": [4, 4], "covariance": covariance},
        }
    )
    inputs = inputs_of(tmp_path)
    make_cohort(study, inputs["cohort"])
    manifest = masks.run(study, inputs, tmp_path / "masks", Tracker())
    assert manifest.sensitivity == "internal"
    assert [event["kind"] for entry in Ledger(inputs["ledger"]).entries() for event in entry["events"]] == [
        "nonprivate",
        "nonprivate",
    ]
    assert masks.load_masks(tmp_path / "masks").draw(0).any()


@pytest.mark.parametrize("where", ["measuring", "writing"])
def test_pitfall_14_no_kill_buys_a_second_release(
    where: str, tiny_study: Study, tmp_path: Path, make_cohort: MakeCohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run goes on within its reservation, or with what it released; without that, the next one is charged."""
    inputs = inputs_of(tmp_path)
    make_cohort(tiny_study, inputs["cohort"])
    ledger = Ledger(inputs["ledger"])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with monkeypatch.context() as patch:
            where_it_dies = (MaskSums, "measure") if where == "measuring" else (masks, "_write_settings")
            patch.setattr(*where_it_dies, killed)
            with pytest.raises(KeyboardInterrupt):
                masks.run(tiny_study, inputs, tmp_path / "masks", Tracker())
        assert not (tmp_path / "masks").exists()
    left = store.partial(tmp_path / "masks")
    if where == "writing":
        released = (left / masks.STATISTICS).read_bytes()
    masks.run(tiny_study, inputs, tmp_path / "masks", Tracker())
    assert [entry["status"] for entry in ledger.entries()] == ["complete"]
    if where == "writing":
        assert (tmp_path / "masks" / masks.STATISTICS).read_bytes() == released


def test_pitfall_14_a_release_that_was_thrown_away_is_charged_again(
    tiny_study: Study, tmp_path: Path, make_cohort: MakeCohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of(tmp_path)
    make_cohort(tiny_study, inputs["cohort"])

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for changed in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(masks, "_write_settings", killed)
            with pytest.raises(KeyboardInterrupt):
                masks.run(tiny_study, inputs, tmp_path / "masks", Tracker())
        statistics = store.partial(tmp_path / "masks") / masks.STATISTICS
        if changed:
            statistics.write_bytes(statistics.read_bytes() + b"0")
        else:
            statistics.unlink()
    with pytest.raises(BudgetError):
        masks.run(tiny_study, inputs, tmp_path / "masks", Tracker())
    assert [entry["status"] for entry in Ledger(inputs["ledger"]).entries()] == ["complete", "complete"]


def test_a_spent_budget_is_refused_before_a_patient_is_read(
    tiny_study: Study, tmp_path: Path, make_cohort: MakeCohort, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_of(tmp_path)
    make_cohort(tiny_study, inputs["cohort"])
    for name in "abcdefgh":
        try:
            masks.run(tiny_study, inputs, tmp_path / name, Tracker())
        except BudgetError:
            break
    else:
        pytest.fail("the budget has no end")
    monkeypatch.setattr("medsynth.imaging.cohort.load_patients", lambda *_: pytest.fail("patients were read"))
    with pytest.raises(PrivacyError):
        masks.run(tiny_study, inputs, tmp_path / "again", Tracker())
    assert not store.partial(tmp_path / "again").exists()


@pytest.mark.parametrize("source", ["statistics", "public_shapes"])
@pytest.mark.parametrize("rank", [2, 3])
def test_a_volume_that_is_asked_for_is_the_median_and_every_map_is_drawn_as_unasked(rank: int, source: Source) -> None:
    grid = Grid(
        spatial_dims=2 if rank == 2 else 3,
        shape=(32,) * rank,
        spacing_mm=(2.0,) * rank,
        labels={0: "none", 1: "head", 2: "tail"},
    )
    generator, seeds = masks.MaskGenerator(grid, *spread_statistics(grid, source)), range(60)
    plain = [generator.draw(seed) for seed in seeds]
    wanted = 1.5 * volume(plain, 1) * 2.0**rank
    how = Synthesise(volume_median={"head": wanted}, volume_scale={"tail": 0.7})
    asked = generator.ask(how, seeds)
    maps = [asked.draw(seed) for seed in seeds]
    assert volume(maps, 1) * 2.0**rank == pytest.approx(wanted, rel=0.05)
    assert volume(maps, 2) == pytest.approx(0.7 * volume(plain, 2), rel=0.05)
    assert np.array_equal(generator.draw(0), plain[0]), "the generator that was asked stays as it is"
    assert generator.ask(Synthesise(), seeds).factors == {}
    with pytest.raises(ConfigError, match="ask for less"):
        generator.ask(Synthesise(volume_scale={"head": 1e4}), seeds)


def volume(maps: list[np.ndarray], value: int) -> float:
    return float(np.median([np.count_nonzero(label == value) for label in maps]))


def spread_statistics(
    grid: Grid, source: Literal["statistics", "public_shapes"]
) -> tuple[Masks, MaskStatistics | None]:
    """Return settings and statistics around one shape of two halves whose size varies."""
    settings = Masks(source=source, coefficients=(8,) * grid.spatial_dims)
    if source == "public_shapes":
        return settings, None
    space = ShapeSpace(grid, settings)
    axes = np.meshgrid(*[(np.arange(n) + 0.5) / n * 2 - 1 for n in grid.shape], indexing="ij")
    inside = sum((axis / radius) ** 2 for axis, radius in zip(axes, (0.5, 0.35, 0.4), strict=False)) <= 1
    label = np.where(inside, 1 + (axes[0] > 0), 0).astype(np.uint8)
    pose = space.pose_vector(label)
    assert pose is not None
    shape = space.shape_vector(label, space.pose(pose))
    return settings, MaskStatistics(pose, np.eye(len(pose)) * 4e-3, shape, np.full(space.band_count, 1e-4))


def test_it_needs_a_cohort(tiny_study: Study, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cohort"):
        masks.run(tiny_study, {"ledger": tmp_path / "ledger.jsonl"}, tmp_path / "masks", Tracker())
