"""What nobody foresaw: a log that names no value, a traceback that only its owner reads, no core dump."""

from __future__ import annotations

import importlib
import logging
import os
import resource
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from medsynth import accidents, config
from medsynth.cli import verbs
from medsynth.errors import BudgetError, ConfigError, UnexpectedError

SECRET = "/cohort/DOE^JANE.dcm"


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    mask, limit, handlers = os.umask(0o022), resource.getrlimit(resource.RLIMIT_CORE), logging.getLogger().handlers[:]
    yield
    os.umask(mask)
    resource.setrlimit(resource.RLIMIT_CORE, limit)
    logging.getLogger().handlers[:] = handlers


def fail(*_: Any, **__: Any) -> None:
    raise FileNotFoundError(2, "No such file", SECRET)


def kept(run: Path) -> list[Path]:
    return sorted((run / accidents.FOLDER).iterdir())


def command(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["medsynth", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        verbs.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("verb", ["run", "ingest"])
def test_an_unforeseen_error_names_no_value_and_keeps_its_traceback_inside(
    verb: str, tiny_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    study, run = tmp_path / "study.yaml", tmp_path / "run"
    study.write_text(config.dump(config.parse(tiny_settings)), encoding="utf-8")
    monkeypatch.setattr("medsynth.study.open_tracker", fail)
    assert (
        command(monkeypatch, verb, study, "--input", tmp_path / "hospital", "--out", run) == UnexpectedError.exit_code
    )
    shown = "".join(capsys.readouterr())
    assert "unexpected FileNotFoundError in medsynth/study.py, line" in shown
    assert "DOE" not in shown and str(tmp_path) not in shown and "Traceback" not in shown
    (file,) = kept(run)
    assert SECRET in file.read_text() and file.name in shown
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_a_verb_without_a_run_folder_keeps_quiet_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("medsynth.release.verify.verify", fail)
    assert command(monkeypatch, "verify", tmp_path) == UnexpectedError.exit_code
    shown = "".join(capsys.readouterr())
    assert "unexpected FileNotFoundError in medsynth/cli/verbs.py" in shown and "DOE" not in shown


@pytest.mark.parametrize("verb", ["config", "ingest"])
def test_a_verb_that_the_small_installation_cannot_do_says_so(
    verb: str, tiny_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def unimportable(*_: Any, **__: Any) -> None:
        import not_installed  # type: ignore[import-not-found]  # noqa: F401

    study, run = tmp_path / "study.yaml", tmp_path / "run"
    study.write_text(config.dump(config.parse(tiny_settings)), encoding="utf-8")
    monkeypatch.setattr("medsynth.config.load" if verb == "config" else "medsynth.study.open_tracker", unimportable)
    words = (
        ("config", "show", study) if verb == "config" else (verb, study, "--input", tmp_path / "hospital", "--out", run)
    )
    assert command(monkeypatch, *words) == 1
    shown = "".join(capsys.readouterr())
    assert "needs the full installation of medsynth, and 'not_installed' is not" in shown and "unexpected" not in shown
    assert not (run / accidents.FOLDER).exists()


@pytest.mark.parametrize("module", ["medsynth.no_such_stage", "numpy.no_such_part", "sqlite3.no_such_part"])
def test_a_missing_module_of_ours_or_of_an_installed_package_is_an_accident(module: str, tmp_path: Path) -> None:
    with pytest.raises(UnexpectedError, match="unexpected ModuleNotFoundError"), accidents.kept_in(tmp_path):
        importlib.import_module(module)


def test_errors_of_ours_and_interrupts_pass(tmp_path: Path) -> None:
    for expected in (BudgetError("nothing is left"), KeyboardInterrupt()):
        with pytest.raises(type(expected)), accidents.kept_in(tmp_path):
            raise expected
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_changes_nothing_but_the_words(tmp_path: Path) -> None:
    (tmp_path / accidents.FOLDER).write_text("a file where a folder should be")
    with pytest.raises(UnexpectedError, match="could not be kept"), accidents.kept_in(tmp_path):
        fail()


def test_a_protected_process_writes_for_its_owner_and_dumps_no_core(tmp_path: Path, capsys: Any) -> None:
    accidents.protect_process()
    (tmp_path / "file").write_text("")
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600
    assert resource.getrlimit(resource.RLIMIT_CORE)[0] == 0
    logging.getLogger("pydicom").warning("invalid value %s", SECRET)
    assert "DOE" not in "".join(capsys.readouterr())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_that_is_asked_to_end_clears_up_and_says_that_it_can_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, number: signal.Signals
) -> None:
    """Exit code 143 or 130; blocks that remove what patients left are run, and a second signal does not stop them."""
    left = tmp_path / "patients"

    def work() -> None:
        left.write_text("voxels")
        try:
            os.kill(os.getpid(), number)
            raise AssertionError("nobody heard it")
        finally:
            os.kill(os.getpid(), number)
            left.unlink()

    monkeypatch.setattr(verbs, "app", work)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert command(monkeypatch, "run") == 128 + number
    assert not left.exists() and "goes on" in capsys.readouterr().err


def test_ctrl_c_does_not_reach_a_job_in_the_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell starts it with the signal ignored."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    monkeypatch.setattr(verbs, "app", lambda: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(sys, "argv", ["medsynth", "run"])
    verbs.main()


def test_processes_of_torchrun_end_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may wait for each other in a call that no exception ends."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(verbs, "app", lambda: None)
    monkeypatch.setattr(sys, "argv", ["medsynth", "run"])
    verbs.main()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize(("code", "kept"), [(None, 0), (0, 0), (7, 7), ("a message", 1)])
def test_an_assistant_ends_with_its_code_and_takes_nothing_apart(
    code: Any, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What gloo does while its connections are closed would end rank 0, whose later stages take hours."""

    class Ended(BaseException):
        pass

    def end(code: int) -> None:
        raise Ended(code)

    def app() -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(verbs, "app", app)
    monkeypatch.setattr(sys, "argv", ["medsynth", "run"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(Ended) as ended:
        verbs.main()
    assert ended.value.args == (kept,)
    monkeypatch.setenv("RANK", "0")  # it writes and tracks: everything is closed in order
    with pytest.raises(SystemExit):
        verbs.main()


@pytest.mark.parametrize(("size", "rank"), [("x", "0"), ("2", "x")])
def test_variables_of_torchrun_that_are_no_numbers_are_said(
    size: str, rank: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", rank)
    assert command(monkeypatch, "run") == ConfigError.exit_code
    assert "whole numbers" in capsys.readouterr().err
