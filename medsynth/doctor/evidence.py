"""What the folders of a run say of its quality; nothing is computed on patients here, only read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medsynth import config, store
from medsynth.budgeting import require_run
from medsynth.config import Study
from medsynth.errors import StoreError
from medsynth.models.shrinkage import joint_sd
from medsynth.privacy.audit.finding import Finding as Audit
from medsynth.privacy.chain import Record
from medsynth.privacy.ledger import Ledger
from medsynth.privacy.scale_law import reach
from medsynth.release.audits import SCORES, SIDES, read_findings
from medsynth.stages.inputs import HISTORY
from medsynth.study import RESOURCES, stored_study

INTERNAL = "internal: measured on patients"
PUBLIC = "released and public values: nothing of it was measured on patients without a mechanism"


@dataclass(frozen=True)
class Evidence:
    """Figures of one run; what a run does not hold is None or empty, and named in ``absent``.

    Attributes:
        study: what the run was last started with.
        report: ``report.json`` of the pairs that the run holds now.
        losses: series by name: ``autoencoder``, ``pretrain_loss``, and without privacy ``loss``.
        errors: the denoiser's error over that of a linear filter, median over ``members`` and ``strangers``.
        noise: privacy noise over signal by what was released: ``pose``, ``shape``, ``spread`` of the label maps,
            ``appearance``.
        reach: of DP-SGD (see :func:`medsynth.privacy.scale_law.reach`).
        trainable: parameters that patients moved.
        audits: what the audits found.
        resources: seconds and memory by stage.
        volume_factors: volumes that were asked for, by label.
        absent: what is missing, and which verb writes it.
    """

    study: Study
    report: Mapping[str, Any] | None
    losses: Mapping[str, Sequence[float]]
    errors: Mapping[str, float]
    noise: Mapping[str, float]
    reach: float | None
    trainable: int | None
    audits: Sequence[Audit]
    resources: Mapping[str, Mapping[str, float]]
    volume_factors: Mapping[str, float]
    absent: tuple[str, ...]

    def at(self, *path: str) -> Any:
        """Return a value of the report by its path, or None."""
        found: Any = self.report
        for name in path:
            found = found.get(name) if isinstance(found, Mapping) else None
        return found

    def number(self, *path: str) -> float | None:
        """Return a number of the report by its path, or None where it is missing or not finite."""
        found = self.at(*path)
        return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def gather(run: Path) -> Evidence:
    """Read what a finished or half finished run holds.

    Raises:
        StoreError: the folder is no run.
        ConfigError: its study cannot be read by this version.
    """
    require_run(run)
    study = config.load(stored_study(run))
    report, audits = _report(run), read_findings(run / "audit") if store.is_done(run / "audit") else []
    losses, errors = _losses(run), _errors(run)
    ledger = run / "ledger.jsonl"
    entries = Ledger(ledger).entries() if study.privacy.private and ledger.is_file() else []
    noise = _noise(run, study, entries)
    synthetic, trained = _details(run / "synthetic"), study.train.pretrain_steps or study.train.steps
    found = {
        "label agreement, memorisation, label maps, codec (medsynth evaluate)": report is not None,
        "losses of the denoiser (medsynth train)": any(name.endswith("loss") for name in losses) or not trained,
        "the denoiser's error on patients (audit.generator, medsynth audit)": bool(errors) or not study.denoiser_counts,
        "noise beside signal (medsynth masks, train)": bool(noise) or not study.privacy.private,
        "time and memory (medsynth run)": (run / RESOURCES).is_file(),
    }
    return Evidence(
        study=study,
        report=report,
        losses=losses,
        errors=errors,
        noise=noise,
        reach=_reach(entries),
        trainable=_details(run / "generator").get("trainable_parameters"),
        audits=audits,
        resources=_json(run / RESOURCES),
        volume_factors=synthetic.get("volume_factors", {}),
        absent=tuple(what for what, there in found.items() if not there),
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        raise StoreError(f"{path.name} of the run cannot be read: make the folder that holds it again") from None


def _details(folder: Path) -> Mapping[str, Any]:
    return store.read_manifest(folder).details if store.is_done(folder) else {}


def _report(run: Path) -> Mapping[str, Any] | None:
    if not (store.is_done(run / "report") and store.is_done(run / "synthetic")):
        return None
    measured = store.read_manifest(run / "report").parents.get("synthetic")
    if measured != store.read_manifest(run / "synthetic").digest:
        return None  # the pairs were made again since
    report: Mapping[str, Any] = _json(run / "report" / "report.json")
    return report


def _losses(run: Path) -> dict[str, Sequence[float]]:
    generator = run / "generator"
    folder = generator if store.is_done(generator) else store.partial(generator)
    codec = _json(run / "autoencoder" / "reconstruction.json").get("loss", [])
    return {**_json(folder / HISTORY), **({"autoencoder": codec} if codec else {})}


def _errors(run: Path) -> dict[str, float]:
    path = run / "audit" / SCORES
    if not (store.is_done(run / "audit") and path.is_file()):
        return {}
    with np.load(path) as arrays:
        # A score is minus the mean log of the denoiser's error over the linear filter's.
        found = {side: arrays[name] for side in SIDES if (name := f"generator_{side}") in arrays}
    return {side: float(np.exp(-np.median(values))) for side, values in found.items()}


def _noise(run: Path, study: Study, entries: Sequence[Record]) -> dict[str, float]:
    """Return noise over signal of what was released, from the ledger, the statistics and public constants alone."""
    found: dict[str, float] = {}
    if store.is_done(run / "masks") and _noise_sd(entries, "mask_means"):
        from medsynth.stages.masks import load_masks

        statistics = load_masks(run / "masks").statistics
        if statistics is not None:
            found |= dict(zip(("pose", "shape", "spread"), map(float, statistics.noise), strict=True))
    appearance, entry = _noise_sd(entries, "appearance"), _last(entries, "appearance")
    if appearance and entry:
        from medsynth.models.drafting import open_drafting

        size = open_drafting(study.grid, study.train.appearance).size
        again = _noise_sd(entries, "appearance_again")
        appearance = appearance if again is None else float(joint_sd(appearance, again))
        # No mean is longer than the clip norm, which is below what patients' vectors have.
        found["appearance"] = appearance * math.sqrt(size) / entry["sensitivity"]["clip_norms"]["appearance"]
    return found


def _reach(entries: Sequence[Record]) -> float | None:
    steps = _last(entries, "denoiser")
    if steps is None:
        return None
    event = steps["events"][0]
    return reach(event["noise_multiplier"], steps["denominators"]["denoiser"], event["count"])


def _noise_sd(entries: Sequence[Record], name: str) -> float | None:
    """Return the standard deviation of the noise in each entry of a released mean, as the ledger states it."""
    entry = _last(entries, name)
    if entry is None or not entry["events"][0].get("noise_multiplier"):
        return None
    scale: float = entry["sensitivity"]["clip_norms"][name] / entry["denominators"][name]
    return scale * float(entry["events"][0]["noise_multiplier"])


def _last(entries: Sequence[Record], name: str) -> Record | None:
    named = [one for one in entries if name in one["denominators"] and one["events"][0]["kind"] != "nonprivate"]
    return named[-1] if named else None
