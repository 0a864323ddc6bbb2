"""Stage synthesise: a plan first, then each row rendered for itself, the same bits however often."""

from __future__ import annotations

import csv
import dataclasses
import gzip
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medsynth import config, store
from medsynth.config import Grid, Study
from medsynth.diffusion.generator import Generator, load_generator
from medsynth.errors import StoreError
from medsynth.imaging.cohort import DRAWN, Pair, read_pairs
from medsynth.imaging.transforms import pair_to_grid
from medsynth.stages import masks, synthesise, train
from medsynth.tracking import Tracker

Before = Callable[..., dict[str, Path]]


@pytest.fixture
def study(tiny_settings: dict[str, Any]) -> Study:
    """Three batches, the last one short; no appearance and no steps on patients, which change nothing here."""
    quick = {"steps": 0, "pretrain_steps": 2, "appearance": {"enabled": False, "coefficients": [2, 2]}}
    return config.parse(
        {
            **tiny_settings,
            "train": {**tiny_settings["train"], **quick},
            "synthesise": {"pairs": 5, "steps": 2, "batch_size": 2, "scheduler": "ddpm", "guidance": 1.5},
        }
    )


@pytest.fixture
def inputs(study: Study, tmp_path: Path, before_training: Before) -> dict[str, Path]:
    found = before_training(study, tmp_path)
    train.run(study, found, found["generator"], Tracker())
    return found


def render_alone(study: Study, inputs: dict[str, Path], number: int) -> Pair:
    """Render one row of the plan, with nothing but the finished folders."""
    source, built = masks.load_masks(inputs["masks"]), load_generator(inputs["generator"], inputs["autoencoder"])
    row = synthesise.plan(study)[number]
    (pair,) = synthesise.render([row], built, source, study.grid, study.synthesise, torch.device("cpu"))
    return pair


def test_it_writes_a_plan_and_its_pairs(study: Study, inputs: dict[str, Path], tmp_path: Path) -> None:
    manifest = synthesise.run(study, inputs, tmp_path / "synthetic", Tracker())
    assert manifest.sensitivity == "released" and set(manifest.parents) == {"autoencoder", "masks", "generator"}
    rows = list(csv.DictReader((tmp_path / "synthetic" / synthesise.PLAN).read_text().splitlines()))
    assert [row["pair_id"] for row in rows] == [pair.name for pair in read_pairs(tmp_path / "synthetic")]
    assert len({row["mask_seed"] for row in rows} | {row["image_seed"] for row in rows}) == 10
    assert len(manifest.files) == 11


def test_a_row_alone_is_the_row_among_others_bit_for_bit(
    study: Study, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Pair] = {}
    original = synthesise.render

    def render(*args: Any) -> list[Pair]:
        pairs = original(*args)
        found.update({pair.name: pair for pair in pairs})
        return pairs

    with monkeypatch.context() as patch:
        patch.setattr(synthesise, "render", render)
        synthesise.run(study, inputs, tmp_path / "synthetic", Tracker())
    for number in range(5):
        pair = render_alone(study, inputs, number)
        assert np.array_equal(pair.image, found[pair.name].image)
        assert np.array_equal(pair.label, found[pair.name].label)


def test_volumes_that_are_asked_for_are_in_the_pairs_and_in_the_manifest(
    study: Study, inputs: dict[str, Path], tmp_path: Path
) -> None:
    how = study.synthesise.model_copy(update={"volume_scale": {"organ": 0.6}})
    plain = synthesise.run(study, inputs, tmp_path / "plain", Tracker())
    asked = synthesise.run(study.model_copy(update={"synthesise": how}), inputs, tmp_path / "asked", Tracker())
    assert "volume_factors" not in plain.details and asked.details["volume_factors"] == {"organ": 0.6}
    pairs = zip(read_pairs(tmp_path / "plain"), read_pairs(tmp_path / "asked"), strict=True)
    for before, after in pairs:
        assert after.label.sum() == pytest.approx(0.6 * before.label.sum(), abs=1)


def test_the_same_study_gives_the_same_files(study: Study, inputs: dict[str, Path], tmp_path: Path) -> None:
    one, two = (synthesise.run(study, inputs, tmp_path / name, Tracker()) for name in ("one", "two"))
    assert one.files == two.files


def test_a_kill_loses_a_batch_and_the_rest_comes_out_the_same(
    study: Study, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = synthesise.run(study, inputs, tmp_path / "whole", Tracker())
    calls: list[int] = []
    original = Generator.render

    def render(self: Generator, *args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(Generator, "render", render)
    with pytest.raises(KeyboardInterrupt):
        synthesise.run(study, inputs, tmp_path / "killed", Tracker())
    partial = store.partial(tmp_path / "killed")
    assert len(list((partial / "images").iterdir())) == 4 and not (tmp_path / "killed").exists()
    manifest = synthesise.run(study, inputs, tmp_path / "killed", Tracker())
    assert len(calls) == 4, "finished batches are not rendered again"
    assert manifest.files == whole.files


def test_half_a_pair_is_rendered_again(
    study: Study, inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = synthesise.run(study, inputs, tmp_path / "whole", Tracker())
    with monkeypatch.context() as patch:
        patch.setattr(store.StageFolder, "finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            synthesise.run(study, inputs, tmp_path / "killed", Tracker())
    labels = store.partial(tmp_path / "killed") / "labels"
    (labels / "synthetic_00002.nii.gz").rename(labels / ".synthetic_00002.nii.gz.partial")
    assert synthesise.run(study, inputs, tmp_path / "killed", Tracker()).files == whole.files


def test_what_another_plan_left_is_thrown_away(study: Study, inputs: dict[str, Path], tmp_path: Path) -> None:
    partial = store.partial(tmp_path / "synthetic")
    (partial / "images").mkdir(parents=True)
    (partial / "images" / "synthetic_00001.nii.gz").write_bytes(gzip.compress(b"another study's"))
    (partial / "unfinished.sha256").write_text("0" * 64)
    manifest = synthesise.run(study, inputs, tmp_path / "synthetic", Tracker())
    assert manifest.files == synthesise.run(study, inputs, tmp_path / "again", Tracker()).files


def test_pitfall_12_the_cohort_is_not_read(study: Study, inputs: dict[str, Path], tmp_path: Path) -> None:
    shutil.rmtree(inputs["cohort"])
    without = {name: inputs[name] for name in ("autoencoder", "masks", "generator")}
    manifest = synthesise.run(study, without, tmp_path / "synthetic", Tracker())
    assert "cohort" not in manifest.parents


def test_pitfall_13_every_pair_of_the_plan_is_released(study: Study, inputs: dict[str, Path], tmp_path: Path) -> None:
    manifest = synthesise.run(study, inputs, tmp_path / "synthetic", Tracker())
    planned = [row.pair_id for row in synthesise.plan(study)]  # of the configuration alone: nobody looked at a pair
    for kind in ("images", "labels"):
        assert [f"{kind}/{name}.nii.gz" for name in planned] == sorted(n for n in manifest.files if n.startswith(kind))


def test_internal_parents_make_internal_pairs(
    tiny_settings: dict[str, Any], tmp_path: Path, before_training: Before
) -> None:
    private = {**tiny_settings["privacy"], "epsilon": float("inf")}
    study = config.parse({**tiny_settings, "name": "tiny-nonprivate", "privacy": private})
    inputs = before_training(study, tmp_path)
    train.run(study, inputs, inputs["generator"], Tracker())
    assert synthesise.run(study, inputs, tmp_path / "synthetic", Tracker()).sensitivity == "internal"


@pytest.fixture
def labelled(study: Study, tiny_settings: dict[str, Any]) -> Study:
    """The same without privacy, with two networks that label its pairs."""
    labelling = {"networks": 2, "channels": [4, 8], "steps": 20, "batch_size": 2}
    raw = study.model_dump() | {"name": "tiny-nonprivate", "privacy": {**tiny_settings["privacy"], "epsilon": "inf"}}
    raw["train"]["labelling"] = labelling
    return config.parse(raw)


def test_pairs_get_the_label_maps_that_networks_see_in_their_images(
    study: Study, labelled: Study, tmp_path: Path, before_training: Before
) -> None:
    inputs = before_training(labelled, tmp_path)
    train.run(labelled, inputs, inputs["generator"], Tracker())
    manifest = synthesise.run(labelled, inputs, tmp_path / "synthetic", Tracker())
    assert manifest.sensitivity == "internal" and manifest.details["labellers"] == 2
    source, built = masks.load_masks(inputs["masks"]), load_generator(inputs["generator"], inputs["autoencoder"])
    assert built.labeller is not None
    rows, unlabelled = synthesise.plan(labelled), dataclasses.replace(built, labeller=None)
    moved = 0
    for number, pair in enumerate(read_pairs(tmp_path / "synthetic")):
        (drawn,) = synthesise.render(
            [rows[number]], unlabelled, source, study.grid, study.synthesise, torch.device("cpu")
        )
        seen = built.labeller.outline(torch.from_numpy(drawn.image)[None])[0].numpy()
        alone = render_alone(labelled, inputs, number)
        assert np.array_equal(alone.image, drawn.image), "the label map that was drawn conditions the image"
        assert np.array_equal(alone.label, seen) and np.array_equal(pair.label, seen)
        assert alone.drawn is not None and np.array_equal(alone.drawn, drawn.label) and drawn.drawn is None
        moved += int((drawn.label != seen).sum())
    assert moved > 0
    kept = {pair.name: pair.label for pair in read_pairs(tmp_path / "synthetic", DRAWN)}
    assert {name: float(one.sum()) for name, one in kept.items()} == {
        row.pair_id: float(source.draw(row.mask_seed).sum()) for row in rows
    }


def test_what_a_pair_was_drawn_for_lies_in_the_window_of_the_pair(
    study: Study, labelled: Study, tmp_path: Path, before_training: Before
) -> None:
    raw = labelled.model_dump()
    sizes = [[4, size - 4] for size in study.grid.shape]
    cropped = config.parse(raw | {"grid": {**raw["grid"], "release_shape_range": sizes}})
    inputs = before_training(cropped, tmp_path)
    train.run(cropped, inputs, inputs["generator"], Tracker())
    source, built = masks.load_masks(inputs["masks"]), load_generator(inputs["generator"], inputs["autoencoder"])
    rows = synthesise.plan(cropped)[:2]
    for row, pair in zip(
        rows, synthesise.render(rows, built, source, cropped.grid, cropped.synthesise, torch.device("cpu")), strict=True
    ):
        whole = source.draw(row.mask_seed)
        (image,) = synthesise.render([row], built, source, study.grid, cropped.synthesise, torch.device("cpu"))
        window = synthesise.release_window(image.label, cropped.grid)
        assert pair.drawn is not None and pair.drawn.shape == pair.label.shape != whole.shape
        assert np.array_equal(pair.drawn, whole[window])


def test_a_kill_before_what_a_pair_was_drawn_for_is_written_renders_it_again(
    labelled: Study, tmp_path: Path, before_training: Before, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = before_training(labelled, tmp_path)
    train.run(labelled, inputs, inputs["generator"], Tracker())
    whole = synthesise.run(labelled, inputs, tmp_path / "whole", Tracker()).files
    with monkeypatch.context() as patch:
        patch.setattr(store.StageFolder, "finish", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            synthesise.run(labelled, inputs, tmp_path / "killed", Tracker())
    (store.partial(tmp_path / "killed") / DRAWN / "synthetic_00002.nii.gz").unlink()
    assert synthesise.run(labelled, inputs, tmp_path / "killed", Tracker()).files == whole


def test_a_share_of_the_pairs_is_drafts_and_the_others_are_as_they_were(
    study: Study, tiny_settings: dict[str, Any], tmp_path: Path, before_training: Before
) -> None:
    """Three of five rows from noise and two drafts among them: one batch of two holds one of either."""
    appearance = {"enabled": True, "coefficients": [2, 2]}
    plain = study.model_dump() | {"train": {**study.train.model_dump(), "appearance": appearance}}
    mixed = config.parse(plain | {"synthesise": {**study.synthesise.model_dump(), "drafts": 0.4}})
    inputs = before_training(mixed, tmp_path)
    train.run(mixed, inputs, inputs["generator"], Tracker())
    rows = synthesise.plan(mixed)
    assert [row.start for row in rows] == [1, 1, 0, 1, 0]
    synthesise.run(mixed, inputs, tmp_path / "mixed", Tracker())
    found = list(read_pairs(tmp_path / "mixed"))
    for start in (1.0, 0.0):
        whole = config.parse(plain | {"synthesise": {**study.synthesise.model_dump(), "start": start}})
        synthesise.run(whole, inputs, tmp_path / f"all-{start}", Tracker())
        alone = list(read_pairs(tmp_path / f"all-{start}"))
        for row, pair, other in zip(rows, found, alone, strict=True):
            assert np.array_equal(pair.label, other.label)
            assert np.array_equal(pair.image, other.image) == (row.start == start)


def test_it_needs_what_comes_before(study: Study, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="generator"):
        synthesise.run(study, {"masks": tmp_path, "autoencoder": tmp_path}, tmp_path / "synthetic", Tracker())


def cropping(low: int, high: int, margin: int) -> Grid:
    return Grid(
        spatial_dims=2,
        shape=(24, 24),
        spacing_mm=(1.0, 1.0),
        labels={0: "none", 1: "organ"},
        release_shape_range=((low, high), (low, high)),
        release_margin=margin,
    )


@given(st.integers(0, 23), st.integers(0, 23), st.integers(1, 24), st.integers(0, 23), st.integers(0, 6))
def test_a_window_lies_in_the_grid_and_the_public_range_and_holds_the_labels(
    first: int, last: int, low: int, more: int, margin: int
) -> None:
    first, last = sorted((first, last))
    grid = cropping(low, min(low + more, 24), margin)
    label = np.zeros((24, 24), np.uint8)
    label[first : last + 1, 7] = 1
    window = synthesise.release_window(label, grid)
    assert grid.release_shape_range is not None
    for part, (least, most) in zip(window, grid.release_shape_range, strict=True):
        assert 0 <= part.start < part.stop <= 24 and least <= part.stop - part.start <= most
    if last - first + 1 <= grid.release_shape_range[0][1]:
        assert label[window].sum() == label.sum()


@given(st.integers(2, 21), st.integers(2, 21), st.integers(1, 20), st.integers(0, 6))
def test_labels_come_back_to_the_place_where_they_were_drawn(first: int, last: int, low: int, margin: int) -> None:
    first, last = sorted((first, last))
    grid = cropping(low, 24, margin).model_copy(update={"intensity_percentiles": (0.0, 100.0)})
    label = np.zeros((24, 24), np.uint8)
    label[first : last + 1, 7:9] = 1
    window = synthesise.release_window(label, grid)
    cut = torch.from_numpy(label[window])
    _, again = pair_to_grid(torch.zeros(1, *cut.shape), cut, grid)
    assert np.array_equal(again.numpy(), label)


def test_a_window_of_an_empty_map_and_of_no_range() -> None:
    label = np.zeros((24, 24), np.uint8)
    assert label[synthesise.release_window(label, cropping(8, 10, 0))].shape == (8, 8)
    whole = cropping(8, 10, 0).model_copy(update={"release_shape_range": None})
    assert label[synthesise.release_window(label, whole)].shape == (24, 24)
