"""The law of scale on phantom cohorts: skill of DP-SGD by patients, epsilon and trainable parameters.

    python -m pipelines.scale_law [--out build/scale-law] [--quick]

A denoiser is pre-trained on public phantoms once. Each cell then trains it by DP-SGD (exact accounting at the declared
size) on phantom patients that look otherwise, renders pairs, trains segmentation networks on them and tests those on
other phantom patients. One JSON a cell; a run that was stopped goes on. Writes scale_law.json, scale_law.md and
scale_law.png. No patient of anybody is read, so no account is charged.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

OUT = Path("build/scale-law")
PATIENTS = (200, 1000, 5000, 20000)
EPSILONS = (8.0, math.inf, 1.0, 3.0)  # in this order, so that a table that is cut short spans the law
TRAINABLE = ("bias_norm", "lora", "all")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--patients", type=int, nargs="+", default=list(PATIENTS))
    parser.add_argument("--epsilon", type=float, nargs="+", default=list(EPSILONS))
    parser.add_argument("--trainable", nargs="+", choices=TRAINABLE, default=list(TRAINABLE))
    parser.add_argument("--repeats", type=int, default=1, help="each cell so often, with other noise")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--quick", action="store_true", help="two tiny cohorts and hardly any steps: does it run at all"
    )
    parser.add_argument("--report", action="store_true", help="write the report of the cells that are there, and stop")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    import torch

    from medsynth import logs
    from pipelines.scale_law.cells import QUICK, Cell, Effort, measure
    from pipelines.scale_law.report import write_report

    torch.set_num_threads(arguments.threads)
    effort = QUICK if arguments.quick else Effort()
    cells = [Cell(0, math.inf, "all")]
    for repeat in range(arguments.repeats):
        for epsilon in arguments.epsilon:
            for patients in [16, 32] if arguments.quick else arguments.patients:
                cells += [Cell(patients, epsilon, name, repeat) for name in arguments.trainable]
    kept = arguments.out / "cells"
    kept.mkdir(parents=True, exist_ok=True)
    left = [cell for cell in cells if _read(kept / f"{cell.name}.json", asdict(effort)) is None]
    for cell in logs.progress([] if arguments.report else left, "cells measured", len(left)):
        found = {**measure(cell, effort, arguments.out), "effort": asdict(effort)}
        scratch = kept / f"{cell.name}.partial"
        scratch.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        scratch.replace(kept / f"{cell.name}.json")
    rows = [row for cell in cells if (row := _read(kept / f"{cell.name}.json", asdict(effort))) is not None]
    print(write_report(rows, len(cells), arguments.out))


def _read(path: Path, effort: dict[str, Any]) -> dict[str, Any] | None:
    """Return a cell that was measured with the same effort."""
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if found["effort"] == effort else None


if __name__ == "__main__":
    main()
