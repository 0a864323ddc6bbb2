"""The law of scale: the table runs and resumes, the fit finds a law that is there, the cohort can be learnt from."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medsynth.privacy.accounting import Event, epsilon
from medsynth.privacy.budget import gaussian_mu
from pipelines.scale_law.cohort import GRID, patient_image, patients
from pipelines.scale_law.law import FORMS, best, fit, gains, predicted, reach


def rows(gain: float, loss: float, half: float, power: float, noise: float = 0.0, q: float = 0.0) -> list[Any]:
    """Cells whose gains follow the law, with noise on top, and the public generator at skill 0.1."""
    rng = np.random.default_rng(0)
    found: list[dict[str, Any]] = [{"patients": 0, "parameters": 0, "skill": 0.1}]
    for count in (200, 1000, 5000, 20000):
        for noise_multiplier in (12.0, 5.0, 2.0, 0.0):
            for parameters in (2000, 15000, 170000):
                row = {"patients": count, "noise_multiplier": noise_multiplier, "parameters": parameters}
                row |= {"sampling_rate": 0.25, "steps": 50}
                share = 1 / (1 + (half * parameters**q / reach(row)) ** power)
                skill = 0.1 + gain * share - loss * (1 - share) + noise * rng.standard_normal()
                found.append(row | {"skill": float(skill)})
    return found


def test_the_fit_finds_the_law_that_made_the_cells() -> None:
    found = fit(rows(0.6, 0.15, 900.0, 1.5), "reach")
    assert found is not None and found.cells == 48 and found.error < 1e-6 and found.left_out < 1e-5
    named = {"gain_at_10k": 0.6, "loss": 0.15, "log_half": math.log(900), "log_power": math.log(1.5)}
    assert found.values == pytest.approx(named | {"gain_a_decade": 0}, abs=1e-4)
    at = predicted(found, np.array([900.0, math.inf]), np.full(2, 2e4))
    assert at == pytest.approx([0.225, 0.6], abs=1e-4)
    noisy = fit(rows(0.6, 0.15, 900.0, 1.5, noise=0.05), "reach")
    assert noisy is not None and 0.03 < noisy.error <= noisy.left_out


def test_how_parameters_count_is_told_by_cells_left_out() -> None:
    fits = [fit(rows(0.6, 0.1, 8.0, 1.0, noise=0.005, q=0.5), form) for form in FORMS]
    known = [one for one in fits if one is not None]
    assert len(known) == 3 and best(known).form != "reach"
    apart, together = known[0].left_out, known[1].left_out
    assert apart > 3 * together and known[2].values["q"] == pytest.approx(0.5, abs=0.03)


def test_too_few_cells_give_no_law() -> None:
    assert fit(rows(0.6, 0.1, 400.0, 1.0)[:7], "reach") is None and fit(rows(0.6, 0.1, 400.0, 1.0)[:8], "reach")
    assert gains([{"patients": 200, "skill": 1.0}]) == []


def test_the_reach_of_many_noisy_steps_is_mu_times_the_patients() -> None:
    row = {"patients": 200, "noise_multiplier": 20.0, "sampling_rate": 0.25, "steps": 400}
    mu = gaussian_mu(epsilon([Event("subsampled_gaussian", 20.0, 0.25, 400)], 1e-5), 1e-5)
    assert reach(row) == pytest.approx(50.0) == pytest.approx(mu * 200, rel=0.02)
    assert math.isinf(reach(row | {"noise_multiplier": 0.0}))


def test_patients_are_the_same_people_in_cohorts_of_any_size(tmp_path: Path) -> None:
    few, _ = patients(3, 0, tmp_path / "few.safetensors")
    many, labels = patients(6, 0, tmp_path / "many.safetensors")
    again, _ = patients(3, 0, tmp_path / "many.safetensors")
    assert torch.equal(few, many[:3]) and torch.equal(few, again)
    assert not torch.equal(patients(3, 1, tmp_path / "others.safetensors")[0], few)
    assert labels.shape == (6, *GRID.shape) and float(many.abs().max()) <= 1


def test_the_organ_is_brighter_than_everything_else_in_every_patient() -> None:
    label = np.zeros(GRID.shape, np.uint8)
    label[8:24, 8:24] = 1
    for index in range(20):
        image = patient_image(label, 0, index)[0]
        around = image[label == 0]
        assert image[12:20, 12:20].mean() > around.mean() + 0.5 and around.min() < -0.7  # the decoys


@pytest.mark.slow
def test_a_quick_table_is_measured_once(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pipelines.scale_law", "--quick", "--out", str(tmp_path), "--epsilon", "8", "inf"]
    subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    found = json.loads((tmp_path / "scale_law.json").read_text(encoding="utf-8"))
    assert len(found["cells"]) == found["wanted"] == 13
    private = [row for row in found["cells"] if row["patients"]]
    assert all(row["dice"] and row["parameters"] > 0 for row in private)
    assert all((row["noise_multiplier"] > 0) == (row["epsilon"] != "inf") for row in private)
    first = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()}
    subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cells").iterdir()} == first
