"""The two figures of a comparison, its page, and how to read it in plain sentences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from medsynth.metrics import figures
from medsynth.metrics.figures import Point
from medsynth.release.spending import round_up
from medsynth.stages.comparison_schema import Comparison, Kind, Measured, Run, Scores, TrainingSet
from medsynth.stages.report_page import figure, number, page, table

FIGURES = ("skill-by-epsilon.png", "dice-by-patients.png")
NAMES: Mapping[Kind, str] = {
    "real_only": "real only",
    "strong_augmentation": "strong augmentation",
    "synthetic_only": "synthetic only",
    "random_contrast": "random contrast",
    "mixed": "real + synthetic",
    "floor": "floor",
}
_QUICK = "QUICK: shortened trainings, not to be quoted"
_WHAT = (
    "Strong augmentation: real patients alone, under poses, bends, contrasts, bias fields and noise by MONAI. Random "
    "contrast: images painted on the run's released label maps in SynthSeg's way, no patient's intensity in them. "
    "Floor: one constant mean shape for everybody."
)


def draw(result: Comparison, folder: Path) -> None:
    """Write both figures into ``folder``."""
    note = _QUICK if result.protocol.quick else ""
    epsilon = {one.label: math.inf if one.epsilon == "inf" else float(one.epsilon) for one in result.runs}
    everybody = result.real.real_patients
    wanted: tuple[tuple[Kind, int], ...] = (("synthetic_only", 0), ("mixed", everybody), ("random_contrast", 0))
    series = {
        NAMES[kind] + (f" ({patients} patients)" if patients else ""): [
            _point(one.skill, epsilon[str(one.run)]) for one in _of(result, kind) if one.real_patients == patients
        ]
        for kind, patients in wanted
    }
    strong = {one.real_patients: one.skill.mean for one in _of(result, "strong_augmentation")}.get(everybody)
    lines = {} if strong is None else {f"strong augmentation ({everybody} patients)": strong}
    figures.skill_by_epsilon(series, lines, folder / FIGURES[0], note)
    figures.dice_by_patients(
        _curves(result),
        {str(one.run): _mean(one.dice.all_labels) for one in _of(result, "synthetic_only")},
        _mean(result.floor.dice.all_labels),
        folder / FIGURES[1],
        note,
    )


def _curves(result: Comparison) -> dict[str, list[Point]]:
    def curve(kind: Kind, run: str | None = None) -> list[Point]:
        found = [one for one in _of(result, kind) if one.run == run]
        return [_point(one.dice.all_labels, one.real_patients) for one in sorted(found, key=lambda o: o.real_patients)]

    mixed = {f"{NAMES['mixed']}, {one.label}": curve("mixed", one.label) for one in result.runs}
    plain: tuple[Kind, ...] = ("real_only", "strong_augmentation")
    return {NAMES[kind]: curve(kind) for kind in plain} | mixed


def _of(result: Comparison, kind: Kind) -> list[TrainingSet]:
    return [one for one in result.training_sets if one.kind == kind]


def _point(value: Measured, x: float) -> Point:
    low, high = (math.nan if end is None or value.mean is None else end for end in value.ci95_with_seeds)
    return Point(x, _mean(value), low, high)


def _mean(value: Measured) -> float:
    return math.nan if value.mean is None else value.mean


def write_page(result: Comparison, folder: Path) -> None:
    """Write ``compare.html`` beside the figures; pictures are embedded, nothing is fetched."""
    how = result.protocol
    quick = f"<p><b>{escape(_QUICK)}</b></p>" if how.quick else ""
    pictures = (
        figure(folder / FIGURES[0], "Skill against epsilon", "95 % intervals over held-out patients and seeds."),
        figure(folder / FIGURES[1], "Dice against real patients", "The same; dotted: no real patient to train on."),
    )
    body = (
        f"{quick}<h2>How to read it</h2><ul>{''.join(f'<li>{escape(line)}</li>' for line in reading(result))}</ul>"
        + "".join(pictures)
        + f'<h2>All training sets</h2><p>{escape(_WHAT)}</p><div class="scroll">{_sets(result)}</div>'
        + f'<h2>The synthetic pairs</h2><div class="scroll">{_runs(result)}</div>'
    )
    subtitle = (
        f"{how.held_out_patients} held-out patients, up to {how.train_patients} train patients, seeds "
        f"{', '.join(map(str, how.seeds))}, {how.steps} steps of {how.batch_size}; intervals are 95 %, over patients "
        "(in brackets: and seeds). By label also surface Dice and HD95: compare.json."
    )
    (folder / "compare.html").write_text(page("comparison", subtitle, body), encoding="utf-8")


def reading(result: Comparison) -> list[str]:
    """Return what the numbers mean, in plain sentences."""
    real, floor = result.real, result.floor.dice.all_labels
    lines = [
        f"{real.real_patients} real patients reach a Dice of {number(real.dice.all_labels.mean)}; one constant mean "
        f"shape, without a look at any image, reaches {number(floor.mean)}. Skill is the share of that difference."
    ]
    lines += [_read_run(result, run) for run in result.runs]
    if result.protocol.quick:
        lines.append("Trainings were shortened: do not quote these numbers.")
    return lines


def _read_run(result: Comparison, run: Run) -> str:
    alone, contrast = (
        next(one for one in _of(result, kind) if one.run == run.label) for kind in ("synthetic_only", "random_contrast")
    )
    if alone.skill.mean is None:
        return f"{run.label}: real training data does not beat the floor, so that skill says nothing."
    text = (
        f"{run.label}: synthetic pairs alone reach {number(alone.dice.all_labels.mean)}, "
        f"{_share(alone.relative_to_real)} of real, skill {number(alone.skill.mean, 2)}; random contrasts on the same "
        f"label maps reach {number(contrast.dice.all_labels.mean)}."
    )
    return f"{text} {equivalent(result, alone)}"


def equivalent(result: Comparison, one: TrainingSet) -> str:
    """Return how many real patients it takes to do better than a training set, in words."""
    dice = _mean(one.dice.all_labels)
    curve = sorted(_of(result, "real_only"), key=lambda point: point.real_patients)
    better = [_mean(point.dice.all_labels) > dice for point in curve]
    if not any(better):
        return "All real patients together do no better."
    first = better.index(True)
    most = curve[first].real_patients
    enough = "1 real patient does better" if most == 1 else f"{most} real patients do better"
    if not first:
        return f"{enough} already."
    fewer = curve[first - 1].real_patients
    return f"{enough}, {fewer} {'does' if fewer == 1 else 'do'} not."


def _share(value: Measured) -> str:
    return "-" if value.mean is None else f"{value.mean:.0%}"


def _sets(result: Comparison) -> str:
    labels = list(result.floor.dice.per_label)
    unit = result.protocol.distance_unit
    surface = f"surface Dice at {result.protocol.tolerance:g} {unit}"
    head = [
        "trained on",
        "real patients",
        "Dice",
        *labels,
        "skill",
        "Dice / real",
        surface,
        f"HD95 ({unit})",
        "by seed",
    ]
    return table(head, [_set(one, labels) for one in (result.floor, *result.training_sets)])


def _set(one: TrainingSet, labels: Sequence[str]) -> list[str]:
    run = f"<small>{escape(one.run)}</small>" if one.run else ""
    seeds = ", ".join(number(value) for value in one.dice_by_seed.values())
    patients = "-" if one.kind == "floor" else str(one.real_patients)
    return [
        escape(NAMES[one.kind]) + run,
        patients,
        *_scores(one.dice, labels),
        _cell(one.skill, 2),
        _cell(one.relative_to_real, 2),
        _cell(one.surface_dice.all_labels),
        _cell(one.hd95.all_labels, 2),
        seeds or "-",
    ]


def _scores(scores: Scores, labels: Sequence[str]) -> list[str]:
    return [_cell(scores.all_labels), *(_cell(scores.per_label[label]) for label in labels)]


def _cell(value: Measured, digits: int = 3) -> str:
    if value.mean is None:
        return number(None)
    ends = [tuple(number(end, digits) for end in interval) for interval in (value.ci95, value.ci95_with_seeds)]
    seeds = "" if ends[0] == ends[1] else f"<small>({' to '.join(ends[1])})</small>"
    return f"{number(value.mean, digits)} <small>{' to '.join(ends[0])}</small>{seeds}"


def _runs(result: Comparison) -> str:
    head = ["run", "epsilon", "pairs", "label agreement", "FID (held out)", "MMD² (held out)", "similarity (real)"]
    head += ["nearness", "copies (by chance)"]
    return table(head, [_run(run) for run in result.runs])


def _run(run: Run) -> list[str]:
    crowd, near = run.fidelity, run.memorisation
    planned = "not private"
    if isinstance(run.epsilon, float) and isinstance(run.spent, float):
        planned = f"{run.epsilon:g} <small>spent {round_up(run.spent):.3f}</small>"
    return [
        f"{escape(run.label)}<small>{escape(run.study)}</small>",
        planned,
        str(run.pairs),
        _cell(run.agreement.all_labels) + ("<small>labelled by networks</small>" if run.labellers else ""),
        f"{number(crowd.fid, 2)} ({number(crowd.fid_held_out, 2)})<small>{crowd.fid_images} images each</small>",
        f"{number(crowd.mmd, 4)} ({number(crowd.mmd_held_out, 4)})",
        f"{number(crowd.similarity_within_synthetic)} ({number(crowd.similarity_within_real)})"
        f"<small>{escape(crowd.similarity)}</small>",
        f"{number(near.median_ratio, 2)}<small>{number(near.nearer_than_held_out_p5, 2)} nearer than 5 %</small>",
        f"{number(near.copies, 2)} ({number(near.copies_by_chance, 2)})",
    ]
