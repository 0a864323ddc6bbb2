"""Take each privacy guard out in turn and show that its tests turn red: ``make mutants``.

Every library is imported once; each mutant is a forked child that replaces one guard in memory and runs its tests with
an ordinary ``pytest``. Without a mutant the same tests must be green. A mutant survives when a test that is named for
it stays green; it is broken when it fails by its own fault. Both end the run with a non-zero status.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import signal
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
# One thread each: forked children must not inherit half a thread pool, and they run beside each other.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
sys.path.insert(0, str(HERE))

from table import MUTANTS, Mutant  # noqa: E402  # found by the line above

LIMIT_S = 600.0  # of one child; a machine that does other work too may need minutes
_OPTIONS = (
    "-q", "--tb=short", "-m", "", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:pytest_cov",
    "-p", "no:unraisableexception",  # what the parent left half open is collected in the forked child
    "-W", "ignore::pytest.PytestAssertRewriteWarning",  # libraries with plugins are imported before pytest starts
)  # fmt: skip


@dataclass
class Outcome:
    """What one pytest run said."""

    code: int = -1
    passed: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    log: str = ""
    elapsed_s: float = 0.0


class Recorder:
    """A pytest plugin that notes which tests were red, and in which file their exception was raised."""

    def __init__(self) -> None:
        self.passed: list[str] = []
        self.failed: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.failed[report.nodeid] = str(getattr(crash, "path", ""))
        elif report.when == "call" and report.passed:
            self.passed.append(report.nodeid)


def import_everything() -> None:
    """Import the package and what its tests import, before any child is forked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("torch", "monai.networks.nets", "opacus", "scipy.stats", "highdicom", "dp_accounting.pld"):
            importlib.import_module(name)
        import medsynth

        for found in pkgutil.walk_packages(medsynth.__path__, "medsynth."):
            importlib.import_module(found.name)
        sys.modules["torch"].set_num_threads(1)


def take_out(mutant: Mutant) -> None:
    """Put the mutant in the place of the guard, in every module of the package that knows it by name."""
    owner, name = _owner(mutant.guard)
    original = vars(owner)[name]
    value = mutant.without(original)
    setattr(owner, name, value)
    for module in [m for key, m in sys.modules.items() if key.partition(".")[0] == "medsynth"]:
        for key in [key for key, known in vars(module).items() if known is original]:
            setattr(module, key, value)


def _owner(guard: str) -> tuple[Any, str]:
    parts = guard.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            owner: Any = importlib.import_module("medsynth." + ".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:-1]:
            owner = getattr(owner, part)
        return owner, parts[-1]
    raise SystemExit(f"no module holds the guard {guard}")


def nodes_of(tests: Sequence[str]) -> list[str]:
    """Return node ids below the repository."""
    return [f"{TESTS}/{test}" for test in tests]


def run_tests(tests: Sequence[str], mutant: Mutant | None, result: Path) -> None:
    """Run inside a child: apply the mutant, run the tests, write the outcome to ``result``."""
    import pytest

    recorder = Recorder()
    if mutant is not None:
        take_out(mutant)
    # a folder of its own: every pytest process takes older ones away, also those of a run beside it
    places = [f"--rootdir={TESTS.parent}", f"--basetemp={result.with_suffix('')}"]
    code = int(pytest.main([*_OPTIONS, *places, *nodes_of(tests)], plugins=[recorder]))
    result.write_text(json.dumps({"code": code, "passed": recorder.passed, "failed": recorder.failed}))


def in_child(work: Callable[[Path], None], folder: Path, name: str) -> int:
    """Fork; the child does ``work`` with its own result file and its output in a log."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        log = os.open(folder / f"{name}.log", os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        work(folder / f"{name}.json")
        sys.stdout.flush()
        status = 0
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


def outcomes(jobs: Sequence[tuple[str, Sequence[str], Mutant | None]], at_once: int) -> Iterator[tuple[str, Outcome]]:
    """Yield the outcome of each job (name, tests, mutant) as it ends, ``at_once`` children at a time."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        waiting, running = list(jobs), {}
        while waiting or running:
            while waiting and len(running) < at_once:
                name, tests, mutant = waiting.pop(0)
                started = time.monotonic()
                child = in_child(lambda out, t=tests, m=mutant: run_tests(t, m, out), Path(scratch), name)
                running[child] = (name, started)
            time.sleep(0.02)
            for child, (name, started) in list(running.items()):
                if time.monotonic() - started > LIMIT_S:
                    os.kill(child, signal.SIGKILL)
                if os.waitpid(child, os.WNOHANG)[0]:
                    del running[child]
                    yield name, _read(Path(scratch), name, time.monotonic() - started)


def _read(folder: Path, name: str, elapsed_s: float) -> Outcome:
    found = folder / f"{name}.json"
    log = (folder / f"{name}.log").read_text(errors="replace") if (folder / f"{name}.log").exists() else ""
    values = json.loads(found.read_text()) if found.exists() else {}
    return Outcome(**values, log=log, elapsed_s=elapsed_s)


def _same(node: str, test: str) -> bool:
    name = node.split("tests/", 1)[-1]
    return name == test or name.startswith(f"{test}[")


def verdict(mutant: Mutant, outcome: Outcome) -> str:
    """Return ``killed``, or why not; every test that is named for the mutant must have turned red."""
    if outcome.code != 1:
        return "broken" if outcome.code != 0 else "SURVIVED"
    if any(Path(place).name == "table.py" for place in outcome.failed.values()):
        return "broken"
    red = [any(_same(node, test) for node in outcome.failed) for test in mutant.tests]
    return "killed" if all(red) else "SURVIVED"


def main() -> int:
    """Run the baseline and every mutant; print the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="children at a time")
    arguments.add_argument(
        "--only", default="", help="mutants whose name or guard holds one of these texts, separated by commas"
    )
    chosen = arguments.parse_args()
    wanted = chosen.only.split(",")
    mutants = [m for m in MUTANTS if any(text in m.name or text in m.guard for text in wanted)]
    if not mutants:
        raise SystemExit(f"no mutant is named {chosen.only!r}: see tests/mutants/table.py")
    started = time.monotonic()
    import_everything()
    print(f"imports {time.monotonic() - started:.0f} s; {len(mutants)} mutants", flush=True)
    files: dict[str, set[str]] = defaultdict(set)
    for mutant in mutants:
        for test in mutant.tests:
            files[test.partition("::")[0]].add(test)
    jobs: list[tuple[str, Sequence[str], Mutant | None]] = [
        (f"baseline {file}".replace("/", "_"), sorted(tests), None) for file, tests in files.items()
    ]
    jobs += [(mutant.name, mutant.tests, mutant) for mutant in mutants]
    known = {mutant.name: mutant for mutant in mutants}
    bad: dict[str, Outcome] = {}
    print(f"| {'pitfall':9} | {'guard taken out':48} | {'mutant':58} | {'tests':5} | result   |    s |")
    print(f"|{'-' * 11}|{'-' * 50}|{'-' * 60}|{'-' * 7}|{'-' * 10}|{'-' * 6}|", flush=True)
    for name, outcome in outcomes(jobs, chosen.jobs):
        if name in known:
            mutant = known[name]
            result = verdict(mutant, outcome)
            pitfalls, guard, tests = ", ".join(map(str, mutant.pitfalls)) or "-", mutant.guard, len(mutant.tests)
        else:
            result = "green" if outcome.code == 0 else "RED"
            pitfalls, guard, tests = "-", "none", len(outcome.passed) + len(outcome.failed)
        print(
            f"| {pitfalls:9} | {guard:48} | {name:58} | {tests:5} | {result:8} | {outcome.elapsed_s:4.1f} |", flush=True
        )
        if result not in ("killed", "green"):
            bad[name] = outcome
    for name, outcome in bad.items():
        print(f"\n=== {name}: exit code {outcome.code}, red {sorted(outcome.failed)}\n{outcome.log[-3000:]}")
    covered = {number for mutant in mutants for number in mutant.pitfalls}
    print(f"{len(mutants)} mutants of {len(covered)} pitfalls, {len(bad)} not as they must be, "
          f"{time.monotonic() - started:.0f} s")  # fmt: skip
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
