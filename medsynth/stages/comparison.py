"""``medsynth compare``: what pairs of one or several runs are worth beside real patients, by one recipe.

Everything in the folder is internal: it reads patients of both sides, and a Dice on held-out patients never leaves.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from medsynth import __version__, logs, store
from medsynth.config import Segment, Study
from medsynth.devices import open_device
from medsynth.errors import InputError
from medsynth.imaging.cohort import Patient, load_pairs, load_patients, read_cases
from medsynth.models.segmenter import Segmenter, load_segmenter
from medsynth.privacy.ledger import Ledger
from medsynth.randomness import derive_seed
from medsynth.stages import comparison_page
from medsynth.stages.comparison_results import (
    Crowd,
    Statistician,
    agreement,
    crowd_of,
    fidelity,
    floor_tables,
    memorisation,
    records,
    training_sets,
)
from medsynth.stages.comparison_schema import Comparison, Protocol, Run
from medsynth.stages.comparison_trainings import (
    Arm,
    Bench,
    Ruler,
    Trained,
    arms_of,
    network_path,
    train_arms,
)
from medsynth.stages.synthesise import LABELLERS, drawn_for
from medsynth.store import Manifest
from medsynth.tracking import Tracker

RESULT = "compare.json"
_SCHEMA = "compare.schema.json"
_SCRATCH = ".pools-"
_QUICK = 4  # a quick comparison trains for a quarter of the steps
SECTIONS = ("seed", "grid", "segment", "evaluate")


@dataclass(frozen=True)
class Settings:
    """What was asked for.

    Attributes:
        numbers: real patients to train on; those that the cohort has not are left out, all of them always come in.
        seeds: of every training set.
        quick: a quarter of the steps.
        tolerance: of surface Dice in mm (pixels where the grid has no spacing); None: the coarsest side of a voxel.
    """

    numbers: tuple[int, ...]
    seeds: tuple[int, ...]
    quick: bool = False
    tolerance: float | None = None


@dataclass(frozen=True)
class Source:
    """A finished run: what it is called here, its study and its folder."""

    label: str
    study: Study
    folder: Path

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """Images and labels of the synthetic pairs on the grid."""
        return load_pairs(self.folder / "synthetic", self.study.grid)

    @property
    def spent(self) -> float:
        """Epsilon that the run's ledger composes to."""
        return Ledger(self.folder / "ledger.jsonl").spent(self.study.privacy.delta) if self.private else math.inf

    @property
    def private(self) -> bool:
        """Whether the study was private."""
        return self.study.privacy.private


def parents_of(sources: Sequence[Source]) -> dict[str, Path]:
    """Return the finished folders that a comparison reads."""
    return {"cohort": sources[0].folder / "cohort"} | {
        f"synthetic-{one.label}": one.folder / "synthetic" for one in sources
    }


def digest_of(sources: Sequence[Source], settings: Settings) -> str:
    """Return the digest of everything but the inputs that a comparison depends on."""
    values = sources[0].study.model_dump(mode="json")
    asked = [settings.numbers, settings.seeds, settings.quick, settings.tolerance]
    return store.digest_of({**{name: values[name] for name in SECTIONS}, "asked": asked})


def run(sources: Sequence[Source], out: Path, tracker: Tracker, settings: Settings) -> Manifest:
    """Train every set, measure it on the held-out patients, and write the folder; a killed one goes on.

    Args:
        sources: finished runs that share cohort, split, grid and recipe (the caller has checked that).
        out: folder to write: ``compare.json`` and its schema, figures, ``compare.html``, ``trainings/``, ``networks/``.
        tracker: gets one nested run a training, the scores, and the figures (which show no patient).
        settings: numbers, seeds, tolerance.

    Raises:
        InputError: no train patient or no held-out patient.
        MedsynthError: a training failed.
    """
    parents, digest = parents_of(sources), digest_of(sources, settings)
    with store.create(out, "compare", digest, parents, keep_partial=True) as folder:
        folder.resume(scratch=_SCRATCH)  # a kill leaves pools of patients behind
        bench = _bench(sources, folder.path, settings)
        numbers = numbers_of(settings, len(bench.train))
        if left_out := [number for number in settings.numbers if number > len(bench.train)]:
            logs.say("compare: the cohort has fewer train patients", left_out=left_out)
        arms = arms_of([one.label for one in sources], numbers)
        with tempfile.TemporaryDirectory(dir=folder.path, prefix=_SCRATCH) as scratch:
            ruler = _ruler(sources[0].study, Path(scratch), settings)
            trained = _train(sources[0].study, bench, arms, settings.seeds, ruler, tracker)
            result = _result(sources, bench, trained, ruler, settings)
        _write(result, folder.path)
        comparison_page.draw(result, folder.path)
        comparison_page.write_page(result, folder.path)
        _track(result, folder.path, tracker)
        return folder.finish("internal", details={"runs": [one.label for one in sources], "quick": settings.quick})


def numbers_of(settings: Settings, patients: int) -> tuple[int, ...]:
    """Return the numbers of real patients to train on, rising, the last of them everybody."""
    return (*sorted({number for number in settings.numbers if number < patients}), patients)


def recipe(segment: Segment, settings: Settings) -> Segment:
    """Return the recipe of all trainings."""
    return segment.model_copy(update={"steps": max(1, segment.steps // _QUICK)}) if settings.quick else segment


def read_result(folder: Path) -> Comparison:
    """Read ``compare.json`` of a finished comparison."""
    return Comparison.model_validate_json((folder / RESULT).read_text(encoding="utf-8"))


def _bench(sources: Sequence[Source], folder: Path, settings: Settings) -> Bench:
    first = sources[0]
    train, test = (_ordered(first.folder / "cohort", first.study, split) for split in ("train", "test"))
    if not train or not test:
        raise InputError(
            "the cohort needs labelled train and held-out patients to compare on: change ingest.test_fraction or add "
            "patients"
        )
    segment = recipe(first.study.segment, settings)
    pairs = {one.label: one.pairs for one in sources}
    return Bench(first.study.seed, first.study.grid, segment, train, test, pairs, folder)


def _ordered(cohort: Path, study: Study, split: str) -> list[Patient]:
    """Return the patients by what their pictures hold: pseudonyms, and their order, are another in each run."""
    content: dict[str, str] = {}
    for row in read_cases(cohort):
        content[row["patient_id"]] = min(row["content"], content.get(row["patient_id"], row["content"]))
    return sorted(load_patients(cohort, study.grid, split), key=lambda patient: content[patient.patient_id])


def _ruler(study: Study, scratch: Path, settings: Settings) -> Ruler:
    spacing = study.grid.spacing_mm or (1.0,) * study.grid.spatial_dims
    tolerance = max(spacing) if settings.tolerance is None else settings.tolerance
    return Ruler(scratch / "held-out.safetensors", spacing, tolerance)


def _train(
    study: Study, bench: Bench, arms: Sequence[Arm], seeds: Sequence[int], ruler: Ruler, tracker: Tracker
) -> dict[Arm, list[Trained]]:
    """Return the trainings of each arm by seed; each is a nested run of the tracking store."""
    found: dict[tuple[Arm, int], Trained] = {}
    device = str(open_device(study.compute))
    logs.say("compare", training_sets=len(arms), seeds=len(seeds), trainings=len(arms) * len(seeds))
    for one, now in train_arms(bench, arms, seeds, ruler, device, study.compute.workers):
        found[one.arm, one.seed] = one
        if now:
            with tracker.stage(f"compare/{one.arm.name}-s{one.seed}") as nested:
                nested.params({"kind": one.arm.kind, "run": one.arm.run or "", "seed": str(one.seed)})
                nested.params({"real_patients": str(one.arm.real_patients)})
                nested.metrics({**one.means, "loss": one.loss, "elapsed_s": one.elapsed_s})
    return {arm: [found[arm, seed] for seed in seeds] for arm in arms}


def _result(
    sources: Sequence[Source],
    bench: Bench,
    trained: Mapping[Arm, Sequence[Trained]],
    ruler: Ruler,
    settings: Settings,
) -> Comparison:
    study = sources[0].study
    how = Statistician(bench.grid.labels, study.evaluate.bootstrap, study.seed)
    images = {arm.name: len(bench.pairs[arm.run][0]) for arm in trained if arm.run is not None}
    floor, sets = training_sets(trained, floor_tables(bench.train, bench.test, bench.grid, ruler), images, how)
    device = open_device(study.compute)
    judges = [
        load_segmenter(bench.grid, bench.segment, network_path(bench.folder, seed)).to(device)
        for seed in settings.seeds
    ]
    logs.say("compare: label agreement, fidelity and memorisation", runs=len(sources))
    sides = crowd_of(records(bench.train), judges), crowd_of(records(bench.test), judges)
    count = study.evaluate.agreement_pairs
    return Comparison(
        medsynth_version=__version__,
        protocol=_protocol(bench, ruler, study, settings),
        floor=floor,
        runs=tuple(_run(one, bench, judges, sides, how, count) for one in sources),
        training_sets=tuple(sets),
    )


def _protocol(bench: Bench, ruler: Ruler, study: Study, settings: Settings) -> Protocol:
    segment = bench.segment
    return Protocol(
        quick=settings.quick,
        seeds=settings.seeds,
        numbers=numbers_of(settings, len(bench.train)),
        steps=segment.steps,
        batch_size=segment.batch_size,
        learning_rate=segment.learning_rate,
        channels=segment.channels,
        bootstrap=study.evaluate.bootstrap,
        tolerance=ruler.tolerance,
        distance_unit="mm" if study.grid.spacing_mm else "pixels",
        train_patients=len(bench.train),
        held_out_patients=len(bench.test),
    )


def _run(
    source: Source,
    bench: Bench,
    judges: Sequence[Segmenter],
    sides: tuple[Crowd, Crowd],
    how: Statistician,
    count: int,
) -> Run:
    """Return what is measured on a run's pairs, beside train and held-out patients; ``count`` of them are judged."""
    images, labels = bench.pairs[source.label]
    drawn = drawn_for(source.folder / "synthetic", bench.grid, labels, count)
    seed = derive_seed(bench.seed, "compare", "crowds")
    synthetic = store.read_manifest(source.folder / "synthetic")
    return Run(
        label=source.label,
        study=source.study.name,
        epsilon=source.study.privacy.epsilon,
        spent=source.spent,
        delta=source.study.privacy.delta,
        pairs=len(images),
        synthetic=synthetic.digest,
        agreement=agreement(judges, images[: len(drawn)], drawn, source.label, how),
        agreement_pairs=len(drawn),
        labellers=synthetic.details.get(LABELLERS, 0),
        fidelity=fidelity(*sides, crowd_of(images, judges), seed),
        memorisation=memorisation(bench.train, bench.test, images, labels, how.draws, seed),
    )


def _write(result: Comparison, folder: Path) -> None:
    (folder / RESULT).write_text(result.model_dump_json(indent=1) + "\n", encoding="utf-8")
    schema = json.dumps(Comparison.model_json_schema(mode="serialization"), indent=1)
    (folder / _SCHEMA).write_text(schema + "\n", encoding="utf-8")


def _track(result: Comparison, folder: Path, tracker: Tracker) -> None:
    values: dict[str, float | None] = {"floor": result.floor.dice.all_labels.mean}
    for one in result.training_sets:
        name = Arm(one.kind, one.run, one.real_patients).name
        values |= {f"dice/{name}": one.dice.all_labels.mean, f"skill/{name}": one.skill.mean}
    for run in result.runs:
        values |= {f"agreement/{run.label}": run.agreement.all_labels.mean, f"fid/{run.label}": run.fidelity.fid}
    tracker.metrics({name: value for name, value in values.items() if value is not None})
    for figure in comparison_page.FIGURES:
        tracker.figure(folder / figure, f"compare/{figure}")
