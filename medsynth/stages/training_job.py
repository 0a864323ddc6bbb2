"""What the parts of stage ``train``, and the audits that run them again, share: settings, folders, reservations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from medsynth import store
from medsynth.config import Study
from medsynth.files import replace_bytes
from medsynth.randomness import derive_seed
from medsynth.stages.inputs import HISTORY, open_ledger
from medsynth.tracking import Tracker

if TYPE_CHECKING:
    from medsynth.diffusion.generator import Generator
    from medsynth.imaging.cohort import Patient
    from medsynth.privacy.budget import BudgetPlan
    from medsynth.privacy.ledger import Ledger

LOG_EVERY = 20
"""Steps from one line of a series to the next."""
STATE = "state.json"
"""Reservations of an unfinished training, in its folder."""


@dataclass(frozen=True)
class Job:
    """One training (or an audit of it).

    Attributes:
        config: the study.
        inputs: ``cohort``, ``autoencoder``, ``masks`` and ``ledger``.
        folder: where the generator is written.
        digest: of the settings that the stage depends on.
        device: where it computes.
        tracker: receives losses and epsilon as a step series.
    """

    config: Study
    inputs: Mapping[str, Path]
    folder: Path
    digest: str
    device: torch.device
    tracker: Tracker

    def seed(self, *names: str | int) -> int:
        """Return the seed of one of the stage's public streams."""
        return derive_seed(self.config.seed, "train", *names)

    @property
    def parents(self) -> dict[str, str]:
        """Digest of the cohort, as the ledger names it."""
        return {"cohort": store.read_manifest(self.inputs["cohort"]).digest}

    @property
    def ledger(self) -> Ledger:
        """The run's ledger."""
        return open_ledger(self.inputs)

    @property
    def plan(self) -> BudgetPlan:
        """How the study's budget is shared out."""
        from medsynth.privacy.budget import plan_budget

        return plan_budget(self.config.privacy, self.config.train, self.config.masks)

    def reserve(self, mechanisms: Sequence[Any], **more: Any) -> str:
        """Reserve mechanisms (or bare events) in the ledger and return the entry's id.

        Args:
            mechanisms: what will run.
            more: further arguments of :meth:`medsynth.privacy.ledger.Ledger.reserve`.

        Raises:
            BudgetError: they do not fit into the budget.
        """
        privacy = self.config.privacy
        return self.ledger.reserve(
            "train",
            mechanisms,
            epsilon=privacy.epsilon,
            delta=privacy.delta,
            noise_source=privacy.entropy,
            config_digest=self.digest,
            parents=self.parents,
            trials=privacy.trials,
            **more,
        )

    def save(self, state: Mapping[str, Any]) -> None:
        """Keep what an interrupted run has to know when it goes on."""
        replace_bytes(self.folder / STATE, json.dumps(state).encode())

    def record(self, name: str, losses: Sequence[float]) -> None:
        """Keep the means of every :data:`LOG_EVERY` losses in the folder, for whoever asks later what limited it."""
        rows = len(losses) // LOG_EVERY
        path = self.folder / HISTORY
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        kept[name] = np.reshape(losses[: rows * LOG_EVERY], (rows, LOG_EVERY)).mean(axis=1).tolist()
        replace_bytes(path, (json.dumps(kept) + "\n").encode(), durable=False)

    def patients(self) -> list[Patient]:
        """Read the patients that train."""
        from medsynth.imaging.cohort import load_patients

        return load_patients(self.inputs["cohort"], self.config.grid, "train")

    def encoded_patients(self, built: Generator) -> list[tuple[str, Tensor, Tensor]]:
        """Return pseudonym, latents and encoded masks of each patient that trains, on the CPU.

        Args:
            built: its codec and mask encoder are used.
        """
        return [(patient.patient_id, *self.encoded(built, patient)) for patient in self.patients()]

    def encoded(self, built: Generator, patient: Patient) -> tuple[Tensor, Tensor]:
        """Return latents and encoded masks of one patient, on the CPU."""
        latents, masks = built.codec.encode(patient.images.to(self.device)), built.masks(patient.labels.to(self.device))
        return latents.cpu(), masks.cpu()
