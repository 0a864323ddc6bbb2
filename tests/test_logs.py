"""Progress: lines in a batch job, one bar on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest

from medsynth import logs


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Callable[[bool], list[dict[str, Any]]]:
    monkeypatch.setattr(logs, "_BATCH_INTERVAL_S", 0.0)

    def shown(inner: bool) -> list[dict[str, Any]]:
        assert list(logs.progress(iter("abc"), "spelling", 3, inner=inner)) == ["a", "b", "c"]
        return [json.loads(line) for line in capsys.readouterr().err.splitlines()]

    return shown


@pytest.mark.parametrize("inner", [False, True])
def test_a_batch_job_gets_lines_that_say_how_far_it_is(inner: bool, lines: Callable[[bool], Any]) -> None:
    found = lines(inner)
    assert [line["done"] for line in found] == [1, 2, 3] and {line["total"] for line in found} == {3}
    assert {line["message"] for line in found} == {"spelling"} and found[-1]["left_s"] == 0


def test_a_part_of_something_has_no_bar_of_its_own(
    lines: Callable[[bool], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert lines(True) == []
