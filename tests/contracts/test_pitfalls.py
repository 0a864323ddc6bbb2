"""The 23 pitfalls: each has a guard that ``make mutants`` takes out, tests that turn red, and a row in the docs."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from medsynth.study import STAGES

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "explanation" / "what-epsilon-covers.md"
PITFALLS = range(1, 24)


def load_table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("mutants_table", ROOT / "tests" / "mutants" / "table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


TABLE = load_table()


@functools.cache
def defined_in(path: Path) -> frozenset[str]:
    """Return the names of functions, classes, methods and constants of a file, methods as ``Class.method``."""
    names: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            children = node.body if isinstance(node, ast.ClassDef) else []
            names |= {f"{node.name}.{child.name}" for child in children if isinstance(child, ast.FunctionDef)}
    return frozenset(names)


def rows() -> dict[int, list[str]]:
    """Return the cells of the table of pitfalls by number."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    found = [line.strip().strip("|").split(" | ") for line in lines if re.match(r"\| \d+ \|", line)]
    return {int(cells[0]): [cell.strip() for cell in cells] for cells in found}


def quoted(cell: str) -> set[str]:
    return {name.partition("[")[0] for name in re.findall(r"`([^`]+)`", cell)}


def test_every_pitfall_has_a_mutant_and_a_row() -> None:
    assert {number for mutant in TABLE.MUTANTS for number in mutant.pitfalls} == set(PITFALLS) == set(rows())
    assert len(TABLE.MUTANTS) >= 35 and len({mutant.name for mutant in TABLE.MUTANTS}) == len(TABLE.MUTANTS)


@pytest.mark.parametrize("mutant", TABLE.MUTANTS, ids=lambda mutant: mutant.name)
def test_the_guard_and_the_tests_of_a_mutant_exist(mutant: "TABLE.Mutant") -> None:
    parts = mutant.guard.split(".")
    files = [(ROOT.joinpath("medsynth", *parts[:cut]).with_suffix(".py"), parts[cut:]) for cut in range(1, len(parts))]
    file, name = next((path, rest) for path, rest in files if path.is_file())
    implicit = name[-1] == "__setattr__"  # made by the dataclass decorator
    assert ".".join(name[:-1] if implicit else name) in defined_in(file)
    assert mutant.tests
    for test in mutant.tests:
        path, function, case = re.fullmatch(r"([\w/]+\.py)::(\w+)(?:\[([^]]+)\])?", test).groups()  # type: ignore[union-attr]
        assert function in defined_in(ROOT / "tests" / path), test
        beside = (ROOT / "tests" / path).parent.glob("*.py")  # a table of cases may be a file of its own
        assert not case or any(case in file.read_text(encoding="utf-8") for file in beside), test


@pytest.mark.parametrize("number", PITFALLS)
def test_a_row_names_exactly_the_guards_that_are_taken_out(number: int) -> None:
    _, _, _, guards, tests = rows()[number]
    mutants = [mutant for mutant in TABLE.MUTANTS if number in mutant.pitfalls]
    assert quoted(guards) == {mutant.guard for mutant in mutants}
    functions = {test.partition("::")[2].partition("[")[0] for mutant in mutants for test in mutant.tests}
    assert functions - quoted(tests) == set()


def test_pitfall_13_what_is_measured_on_patients_is_no_input_of_what_leaves() -> None:
    allowed = {"cohort", "autoencoder", "masks", "generator"}
    reads = {stage.verb: set(stage.reads) for stage in STAGES}
    for verb in ("ingest", "encode", "masks", "train", "synthesise"):
        assert reads[verb] <= allowed, verb
    assert reads["synthesise"] == allowed - {"cohort"}
    assert reads["export"] == {"synthetic", "certificate"}
