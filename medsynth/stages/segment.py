"""Stage ``segment``: a downstream network a regime and seed, one recipe for real, synthetic and mixed pairs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from medsynth import logs, store
from medsynth.config import Study
from medsynth.devices import open_device
from medsynth.errors import InputError
from medsynth.files import replace_bytes
from medsynth.imaging.cohort import load_pairs, load_patients
from medsynth.models.autoencoder import load_codec
from medsynth.models.segmenter import save_segmenter
from medsynth.randomness import derive_seed
from medsynth.stages.inputs import config_digest, stage_inputs
from medsynth.stages.segmenter_training import (
    Network,
    Training,
    side_by_side,
    train_segmenter,
    write_patients,
    write_pool,
)
from medsynth.store import Manifest
from medsynth.tracking import Tracker

POOLS: dict[str, tuple[str, ...]] = {
    "real_only": ("real",),
    "synthetic_only": ("synthetic",),
    "mixed": ("real", "synthetic"),
    "reconstructed": ("reconstructed",),
}
_POINTS = 100  # of a logged loss series
_SCRATCH = ".pools-"  # a kill leaves pools of patients behind


def run(config: Study, inputs: Mapping[str, Path], out: Path, tracker: Tracker) -> Manifest:
    """Train every regime and seed on the train patients and (or) the synthetic pairs; a killed run goes on.

    Args:
        config: uses ``seed``, ``grid``, ``segment`` and ``compute``.
        inputs: the finished folders ``cohort`` and ``synthetic``, and for the regime ``reconstructed`` ``autoencoder``.
        out: folder to write: ``<regime>-<seed>.safetensors`` and ``training.json`` (losses), all internal.
        tracker: gets the loss series of each regime.

    Raises:
        InputError: no train patient or no synthetic pair.
        MedsynthError: a training failed; the message names regime and seed.
    """
    more = ["autoencoder"] if "reconstructed" in config.segment.regimes else []
    folders = stage_inputs(inputs, "cohort", "synthetic", *more)
    with store.create(out, "segment", config_digest(config, "segment"), folders, keep_partial=True) as folder:
        folder.resume(scratch=_SCRATCH)
        with tempfile.TemporaryDirectory(dir=folder.path, prefix=_SCRATCH) as scratch:
            jobs = [
                _job(config, regime, seed, Path(scratch), folder.path)
                for regime in config.segment.regimes
                for seed in config.segment.seeds
            ]
            left = [job for job in jobs if not job.losses.is_file()]
            if len(left) < len(jobs):
                logs.say("going on with interrupted trainings", left=len(left), trainings=len(jobs))
            if left:
                _write_pools(config, folders, Path(scratch))
            device, workers = str(open_device(config.compute)), config.compute.workers
            for _ in side_by_side(_train, left, device, workers, "segment"):
                pass  # each has written its network
        losses = {job.name: json.loads(job.losses.read_bytes()) for job in jobs}
        (folder.path / "training.json").write_text(json.dumps({"loss": losses}, indent=1) + "\n", encoding="utf-8")
        _report(losses, tracker)
        marks = [job.losses.name for job in jobs]
        return folder.finish("internal", details={"networks": sorted(losses)}, scratch=marks)


@dataclass(frozen=True)
class _Job(Network):
    @property
    def losses(self) -> Path:
        """The file of its losses; it is there once the network is."""
        return self.folder / f".{self.name}.json"


def _job(config: Study, regime: str, seed: int, pools: Path, out: Path) -> _Job:
    files = tuple(pools / f"{name}.safetensors" for name in POOLS[regime])
    return _Job(Training(f"{regime}-{seed}", config.grid, config.segment, _stream(config, regime, seed), files), out)


def _stream(config: Study, regime: str, seed: int) -> int:
    # The same draws for both regimes of real patients: what differs between their networks is the codec.
    return derive_seed(config.seed, "segment", "real_only" if regime == "reconstructed" else regime, seed)


def _write_pools(config: Study, folders: Mapping[str, Path], scratch: Path) -> None:
    """Write images, labels and the number of records of each unit (patient or pair) of the pools that are needed."""
    needed = {pool for regime in config.segment.regimes for pool in POOLS[regime]}
    if needed & {"real", "reconstructed"}:
        patients = load_patients(folders["cohort"], config.grid, "train")
        if not patients:
            raise InputError(
                "the cohort has no train patient: more patients or a smaller ingest.test_fraction are needed"
            )
        write_patients(scratch / "real.safetensors", patients)
        if "reconstructed" in needed:
            codec = load_codec(folders["autoencoder"])
            again = [replace(patient, images=codec.decode(codec.encode(patient.images))) for patient in patients]
            write_patients(scratch / "reconstructed.safetensors", again)
    if "synthetic" in needed:
        images, labels = load_pairs(folders["synthetic"], config.grid)
        if not len(images):
            raise InputError("there is no synthetic pair to train on: synthesise.pairs must be at least 1")
        write_pool(scratch / "synthetic.safetensors", images, labels, torch.ones(len(images), dtype=torch.int64))


def _train(job: _Job, device: str) -> None:
    """Train one network and write its weights and, after them, its loss at each step."""
    model, losses = train_segmenter(job.training, torch.device(device))
    save_segmenter(model, job.weights)
    replace_bytes(job.losses, json.dumps(losses).encode())


def _report(losses: Mapping[str, list[float]], tracker: Tracker) -> None:
    for name, series in losses.items():
        width = max(1, len(series) // _POINTS)
        for start in range(0, len(series), width):
            part = series[start : start + width]
            tracker.metrics({f"loss/{name}": sum(part) / len(part)}, step=start)
