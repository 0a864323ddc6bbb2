"""``medsynth compare``: which runs may stand side by side, and what is printed of their comparison."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsynth import config, logs, store
from medsynth.config import Study
from medsynth.errors import ConfigError, InputError, StoreError
from medsynth.imaging.cohort import read_cases
from medsynth.stages.report_page import number
from medsynth.study import STUDY
from medsynth.tracking import open_tracker

if TYPE_CHECKING:
    from rich.table import Table

    from medsynth.stages.comparison import Settings, Source
    from medsynth.stages.comparison_schema import Comparison, Measured

FOLDER = "compare"
"""Below the output folder, beside ``mlflow/``."""
NUMBERS, SEEDS = "1,2,4,8,20,all", "0,1,2"
QUICK_NUMBERS, QUICK_SEEDS = "1,4,all", "0"
_COLUMNS = 130
_SETTABLE = ("segment", "evaluate", "compute", "tracking")
_RECIPE = ("channels", "steps", "batch_size", "learning_rate", "augment", "largest_component")


def compare(
    runs: Sequence[Path], out: Path, settings: Settings, overrides: Mapping[str, Any], *, replace: bool = False
) -> Comparison:
    """Compare finished runs of one cohort; a finished comparison of the same things is read, not made again.

    Args:
        runs: run folders with finished ``cohort/`` and ``synthetic/``.
        out: folder for ``compare/`` and ``mlflow/``; none of the runs.
        settings: numbers, seeds, tolerance.
        overrides: values of the runs' studies to replace, by dotted path: only of ``segment``, ``evaluate``,
            ``compute`` and ``tracking``.
        replace: make the comparison again when it was made from other things.

    Raises:
        InputError: the runs do not share cohort, split, grid or recipe.
        StoreError: a run is not finished, or ``out`` holds another comparison.
        ConfigError: an override that may not be set here.
    """
    from medsynth.stages import comparison

    sources = open_runs(runs, out, overrides)
    folder = out / FOLDER
    if store.is_done(folder):
        if _is_same(folder, sources, settings):
            logs.say("compare: finished before, skipped")
            return comparison.read_result(folder)
        if not replace:
            raise StoreError(
                f"'{FOLDER}' in the output folder was made from other runs or settings: pass --replace to make it "
                "again, or use a new --out"
            )
    _run(sources, out, settings)
    return comparison.read_result(folder)


def _is_same(folder: Path, sources: Sequence[Source], settings: Settings) -> bool:
    """Whether a finished comparison was made from the same runs and settings."""
    from medsynth.stages import comparison

    manifest = store.read_manifest(folder)
    parents = {name: store.read_manifest(path).digest for name, path in comparison.parents_of(sources).items()}
    return (manifest.config_digest, dict(manifest.parents)) == (comparison.digest_of(sources, settings), parents)


def _run(sources: Sequence[Source], out: Path, settings: Settings) -> None:
    from medsynth.stages import comparison

    study = sources[0].study
    with (
        store.alone_in(out, "output"),
        open_tracker(study.tracking.uri, study.tracking.experiment, out, FOLDER) as tracker,
        store.set_aside(out / FOLDER),
    ):
        tracker.params({**config.flatten(study), "compare": str(asdict(settings))})
        for name, parent in comparison.parents_of(sources).items():
            tracker.dataset(name, store.read_manifest(parent).digest, "input")
        tracker.describe(
            f"{study.name}: the same segmentation model on real patients, on synthetic pairs and on both, a child run "
            "each; `compare.json` and the page `compare.html` lie in the folder of the comparison. Dice on held-out "
            "patients is **internal**."
        )
        comparison.run(sources, out / FOLDER, tracker, settings)


def parse_settings(numbers: str | None, seeds: str | None, tolerance: float | None, quick: bool) -> Settings:
    """Return what was asked for on the command line.

    Args:
        numbers: numbers of real patients, e.g. ``"1,4,all"``; all are always among them.
        seeds: e.g. ``"0,1,2"``.
        tolerance: of surface Dice.
        quick: shortens what is not given.

    Raises:
        ConfigError: a text that is no list of whole numbers, or a tolerance below 0.
    """
    from medsynth.stages.comparison import Settings

    wanted = numbers or (QUICK_NUMBERS if quick else NUMBERS)
    parts = [part for part in wanted.split(",") if part.strip() != "all"]
    if tolerance is not None and not 0 <= tolerance < math.inf:
        raise ConfigError(f"--tolerance is a distance of 0 or more, got {tolerance:g}")
    return Settings(
        numbers=_whole("--numbers", parts, 1),
        seeds=_whole("--seeds", (seeds or (QUICK_SEEDS if quick else SEEDS)).split(","), 0),
        quick=quick,
        tolerance=tolerance,
    )


def _whole(option: str, parts: Sequence[str], least: int) -> tuple[int, ...]:
    try:
        found = [int(part) for part in parts]
    except ValueError:
        raise ConfigError(f"{option} takes whole numbers with commas between, got '{','.join(parts)}'") from None
    if any(number < least for number in found) or len(set(found)) < len(found):
        raise ConfigError(f"{option} takes different numbers from {least} on, got '{','.join(parts)}'")
    return tuple(found)


def open_runs(runs: Sequence[Path], out: Path, overrides: Mapping[str, Any]) -> list[Source]:
    """Return the runs in the order given, each with a label by its epsilon (see :func:`compare`)."""
    from medsynth.stages.comparison import Source

    for name in overrides:
        if name.partition(".")[0] not in _SETTABLE:
            raise ConfigError(f"--set {name}: a comparison can only change {', '.join(_SETTABLE)}")
    if len({run.resolve() for run in runs}) < len(runs):
        raise InputError("a run was given twice: give each run folder once")
    if out.resolve() in {run.resolve() for run in runs}:
        raise StoreError("--out is one of the runs: choose a folder of its own for the comparison")
    studies = [_study(run, number, overrides) for number, run in enumerate(runs, start=1)]
    labels = _labels(studies)
    sources = [Source(*parts) for parts in zip(labels, studies, runs, strict=True)]
    for one in sources[1:]:
        _require_alike(sources[0], one)
    return sources


def _study(run: Path, number: int, overrides: Mapping[str, Any]) -> Study:
    # A run folder's own name may be that of a person: messages say which run it was.
    for folder in ("cohort", "synthetic"):
        if not store.is_done(run / folder):
            raise StoreError(
                f"run {number} of those given has no finished {folder}/: give run folders in which at least the stage "
                "'synthesise' has finished"
            )
    if not (run / STUDY).is_file():
        raise StoreError(f"run {number} of those given holds no {STUDY}: run a stage of its study there once more")
    study = config.load(run / STUDY, dict(overrides))
    if study.privacy.private and not (run / "ledger.jsonl").is_file():
        raise StoreError(f"run {number} of those given has no ledger.jsonl: give the whole run folder")
    return study


def _labels(studies: Sequence[Study]) -> list[str]:
    names = [f"epsilon-{study.privacy.epsilon:g}" for study in studies]
    counts, seen, labels = Counter(names), Counter[str](), []
    for name in names:
        seen[name] += 1
        labels.append(name if counts[name] == 1 else f"{name}-{seen[name]}")
    return labels


def _require_alike(first: Source, other: Source) -> None:
    """Refuse two runs whose numbers could not be held against each other."""
    for section, keys in (("grid", None), ("segment", _RECIPE)):
        ours, theirs = (getattr(one.study, section).model_dump() for one in (first, other))
        different = [key for key in keys or ours if ours[key] != theirs[key]]
        if different:
            hint = "" if section == "grid" else f"; --set {section}.{different[0]}=... gives all runs the same"
            raise InputError(
                f"{first.label} and {other.label} have another {section} ({', '.join(different)}): only runs of the "
                f"same {section} can be compared{hint}"
            )
    ours, theirs = _split(first), _split(other)
    if ours.keys() != theirs.keys():
        raise InputError(
            f"{first.label} and {other.label} were made from different patients or images: only runs of one cohort "
            "can be compared"
        )
    if ours != theirs:
        raise InputError(
            f"{first.label} and {other.label} hold back different patients: only runs of one split can be compared "
            "(the same seed, ingest.split and ingest.test_fraction)"
        )


def _split(source: Source) -> dict[str, tuple[str, str]]:
    """Return side and labelling of each case by what its picture holds: names of patients differ between runs."""
    rows = read_cases(source.folder / "cohort")
    if not all(row.get("content") for row in rows):
        raise StoreError(f"the cohort of {source.label} does not say what its pictures hold: run ingest again")
    return {row["content"]: (row["split"], row["labelled"]) for row in rows}


def show(result: Comparison, out: Path) -> None:
    """Print the comparison as tables, how to read it, and where the rest is."""
    from rich.console import Console

    from medsynth.stages.comparison_page import reading

    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, _COLUMNS)  # a batch job has no terminal, and tables should not be cut there
    console.print(_table_of_sets(result))
    console.print(_table_of_runs(result))
    for line in reading(result):
        console.print(line)
    console.print(f"page     {out / FOLDER / 'compare.html'}")
    console.print(f"numbers  {out / FOLDER / 'compare.json'}")


def _table_of_sets(result: Comparison) -> Table:
    from rich.table import Table

    from medsynth.stages.comparison_page import NAMES

    unit, tolerance = result.protocol.distance_unit, result.protocol.tolerance
    head = ["trained on", "run", "patients", "Dice (95 %)", "skill", "/ real", f"surface {tolerance:g} {unit}"]
    table = Table(*head, f"HD95 {unit}", title="internal: measured on held-out patients")
    for column in table.columns[:4]:
        column.no_wrap = True
    for one in (result.floor, *result.training_sets):
        measures = (one.skill, one.relative_to_real, one.surface_dice.all_labels, one.hd95.all_labels)
        patients = "-" if one.kind == "floor" else str(one.real_patients)
        values = [number(value.mean, 2) for value in measures]
        table.add_row(NAMES[one.kind], one.run or "-", patients, _interval(one.dice.all_labels), *values)
    return table


def _table_of_runs(result: Comparison) -> Table:
    from rich.table import Table

    table = Table("pairs of", "agreement (95 %)", "FID", "held out", "alike", "real", "nearness", "copies", "by chance")
    for run in result.runs:
        crowd, near = run.fidelity, run.memorisation
        alike = (crowd.similarity_within_synthetic, crowd.similarity_within_real)
        told = (crowd.fid, crowd.fid_held_out, *alike, near.median_ratio, near.copies, near.copies_by_chance)
        table.add_row(run.label, _interval(run.agreement.all_labels), *(number(value, 2) for value in told))
    return table


def _interval(value: Measured) -> str:
    if value.mean is None:
        return number(None)
    low, high = value.ci95_with_seeds
    return f"{number(value.mean, 3)} ({number(low, 3)} to {number(high, 3)})"
