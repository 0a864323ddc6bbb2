"""Figures of the internal report: aggregate plots, and pictures with label contours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from medsynth.metrics.membership import roc as roc_curve

COLOURS = {"real_only": "#33658a", "synthetic_only": "#d1603d", "mixed": "#6a994e", "reconstructed": "#8a6fb0"}
NAMES = {
    "real_only": "real only",
    "synthetic_only": "synthetic only",
    "mixed": "mixed",
    "reconstructed": "real, through the codec",
}
_REAL, _SYNTHETIC, _GREY = COLOURS["real_only"], COLOURS["synthetic_only"], "#8a8f98"
_CONTOURS = ("#ffd166", "#4cc9f0", "#f72585", "#80ed99", "#ff9f1c", "#b892ff")
_DPI = 110
_BINS = 24  # of a histogram; fewer whole numbers get a bin each
Side = Literal["left", "right", "none"]
_CURVES = (_SYNTHETIC, "#7b5ea7", "#2a9d8f")
_LINES = ("#b08900", "#5c677d")
_RUNS = ("#d1603d", "#7b5ea7", "#6a994e", "#b08900", "#c2417f", "#5c677d")
_LOWEST, _HIGHEST = -1.0, 2.0  # skill that is drawn to scale
_GAP = 0.45  # decades between the largest epsilon and infinity
_ASIDE, _BESIDE = 0.075, 0.02  # decades between series, and between runs of one epsilon
_NO_SKILL = "real training does not beat the floor:\nno skill to speak of"
_SIDE = 1.05  # factor between curves at one number of patients


def montage(rows: Mapping[str, Sequence[tuple[Tensor, Tensor]]], path: Path, upright: bool) -> None:
    """Draw a row of images with the contours of their labels for each group; volumes as an axial and a sagittal slice.

    Args:
        rows: by title, pairs of an image ``(channel, *spatial)`` in [-1, 1] and labels ``(*spatial)``.
        path: PNG to write.
        upright: the second axis points up (RAS geometry) and not down (photographs).
    """
    strips = {title: _strips(pairs) for title, pairs in rows.items() if pairs}
    lines = [(f"{title}\n{view}".strip(), cells) for title, views in strips.items() for view, cells in views.items()]
    columns = max(len(cells) for _, cells in lines)
    figure, axes = _figure(1.55 * columns, 1.62 * len(lines), len(lines), columns)
    for row, (title, cells) in enumerate(lines):
        for axis in axes[row]:
            axis.axis("off")
        for axis, (image, label) in zip(axes[row], cells, strict=False):
            _cell(axis, image, label, upright)
        axes[row][0].text(-0.08, 0.5, title, transform=axes[row][0].transAxes, rotation=90, ha="right", va="center")
    figure.subplots_adjust(
        left=0.09 if columns > 3 else 0.18, right=0.995, top=0.99, bottom=0.01, wspace=0.04, hspace=0.04
    )
    _save(figure, path)


def _strips(pairs: Sequence[tuple[Tensor, Tensor]]) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    arrays = [(np.moveaxis(image.numpy(), 0, -1), label.numpy()) for image, label in pairs]
    if arrays[0][1].ndim == 2:
        return {"": arrays}
    return {
        name: [
            (np.take(image, at, axis), np.take(label, at, axis))
            for image, label in arrays
            for at in [_widest(label, axis)]
        ]
        for name, axis in (("axial", 2), ("sagittal", 0))
    }


def _widest(label: np.ndarray, axis: int) -> int:
    areas = (label > 0).sum(axis=tuple(a for a in range(label.ndim) if a != axis))
    return int(areas.argmax()) if areas.any() else label.shape[axis] // 2


def _cell(axis: Axes, image: np.ndarray, label: np.ndarray, upright: bool) -> None:
    shown = np.clip((np.swapaxes(image, 0, 1) + 1) / 2, 0, 1)
    origin: Any = "lower" if upright else "upper"
    axis.imshow(shown[..., 0] if shown.shape[-1] == 1 else shown, cmap="gray", vmin=0, vmax=1, origin=origin)
    for value in sorted(set(np.unique(label).tolist()) - {0}):
        colour = _CONTOURS[(int(value) - 1) % len(_CONTOURS)]
        axis.contour((value == label.T).astype(float), levels=[0.5], colors=[colour], linewidths=1.1)


def dice(blocks: Mapping[str, Any], floor: Mapping[str, Any], path: Path) -> None:
    """Draw the mean Dice and its 95 % interval of each regime, overall and by label, over the image-blind floor.

    Args:
        blocks: by regime, ``mean``, ``ci95`` and ``per_label``.
        floor: the same of the constant mean shape.
        path: PNG to write.
    """
    groups = ["all labels", *floor["per_label"]]
    figure, axes = _figure(2.2 + 1.7 * len(groups), 3.4, 1, 1)
    axis = axes[0][0]

    def of(block: Mapping[str, Any], group: str) -> Mapping[str, Any]:
        chosen: Mapping[str, Any] = block if group == "all labels" else block["per_label"][group]
        return chosen

    for place, group in enumerate(groups):
        height = of(floor, group)["mean"]
        axis.plot([place - 0.36, place + 0.36], [height] * 2, color=_GREY, ls="--", lw=1.5, label="image-blind floor")
        for turn, (regime, block) in enumerate(blocks.items()):
            one = of(block, group)
            x = place + 0.22 * (turn - (len(blocks) - 1) / 2)
            axis.plot([x, x], one["ci95"], color=COLOURS[regime], lw=2.2, solid_capstyle="round", label=NAMES[regime])
            axis.plot([x], [one["mean"]], "o", color=COLOURS[regime], ms=7)
            axis.annotate(
                f"{one['mean']:.2f}", (x, one["ci95"][1]), (0, 4), textcoords="offset points", ha="center", fontsize=8
            )
    axis.set_xticks(range(len(groups)), groups)
    axis.set_xlim(-0.6, len(groups) - 0.4)
    axis.set_ylim(0.0, 1.0)  # of every run: a start that follows the data makes a small gap look large
    axis.set_ylabel("Dice on held-out patients")
    handles, names = axis.get_legend_handles_labels()
    unique = dict(zip(names, handles, strict=True))
    axis.legend(unique.values(), unique.keys(), frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def distances(synthetic: np.ndarray, held_out: np.ndarray, path: Path) -> None:
    """Draw both distributions of the distance to the nearest training image."""
    figure, axes = _figure(5.6, 2.8, 1, 1)
    _two_histograms(axes[0][0], held_out, synthetic, "held-out patients")
    axes[0][0].axvline(float(np.percentile(held_out, 5)), color=_GREY, ls="--", lw=1, label="5 % of held-out patients")
    axes[0][0].set_xlabel("distance to the nearest training image")
    axes[0][0].legend(frameon=False, fontsize=8)
    _save(figure, path)


def roc(scores: Mapping[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
    """Draw the curve of each membership attack: how many members it recognises at how many false alarms.

    Args:
        scores: by name, scores of members and of strangers.
        path: PNG to write.
    """
    figure, axes = _figure(3.8, 3.5, 1, 1)
    axis = axes[0][0]
    axis.plot([0, 1], [0, 1], color=_GREY, ls="--", lw=1, label="chance")
    for (name, sides), colour in zip(scores.items(), (_SYNTHETIC, _REAL, *_CONTOURS), strict=False):
        false, true = roc_curve(*sides)
        axis.plot(false, true, color=colour, lw=1.8, label=name)  # where scores are equal, along the diagonal
    axis.set(xlabel="held-out patients taken for members", ylabel="members recognised", aspect="equal")
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    _save(figure, path)


def label_maps(values: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]], path: Path) -> None:
    """Draw what was measured on label maps of held-out patients and on synthetic ones: a row a label, a column each.

    Args:
        values: by label and by measure (with its unit), real and synthetic values; NaN is left out.
        path: PNG to write.
    """
    columns = max(len(row) for row in values.values())
    figure, axes = _figure(2.9 * columns, 2.3 * len(values), len(values), columns)
    for line, (label, row) in zip(axes, values.items(), strict=True):
        for axis, (name, pair) in zip(line, row.items(), strict=True):
            real, synthetic = (side[~np.isnan(side)] for side in pair)
            _two_histograms(axis, real, synthetic, "real (held out)")
            axis.set_xlabel(name, fontsize=9)
            axis.set_ylabel("")
            axis.tick_params(labelsize=8)
        line[0].set_ylabel(f"{label}\nshare (%)")
    axes[0][-1].legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.subplots_adjust(wspace=0.25, hspace=0.55)
    _save(figure, path)


def losses(series: Mapping[str, Sequence[float]], path: Path) -> None:
    """Draw the smoothed training loss of each network; names are ``<regime>-<seed>``."""
    figure, axes = _figure(5.6, 2.8, 1, 1)
    axis = axes[0][0]
    for name, values in series.items():
        regime, _, seed = name.rpartition("-")
        window = max(1, len(values) // 50)
        smooth = np.convolve(values, np.ones(window) / window, mode="valid")
        label = f"{NAMES.get(regime, regime)}, seed {seed}"
        axis.plot(np.arange(len(smooth)) + window, smooth, color=COLOURS.get(regime, _GREY), lw=1.4, label=label)
    axis.set_xlabel("training step")
    axis.set_ylabel("loss (1 - Dice + CE)")
    axis.legend(frameon=False, fontsize=8)
    _save(figure, path)


@dataclass(frozen=True)
class Point:
    """A mean with its 95 % interval at a place on the horizontal axis; the place may be infinite."""

    x: float
    mean: float
    low: float
    high: float


def skill_by_epsilon(series: Mapping[str, Sequence[Point]], lines: Mapping[str, float], path: Path, note: str) -> None:
    """Draw skill against epsilon, both with their intervals; infinite epsilon stands apart at the right.

    Args:
        series: by legend, points at their epsilon; several at one epsilon lie side by side.
        lines: by legend, heights that need no epsilon.
        path: PNG to write.
        note: small print below the axis.
    """
    figure, axes = _figure(6.4, 3.8, 1, 1)
    axis = axes[0][0]
    places = _decades({point.x for points in series.values() for point in points})
    for height, style, text in ((0.0, "--", "image-blind floor (0)"), (1.0, "-", "all real patients (1)")):
        axis.axhline(height, color=_GREY, ls=style, lw=1.2, label=text)
    for (name, height), colour in zip(lines.items(), _LINES, strict=False):
        axis.axhline(height, color=colour, ls=":", lw=1.6, label=name)
    ends = [end for points in series.values() for point in points for end in (point.low, point.high)]
    heights = [height for height in (*ends, *lines.values(), 0.0, 1.0) if np.isfinite(height)]
    drawn = max(min(heights) - 0.1, _LOWEST), min(max(heights) + 0.08, _HIGHEST)
    for turn, ((name, points), colour) in enumerate(zip(series.items(), _CURVES, strict=False)):
        for number, point in enumerate(points):
            alike = [one for one, other in enumerate(points) if other.x == point.x]
            beside = _BESIDE * (alike.index(number) - (len(alike) - 1) / 2)
            x = places[point.x] + _ASIDE * (turn - (len(series) - 1) / 2) + beside
            # the first of several at the left: beside the second its number would lie on that one's mark
            side: Side = "left" if turn == 0 < len(series) - 1 else "right"
            _point(axis, x, point, colour, None if number else name, side, drawn)
    axis.set_xticks(list(places.values()), [f"{x:g}" if np.isfinite(x) else "∞\nnot private" for x in places])
    axis.set_xlim(min(places.values()) - 0.2, max(places.values()) + 0.2)
    if not any(np.isfinite(point.mean) for points in series.values() for point in points):
        axis.text(0.5, 0.5, _NO_SKILL, transform=axis.transAxes, ha="center")
    axis.set_ylim(*drawn)
    axis.set(xlabel=f"epsilon for a whole patient\n{note}".strip(), ylabel="skill on held-out patients")
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def _decades(values: Set[float]) -> dict[float, float]:
    """Return where each value stands on a logarithmic axis that has infinity at its right end."""
    places = {x: float(np.log10(x)) for x in sorted(values) if np.isfinite(x)}
    last = max(places.values(), default=0.0)
    return places | {x: last + _GAP for x in values if not np.isfinite(x)}


def dice_by_patients(
    curves: Mapping[str, Sequence[Point]], lines: Mapping[str, float], floor: float, path: Path, note: str
) -> None:
    """Draw Dice against the number of real patients; what needs no real patient is a horizontal line.

    Args:
        curves: by legend, points at their number of patients; a legend that ends in a run has the colour of its line.
        lines: by run, Dice of synthetic pairs alone.
        floor: Dice of the constant mean shape.
        path: PNG to write.
        note: small print below the axis.
    """
    figure, axes = _figure(6.8, 4.2, 1, 1)
    axis = axes[0][0]
    colours = dict(zip(lines, _RUNS * len(lines), strict=False))
    axis.axhline(floor, color=_GREY, ls="--", lw=1.3, label="image-blind floor")
    for run, height in lines.items():
        axis.axhline(height, color=colours[run], ls=":", lw=1.8, label=f"synthetic only, {run}")
    plain = iter((_REAL, _CURVES[2]))
    numbers: set[float] = set()
    for turn, (name, points) in enumerate(curves.items()):
        run = name.rpartition(", ")[2]
        colour = colours[run] if run in colours else next(plain)
        at = [point.x * _SIDE ** (turn - (len(curves) - 1) / 2) for point in points]
        numbers |= {point.x for point in points}
        axis.plot(at, [point.mean for point in points], "-", color=colour, lw=1.4)
        for x, point in zip(at, points, strict=True):
            _point(axis, x, point, colour, name if point is points[0] else None, "none")
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(numbers), [f"{x:g}" for x in sorted(numbers)])
    axis.minorticks_off()
    # Lines that lie close need the zoom; the axis says that there is one.
    zoomed = "\n(axis does not start at 0)" if axis.get_ylim()[0] > 0 else ""
    axis.set(xlabel=f"real patients to train on\n{note}".strip(), ylabel=f"Dice on held-out patients{zoomed}")
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, path)


def _point(
    axis: Axes,
    x: float,
    point: Point,
    colour: str,
    label: str | None,
    number: Side = "right",
    drawn: tuple[float, float] = (-np.inf, np.inf),
) -> None:
    """Draw a mean and its interval; a mean below or above what is ``drawn`` as an arrow there, with its number."""
    bottom, top = drawn
    height = min(max(point.mean, bottom), top)
    marker = "v" if point.mean < bottom else "^" if point.mean > top else "o"
    ends = [min(max(end, bottom), top) for end in (point.low, point.high)]
    axis.plot([x, x], ends, color=colour, lw=2.0, alpha=0.8)
    axis.plot([x], [height], marker, color=colour, ms=6, label=label, clip_on=False)
    if number != "none" and np.isfinite(point.mean):
        text = f"{round(point.mean, 2) + 0.0:.2f}"  # no minus before a zero
        aside, edge = (-6, "right") if number == "left" else (6, "left")
        axis.annotate(text, (x, height), (aside, 2), textcoords="offset points", fontsize=8, ha=edge)


def _two_histograms(axis: Axes, real: np.ndarray, synthetic: np.ndarray, name: str) -> None:
    both = np.concatenate([real, synthetic])
    whole = bool(both.size and np.all(both == both.round()) and np.ptp(both) < _BINS)
    edges = np.arange(both.min() - 0.5, both.max() + 1) if whole else np.histogram_bin_edges(both, bins=_BINS)
    if whole:
        axis.set_xlim(both.min() - 1, both.max() + 1)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for values, colour, label in ((real, _REAL, name), (synthetic, _SYNTHETIC, "synthetic")):
        weights = np.full(len(values), 100 / max(1, len(values)))
        axis.hist(values, bins=edges.tolist(), weights=weights, color=colour, alpha=0.55, label=label)
    axis.set_ylabel("share (%)")


def _figure(width: float, height: float, rows: int, columns: int) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width, height), layout=None)
    FigureCanvasAgg(figure)
    axes = np.asarray(figure.subplots(rows, columns, squeeze=False))
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=_DPI, bbox_inches="tight", facecolor="white", metadata={"Software": None})
