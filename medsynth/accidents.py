"""What must not leak when something goes wrong that nobody foresaw: tracebacks, core dumps, files that others may read.

The message of an unforeseen exception may quote a path of the cohort or a header, and a batch job's log is read by
more people than the run folder. So the log gets the kind of exception and a place in our code, the run folder the rest.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import secrets
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import NoReturn

from medsynth.errors import MedsynthError, UnexpectedError

FOLDER = "errors"
"""Below the run folder; internal."""
_CLEARING_UP_S = 5.0  # a second signal within it does not stop what the first one began
_PACKAGE = Path(__file__).resolve().parent


def protect_process() -> None:
    """Make new files readable by their owner only, write no core dumps, and mute what libraries log of their own.

    Readers of medical files log the values of headers; without a handler Python prints that on standard error.
    """
    os.umask(0o077)
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    logging.getLogger().addHandler(logging.NullHandler())


class Stopped(SystemExit):
    """Somebody asks the process to end: a time limit, a shutdown, Ctrl-C. Its code is 128 and the signal."""


def end_at_once(ended: SystemExit) -> NoReturn:
    """End this process, one that assisted, with the code of ``ended`` and nothing taken apart.

    Whatever gloo does while connections are closed from both ends, an abort say, would be this process's exit code,
    for which ``torchrun`` stops rank 0 amid its later stages. An assistant has nothing open that needs an orderly end.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # closed, or nobody reads it
            stream.flush()
    os._exit(ended.code if isinstance(ended.code, int) else int(ended.code is not None))


def stop_when_asked() -> None:
    """Raise :class:`Stopped` wherever the process is when SIGTERM or SIGINT (Ctrl-C) arrives.

    So what patients left in temporary folders is removed and MLflow hears of it. Without a handler the first process
    of a container does not hear the signal at all, and is killed when the patience of the cluster ends.
    """

    asked: list[float] = []

    def stop(number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if asked and now - asked[-1] < _CLEARING_UP_S:
            return
        asked.append(now)
        raise Stopped(128 + number)

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background jobs ignore it
        signal.signal(signal.SIGINT, stop)


@contextlib.contextmanager
def kept_in(run: Path) -> Iterator[None]:
    """Keep the traceback of an unforeseen exception in ``run/errors`` and raise one that may be shown anywhere.

    Raises:
        MedsynthError: instead of that of a package that is not installed.
        UnexpectedError: instead of any other exception that is not ours.
    """
    try:
        yield
    except MedsynthError:
        raise
    except Exception as error:
        if (said := lacking(error)) is not None:
            raise said from error
        name = _keep(error, run)
        where = "its traceback could not be kept"
        if name:
            where = (
                f"its traceback is in {FOLDER}/{name} of the run folder. That file may quote paths and values of the "
                "cohort: read it inside"
            )
        raise UnexpectedError(
            f"{describe(error)}; {where}. Finished stages stay; the same command goes on where this one stopped"
        ) from error


def lacking(error: BaseException) -> MedsynthError | None:
    """Return what to say when a package is not installed that we depend on; None for any other error.

    A collaborator who only verifies installs four packages. A module of our own that is missing, or one of a package
    that is there, is an accident and no matter of what was installed.
    """
    package = ((isinstance(error, ModuleNotFoundError) and error.name) or "").partition(".")[0]
    if not package or package == _PACKAGE.name or package in sys.stdlib_module_names or find_spec(package):
        return None
    return MedsynthError(
        f"this verb needs the full installation of medsynth, and '{package}' is not installed here: install medsynth "
        "with everything that it depends on (README.md); `medsynth verify` needs less"
    )


def describe(error: BaseException) -> str:
    """Return what may be said of an exception in a log: its class and the place in our code, never its message."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(_PACKAGE)
    ]
    place = ""
    if frames:
        file = Path(frames[-1].filename).relative_to(_PACKAGE.parent).as_posix()
        place = f" in {file}, line {frames[-1].lineno} ({frames[-1].name})"
    return f"unexpected {type(error).__name__}{place}"


def _keep(error: BaseException, run: Path) -> str | None:
    """Write the traceback where only the owner reads it; return the file's name, None where that is impossible."""
    folder = run / FOLDER
    name = f"{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(3)}.txt"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        handle = os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write("".join(traceback.format_exception(error)))
    except OSError:
        return None
    return name
