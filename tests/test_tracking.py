"""The tracker: what goes into MLflow, what never does, and that it cannot stop a pipeline."""

from __future__ import annotations

import os
import shutil
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from medsynth import tracking
from medsynth.tracking import Tracker, open_tracker

pytestmark = pytest.mark.filterwarnings("ignore")  # MLflow's own imports warn


class Written(NamedTuple):
    folder: Path
    working: Path
    connections: list[Any]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    """One run folder, written once with the network blocked: creating MLflow's database takes seconds."""
    folder = tmp_path_factory.mktemp("run")
    working = tmp_path_factory.mktemp("DOE-JANE-19700101")  # a working directory whose name must not leak
    connections: list[Any] = []

    def refuse(self: socket.socket, address: Any) -> None:
        connections.append(address)
        raise OSError("network blocked")

    figure = working / "source-name.png"
    figure.write_bytes(b"\x89PNG")
    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", refuse)
    patch.chdir(working)
    patch.setattr(os, "environ", os.environ.copy())
    try:
        with open_tracker(None, "medsynth", folder, "demo") as tracker:
            tracker.params({"train.steps": "5", "grid.labels.1": "a" * 9000})
            tracker.params({"train.steps": "6"})
            tracker.describe("What it is")
            with tracker.stage("train") as stage:
                for step in range(3):
                    stage.metrics({"loss": 1.0 / (step + 1), "Dice: left (%)": 0.5, "epsilon": float("inf")}, step)
                stage.figure(figure, "evaluate/dice")
                stage.dataset("cohort", "ab" * 32, "training")
        with open_tracker(None, "medsynth", folder, "demo") as tracker, tracker.stage("certify") as stage:
            stage.metrics({"epsilon": 8.0})
        opened = open_tracker(None, "medsynth", folder, "demo")
        with pytest.raises(ZeroDivisionError), opened as tracker, tracker.stage("export"):
            raise ZeroDivisionError
    finally:
        patch.undo()
    yield Written(folder, working, connections)


def _rows(written: Written, query: str) -> list[tuple[Any, ...]]:
    with sqlite3.connect(written.folder / "mlflow" / "mlflow.db") as database:
        return database.execute(query).fetchall()


def test_a_pipeline_is_one_parent_run_with_a_nested_run_a_stage_even_when_continued(written: Written) -> None:
    parent = (written.folder / "mlflow" / "run_id").read_text().strip()
    runs = {name: (run, status) for run, name, status in _rows(written, "select run_uuid, name, status from runs")}
    assert set(runs) == {"demo", "train", "certify", "export"}
    assert runs["demo"][0] == parent
    nested = _rows(written, "select run_uuid from tags where key='mlflow.parentRunId' and value=" + f"'{parent}'")
    assert {run for (run,) in nested} == {runs[name][0] for name in ("train", "certify", "export")}
    assert runs["train"][1] == "FINISHED" and runs["export"][1] == "FAILED" == runs["demo"][1]


def test_values_arrive_and_what_is_not_finite_is_left_out(written: Written) -> None:
    series = _rows(written, "select value from metrics where key='loss' order by step")
    assert [value for (value,) in series] == pytest.approx([1, 1 / 2, 1 / 3])
    assert _rows(written, "select value from metrics where key='epsilon'") == [(8.0,)]
    assert _rows(written, "select count(*) from metrics where key like 'Dice%'") == [(3,)]
    assert _rows(written, "select value from params where key='train.steps'") == [("5",)]
    assert _rows(written, "select name, digest from datasets") == [("cohort", ("ab" * 32)[:36])]
    assert _rows(written, "select value from tags where key='mlflow.note.content'") == [("What it is",)]
    assert [p.name for p in (written.folder / "mlflow" / "artifacts").rglob("*.png")] == ["dice.png"]


def test_nothing_of_the_machine_or_the_caller_is_written(written: Written) -> None:
    raw = b"".join(path.read_bytes() for path in written.folder.rglob("*") if path.is_file())
    home = os.environ.get("USER", "")
    for secret in (written.working.name, "source-name", "git.commit", sys.executable, socket.gethostname()):
        assert secret.encode() not in raw
    users = {value for (value,) in _rows(written, "select value from tags where key like 'mlflow.user'")}
    assert users == {"medsynth"} and home not in (users - {"medsynth"})
    assert list(written.working.iterdir()) == [written.working / "source-name.png"]


def test_no_connection_is_tried(written: Written) -> None:
    assert written.connections == []


def test_a_failing_store_is_reported_once_and_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken:
        calls = 0

        def _fail(self, *given: Any, **named: Any) -> Any:
            Broken.calls += 1
            raise RuntimeError("database is locked: /hospital/DOE-JANE")

        log_batch = create_run = _fail

    tracker = tracking._MlflowTracker(tracking._Store(Broken(), "1"), "run")
    for step in range(20):
        tracker.metrics({"loss": 1.0}, step)
    with tracker.stage("train") as stage:
        stage.metrics({"loss": 1.0})
    message = capsys.readouterr().err
    assert message.count("MLflow failed") == 1 and "DOE-JANE" not in message
    assert Broken.calls == tracking._GIVE_UP_AFTER


def test_a_broken_database_prints_no_traceback(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """MLflow would log its own, and with it the exception of ours that is under way, message and all."""
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ValueError, match="DOE-JANE"),
        open_tracker(None, "medsynth", tmp_path, "demo") as tracker,
        tracker.stage("ingest"),
    ):
        patch.setattr(os, "environ", os.environ.copy())
        with sqlite3.connect(tmp_path / "mlflow" / "mlflow.db") as database:
            database.execute("drop table runs")
        raise ValueError("/hospital/DOE-JANE is 7")
    printed = "".join(capfd.readouterr())
    assert "MLflow failed" in printed
    assert "DOE-JANE" not in printed and "Traceback" not in printed and "SQL" not in printed


def test_a_store_that_cannot_be_opened_gives_a_tracker_that_forgets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with open_tracker("no-such-scheme://host", "medsynth", tmp_path, "demo") as tracker:
        assert type(tracker) is Tracker
        tracker.metrics({"loss": 1.0})
    assert "MLflow failed" in capsys.readouterr().err


@pytest.mark.parametrize("carry", ["move", "copy"])
def test_a_store_that_was_carried_elsewhere_keeps_and_finds_its_figures_there(
    carry: str, written: Written, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    before, after = tmp_path / "run", tmp_path / "a patient's folder" / "run"
    shutil.copytree(written.folder, before)
    with open_tracker(None, "medsynth", before, "demo"):  # where `written` is, a copy of it must not write
        pass
    known = {path: path.read_bytes() for path in before.rglob("*.png")}
    after.parent.mkdir()
    shutil.copytree(before, after)
    if carry == "move":
        shutil.rmtree(before)
    capsys.readouterr()
    figure = tmp_path / "new.png"
    figure.write_bytes(b"\x89PNG new")
    for _ in range(2):
        with open_tracker(None, "medsynth", after, "demo") as tracker, tracker.stage("evaluate") as stage:
            stage.figure(figure, "evaluate/new")
    shown = capsys.readouterr().err
    assert shown.count("was moved") == 1 and "a patient" not in shown and str(tmp_path) not in shown
    assert len(list(after.rglob("new.png"))) == 2
    assert {path: path.read_bytes() for path in before.rglob("*.png")} == (known if carry == "copy" else {})
    for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
        places = [place for (place,) in _rows(written._replace(folder=after), f"select {column} from {table}")]
        assert places and all(place.startswith((after / "mlflow" / "artifacts").as_uri()) for place in places)

    from mlflow import MlflowClient

    ((run,),) = _rows(written._replace(folder=after), "select run_uuid from runs where name='train'")
    client = MlflowClient(f"sqlite:///{after / 'mlflow' / 'mlflow.db'}")
    assert [one.path for one in client.list_artifacts(run, "evaluate")] == ["evaluate/dice.png"]


def test_a_database_without_tables_is_left_to_mlflow(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").touch()
    tracking._follow_move(tmp_path / "mlflow.db", "file:///here/mlflow/artifacts")
    assert (tmp_path / "mlflow.db").read_bytes() == b""


def test_importing_the_module_does_not_import_mlflow() -> None:
    code = "import sys, medsynth.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_store_opens_where_warnings_are_errors(tmp_path: Path) -> None:
    # In a process of its own: what MLflow imports, it imports once.
    code = (
        "import sys; from pathlib import Path; from medsynth.tracking import Tracker, open_tracker\n"
        "with open_tracker(None, 'medsynth', Path(sys.argv[1]), 'demo') as tracker: sys.exit(type(tracker) is Tracker)"
    )
    command = [sys.executable, "-W", "error", "-c", code, str(tmp_path)]
    ran = subprocess.run(command, check=False, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr + ran.stdout
