"""The benchmark runs on the code as it is, checks every engine against the naive loop, and marks the wrong ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medsynth.privacy.gradients import ClippedSum
from pipelines.bench.configurations import CPU, Place
from pipelines.bench.measuring import Reference, Timing, compare, ratios
from pipelines.bench.results import cell, geometric_mean, place_of, quartiles, rows

ENGINES = ["plain", "bookkeeping", "naive-loop", "opacus-hooks", "opacus-ghost", "opacus-functorch", "vmap"]


@pytest.mark.slow
def test_benchmark_writes_an_entry_for_each_engine_and_thread_count(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "dp_step.json"
    command = [sys.executable, "-m", "pipelines.bench", "--quick", "--out", str(out)]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    entries = json.loads(out.read_text(encoding="utf-8"))
    assert [(e["engine"], e["threads"]) for e in entries] == [(name, t) for t in (1, 2) for name in ENGINES]
    for e in entries:
        assert e["time_ratio"] > 0 and e["memory_ratio"] > 0 and len(e["time_spread"]) == 2, e
        assert e["engine"] == "plain" or (e["correct"] and e["max_relative_error"] <= CPU.tolerance), e
    command = [*command[:3], "--markdown", "--out", str(out)]
    markdown = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert "| geometric mean |" in markdown.stdout and "bookkeeping" in markdown.stdout


@pytest.mark.slow
def test_in_half_precision_norms_and_sums_are_those_of_the_patient_loop(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "dp_step.json"
    command = [sys.executable, "-m", "pipelines.bench", "--quick", "--bf16", "--threads", "1", "--out", str(out)]
    result = subprocess.run(
        [*command, "--engine", "bookkeeping"], cwd=root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    _, ours = json.loads(out.read_text(encoding="utf-8"))
    assert (ours["device"], ours["precision"]) == ("cpu", "bf16") and ours["correct"], ours
    assert 1e-7 < ours["max_relative_error"] < ours["tolerance"] < 0.04 and ours["clipped_norm"] <= 1 + 1e-6


@pytest.mark.slow
def test_two_ranks_agree_with_one(root: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "pipelines.ddp_step", "--config", "tiny", "--rounds", "1"]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    assert found["sums_agree"] and found["weights_stay_equal"] and found["speedup"] > 0 and found["cpu_speedup"] > 0


def test_a_wrong_sum_norm_or_clip_is_not_correct() -> None:
    right = Reference([1.0, 2.0], [torch.tensor([3.0, 4.0], dtype=torch.float64)])
    good = compare(ClippedSum([right.sums[0]], [1.0, 2.0]), right, [1.0], 1.0)
    assert good.correct
    assert not compare(ClippedSum([right.sums[0] * 1.0001], [1.0, 2.0]), right, [1.0], 1.0).correct
    assert not compare(ClippedSum([right.sums[0]], [1.0, 2.0001]), right, [1.0], 1.0).correct
    assert not compare(ClippedSum([right.sums[0]], [1.0, 2.0]), right, [1.00001], 1.0).correct


def test_results_of_before_there_was_a_choice_are_of_the_cpu() -> None:
    assert place_of({}) == (CPU.name, CPU.precision) == ("cpu", "float32")
    assert place_of({"device": "cpu", "precision": Place(bf16=True).precision}) == ("cpu", "bf16")


def test_ratios_are_taken_within_a_round() -> None:
    plain = Timing(cpu={1: 1.0, 2: 10.0, 3: 1.0})
    assert ratios(Timing(cpu={1: 2.0, 2: 20.0}), plain) == [2.0, 2.0]


def test_table_marks_wrong_failed_and_impossible_results() -> None:
    measured = {"time_ratio": 2.0, "time_spread": [1.9, 2.1], "memory_ratio": 1.5, "cpu_s": 0.1, "threads": 1}
    entries = [
        {**measured, "config": "a", "engine": "plain", "correct": None},
        {**measured, "config": "a", "engine": "bad", "correct": False},
        {"config": "a", "engine": "dead", "threads": 1, "time_ratio": None, "correct": False, "error": "error: E: x"},
        {"config": "a", "engine": "other", "threads": 1, "time_ratio": None, "correct": None, "error": "n/a: row"},
    ]
    header, body = rows(entries, 1)
    assert header[2:] == ["bad", "dead", "other"]
    assert body[0] == ["a", "100 ms", "2.00 / 1.50 WRONG", "error", "n/a"]
    assert cell(entries[0]) == "2.00 / 1.50"
    rounded = {**entries[1], "norm_error": 1e-7, "sum_error": 3e-6, "clipped_norm": 1 + 5e-6}
    assert cell(rounded) == "2.00 / 1.50 OVER"
    assert cell({**rounded, "clipped_norm": 1.003}) == cell({**rounded, "sum_error": 0.3}) == "2.00 / 1.50 WRONG"


def test_geometric_mean_and_quartiles() -> None:
    assert geometric_mean([{"x": 2.0}, {"x": 8.0}, {"x": None}], "x") == pytest.approx(4.0)
    assert geometric_mean([{"x": None}], "x") is None
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == [2.0, 4.0] and quartiles([7.0]) == [7.0, 7.0]
