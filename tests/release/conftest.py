"""A finished run without any learning: folders, manifests and a ledger as the stages leave them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsynth import config, store
from medsynth.config import Study
from medsynth.privacy.accounting import Event
from medsynth.privacy.ledger import Ledger
from medsynth.privacy.mechanism import DpSgd, GaussianSum
from medsynth.stages.inputs import config_digest

STUDY: dict[str, Any] = {
    "name": "fake",
    "grid": {
        "spatial_dims": 3,
        "shape": [16, 16, 8],
        "spacing_mm": [1, 1.5, 2],
        "labels": {0: "background", 1: "front", 2: "back"},
    },
    "privacy": {"epsilon": 8, "delta": 1e-4, "declared_patients": 200},
    "encode": {"codec": "wavelet", "levels": 1},
    "train": {"sampling_rate": 0.25, "steps": 20},
    "export": {"dicom_pairs": 1, "dataset_name": "Fake"},
}
PREFLIGHT = {"backend": "unit", "passed": True, "max_norm_error": 1e-7}


def make_study(**sections: dict[str, Any]) -> Study:
    """The study above with some values of some sections replaced."""
    return config.parse({**STUDY, **{name: {**STUDY.get(name, {}), **values} for name, values in sections.items()}})


@dataclass(frozen=True)
class Recipe:
    """What to do wrong in a fake run; as it stands everything is right."""

    noise: float = 3.0
    noise_source: str = "os"
    nonprivate: bool = False
    codec_reads_patients: bool = False
    synthesis_reads_patients: bool = False
    generator_names_entry: bool = True
    generator_completes: bool = True
    generator_sensitivity: store.Sensitivity = "released"
    synthetic_sensitivity: store.Sensitivity = "released"
    segmenter_feeds_synthetic: bool = False
    charged_config: str = ""
    report_feeds_synthetic: bool = False
    salt: str = "5a" * 16
    abandoned: int = 0


def make_run(run: Path, recipe: Recipe = Recipe()) -> Path:
    """Write cohort/, autoencoder/, masks/, generator/, synthetic/ and ledger.jsonl into ``run``."""
    ledger = Ledger(run / "ledger.jsonl")
    with store.create(run / "cohort", "ingest", config_digest(make_study(), "ingest")) as folder:
        (folder.path / "cases.csv").write_text("case_id,patient_id\nc1,p1\n")
        folder.finish("private", details={"salt": recipe.salt})
    codec_reads = {"cohort": run / "cohort"} if recipe.codec_reads_patients else {}
    with store.create(run / "autoencoder", "encode", config_digest(make_study(), "encode"), codec_reads) as folder:
        (folder.path / "codec.json").write_text("{}")
        folder.finish("released" if codec_reads else "public")
    for _ in range(recipe.abandoned):
        _reserve(ledger, run, recipe, "train", [_training(recipe)])
    _masks(ledger, run, recipe)
    _generator(ledger, run, recipe)
    _synthetic(run, recipe)
    return run


def _training(recipe: Recipe) -> DpSgd:
    return DpSgd("denoiser", 0.25, 20, 0.0 if recipe.nonprivate else recipe.noise, 1.0, 50.0)


def _reserve(
    ledger: Ledger, run: Path, recipe: Recipe, stage: str, plans: list[GaussianSum | DpSgd | Event], *more: str
) -> str:
    names = ("cohort", *more)
    return ledger.reserve(
        stage,
        plans,
        epsilon=8.0 if (recipe.noise, recipe.abandoned, recipe.nonprivate) == (3.0, 0, False) else float("inf"),
        delta=1e-4,
        noise_source=recipe.noise_source,
        config_digest=(recipe.charged_config if stage == "train" else "") or config_digest(make_study(), stage),
        parents={name: store.read_manifest(run / name).digest for name in names},
        preflight=PREFLIGHT if stage == "train" else None,
    )


def _masks(ledger: Ledger, run: Path, recipe: Recipe) -> None:
    plan = GaussianSum("pose", 4, 1.0, 8.0, 200.0)
    with store.create(
        run / "masks", "masks", config_digest(make_study(), "masks"), {"cohort": run / "cohort"}
    ) as folder:
        entry = _reserve(ledger, run, recipe, "masks", [plan])
        (folder.path / "statistics.json").write_text("[0.1]")
        ledger.complete(entry, {"statistics.json": store.digest_file(folder.path / "statistics.json")})
        folder.finish("released", ledger_entries=(entry,))


def _generator(ledger: Ledger, run: Path, recipe: Recipe) -> None:
    parents = {name: run / name for name in ("cohort", "autoencoder", "masks")}
    with store.create(run / "generator", "train", config_digest(make_study(), "train"), parents) as folder:
        entry = _reserve(ledger, run, recipe, "train", [_training(recipe)], "autoencoder", "masks")
        (folder.path / "denoiser.safetensors").write_bytes(b"weights")
        if recipe.generator_completes:
            digest = store.digest_file(folder.path / "denoiser.safetensors")
            ledger.complete(entry, {"denoiser.safetensors": digest})
        entries = (entry,) if recipe.generator_names_entry else ()
        folder.finish(recipe.generator_sensitivity, ledger_entries=entries)


def _synthetic(run: Path, recipe: Recipe) -> None:
    from medsynth.imaging.cohort import Pair, write_pair

    names = ["generator", "masks", "autoencoder"] + ["cohort"] * recipe.synthesis_reads_patients
    if recipe.segmenter_feeds_synthetic:
        with store.create(run / "segmenter", "segment", "segment-config", {"cohort": run / "cohort"}) as folder:
            (folder.path / "real_only.safetensors").write_bytes(b"weights")
            folder.finish("internal")
        names.append("segmenter")
    if recipe.report_feeds_synthetic:  # pairs near a patient were left out, and the report says that it is harmless
        with store.create(run / "report", "evaluate", "evaluate-config") as folder:
            (folder.path / "report.json").write_text("{}")
            folder.finish("released")
        names.append("report")
    grid = make_study().grid
    random = np.random.default_rng(0)
    digest, parents = config_digest(make_study(), "synthesise"), {name: run / name for name in names}
    with store.create(run / "synthetic", "synthesise", digest, parents) as folder:
        for number, shape in enumerate([(12, 14, 6), (16, 16, 8), (10, 9, 8)]):
            label = np.zeros(shape, np.uint8)
            label[3:7, 3:7, 2:5] = 1
            label[7:9, 3:7, 2:5] = 2
            image = random.uniform(-1, 1, (1, *shape)).astype(np.float32)
            write_pair(folder.path, Pair(f"pair_{number}", image, label), grid)
        (folder.path / "pairs.csv").write_text("pair_id,image_seed\npair_0,1\n")
        (folder.path / "preview.png").write_bytes(b"not part of the payload")
        folder.finish(recipe.synthetic_sensitivity)


@pytest.fixture
def fake_run(tmp_path: Path) -> Callable[..., Path]:
    """Build a fake run with deviations from :class:`Recipe`."""
    return lambda **wrong: make_run(tmp_path / "run", replace(Recipe(), **wrong))


@pytest.fixture
def fake_study() -> Callable[..., Study]:
    """Build the fake run's study with some sections changed."""
    return make_study


@pytest.fixture(scope="session")
def certified_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fake run that went through certify and export for real; never change it, copy it."""
    from medsynth.stages import certify, export
    from medsynth.tracking import Tracker

    run = make_run(tmp_path_factory.mktemp("certified") / "run")
    study = make_study()
    inputs = {"synthetic": run / "synthetic", "ledger": run / "ledger.jsonl", "keys": run / "keys"}
    certify.run(study, inputs, run / "certificate", Tracker())
    export.run(study, {"certificate": run / "certificate"}, run / "release", Tracker())
    return run


@pytest.fixture
def release(certified_run: Path, tmp_path: Path) -> Path:
    """A copy of a good release, to be tampered with."""
    return Path(shutil.copytree(certified_run / "release", tmp_path / "release"))


@pytest.fixture
def hospital_key(certified_run: Path) -> Path:
    """The public key that signed, received by another way."""
    return certified_run / "keys" / "public.pem"
