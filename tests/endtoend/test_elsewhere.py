"""The whole road where tensors lie elsewhere: a GPU's rules, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medsynth import config
from medsynth.imaging.phantom_hospital import LABELS, write_hospital
from medsynth.release.verify import verify

pytestmark = pytest.mark.endtoend
TWO = {"spatial_dims": 2, "shape": [24, 32], "spacing_mm": [2, 2], "slice_axis": "S", "max_slices": 3}
THREE = {"spatial_dims": 3, "shape": [24, 32, 24], "spacing_mm": [2, 2, 2]}


def settings_of(tiny: dict[str, Any], grid: dict[str, Any], **more: dict[str, Any]) -> dict[str, Any]:
    """The settings of a small study of the phantom hospital, on whatever GPU there is."""
    dims = grid["spatial_dims"]
    shapes = {"labels": LABELS, "release_shape_range": [[20, 24], [24, 32], [20, 24]][:dims]}
    changes = {
        "grid": {**tiny["grid"], **grid, **shapes},
        "train": {**tiny["train"], "appearance": {"coefficients": [2] * dims}, **more.get("train", {})},
        "privacy": {**tiny["privacy"], "entropy": "os", "delta": 1e-3},
        "masks": {"coefficients": [3] * dims},
        "encode": {**tiny["encode"], **more.get("encode", {})},
        # without what trains models of its own, on the CPU
        "audit": {"step": False, "one_run": False, "bootstrap": 100, "generator": dims == 2},
        "compute": {"device": "auto", "threads": 1, "workers": 1},
        "ingest": {"test_fraction": 0.3},
    }
    return {**tiny, **changes}


@pytest.mark.parametrize(
    ("grid", "more"),
    [
        pytest.param(TWO, {"encode": {"codec": "kl"}, "train": {"conditioning": "cross_attention"}}, id="2d"),
        pytest.param(THREE, {"train": {"conditioning": "spade", "backend": "unit", "trainable": "lora"}}, id="3d"),
    ],
)
def test_every_stage_runs_where_tensors_lie_elsewhere(
    grid: dict[str, Any], more: dict[str, dict[str, Any]], tiny_settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = settings_of(tiny_settings, grid, **more)
    config.parse(settings)
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    write_hospital(tmp_path / "hospital", patients=10, seed=0)
    here = Path(__file__).parent
    command = [sys.executable, str(here / "elsewhere.py"), "settings.json", "hospital", "run"]
    environment = {**os.environ, "MEDSYNTH_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    assert json.loads(result.stdout.splitlines()[-1])["operations"] > 10_000
    assert verify(tmp_path / "run" / "release").ok
