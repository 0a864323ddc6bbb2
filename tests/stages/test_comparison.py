"""medsynth compare: every set is trained once and kept over a kill, and numbers mean what they say."""

from __future__ import annotations

import contextlib
import csv
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_segment import folders, reserve_masks, study  # the same tiny cohort

from medsynth import comparing, config, store
from medsynth.errors import ConfigError, InputError, MedsynthError, StoreError
from medsynth.imaging.cohort import Pair, read_pairs, write_pair
from medsynth.metrics.intervals import skill_of
from medsynth.stages import comparison, comparison_page, comparison_trainings, segmenter_training
from medsynth.stages.comparison import Settings, Source
from medsynth.stages.comparison_results import Statistician
from medsynth.stages.comparison_schema import Comparison, Measured
from medsynth.stages.comparison_trainings import Arm, Ruler
from medsynth.stages.synthesise import LABELLERS
from medsynth.tracking import Tracker

SETTINGS = Settings(numbers=(1, 4, 9), seeds=(0, 1))
OPEN = {"name": "tiny-nonprivate", "privacy": {"epsilon": "inf", "declared_patients": 16}}
TINY = {
    "segment": {"channels": [4, 8], "steps": 12, "batch_size": 2},
    "evaluate": {"bootstrap": 50, "montage": 2, "agreement_pairs": 3},
}
TRAININGS = 2 * (2 + 2 + 2 * 2 + 2 * 2)  # seeds x (real, strong, alone in two runs, mixed in two runs)


class Recorder(Tracker):
    """Keeps what it is given, nested runs by name."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.figures: set[str] = set()
        self.nested: dict[str, Recorder] = {}

    def metrics(self, values: Any, step: int | None = None) -> None:
        self.values.update(values)

    def figure(self, path: Path, name: str) -> None:
        self.figures.add(name)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Tracker]:
        assert name not in self.nested, "trained twice"
        self.nested[name] = Recorder()
        yield self.nested[name]


def _run(root: Path, **sections: Any) -> Path:
    """Write a run folder: cohort, pairs, study and ledger."""
    small = study(2, **{**TINY, **sections})
    folders(small, root, train=4, test=3, pairs=3)
    (root / "study.yaml").write_text(config.dump(small), encoding="utf-8")
    if small.privacy.private:
        reserve_masks(small, root)
    return root


def _sources(*runs: Path) -> list[Source]:
    return comparing.open_runs(runs, runs[0].parent / "out", {})


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [_run(root / "a"), _run(root / "b", **OPEN)]


@pytest.fixture(scope="module")
def finished(runs: list[Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Comparison, Recorder]:
    out, recorder = tmp_path_factory.mktemp("out") / "compare", Recorder()
    manifest = comparison.run(_sources(*runs), out, recorder, SETTINGS)
    assert manifest.sensitivity == "internal" and not manifest.releasable
    assert set(manifest.parents) == {"cohort", "synthetic-epsilon-8", "synthetic-epsilon-inf"}
    return out, comparison.read_result(out), recorder


def test_every_set_is_there_with_its_intervals(finished: tuple[Path, Comparison, Recorder]) -> None:
    _, result, _ = finished
    runs, numbers = ("epsilon-8", "epsilon-inf"), (1, 4)
    expected = {(kind, None, n) for kind in ("real_only", "strong_augmentation") for n in numbers}
    expected |= {(kind, run, 0) for kind in ("synthetic_only", "random_contrast") for run in runs}
    expected |= {("mixed", run, n) for run in runs for n in numbers}
    assert {(one.kind, one.run, one.real_patients) for one in result.training_sets} == expected
    assert len(result.training_sets) == len(expected) and result.protocol.numbers == numbers
    for one in (*result.training_sets, result.floor):
        for scores in (one.dice, one.surface_dice, one.hd95):
            for value in (scores.all_labels, *scores.per_label.values()):
                assert value.ci95[0] <= value.mean <= value.ci95[1]
                assert value.ci95_with_seeds[0] <= value.mean <= value.ci95_with_seeds[1]
        assert set(one.dice.per_label) == {"organ"}
    assert all(set(one.dice_by_seed) == {"0", "1"} for one in result.training_sets)


def test_the_yardsticks_are_exact(finished: tuple[Path, Comparison, Recorder]) -> None:
    _, result, _ = finished
    assert result.real.real_patients == 4 and result.real.relative_to_real.mean == 1.0
    if result.real.skill.mean is not None:
        assert result.real.skill.mean == 1.0 and result.floor.skill.mean == 0.0
    assert result.floor.relative_to_real.mean == pytest.approx(
        result.floor.dice.all_labels.mean / result.real.dice.all_labels.mean
    )
    tables = [
        json.loads((finished[0] / "trainings" / f"synthetic_only-epsilon-8-s{seed}.json").read_text())["dice"]
        for seed in (0, 1)
    ]
    alone = next(one for one in result.training_sets if (one.kind, one.run) == ("synthetic_only", "epsilon-8"))
    assert alone.dice.all_labels.mean == pytest.approx(np.mean(tables))


def test_runs_say_what_they_cost_and_how_their_images_are(finished: tuple[Path, Comparison, Recorder]) -> None:
    private, free = finished[1].runs
    assert private.epsilon == 8 and 0 < private.spent < 8 and free.epsilon == free.spent == "inf"
    for run in (private, free):
        assert run.pairs == run.agreement_pairs == 3 and 0 <= run.agreement.all_labels.mean <= 1
        assert run.fidelity.fid_images == 3 and run.fidelity.similarity in ("SSIM", "MS-SSIM with 2 scales")
        assert 0 <= run.memorisation.copies <= 1 and run.memorisation.median_ratio > 0
    # Both runs hold the same pairs here, and so the same crowds.
    assert private.fidelity == free.fidelity and private.synthetic == free.synthetic


def test_images_are_held_against_what_they_were_drawn_for(tmp_path: Path) -> None:
    plain, relabelled = _run(tmp_path / "plain"), _run(tmp_path / "relabelled", **OPEN)
    shutil.rmtree(relabelled / "synthetic")
    with store.create(relabelled / "synthetic", "synthesise", "0" * 64) as folder:
        for pair in read_pairs(plain / "synthetic"):
            moved = np.roll(pair.label, 3, axis=0)
            write_pair(folder.path, Pair(pair.name, pair.image, moved, pair.label), study(2).grid)
        folder.finish("internal", details={LABELLERS: 3})
    comparison.run(_sources(plain, relabelled), tmp_path / "compare", Tracker(), Settings(numbers=(4,), seeds=(0,)))
    one, other = comparison.read_result(tmp_path / "compare").runs
    assert one.agreement.all_labels.mean == other.agreement.all_labels.mean > 0
    assert (one.labellers, other.labellers) == (0, 3)


def test_the_file_fits_its_schema_and_the_folder_names_no_patient(finished: tuple[Path, Comparison, Recorder]) -> None:
    out, result, _ = finished
    raw = json.loads((out / "compare.json").read_text())
    schema = json.loads((out / "compare.schema.json").read_text())
    assert set(raw) == set(schema["properties"]) and Comparison.model_validate(raw) == result
    assert {path.name for path in (out / "networks").iterdir()} == {
        "real_only-s0.safetensors",
        "real_only-s1.safetensors",
    }
    assert not list(out.glob(".*")) and len(list((out / "trainings").iterdir())) == TRAININGS
    page = (out / "compare.html").read_text()
    assert "INTERNAL" in page and page.count("data:image/png;base64,") == 2 and "http" not in page
    for path in out.rglob("*"):
        held = path.read_bytes() if path.is_file() else b""
        assert b"patient-" not in held and b"case-" not in held and str(out).encode() not in held


def test_each_training_is_a_nested_run_and_no_picture_of_a_patient_is_tracked(
    finished: tuple[Path, Comparison, Recorder],
) -> None:
    out, _, recorder = finished
    assert set(recorder.nested) == {f"compare/{path.stem}" for path in (out / "trainings").iterdir()}
    assert all({"dice", "hd95", "loss"} <= set(child.values) for child in recorder.nested.values())
    assert recorder.figures == {f"compare/{name}" for name in comparison_page.FIGURES}
    assert {"floor", "dice/real_only-n4", "dice/synthetic_only-epsilon-8", "agreement/epsilon-inf"} <= set(
        recorder.values
    )


def test_a_killed_comparison_goes_on_and_ends_with_the_same_numbers(
    runs: list[Path], finished: tuple[Path, Comparison, Recorder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure, calls = comparison_trainings._measure, []

    def counted(job: Any, device: str) -> Any:
        calls.append(job.name)
        if len(calls) == 6:
            raise RuntimeError("killed")
        return measure(job, device)

    monkeypatch.setattr(comparison_trainings, "_measure", counted)
    out = tmp_path / "compare"
    with pytest.raises(MedsynthError, match="killed"):
        comparison.run(_sources(*runs), out, Tracker(), SETTINGS)
    half = store.partial(out)
    assert not out.exists() and len(list((half / "trainings").iterdir())) == 5
    (half / ".pools-left").mkdir()
    (half / ".pools-left" / "real.safetensors").write_bytes(b"patients")
    (half / "networks" / "real_only-s0.safetensors").unlink()  # its training must come again: images are judged by it
    again = Recorder()
    comparison.run(_sources(*runs), out, again, SETTINGS)
    assert len(again.nested) == TRAININGS - 4 and len(calls) == 6 + TRAININGS - 4
    assert comparison.read_result(out) == finished[1] and not list(out.glob(".*"))


def test_what_was_begun_for_other_settings_is_not_gone_on_with(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(job: Any, device: str) -> Any:
        raise RuntimeError("stop")

    half = store.partial(tmp_path / "compare")
    (half / "trainings").mkdir(parents=True)
    (half / "trainings" / "real_only-n4-s0.json").write_text("{}")
    (half / "unfinished.sha256").write_text("0" * 64)
    monkeypatch.setattr(comparison_trainings, "_measure", stop)
    with pytest.raises(MedsynthError, match="real_only-n4-s0"):
        comparison.run(_sources(*runs), tmp_path / "compare", Tracker(), SETTINGS)
    assert list((half / "trainings").iterdir()) == []


def test_small_sets_of_patients_lie_within_larger_ones_and_are_shared_by_all_kinds(
    runs: list[Path], tmp_path: Path
) -> None:
    bench = comparison._bench(_sources(*runs), tmp_path, SETTINGS)
    ruler = Ruler(tmp_path / "held-out.safetensors", (1.0, 1.0), 1.0)

    def units(kind: Any, number: int, seed: int) -> Any:
        run = "epsilon-8" if kind == "mixed" else None
        return comparison_trainings._job(bench, Arm(kind, run, number), seed, ruler).training.units

    for seed in range(4):
        whole = units("real_only", 4, seed)
        assert sorted(whole) == [0, 1, 2, 3]
        for kind in ("real_only", "strong_augmentation", "mixed"):
            assert [units(kind, number, seed) for number in (1, 2, 3)] == [whole[:1], whole[:2], whole[:3]]
    assert len({units("real_only", 4, seed) for seed in range(8)}) > 1


def test_only_the_chosen_patients_are_drawn(runs: list[Path], tmp_path: Path) -> None:
    bench = comparison._bench(_sources(*runs), tmp_path, SETTINGS)
    ruler = Ruler(tmp_path / "held-out.safetensors", (1.0, 1.0), 1.0)
    job = comparison_trainings._job(bench, Arm("real_only", None, 2), 0, ruler)
    comparison_trainings._write_pools(bench, {job.arm}, ruler)
    allowed = {bench.train[index].labels.numpy().tobytes() for index in job.training.units or ()}
    plain = replace(job.training, segment=job.training.segment.model_copy(update={"augment": False, "steps": 30}))
    drawn = {row.numpy().tobytes() for _, labels in segmenter_training.batches(plain) for row in labels}
    assert drawn == allowed


def test_random_contrasts_know_the_labels_and_nothing_of_the_images(runs: list[Path], tmp_path: Path) -> None:
    bench = comparison._bench(_sources(*runs), tmp_path, SETTINGS)
    _, labels = bench.pairs["epsilon-8"]
    images, maps, copies = comparison_trainings.random_contrast(bench.grid, labels, seed=0)
    assert len(images) == len(maps) == copies * len(labels) and copies > 1
    assert torch.equal(maps[::copies], labels) and images.min() >= -1 and images.max() <= 1
    contrasts = [
        float(image[0][label == 1].mean() - image[0][label == 0].mean())
        for image, label in zip(images, maps, strict=True)
    ]
    assert min(contrasts) < -0.3 and max(contrasts) > 0.3, "bright organs and dark ones"


def test_runs_that_differ_are_refused(tmp_path: Path) -> None:
    first = _run(tmp_path / "a")
    other_recipe = _run(tmp_path / "b", segment={**TINY["segment"], "steps": 13}, **OPEN)
    with pytest.raises(InputError, match=r"another segment \(steps\).*--set segment.steps"):
        _sources(first, other_recipe)
    assert len(comparing.open_runs([first, other_recipe], tmp_path / "out", {"segment.steps": 5})) == 2
    with pytest.raises(InputError, match=r"another segment \(largest_component\)"):
        _sources(first, _run(tmp_path / "d", segment={**TINY["segment"], "largest_component": True}))
    grid = {"spatial_dims": 2, "shape": [16, 16], "spacing_mm": [2, 2], "labels": {0: "none", 1: "organ"}}
    with pytest.raises(InputError, match=r"another grid \(spacing_mm\)"):
        _sources(first, _run(tmp_path / "c", grid=grid))
    for change, message in (({"split": "test"}, "hold back different"), ({"content": "f" * 64}, "different patients")):
        other = _run(tmp_path / message.replace(" ", "-"))
        with (other / "cohort" / "cases.csv").open(newline="") as handle:
            rows = list(csv.DictReader(handle))
        with (other / "cohort" / "cases.csv").open("w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows([{**rows[0], **change}, *rows[1:]])
        with pytest.raises(InputError, match=message):
            _sources(first, other)


def test_what_is_no_finished_run_is_refused_without_naming_its_folder(tmp_path: Path) -> None:
    first = _run(tmp_path / "a")
    (tmp_path / "mueller").mkdir()
    with pytest.raises(StoreError, match="run 2 of those given has no finished cohort") as refusal:
        _sources(first, tmp_path / "mueller")
    assert "mueller" not in str(refusal.value)
    with pytest.raises(InputError, match="twice"):
        _sources(first, tmp_path / "a" / ".." / "a")
    with pytest.raises(StoreError, match="a folder of its own"):
        comparing.open_runs([first], first, {})
    with pytest.raises(ConfigError, match="can only change"):
        comparing.open_runs([first], tmp_path / "out", {"grid.shape": [8, 8]})
    (first / "ledger.jsonl").unlink()
    with pytest.raises(StoreError, match=r"ledger\.jsonl"):
        _sources(first)
    (first / "study.yaml").unlink()
    with pytest.raises(StoreError, match=r"study\.yaml"):
        _sources(first)


def test_a_finished_comparison_is_skipped_and_another_one_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, settings = _run(tmp_path / "a"), Settings(numbers=(), seeds=(0,), quick=True)
    out = tmp_path / "out"
    first = comparing.compare([run], out, settings, {"tracking.uri": None})
    assert first.protocol.steps == 3 and first.protocol.quick and first.protocol.numbers == (4,)
    trained: list[str] = []
    measure = comparison_trainings._measure
    monkeypatch.setattr(
        comparison_trainings, "_measure", lambda job, device: [trained.append(job.name), measure(job, device)][1]
    )
    assert comparing.compare([run], out, settings, {}) == first and trained == []
    with pytest.raises(StoreError, match="--replace"):
        comparing.compare([run], out, replace(settings, tolerance=3.0), {})
    again = comparing.compare([run], out, replace(settings, tolerance=3.0), {}, replace=True)
    assert again.protocol.tolerance == 3.0 and len(trained) == 5


@pytest.mark.parametrize(
    ("numbers", "seeds", "tolerance"),
    [("1,x", None, None), ("0", None, None), ("2,2", None, None), (None, "-1", None), (None, None, -1.0)],
)
def test_wrong_options_are_refused(numbers: str | None, seeds: str | None, tolerance: float | None) -> None:
    with pytest.raises(ConfigError, match="--"):
        comparing.parse_settings(numbers, seeds, tolerance, quick=False)


def test_options_have_their_defaults() -> None:
    assert comparing.parse_settings(None, None, None, quick=False) == Settings((1, 2, 4, 8, 20), (0, 1, 2))
    assert comparing.parse_settings(None, None, 1.5, quick=True) == Settings((1, 4), (0,), quick=True, tolerance=1.5)
    assert comparing.parse_settings("all,3", "7", None, quick=True).numbers == (3,)
    assert comparison.numbers_of(Settings((1, 8, 20), (0,)), 8) == (1, 8)


def test_runs_of_one_epsilon_get_labels_of_their_own(tmp_path: Path) -> None:
    runs = [_run(tmp_path / name) for name in "abc"]
    assert [one.label for one in _sources(*runs)] == ["epsilon-8-1", "epsilon-8-2", "epsilon-8-3"]


def test_a_skill_that_does_not_exist_is_a_dash_in_file_and_tables_and_no_bar_in_the_figure() -> None:
    real, floor = np.array([[0.1, 0.9, 0.4, 0.5]]), np.array([[0.3, 0.5, 0.6, 0.6]])
    skill = Statistician({0: "none", 1: "organ"}, 200, 0).measured("skill", skill_of, real - 0.1, floor, real)
    assert json.loads(skill.model_dump_json()) == {"mean": None, "ci95": [None] * 2, "ci95_with_seeds": [None] * 2}
    old = Measured(mean=None, ci95=(-162.68, -0.9), ci95_with_seeds=(-162.68, -0.9))  # as older comparisons hold it
    for value in (skill, old):
        assert comparison_page._cell(value, 2) == comparing._interval(value) == "-"
        point = comparison_page._point(value, 8.0)
        assert np.isnan([point.mean, point.low, point.high]).all()


def test_what_pairs_are_worth_in_patients_is_said_plainly(finished: tuple[Path, Comparison, Recorder]) -> None:
    result = finished[1]
    alone = next(one for one in result.training_sets if one.kind == "synthetic_only")

    def worth(dice: float) -> str:
        value = Measured(mean=dice, ci95=(dice, dice), ci95_with_seeds=(dice, dice))
        return comparison_page.equivalent(
            result, alone.model_copy(update={"dice": alone.dice.model_copy(update={"all_labels": value})})
        )

    one, four = (
        next(s.dice.all_labels.mean for s in result.training_sets if (s.kind, s.real_patients) == ("real_only", number))
        for number in (1, 4)
    )
    assert worth(1.0) == "All real patients together do no better."
    assert worth(-0.1) == "1 real patient does better already."
    if one < four:
        assert worth((one + four) / 2) == "4 real patients do better, 1 does not."
    assert any("epsilon-inf" in line for line in comparison_page.reading(result))
