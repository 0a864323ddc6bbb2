"""How tests run stage ``ingest`` and read its lists."""

from __future__ import annotations

import csv
from pathlib import Path

from medsynth.config import Study
from medsynth.stages import ingest
from medsynth.tracking import Tracker


def rows(path: Path) -> list[dict[str, str]]:
    """Return the lines of a list."""
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def ingested(settings: Study, source: Path, out: Path) -> list[str]:
    """Run the stage; returns the reasons of the quarantine list."""
    ingest.run(settings, {"source": source}, out, Tracker())
    return sorted(row["reason"] for row in rows(out / "quarantine.csv"))
