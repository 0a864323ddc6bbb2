"""The table of samplers: same label maps in every setting, calls counted, settings resumed, the choice as it says."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from medsynth import config
from medsynth.stages import train
from medsynth.study import STUDY
from medsynth.tracking import Tracker
from pipelines import samplers

Before = Callable[..., dict[str, Path]]


@pytest.fixture
def run(tiny_settings: dict[str, Any], before_training: Before, tmp_path: Path) -> Path:
    public = {"appearance": {"enabled": False, "coefficients": [2, 2]}, "steps": 0}
    study = config.parse(
        {
            **tiny_settings,
            "masks": {"source": "public_shapes", "coefficients": [4, 4]},
            "train": tiny_settings["train"] | public,
        }
    )
    inputs = before_training(study, tmp_path)
    cases = tmp_path / "cohort" / "cases.csv"
    text = cases.read_text(encoding="utf-8")
    cases.write_text(text.replace("patient-005,train", "patient-005,test"), encoding="utf-8")
    train.run(study, inputs, inputs["generator"], Tracker())
    (tmp_path / STUDY).write_text(config.dump(study), encoding="utf-8")
    return tmp_path


def cell(scheduler: str, steps: int, calls: int, *dice: float) -> samplers.Cell:
    return {
        "scheduler": scheduler,
        "steps": steps,
        "network_calls": calls,
        "cpu_s_a_pair": 0.01,
        "agreement": 0.8,
        "frechet": 1.0,
        "real_dice": [0.9],
        "test_patients": 4,
        "dice": list(dice) or None,
    }


def test_every_setting_stands_once_and_few_steps_come_first() -> None:
    found = samplers.settings(["ddpm", "ddim"], [10, 5, 5], [250, 10])
    assert found == [("ddpm", 5), ("ddim", 5), ("ddpm", 10), ("ddim", 10), ("ddpm", 250)]
    assert samplers.settings(["ddim"], [5], [250]) == [("ddim", 5)]


def test_the_choice_takes_few_calls_near_the_best_or_nothing() -> None:
    best, near, pndm = cell("ddpm", 250, 250, 0.80), cell("ddim", 10, 10, 0.796, 0.796), cell("pndm", 10, 11, 0.80)
    assert samplers.chosen([best, near, pndm]) == near
    assert samplers.chosen([best, pndm, cell("ddim", 5, 5, 0.794)]) is None
    assert samplers.chosen([cell("ddim", 10, 10)]) is None
    text = samplers.markdown([best, near, pndm])
    assert "ddim at 10 steps" in text and "| ddpm | 250 | 250 | 10 | 0.800 | 1.00 | 0.800 (0.800) |" in text
    assert "No setting" in samplers.markdown([best])
    assert "Nothing was measured" in samplers.markdown([])


def test_settings_differ_in_the_sampler_alone(run: Path) -> None:
    study = config.load(run / STUDY)
    images, labels, calls, seconds = samplers.sample(study, run, "ddim", 2)
    others, same, more, _ = samplers.sample(study, run, "pndm", 3)
    assert torch.equal(labels, same) and not torch.equal(images, others)
    assert (calls, more) == (2, 4)  # PNDM asks twice at its second step
    assert seconds > 0 and images.shape == (4, 1, 16, 16)


def test_a_run_is_measured_once_and_again_only_when_asked_otherwise(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[tuple[str, int]] = []
    true_measure = samplers.measure

    def watched(bench: samplers.Bench, scheduler: str, steps: int) -> samplers.Cell:
        measured.append((scheduler, steps))
        return true_measure(bench, scheduler, steps)

    monkeypatch.setattr(samplers, "measure", watched)
    words = [
        "samplers",
        str(run),
        "--out",
        str(run / "out"),
        "--steps",
        "2",
        "--more-ddpm",
        "3",
        "--dice",
        "--seeds",
        "1",
    ]
    words += ["--scheduler", "ddpm", "--scheduler", "unipc"]
    monkeypatch.setattr(sys, "argv", words)
    samplers.main()
    assert measured == [("ddpm", 2), ("unipc", 2), ("ddpm", 3)]
    samplers.main()
    assert len(measured) == 3
    (run / "out" / "settings" / "unipc-2.json").unlink()
    samplers.main()
    assert measured[3:] == [("unipc", 2)]
    monkeypatch.setattr(sys, "argv", [*words, "--pairs", "3"])
    samplers.main()
    assert len(measured) == 7
    assert "1 held-out patients" in capsys.readouterr().out and (run / "out" / "samplers.md").is_file()
    (run / "out" / "settings" / "ddpm-3.json").unlink()
    monkeypatch.setattr(sys, "argv", [*words, "--pairs", "3", "--report"])
    samplers.main()
    assert len(measured) == 7 and "| ddpm | 3 |" not in (run / "out" / "samplers.md").read_text(encoding="utf-8")


def test_agreement_alone_looks_at_no_held_out_patient(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "_dice", None)
    words = ["samplers", str(run), "--out", str(run / "out"), "--steps", "2", "--more-ddpm", "--scheduler", "ddim"]
    monkeypatch.setattr(sys, "argv", words)
    samplers.main()
    assert "| - |" in (run / "out" / "samplers.md").read_text(encoding="utf-8")
