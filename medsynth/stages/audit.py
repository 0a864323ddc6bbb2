"""Stage ``audit``: try to falsify the claim, on the study's own mechanisms and on what came out of them.

Everything in the folder is internal. It may stop a release (stage ``certify`` reads it) and never shapes one: nothing
of it is read by a stage that makes data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medsynth import logs, store
from medsynth.config import Study
from medsynth.devices import open_device
from medsynth.diffusion.generator import load_generator
from medsynth.imaging.cohort import load_pairs, load_patients
from medsynth.metrics import figures
from medsynth.privacy.audit.finding import Finding
from medsynth.privacy.ledger import Ledger
from medsynth.randomness import generator
from medsynth.release import spending
from medsynth.release.audits import FINDINGS, ROC, SCORES, SIDES
from medsynth.stages.audit_generator import audit_generator
from medsynth.stages.audit_mechanisms import audit_mechanisms
from medsynth.stages.audit_results import Scores, Sides, allowed_area, audit_pairs
from medsynth.stages.inputs import config_digest, stage_inputs
from medsynth.store import Manifest
from medsynth.tracking import Tracker

_READ = ("cohort", "autoencoder", "masks", "generator", "synthetic")


def run(config: Study, inputs: Mapping[str, Path], out: Path, tracker: Tracker) -> Manifest:
    """Write ``audit/``: one finding an audit, each beside its positive control, and the ROC curve of the generator.

    Args:
        config: section ``audit``, and all sections that say what ran.
        inputs: ``cohort``, ``autoencoder``, ``masks``, ``generator``, ``synthetic`` and ``ledger``.
        out: the new folder.
        tracker: receives what was measured.
    """
    folders = stage_inputs(inputs, *_READ)
    inputs = {**inputs, **stage_inputs(inputs, "ledger")}
    with store.create(out, "audit", config_digest(config, "audit"), folders) as folder:
        device = open_device(config.compute)
        torch.manual_seed(0)
        findings = []
        for finding in _findings(config, inputs, device, folder.path):
            findings.append(finding)
            # Logs of jobs are read by more people than the folder: nothing that was measured on patients goes there.
            told = {} if finding.reads_patients else {"value": finding.value}
            logs.say(f"audit: {finding.audit} of {finding.subject}", verdict=finding.verdict, **told)
        write_findings(findings, folder.path)
        tracker.metrics({f"audit/{one.audit}/{one.subject}": one.value for one in findings})
        if (folder.path / ROC).is_file():
            tracker.figure(folder.path / ROC, f"audit/{ROC}")
        return folder.finish("internal")


def write_findings(findings: list[Finding], folder: Path) -> None:
    """Write ``findings.json`` into ``folder``."""
    text = json.dumps({"findings": [finding.to_json() for finding in findings]}, indent=1, allow_nan=False)
    (folder / FINDINGS).write_text(text + "\n", encoding="utf-8")


def _findings(config: Study, inputs: Mapping[str, Path], device: torch.device, folder: Path) -> Iterator[Finding]:
    built = load_generator(inputs["generator"], inputs["autoencoder"]).to(device)
    members, strangers = (load_patients(inputs["cohort"], config.grid, split) for split in ("train", "test"))
    # Alphabetical order of pseudonyms is no order of admission, but who is tried first should not depend on it.
    order = generator(config.seed, "audit", "patients")
    sides = Sides(*([side[index] for index in order.permutation(len(side))] for side in (members, strangers)))
    if config.privacy.private and members:
        yield from audit_mechanisms(config, inputs, built, sides.members, device)
    if min(len(members), len(strangers)) < 2:
        logs.say("audit: two patients on each side are needed for membership and copies; left out")
        return
    bound = _bound(config, inputs["ledger"])
    if config.audit.generator:
        scores = {}
        for finding, scores[finding.subject] in audit_generator(config, built, sides, bound, device):
            yield finding
        _keep_scores(scores, folder)
    if config.audit.pairs:
        images, labels = load_pairs(inputs["synthetic"], config.grid)
        yield from audit_pairs(config, images, labels, sides, bound)


def _bound(config: Study, ledger: Path) -> float:
    """Return the area under the curve that no attack exceeds if the claim holds, from the claim's whole curve."""
    if not config.privacy.private:
        return 1.0
    return allowed_area(spending.curve(spending.events(Ledger(ledger).entries()), config.privacy.delta))


def _keep_scores(scores: Mapping[str, Scores], folder: Path) -> None:
    sides: dict[str, Any] = {}
    for subject, both in scores.items():
        sides |= {f"{subject}_{side}": values for side, values in zip(SIDES, both, strict=True)}
    np.savez(folder / SCORES, **sides)
    figures.roc(scores, folder / ROC)
