"""Draw the membership attacks on the generators of audited runs: roc.py OUT.png NAME=RUN [NAME=RUN ...]."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from medsynth.metrics.figures import roc


def main(out: str, *named: str) -> None:
    scores = {}
    for text in named:
        name, _, run = text.partition("=")
        with np.load(Path(run) / "audit" / "scores.npz") as arrays:
            scores[name] = arrays["generator_members"], arrays["generator_strangers"]
    roc(scores, Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:])
