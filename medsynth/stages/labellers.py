"""Of stage ``train``: networks that learn from patients, without privacy, to say what generated images show."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import torch

from medsynth import logs
from medsynth.errors import InputError, PrivacyError
from medsynth.models.labelling import network_file
from medsynth.models.segmenter import save_segmenter
from medsynth.stages.segmenter_training import Network, Training, side_by_side, train_segmenter, write_patients
from medsynth.stages.training_job import Job

_POOLS = ".pools-"  # in such a folder patients lie while the networks learn; a kill leaves it behind


def files(job: Job) -> tuple[Path, ...]:
    """Return where the study's networks lie, written or not."""
    return tuple(network_file(job.folder, number) for number in range(job.config.train.labelling.networks))


def clear(job: Job) -> None:
    """Remove the pools of patients that a killed run left behind."""
    for pools in job.folder.glob(f"{_POOLS}*"):
        shutil.rmtree(pools)


def train_labellers(job: Job) -> None:
    """Train the networks that are not there yet on the patients that train, one a seed, and write them.

    What they say of an image is not private: whoever calls it has told the ledger.

    Args:
        job: the training of the generator, whose folder gets the networks.

    Raises:
        PrivacyError: the study promises privacy.
        InputError: no patient that trains has a label map.
        MedsynthError: a training failed; the message names it.
    """
    if job.config.privacy.private:
        raise PrivacyError("train.labelling.networks bounds no patient's share: set it to 0")
    recipe, left = job.config.train.labelling, [path for path in files(job) if not path.is_file()]
    if not left:
        return
    patients = job.patients()
    if not patients:
        raise InputError("the cohort has no labelled train patient that train.labelling could learn from")
    logs.say("training networks that label pairs, WITHOUT privacy", networks=recipe.networks, left=len(left))
    with tempfile.TemporaryDirectory(dir=job.folder, prefix=_POOLS) as scratch:
        pool = Path(scratch) / "patients.safetensors"
        write_patients(pool, patients)
        jobs = [
            Network(Training(path.stem, job.config.grid, recipe, job.seed("labeller", path.stem), (pool,)), job.folder)
            for path in left
        ]
        for _ in side_by_side(_train, jobs, str(job.device), job.config.compute.workers, "labellers"):
            pass  # each has written its network


def _train(network: Network, device: str) -> None:
    model, _ = train_segmenter(network.training, torch.device(device))
    save_segmenter(model, network.weights)
