"""Stage ``synthesise``: a plan of pairs first, then each row rendered as a pure function of it.

Rows are drawn before anything is rendered, and pairs are written as they come, so that a kill loses at most the batch
in hand and any row can be rendered again, bit for bit on the same machine.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medsynth import logs, store
from medsynth.config import Grid, Study, Synthesise
from medsynth.devices import open_device
from medsynth.errors import StoreError
from medsynth.randomness import derive_seed
from medsynth.stages.inputs import config_digest, stage_inputs
from medsynth.stages.masks import MaskGenerator, load_masks
from medsynth.store import Manifest
from medsynth.tracking import Tracker

if TYPE_CHECKING:
    import torch

    from medsynth.diffusion.generator import Generator
    from medsynth.imaging.cohort import Pair

PLAN = "pairs.csv"
LABELLERS = "labellers"
"""Of the manifest's details: how many networks labelled the pairs anew."""


@dataclass(frozen=True)
class Row:
    """Everything random about one pair, and how it is rendered."""

    pair_id: str
    mask_seed: int
    image_seed: int
    scheduler: str
    steps: int
    guidance: float
    start: float


def run(config: Study, inputs: Mapping[str, Path], out: Path, tracker: Tracker) -> Manifest:
    """Write ``synthetic/``: ``pairs.csv``, ``images/``, ``labels/`` and, where networks label pairs anew, ``drawn/``.

    Args:
        config: sections ``grid`` and ``synthesise``.
        inputs: ``autoencoder``, ``masks``, ``generator``; the cohort is not among them, so no patient's mask can
            condition an image.
        out: the new folder.
        tracker: receives the number of pairs.
    """
    from medsynth.diffusion.generator import load_generator
    from medsynth.imaging.cohort import DRAWN, write_pair

    parents = stage_inputs(inputs, "autoencoder", "masks", "generator")
    digest = config_digest(config, "synthesise")
    device = open_device(config.compute)
    with store.create(out, "synthesise", digest, parents, keep_partial=True) as folder:
        rows = plan(config)
        if folder.resume():
            logs.say("going on with an interrupted rendering")
        _write_plan(folder.path / PLAN, rows)
        source = load_masks(parents["masks"]).ask(config.synthesise, [row.mask_seed for row in rows])
        built = load_generator(parents["generator"], parents["autoencoder"]).to(device)
        kinds = ("images", "labels") if built.labeller is None else ("images", "labels", DRAWN)
        size = config.synthesise.batch_size
        alike = sorted(rows, key=lambda row: -row.start)  # a batch takes as many passes as it has beginnings
        batches = [alike[first : first + size] for first in range(0, len(alike), size)]
        for batch in logs.progress(batches, "rendering pairs", len(batches)):
            if all(_written(folder.path / kind, row) for kind in kinds for row in batch):
                continue
            for pair in render(batch, built, source, config.grid, config.synthesise, device):
                write_pair(folder.path, pair, config.grid)
        tracker.metrics({"pairs": float(len(rows))})
        labellers = 0 if built.labeller is None else len(built.labeller.networks)
        details = {"pairs": len(rows), LABELLERS: labellers, **_asked(source)}
        return folder.finish(_sensitivity(parents), details=details)


def drawn_for(folder: Path, grid: Grid, labels: torch.Tensor, count: int) -> torch.Tensor:
    """Return the label maps that the first ``count`` images were drawn for, whatever label maps the pairs have.

    Args:
        folder: the finished ``synthetic/``.
        grid: the study's.
        labels: of all pairs, (pair, *grid.shape), sorted by name.
        count: of pairs.

    Raises:
        StoreError: networks labelled the pairs, and nothing says what was drawn.
    """
    from medsynth.imaging.cohort import DRAWN, load_pairs

    if not store.read_manifest(folder).details.get(LABELLERS):
        return labels[:count]
    if not (folder / DRAWN).is_dir():
        raise StoreError(
            "networks labelled these pairs, and an earlier medsynth did not keep what they were drawn for: run the "
            "stage synthesise again (--replace)"
        )
    return load_pairs(folder, grid, DRAWN, count)[1]


def plan(config: Study) -> list[Row]:
    """Return the rows of a study, a function of the configuration alone; drafts are spread evenly among them."""
    how = config.synthesise
    drafts = how.drawn_drafts
    return [
        Row(
            pair_id=f"synthetic_{index + 1:05d}",
            mask_seed=derive_seed(config.seed, "synthesise", "mask", index),
            image_seed=derive_seed(config.seed, "synthesise", "image", index),
            scheduler=how.scheduler,
            steps=how.steps,
            guidance=how.guidance,
            start=0.0 if (index + 1) * drafts // how.pairs > index * drafts // how.pairs else how.start,
        )
        for index in range(how.pairs)
    ]


def render(
    rows: Sequence[Row],
    built: Generator,
    source: MaskGenerator,
    grid: Grid,
    how: Synthesise,
    device: torch.device,
) -> list[Pair]:
    """Return the pairs of ``rows``; each is a pure function of its row, the generator and ``how``.

    Args:
        rows: at most ``how.batch_size`` rows.
        built: the generator.
        source: the mask generator.
        grid: the public grid, with the range of released sizes.
        how: scheduler, steps, guidance and batch size.
        device: where the generator lies.
    """
    import torch

    from medsynth.imaging.cohort import Pair

    drawn = [source.draw(row.mask_seed) for row in rows]
    # Kernels may round differently for another batch size: a short batch is filled up, so that a row alone and a row
    # among others give the same bits.
    filled = [*range(len(rows)), *[len(rows) - 1] * (how.batch_size - len(rows))]
    stacked = torch.from_numpy(np.stack([drawn[index] for index in filled])).to(device)
    rendered = _images(built, stacked, [rows[index] for index in filled], how)
    images, labels = rendered.cpu().numpy(), built.outline(rendered, stacked).cpu().numpy()
    pairs = []
    for row, label, image, asked in zip(rows, labels, images, drawn, strict=False):
        window = release_window(label, grid)
        other = None if built.labeller is None else asked[window]
        pairs.append(Pair(row.pair_id, np.ascontiguousarray(image[(slice(None), *window)]), label[window], other))
    return pairs


def _images(built: Generator, labels: torch.Tensor, rows: Sequence[Row], how: Synthesise) -> torch.Tensor:
    """Return the images of a batch, each begun where its row says; the whole batch passes for each beginning in it."""
    import torch

    seeds, starts = [row.image_seed for row in rows], [row.start for row in rows]
    found: dict[float, torch.Tensor] = {
        start: built.render(labels, seeds, how.model_copy(update={"start": start})) for start in dict.fromkeys(starts)
    }
    return torch.stack([found[start][index] for index, start in enumerate(starts)])


def release_window(label: np.ndarray, grid: Grid) -> tuple[slice, ...]:
    """Return the part of the grid that is released: the labels plus a margin, within the public range of sizes.

    Its centre is the grid's, so that labels lie in a released image as they were drawn, and come back to the same place
    when it is centred on a grid again: a network learns from where an organ lies, too. Only labels that would be cut
    move it.

    Args:
        label: (\\*spatial) integers on the grid.
        grid: with ``release_shape_range`` and ``release_margin``.
    """
    if grid.release_shape_range is None:
        return tuple(slice(None) for _ in grid.shape)
    window = []
    for axis, ((low, high), size) in enumerate(zip(grid.release_shape_range, grid.shape, strict=True)):
        others = tuple(a for a in range(label.ndim) if a != axis)
        found = np.flatnonzero(label.any(axis=others))
        first, last = (int(found[0]), int(found[-1])) if len(found) else (size // 2, size // 2)
        half = max(size - 2 * first, 2 * (last + 1) - size, 0) // 2 + grid.release_margin
        length = min(max(2 * half, low), high)
        start = min(max((size - length) // 2, last + 1 - length), first) if last - first < length else first
        start = min(max(start, 0), size - length)
        window.append(slice(start, start + length))
    return tuple(window)


def _write_plan(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, [field.name for field in fields(Row)])
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)


def _asked(source: MaskGenerator) -> dict[str, dict[str, float]]:
    names = {source.grid.labels[value]: factor for value, factor in source.factors.items()}
    return {"volume_factors": names} if names else {}


def _written(folder: Path, row: Row) -> bool:
    return (folder / f"{row.pair_id}.nii.gz").is_file()


def _sensitivity(parents: Mapping[str, Path]) -> store.Sensitivity:
    """Return the most sensitive kind among the parents: rendering adds nothing and takes nothing away."""
    kinds = [store.read_manifest(folder).sensitivity for folder in parents.values()]
    return max(kinds, key=store.ORDER.index)
