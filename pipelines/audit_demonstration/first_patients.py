"""Copy the first patients of an MSD folder into a new one: first_patients.py SOURCE OUT COUNT."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path


def main(source: Path, out: Path, count: int) -> None:
    listed = json.loads((source / "dataset.json").read_text(encoding="utf-8"))
    chosen = sorted(listed["training"], key=lambda entry: entry["image"])[:count]
    for entry in chosen:
        for kind in ("image", "label"):
            target = out / entry[kind]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / entry[kind], target)
    text = json.dumps({**listed, "training": chosen, "numTraining": len(chosen)})
    (out / "dataset.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
