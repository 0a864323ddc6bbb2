"""A run folder in which nothing limits quality, written without running a stage."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from medsynth import config, store
from medsynth.config import Study
from medsynth.imaging.phantom import sample_label_maps
from medsynth.models.mask_generator import MaskStatistics, ShapeSpace
from medsynth.privacy.accounting import Event
from medsynth.privacy.audit.finding import Control, Finding
from medsynth.privacy.ledger import Ledger
from medsynth.privacy.mechanism import DpSgd, GaussianSum
from medsynth.release.audits import FINDINGS, SCORES
from medsynth.stages.inputs import HISTORY
from medsynth.stages.masks import SETTINGS, STATISTICS
from medsynth.study import RESOURCES, STUDY

PATIENTS = 20_000


def report() -> dict[str, Any]:
    """Return what a good study measures."""
    block = {"mean": 0.86, "ci95": [0.85, 0.87], "n_patients": 40, "skill": 1.0}
    sizes = {name: {"p5": 90.0, "p50": 100.0, "p95": 110.0} for name in ("real", "synthetic", "train")}
    volume = {**sizes, "wasserstein": 1.0, "wasserstein_sd": 0.1}
    return {
        "dice": {"real_only": block, "synthetic_only": {**block, "mean": 0.84, "skill": 0.9}},
        "floor": {"mean": 0.66},
        "agreement": {"mean": 0.8},
        "memorisation": {"median_ratio": 1.4, "nearer_than_held_out_p5": 0.02},
        "fidelity": {"ssim_within_synthetic": 0.41, "ssim_within_real": 0.4},
        "reconstruction": {
            "psnr_db": 40.0,
            "ssim": 0.99,
            "dice": {"originals": 0.86, "reconstructions": 0.855},
            "latents": {"std": 1.1, "low": 0.8, "high": 1.5},
        },
        "label_maps": {
            "labels": {"organ": {"measures": {"volume": volume}}},
            "plausible": {"synthetic": 0.7, "train": 0.8},
            "relations": {"touching": {"organ and rest": 0.99}, "apart": {}, "nested": {}, "worst": 0.99},
        },
    }


def audit(outcome: Any = "pass", caught: bool = True) -> Finding:
    """Return a finding of an audit."""
    control = Control("no clip", 9.0, caught)
    return Finding("record-replay", "masks", "change", 1.0, 1.0, 1.0, 1.1, outcome, True, (control,), "Shows.", False)


def write_audits(folder: Path, *findings: Finding) -> None:
    """Write the findings of stage ``audit``."""
    (folder / FINDINGS).write_text(json.dumps({"findings": [one.to_json() for one in findings]}))


def reserve(run: Path, study: Study, mechanism: GaussianSum | DpSgd | Event) -> None:
    """Reserve a mechanism in the run's ledger."""
    Ledger(run / "ledger.jsonl").reserve(
        "train",
        [mechanism],
        epsilon=math.inf if isinstance(mechanism, Event) else 1e6,
        delta=study.privacy.delta,
        noise_source="test_only",
        config_digest="0" * 64,
        parents={},
        preflight={"passed": True},
    )


def mean_of(name: str, noise_multiplier: float, patients: float = PATIENTS, clip_norm: float = 20.0) -> GaussianSum:
    """Return a noisy mean."""
    return GaussianSum(name, 10, clip_norm, noise_multiplier, patients)


def steps(noise_multiplier: float, patients: float = PATIENTS) -> DpSgd:
    """Return a private training."""
    return DpSgd("denoiser", 0.25, 100, noise_multiplier, 1.0, 0.25 * patients)


def write_run(run: Path, settings: dict[str, Any]) -> None:
    """Write the healthy run into a new folder."""
    privacy = {**settings["privacy"], "declared_patients": PATIENTS, "delta": 1e-6}
    study = config.parse({**settings, "privacy": privacy})
    run.mkdir()
    (run / STUDY).write_text(config.dump(study))
    folders: dict[str, dict[str, Any]] = {"generator": {"trainable_parameters": 9000}}
    for name in ("cohort", "autoencoder", "masks", "generator", "synthetic", "audit", "report"):
        inputs = {"synthetic": run / "synthetic"} if name == "report" else {}
        with store.create(run / name, name, "0" * 64, inputs) as folder:
            _fill(name, folder.path, study)
            folder.finish("internal", details=folders.get(name))
    for mechanism in (mean_of("mask_means", 4.0), mean_of("mask_spread", 4.0), mean_of("appearance", 4.0), steps(2.0)):
        reserve(run, study, mechanism)
    usage = {"elapsed_s": 100.0, "peak_memory_gib": 1.0, "machine_memory_gib": 8.0}
    (run / RESOURCES).write_text(json.dumps({"train": usage, "segment": usage}))


def _fill(name: str, folder: Path, study: Study) -> None:
    if name == "autoencoder":
        (folder / "reconstruction.json").write_text(json.dumps({"phantoms": {}, "loss": [1.0, *[0.5] * 11]}))
    if name == "generator":
        (folder / HISTORY).write_text(json.dumps({"pretrain_loss": [1.0, 0.6, *[0.4] * 10]}))
    if name == "audit":
        write_audits(folder, audit())
        np.savez(folder / SCORES, generator_members=np.full(9, 0.81), generator_strangers=np.full(9, 0.8))
    if name == "report":
        (folder / "report.json").write_text(json.dumps(report()))
    if name == "masks":
        settings = {"grid": study.grid.model_dump(mode="json"), "masks": study.masks.model_dump(mode="json")}
        (folder / SETTINGS).write_text(json.dumps(settings))
        np.savez(folder / STATISTICS, **vars(_statistics(study)))


def _statistics(study: Study) -> MaskStatistics:
    space = ShapeSpace(study.grid, study.masks)
    labels = sample_label_maps(study.grid, 20, 0)
    poses = np.stack([vector for label in labels if (vector := space.pose_vector(label)) is not None])
    shapes = np.stack(
        [space.shape_vector(lab, space.pose(p, poses.mean(0))) for lab, p in zip(labels, poses, strict=True)]
    )
    spread = np.mean([space.band_sums(one - shapes.mean(0)) for one in shapes], axis=0)
    return MaskStatistics(poses.mean(0), np.cov(poses.T), shapes.mean(0), spread, np.full(3, 0.1))
