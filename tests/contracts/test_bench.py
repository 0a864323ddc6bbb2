"""The benchmark runs on the code as it is, and compares every variant with the plain step."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from medsynth import config
from medsynth.config import Study


@pytest.mark.slow
def test_benchmark_prints_a_row_for_each_variant(root: Path, tiny_study: Study, tmp_path: Path) -> None:
    study = tmp_path / "tiny.yaml"
    study.write_text(config.dump(tiny_study), encoding="utf-8")
    command = [sys.executable, "pipelines/bench_dp_step.py", "--config", str(study), "--patients", "2"]
    result = subprocess.run(
        [*command, "--draws", "2", "--repeats", "1"], cwd=root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    rows = re.findall(r"^(plain|unit|opacus) +[\d.]+ +[\d.]+ +([\d.]+) +\d+$", result.stdout, re.MULTILINE)
    assert [name for name, _ in rows] == ["plain", "unit", "opacus"] and rows[0][1] == "1.00"
