"""Phantom patients as a finished cohort, and the public stages before training, for the tests of stages."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from medsynth import store
from medsynth.config import Study
from medsynth.imaging.cohort import CASE_COLUMNS, write_case
from medsynth.imaging.phantom import phantom_pairs
from medsynth.stages import encode, masks
from medsynth.tracking import Tracker

MakeCohort = Callable[..., Path]
Before = Callable[..., dict[str, Path]]


@pytest.fixture
def make_cohort() -> MakeCohort:
    """Return a function that writes a cohort of phantom patients; patient number n is always the same person."""

    def make(study: Study, folder: Path, numbers: range | list[int] = range(6), records: int = 1) -> Path:
        grid = study.grid
        per_case = records if grid.spatial_dims == 2 else 1
        with store.create(folder, "ingest", "0" * 64) as stage:
            rows = []
            for number in numbers:
                images, labels = map(torch.from_numpy, phantom_pairs(grid, records, 1000 + number))
                for case in range(records // per_case):
                    part = slice(case * per_case, (case + 1) * per_case)
                    name = f"case-{number:03d}-{case}"
                    write_case(stage.path, name, images[part], labels[part], grid)
                    rows.append([name, f"patient-{number:03d}", "train", "nifti", per_case, "true", ""])
            with (stage.path / "cases.csv").open("w", newline="") as handle:
                csv.writer(handle).writerows([CASE_COLUMNS, *rows])
            stage.finish("private")
        return folder

    return make


@pytest.fixture
def before_training(make_cohort: MakeCohort) -> Before:
    """Return a function that runs what comes before ``train`` and returns its inputs."""

    def prepare(study: Study, root: Path, numbers: range | list[int] = range(6), records: int = 1) -> dict[str, Path]:
        names = ("cohort", "autoencoder", "masks", "generator")
        inputs = {name: root / name for name in names} | {"ledger": root / "ledger.jsonl"}
        make_cohort(study, inputs["cohort"], numbers, records)
        encode.run(study, {}, inputs["autoencoder"], Tracker())
        masks.run(study, inputs, inputs["masks"], Tracker())
        return inputs

    return prepare
