"""Figures of the internal report: aggregate plots, and pictures with label contours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from medsynth.metrics.membership import roc as roc_curve

COLOURS = {"real_only": "#33658a", "synthetic_only": "#d1603d", "mixed": "#6a994e"}
NAMES = {"real_only": "real only", "synthetic_only": "synthetic only", "mixed": "mixed"}
_REAL, _SYNTHETIC, _GREY = COLOURS["real_only"], COLOURS["synthetic_only"], "#8a8f98"
_CONTOURS = ("#ffd166", "#4cc9f0", "#f72585", "#80ed99", "#ff9f1c", "#b892ff")
_DPI = 110


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
    lows = [of(b, g)["ci95"][0] for g in groups for b in [*blocks.values(), floor]]
    axis.set_ylim(max(0.0, np.floor(10 * (np.nanmin(lows) - 0.05)) / 10) if np.isfinite(lows).any() else 0.0, 1.0)
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
        axis.step(false, true, where="post", color=colour, lw=1.8, label=name)
    axis.set(xlabel="held-out patients taken for members", ylabel="members recognised", aspect="equal")
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    _save(figure, path)


def volumes(sizes: Mapping[str, tuple[np.ndarray, np.ndarray]], unit: str, path: Path) -> None:
    """Draw the distribution of each label's size in real and synthetic records.

    Args:
        sizes: by label, real and synthetic sizes.
        unit: of the sizes.
        path: PNG to write.
    """
    figure, axes = _figure(3.6 * len(sizes), 2.8, 1, len(sizes))
    for axis, (name, (real, synthetic)) in zip(axes[0], sizes.items(), strict=True):
        _two_histograms(axis, real, synthetic, "real (train)")
        axis.set_title(name, fontsize=10)
        axis.set_xlabel(f"size ({unit})")
    axes[0][0].legend(frameon=False, fontsize=8)
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


def _two_histograms(axis: Axes, real: np.ndarray, synthetic: np.ndarray, name: str) -> None:
    edges = np.histogram_bin_edges(np.concatenate([real, synthetic]), bins=24)
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
