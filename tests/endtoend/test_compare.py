"""medsynth compare as a person would: two studies of one hospital, the command, its page and its nested MLflow runs."""

from __future__ import annotations

import sqlite3
import sys
from pathlib import Path
from typing import Any

import pytest

from medsynth import config, store
from medsynth.cli import verbs
from medsynth.imaging.phantom_hospital import FAMILY_NAME, LABELS, write_hospital
from medsynth.stages.comparison import read_result
from medsynth.study import run_verb

pytestmark = [pytest.mark.endtoend, pytest.mark.filterwarnings("ignore")]  # MLflow's own imports warn


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_settings: dict[str, Any]) -> list[Path]:
    """Two runs of one hospital, at epsilon 8 and without privacy, as far as their pairs."""
    root = tmp_path_factory.mktemp("compare")
    write_hospital(root / "hospital", patients=12, seed=0)
    grid = {
        **tiny_settings["grid"],
        "spatial_dims": 3,
        "shape": [24, 32, 24],
        "spacing_mm": [2, 2, 2],
        "labels": LABELS,
    }
    changes = {
        "grid": grid,
        "masks": {"coefficients": [3, 3, 3]},
        "train": {**tiny_settings["train"], "appearance": {"coefficients": [2, 2, 2]}},
        "ingest": {"test_fraction": 0.3},
        "segment": {"channels": [4, 8], "steps": 8, "batch_size": 2},
    }
    for name, privacy in (("eight", {"delta": 1e-3}), ("open-nonprivate", {"epsilon": "inf"})):
        settings = {**tiny_settings, **changes, "name": name, "privacy": {**tiny_settings["privacy"], **privacy}}
        for verb in ("ingest", "encode", "masks", "train", "synthesise"):
            run_verb(config.parse(settings), verb, root / "hospital", root / name)
    return [root / "eight", root / "open-nonprivate"]


def _command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["medsynth", *arguments])
    with pytest.raises(SystemExit) as left:
        verbs.main()
    return int(left.value.code or 0)


def test_the_command_compares_what_two_studies_made(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "comparison"
    arguments = ["compare", *map(str, runs), "--out", str(out), "--quick", "--set", "compute.workers=2"]
    assert _command(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out
    assert "epsilon-inf" in printed and "random contrast" in printed and "compare.html" in printed
    assert store.read_manifest(out / "compare").sensitivity == "internal"
    result = read_result(out / "compare")
    assert [run.epsilon for run in result.runs] == [8.0, "inf"] and result.protocol.quick
    assert all((out / "compare" / name).is_file() for name in ("skill-by-epsilon.png", "dice-by-patients.png"))
    with sqlite3.connect(out / "mlflow" / "mlflow.db") as database:
        query = "select count(*) from tags where key = 'mlflow.parentRunId'"
        assert database.execute(query).fetchone()[0] == len(list((out / "compare" / "trainings").iterdir()))
    assert not [path for path in out.rglob("*") if path.is_file() and FAMILY_NAME.encode() in path.read_bytes()]
    assert _command(monkeypatch, *arguments) == 0 and "finished before" in capsys.readouterr().err


def test_a_run_that_is_not_finished_stops_the_command(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _command(monkeypatch, "compare", str(runs[0]), str(tmp_path), "--out", str(tmp_path / "out")) == 4
    assert "run 2 of those given" in capsys.readouterr().err and not (tmp_path / "out").exists()
