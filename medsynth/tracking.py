"""MLflow, the researchers' window on a run: a parent run a pipeline, a nested run a stage; the only importer of mlflow.

Nothing private goes in: no patient identifier, no path of an input, no real pixel. Values computed on patients
(losses, Dice) are internal and stay in this store. Tracking never stops a pipeline: a store that fails is reported
once and left alone.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from medsynth import logs
from medsynth.files import replace_bytes

_FORBIDDEN_IN_KEYS = re.compile(r"[^\w\-. /]")
_MAX_VALUE_CHARACTERS = 500
_MAX_DIGEST_CHARACTERS = 36  # width of MLflow's column
_ARTIFACTS = "/mlflow/artifacts"  # with which every place of our own stores ends
_BATCH = 100  # MLflow's limit on parameters in one call
_GIVE_UP_AFTER = 3  # failures in a row; a remote server that is gone costs its time-out each time
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "false",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
}
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "15"}
_NEUTRAL_TAGS = {"mlflow.user": "medsynth", "mlflow.source.name": "medsynth", "mlflow.source.type": "LOCAL"}


class Tracker:
    """What a stage may report; this one forgets everything."""

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Log numbers by name; values that are not finite are left out.

        Args:
            values: numbers by name, e.g. ``{"loss": 0.3}``.
            step: position in a series, >= 0; None: a single value.
        """

    def params(self, values: Mapping[str, str]) -> None:
        """Log settings by dotted name; one that is set already keeps its first value."""

    def describe(self, text: str) -> None:
        """Say in words (Markdown) what the run is; nothing of a patient."""

    def figure(self, path: Path, name: str) -> None:
        """Log a picture or page made of synthetic or aggregate values, never of real pixels.

        Args:
            path: the PNG or HTML file.
            name: name in the store, e.g. ``"evaluate/dice.png"``; the suffix of ``path`` is added when missing.
        """

    def dataset(self, name: str, digest: str, context: str) -> None:
        """Log which data a run read, by name and digest only.

        Args:
            name: stage folder, e.g. ``"cohort"``.
            digest: its manifest's digest, hex.
            context: role, e.g. ``"training"``.
        """

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Tracker]:
        """Open the nested run of a stage; it ends as failed when the block raises."""
        yield self


class _Store:
    """An MLflow client whose failures are reported once and otherwise ignored."""

    def __init__(self, client: Any, experiment_id: str) -> None:
        self.client = client
        self.experiment_id = experiment_id
        self._failures = 0

    def attempt(self, call: Callable[[], Any]) -> Any:
        """Return what ``call`` returns, or None when it fails or the store was given up."""
        if self._failures >= _GIVE_UP_AFTER:
            return None
        try:
            result = call()
        except Exception as error:  # whatever MLflow raises, the pipeline is worth more than its log
            if self._failures == 0:
                _warn(error)
            self._failures += 1
            return None
        self._failures = 0
        return result

    def open_run(self, name: str, parent: str | None) -> str | None:
        """Create a run and return its id."""
        tags = {**_NEUTRAL_TAGS, **({"mlflow.parentRunId": parent} if parent else {})}
        run = self.attempt(lambda: self.client.create_run(self.experiment_id, tags=tags, run_name=name))
        return None if run is None else str(run.info.run_id)

    @contextlib.contextmanager
    def closing(self, run_id: str | None) -> Iterator[None]:
        """End the run as finished, failed or killed when the block ends."""
        status = "FINISHED"
        try:
            yield
        except Exception:
            status = "FAILED"
            raise
        except BaseException:
            status = "KILLED"
            raise
        finally:
            if run_id is not None:
                self.attempt(lambda: self.client.set_terminated(run_id, status))


class _MlflowTracker(Tracker):
    def __init__(self, store: _Store, run_id: str) -> None:
        self._store = store
        self._run_id = run_id

    def metrics(self, values: Mapping[str, float], step: int | None = None) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [
            Metric(_key(name), float(value), now, step or 0) for name, value in values.items() if math.isfinite(value)
        ]
        for part in _parts(batch):
            self._store.attempt(partial(self._store.client.log_batch, self._run_id, metrics=part))

    def params(self, values: Mapping[str, str]) -> None:
        from mlflow.entities import Param

        run = self._store.attempt(lambda: self._store.client.get_run(self._run_id))
        known = {} if run is None else run.data.params
        batch = [Param(_key(k), str(v)[:_MAX_VALUE_CHARACTERS]) for k, v in values.items() if _key(k) not in known]
        for part in _parts(batch):
            self._store.attempt(partial(self._store.client.log_batch, self._run_id, params=part))

    def describe(self, text: str) -> None:
        self._store.attempt(lambda: self._store.client.set_tag(self._run_id, "mlflow.note.content", text))

    def figure(self, path: Path, name: str) -> None:
        target = Path(name if Path(name).suffix else name + path.suffix)
        folder = target.parent.as_posix()
        with tempfile.TemporaryDirectory(
            prefix="medsynth-"
        ) as scratch:  # MLflow keeps the name of the file it is given
            copy = shutil.copyfile(path, Path(scratch) / target.name)
            place = None if folder == "." else folder
            self._store.attempt(lambda: self._store.client.log_artifact(self._run_id, str(copy), place))

    def dataset(self, name: str, digest: str, context: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        data = Dataset(name, digest[:_MAX_DIGEST_CHARACTERS], "medsynth", f"stage folder {name}")
        entry = DatasetInput(data, [InputTag("mlflow.data.context", context)])
        self._store.attempt(lambda: self._store.client.log_inputs(self._run_id, [entry]))

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[Tracker]:
        run_id = self._store.open_run(name, self._run_id)
        with self._store.closing(run_id):
            yield Tracker() if run_id is None else _MlflowTracker(self._store, run_id)


def open_tracker(uri: str | None, experiment: str, run_folder: Path, run_name: str) -> AbstractContextManager[Tracker]:
    """Open the parent run of a pipeline; a continued pipeline finds its first one again.

    Args:
        uri: MLflow tracking URI; None: a SQLite database and files below ``run_folder/mlflow``.
        experiment: name of the MLflow experiment.
        run_folder: the run's folder; ``mlflow/run_id`` below it remembers the parent run.
        run_name: name of the parent run.

    Returns:
        A context manager; its tracker forgets everything when the store cannot be opened (reported once).
    """
    return _opened(uri, experiment, run_folder / "mlflow", run_name)


@contextlib.contextmanager
def _opened(uri: str | None, experiment: str, folder: Path, run_name: str) -> Iterator[Tracker]:
    if uri is not None:
        logs.say("opening the MLflow store of tracking.uri")  # one that is not there is waited for, for minutes
    try:
        with warnings.catch_warnings():
            # MLflow's own imports warn; where warnings are errors they would end half-way, for this whole process.
            warnings.simplefilter("ignore")
            store = _open_store(uri, experiment, folder)
        run_id = _parent_run(store, folder / "run_id", run_name)
    except Exception as error:  # see _Store.attempt
        _warn(error)
        run_id = None
    if run_id is None:
        yield Tracker()
        return
    with store.closing(run_id):
        yield _MlflowTracker(store, run_id)


def _open_store(uri: str | None, experiment: str, folder: Path) -> _Store:
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(_ENVIRONMENT)
    for name, value in _PATIENCE.items():
        os.environ.setdefault(name, value)
    artifacts: str | None = None
    if uri is None:
        place = folder.resolve()
        uri, artifacts = f"sqlite:///{place / 'mlflow.db'}", (place / "artifacts").as_uri()
        _follow_move(place / "mlflow.db", artifacts)
        # Without this, MLflow makes ./mlruns where the command was called and writes that path into the database.
        os.environ["_MLFLOW_SERVER_ARTIFACT_ROOT"] = artifacts
    from mlflow import MlflowClient

    for noisy in ("alembic", "mlflow", "mlflow.store.db.utils"):
        # Their errors come with tracebacks, and with the exception of ours that was under way: see attempt().
        logging.getLogger(noisy).setLevel(logging.CRITICAL + 1)
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    known = client.get_experiment_by_name(experiment)
    if known is not None:
        return _Store(client, known.experiment_id)
    return _Store(client, client.create_experiment(experiment, artifact_location=artifacts))


def _follow_move(database: Path, artifacts: str) -> None:
    """Put the folder's present place into a database that was moved (or copied) with it: MLflow keeps absolute ones.

    Args:
        database: our own store's; nothing is done where there is none yet.
        artifacts: URI of the folder of artifacts beside it.
    """
    if not database.is_file():
        return
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        if not {"experiments", "runs"} <= {name for (name,) in connection.execute("select name from sqlite_master")}:
            return  # MLflow was stopped before it had made its tables
        places = {place for (place,) in connection.execute("select artifact_location from experiments") if place}
        moved = {place for place in places if place.endswith(_ARTIFACTS) and place != artifacts}
        for old in moved:
            for table, column in (("experiments", "artifact_location"), ("runs", "artifact_uri")):
                connection.execute(
                    f"update {table} set {column} = ? || substr({column}, ?) where substr({column} || '/', 1, ?) = ?",
                    (artifacts, len(old) + 1, len(old) + 1, f"{old}/"),
                )
    if moved:
        logs.say("the MLflow store was moved: it now keeps its figures where it is, and finds the earlier ones here")


def _parent_run(store: _Store, memory: Path, run_name: str) -> str | None:
    if memory.is_file():
        run_id = memory.read_text(encoding="ascii").strip()
        try:
            store.client.update_run(run_id, status="RUNNING")
        except Exception:
            logs.say("the earlier MLflow run is gone: a new one is opened")
        else:
            return run_id
    opened = store.open_run(run_name, None)
    if opened is not None:
        replace_bytes(memory, f"{opened}\n".encode("ascii"))
    return opened


def _warn(error: Exception) -> None:
    # The class only: messages of SQLAlchemy and HTTP errors quote paths, addresses and credentials.
    logs.say("MLflow failed: the pipeline goes on, some of its log is missing", error=type(error).__name__)


def _key(name: str) -> str:
    return _FORBIDDEN_IN_KEYS.sub("_", name)


def _parts(batch: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(batch), _BATCH):
        yield batch[start : start + _BATCH]
