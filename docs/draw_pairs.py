"""Draw pairs of runs, one above the other, beside patients: `python docs/draw_pairs.py OUT real=RUN "epsilon 8=RUN"`.

The row named ``real`` shows held-out patients of that run: for public cohorts only, whose licence allows it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import yaml
from PIL import Image

from medsynth.config import Study
from medsynth.imaging.cohort import load_pairs, load_patients
from medsynth.metrics.figures import montage

COLUMNS = 8


def main(out: str, *rows: str) -> None:
    """Write the picture."""
    drawn = {}
    for row in rows:
        title, place = row.split("=", 1)
        run = Path(place)
        grid = Study.model_validate(yaml.safe_load((run / "study.yaml").read_text(encoding="utf-8"))).grid
        if title == "real":
            patients = load_patients(run / "cohort", grid, "test")[:COLUMNS]
            images, labels = (torch.stack([getattr(p, name)[0] for p in patients]) for name in ("images", "labels"))
        else:
            images, labels = load_pairs(run / "synthetic", grid)
        drawn[title] = list(zip(images[:COLUMNS], labels[:COLUMNS], strict=True))
    montage(drawn, Path(out), upright=grid.spacing_mm is not None)
    with Image.open(out) as picture:
        small = picture.convert("RGB").quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    small.save(out, optimize=True)  # a tracked file stays below 1 MiB


if __name__ == "__main__":
    main(*sys.argv[1:])
