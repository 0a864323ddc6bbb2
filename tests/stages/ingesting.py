"""Small cohorts for tests of stage ``ingest``, how they run it and read its lists."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np

from medsynth import config
from medsynth.config import Study
from medsynth.imaging.dicom_segmentation import write_segmentation
from medsynth.imaging.dicom_writer import SeriesMeta, write_series
from medsynth.stages import ingest
from medsynth.tracking import Tracker

LABELS = {0: "background", 1: "organ", 2: "lesion"}
SHAPE = (10, 12, 8)
SIZE = 10 * 12 * 8
AFFINE = np.array([[-2.0, 0, 0, 30], [0, -2, 0, -7], [0, 0, 2, 11], [0, 0, 0, 1]])


def study(ingest_settings: dict[str, Any] | None = None, **grid: Any) -> Study:
    full = {"spatial_dims": 3, "shape": [12, 12, 12], "spacing_mm": [2, 2, 2], "labels": LABELS, **grid}
    dims = full["spatial_dims"]
    return config.parse(
        {
            "name": "ingest",
            "grid": full,
            "privacy": {"declared_patients": 16},
            "ingest": {"test_fraction": 0.5, **(ingest_settings or {})},
            "encode": {"levels": 1},
            "segment": {"channels": [4, 8]},
            "masks": {"coefficients": [4] * dims},
            "train": {"appearance": {"coefficients": [2] * dims}},
        }
    )


def picture(seed: int, shape: tuple[int, ...] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    image = np.random.default_rng(seed).integers(0, 900, shape).astype(np.int16)
    label = np.zeros(shape, np.uint8)
    label[2:6, 3:7, 2:5] = 1
    label[2:4, 3:7, 5] = 2
    return image, label


def put_dicom(root: Path, person: str, seed: int, labelled: bool = True) -> Path:
    image, label = picture(seed)
    meta = SeriesMeta(modality="MR", patient_id=person, patient_name="Zyxwvut^Planted", synthetic=False)
    series = write_series(root / person / "image", image, AFFINE, meta)
    if labelled:
        write_segmentation(root / person / "seg" / "seg.dcm", label, series, LABELS)
    return root / person / "image"


def rows(path: Path) -> list[dict[str, str]]:
    """Return the lines of a list."""
    with path.open(newline="") as handle:
        return list(csv.DictReader(handle))


def ingested(settings: Study, source: Path, out: Path) -> list[str]:
    """Run the stage; returns the reasons of the quarantine list."""
    ingest.run(settings, {"source": source}, out, Tracker())
    return sorted(row["reason"] for row in rows(out / "quarantine.csv"))
