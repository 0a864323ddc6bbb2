"""Bad input from the command line: one clear message, the right exit code, nothing half written."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from medsynth import config
from medsynth.cli import verbs
from medsynth.privacy.accounting import Event
from medsynth.privacy.ledger import Ledger

pytestmark = pytest.mark.endtoend


@pytest.fixture
def study(tiny_settings: dict[str, Any], tmp_path: Path) -> Path:
    path = tmp_path / "study.yaml"
    path.write_text(config.dump(config.parse(tiny_settings)), encoding="utf-8")
    return path


def command(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["medsynth", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        verbs.main()
    return int(ended.value.code or 0)


def leftovers(run: Path) -> list[str]:
    kept = ("mlflow", "resources.json", "study.yaml", "ledger.jsonl", "ledger.jsonl.lock", ".lock")
    return sorted(path.name for path in run.glob("*") if path.name not in kept)


def test_an_empty_folder(study: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "hospital").mkdir()
    assert command(monkeypatch, "ingest", study, "--input", tmp_path / "hospital", "--out", tmp_path / "run") == 3
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("medsynth: ") and str(tmp_path) not in message
    assert leftovers(tmp_path / "run") == []


def test_a_folder_that_is_not_there(study: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    assert command(monkeypatch, "ingest", study, "--input", tmp_path / "nowhere", "--out", tmp_path / "run") == 3
    assert str(tmp_path) not in capsys.readouterr().err.splitlines()[-1]


def test_no_input_at_all(study: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    assert command(monkeypatch, "run", study, "--out", tmp_path / "run") == 3
    assert "add --input" in capsys.readouterr().err
    assert leftovers(tmp_path / "run") == []


def test_a_typo_in_the_configuration(study: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    study.write_text(study.read_text().replace("epsilon:", "epsilom:"), encoding="utf-8")
    assert command(monkeypatch, "run", study, "--input", tmp_path, "--out", tmp_path / "run") == 2
    assert "privacy.epsilom: unknown key, did you mean 'epsilon'?" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_output_that_cannot_be_written(study: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "file").write_text("a file where a folder should be")
    assert command(monkeypatch, "encode", study, "--out", tmp_path / "file") == 4
    assert "cannot write the run folder" in capsys.readouterr().err


def test_a_stage_before_its_inputs(study: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    assert command(monkeypatch, "synthesise", study, "--out", tmp_path / "run") == 4
    assert "run the stage before it first" in capsys.readouterr().err


def test_a_budget_that_is_spent(study: Path, tmp_path: Path, monkeypatch: Any, capsys: Any, make_pairs: Any) -> None:
    run = tmp_path / "run"
    values = ("--set", "grid.spacing_mm=null", "--set", "ingest.test_fraction=0.5")
    assert command(monkeypatch, "ingest", study, "--input", make_pairs(12), "--out", run, *values) == 0
    Ledger(run / "ledger.jsonl").reserve(
        "masks",
        [Event("gaussian", 0.5)],
        epsilon=20.0,
        delta=1e-4,
        noise_source="test_only",
        config_digest="0" * 64,
        parents={},
    )
    before = (run / "ledger.jsonl").read_bytes()
    assert command(monkeypatch, "masks", study, "--out", run, *values) == 6
    assert "does not fit into the budget" in capsys.readouterr().err
    assert (run / "ledger.jsonl").read_bytes() == before
    assert leftovers(run) == ["cohort"]


@pytest.fixture
def make_pairs(tmp_path: Path) -> Any:
    import numpy as np
    from PIL import Image

    def write(count: int) -> Path:
        rng = np.random.default_rng(0)
        for index in range(count):
            mask = np.zeros((20, 20), np.uint8)
            mask[4 + index % 5 : 14, 5:15] = 255
            for kind, array in (("images", rng.integers(0, 255, (20, 20), dtype=np.uint8)), ("masks", mask)):
                (tmp_path / "pairs" / kind).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(tmp_path / "pairs" / kind / f"case{index}.png")
        return tmp_path / "pairs"

    return write
