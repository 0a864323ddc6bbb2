"""Stage ``masks``: a generator of label maps from two Gaussian mechanisms (or from public shapes).

What is released: the mean pose and mean shape of the patients' label maps, then the spread around them (see
:mod:`medsynth.stages.mask_sums`). Every label map that is drawn afterwards is post-processing; no patient's own mask
is kept.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medsynth import logs, store
from medsynth.config import Grid, Masks, Study, Synthesise
from medsynth.models.label_volumes import resize_labels, volume_factors
from medsynth.models.mask_generator import MaskStatistics, ShapeSpace
from medsynth.randomness import derive_seed
from medsynth.stages.inputs import config_digest, open_ledger, stage_inputs
from medsynth.stages.mask_sums import plan_sums
from medsynth.store import Manifest
from medsynth.tracking import Tracker

if TYPE_CHECKING:
    from medsynth.imaging.cohort import Patient
    from medsynth.privacy.mechanism import GaussianSum

STATISTICS = "statistics.npz"
SETTINGS = "masks.json"
_VOLUME_MAPS = 300  # tell how large a label is unasked, its median to a few per cent


def run(config: Study, inputs: Mapping[str, Path], out: Path, tracker: Tracker) -> Manifest:
    """Write ``masks/``: released statistics and a public preview of what they generate.

    Args:
        config: sections ``grid``, ``privacy``, ``masks``.
        inputs: ``cohort`` (read only for ``masks.source: statistics``) and ``ledger``.
        out: the new folder.
        tracker: receives volumes of generated label maps.
    """
    digest = config_digest(config, "masks")
    if config.masks.source == "public_shapes":
        with store.create(out, "masks", digest) as folder:
            _write_settings(config, folder.path)
            return folder.finish("public", details={"source": "public_shapes"})
    parents = stage_inputs(inputs, "cohort")
    with store.create(out, "masks", digest, parents, keep_partial=True) as folder:
        space = ShapeSpace(config.grid, config.masks)
        entry = _release(config, inputs, space, digest, folder.path)
        _write_settings(config, folder.path)
        _report(load_masks(folder.path), config.seed, tracker)
        sensitivity: store.Sensitivity = "released" if config.privacy.private else "internal"
        return folder.finish(sensitivity, ledger_entries=(entry,), details={"source": "statistics"})


class MaskGenerator:
    """Label maps from the finished ``masks/`` folder.

    Args:
        grid: the public grid.
        settings: the section that the folder was made with.
        statistics: what was released; None draws public shapes.
    """

    def __init__(self, grid: Grid, settings: Masks, statistics: MaskStatistics | None) -> None:
        self.grid = grid
        self.statistics = statistics
        self.space = ShapeSpace(grid, settings)
        self.factors: Mapping[int, float] = {}
        """Factor on the volume of each label that :meth:`ask` was told of, by label value."""

    def ask(self, how: Synthesise, seeds: Sequence[int]) -> MaskGenerator:
        """Return a generator of the label maps of this one, resized to the volumes that ``how`` asks for.

        Args:
            how: ``volume_scale`` and ``volume_median``.
            seeds: of the label maps that will be drawn; the first few hundred tell how large they are unasked.

        Raises:
            ConfigError: the volumes cannot be reached on the grid.
        """
        asked = copy.copy(self)
        if how.volume_scale or how.volume_median:
            asked.factors = volume_factors([self.draw(seed) for seed in seeds[:_VOLUME_MAPS]], self.grid, how)
        return asked

    def draw(self, seed: int) -> np.ndarray:
        """Return one label map (\\*spatial) uint8, a function of ``seed`` alone."""
        if self.statistics is None:
            from medsynth.imaging.phantom import sample_label_maps

            label = np.asarray(sample_label_maps(self.grid, 1, seed)[0])
        else:
            label = self.space.sample(self.statistics, np.random.default_rng(seed))
        return resize_labels(label, self.factors, self.grid.spacing_mm) if self.factors else label


def load_masks(folder: Path) -> MaskGenerator:
    """Read the generator that stage ``masks`` wrote."""
    settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    grid, masks = Grid.model_validate(settings["grid"]), Masks.model_validate(settings["masks"])
    if masks.source == "public_shapes":
        return MaskGenerator(grid, masks, None)
    with np.load(folder / STATISTICS) as arrays:
        statistics = MaskStatistics(**{name: arrays[name] for name in arrays.files})
    return MaskGenerator(grid, masks, statistics)


def _release(config: Study, inputs: Mapping[str, Path], space: ShapeSpace, digest: str, folder: Path) -> str:
    from medsynth.imaging.cohort import load_patients
    from medsynth.privacy.budget import plan_budget
    from medsynth.privacy.entropy import open_entropy

    ledger, path = open_ledger(inputs), folder / STATISTICS
    cohort = {"cohort": store.read_manifest(inputs["cohort"]).digest}
    if path.is_file():
        before = ledger.completed(digest, cohort, {STATISTICS: store.digest_file(path)})
        if before is not None:
            logs.say("going on with the statistics that an interrupted run released")
            return before
        path.unlink()
    plan = plan_budget(config.privacy, config.train, config.masks)
    sums = plan_sums(config, space, plan.masks_noise_multiplier)
    entry = ledger.reserve(
        "masks",
        [sums.mean, sums.spread],
        epsilon=config.privacy.epsilon,
        delta=config.privacy.delta,
        noise_source=config.privacy.entropy,
        config_digest=digest,
        parents=cohort,
        resume=True,
        trials=config.privacy.trials,
    )
    patients = load_patients(inputs["cohort"], config.grid, "train")
    labels = [patient.labels.numpy() for patient in patients]
    statistics = sums.measure(labels, open_entropy(config.privacy.entropy))
    released = io.BytesIO()
    np.savez(released, **vars(statistics))
    # Completed before anything is on disk: a killed run either released nothing, and goes on within its reservation,
    # or has used it up.
    ledger.complete(entry, {STATISTICS: hashlib.sha256(released.getvalue()).hexdigest()})
    path.write_bytes(released.getvalue())
    logs.say("mask statistics released", noise_multiplier=plan.masks_noise_multiplier, clip_norm=sums.mean.clip_norm)
    return entry


def rerun(config: Study, patients: list[Patient], wrap: Callable[[GaussianSum], GaussianSum]) -> None:
    """Run the stage's mechanisms once more for an audit, each wrapped by ``wrap``; nothing is written or released."""
    from medsynth.privacy.budget import plan_budget
    from medsynth.privacy.entropy import open_entropy

    noise = plan_budget(config.privacy, config.train, config.masks).masks_noise_multiplier
    sums = plan_sums(config, ShapeSpace(config.grid, config.masks), noise)
    wrapped = replace(sums, mean=wrap(sums.mean), spread=wrap(sums.spread))
    wrapped.measure([patient.labels.numpy() for patient in patients], open_entropy("test_only"))


def _write_settings(config: Study, folder: Path) -> None:
    settings = {"grid": config.grid.model_dump(mode="json"), "masks": config.masks.model_dump(mode="json")}
    (folder / SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _report(generator: MaskGenerator, seed: int, tracker: Tracker) -> None:
    maps = [generator.draw(derive_seed(seed, "masks", "preview", index)) for index in range(16)]
    for value, name in list(generator.grid.labels.items())[1:]:
        volumes = [float((label == value).sum()) for label in maps]
        tracker.metrics({f"generated_{name}_voxels": float(np.mean(volumes))})
