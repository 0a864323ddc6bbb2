"""Stage ``evaluate``: how good the synthetic pairs are, measured on real patients that no stage has trained on."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from medsynth import logs, store
from medsynth.config import Study
from medsynth.devices import open_device
from medsynth.errors import InputError
from medsynth.imaging.cohort import Patient, load_pairs, load_patients
from medsynth.metrics import figures
from medsynth.metrics.agreement import label_agreement
from medsynth.metrics.fidelity import discrepancy, similarity_within
from medsynth.metrics.label_maps import Anatomy, anatomy, compare
from medsynth.metrics.memorisation import Nearness, nearness
from medsynth.metrics.overlap import (
    bootstrap,
    constant_prediction,
    known_mean,
    mean_shape,
    patient_dice,
    patient_means,
    skill,
)
from medsynth.models.segmenter import load_segmenter, predict
from medsynth.privacy.ledger import Ledger
from medsynth.randomness import derive_seed, generator
from medsynth.release import spending
from medsynth.release.audits import ROC, read_findings
from medsynth.stages.codec_quality import codec_quality
from medsynth.stages.inputs import config_digest, stage_inputs
from medsynth.stages.report_page import write_page
from medsynth.stages.synthesise import LABELLERS, drawn_for
from medsynth.store import Manifest
from medsynth.tracking import Tracker

Network = Callable[[Tensor], Tensor]
_READ = ("cohort", "autoencoder", "synthetic", "segmenter")
_SSIM_PAIRS = 32
_MEASURED_MAPS = 400  # of each crowd, at most
_FALSE_ALARMS = 0.01
# Pictures of real patients never leave the report folder for the tracking store.
_TRACKED = ("dice.png", "synthetic.png", "memorisation.png", "label_maps.png", "losses.png")


def run(config: Study, inputs: Mapping[str, Path], out: Path, tracker: Tracker) -> Manifest:
    """Write ``report.json``, ``report.html`` and their figures; everything in the folder is internal.

    Args:
        config: uses ``grid``, ``privacy.delta``, ``segment``, ``evaluate``, ``compute.device`` and ``seed``.
        inputs: the finished folders ``cohort``, ``autoencoder``, ``synthetic``, ``segmenter`` and ``audit``, and
            ``ledger``.
        out: folder to write.
        tracker: gets the numbers, and those figures that show no real patient.

    Raises:
        InputError: the cohort has no test patient.
    """
    # Tests of this stage alone may leave the audit out; a run never does.
    folders = stage_inputs(inputs, *_READ, *(["audit"] if "audit" in inputs else []))
    ledger = stage_inputs(inputs, "ledger")["ledger"]
    with store.create(out, "evaluate", config_digest(config, "evaluate"), folders) as folder:
        data = _load(config, folders)
        report, series = _measure(config, data, folders, ledger)
        _draw(config, data, report, series, folder.path)
        if "audit" in folders:
            report["audits"] = [finding.to_json() for finding in read_findings(folders["audit"])]
            if (folders["audit"] / ROC).is_file():
                shutil.copyfile(folders["audit"] / ROC, folder.path / ROC)
        text = json.dumps(_plain(report), indent=1, allow_nan=False)
        (folder.path / "report.json").write_text(text + "\n", encoding="utf-8")
        write_page(_plain(report), folder.path)
        tracker.metrics(_tracked(report))
        for name in _TRACKED:
            if (folder.path / name).is_file():
                tracker.figure(folder.path / name, f"evaluate/{name}")
        return folder.finish("internal")


@dataclass(frozen=True)
class _Data:
    """What is compared; ``drawn`` is what the first images were rendered for, ``networks`` are by regime and seed."""

    train: list[Patient]
    test: list[Patient]
    images: Tensor
    labels: Tensor
    drawn: Tensor
    networks: dict[str, dict[int, Network]]


@dataclass(frozen=True)
class _Series:
    """Distributions that are drawn but not written as numbers."""

    nearness: Nearness
    anatomy: dict[str, Anatomy]
    losses: dict[str, list[float]]


def _load(config: Study, folders: Mapping[str, Path]) -> _Data:
    train, test = (load_patients(folders["cohort"], config.grid, split) for split in ("train", "test"))
    if not test:
        raise InputError("the cohort has no test patient: raise ingest.test_fraction or add patients")
    images, labels = load_pairs(folders["synthetic"], config.grid)
    drawn = drawn_for(folders["synthetic"], config.grid, labels, config.evaluate.agreement_pairs)
    device = open_device(config.compute)
    networks: dict[str, dict[int, Network]] = {}
    for regime in config.segment.regimes:
        for seed in config.segment.seeds:
            path = folders["segmenter"] / f"{regime}-{seed}.safetensors"
            model = load_segmenter(config.grid, config.segment, path).to(device)
            networks.setdefault(regime, {})[seed] = partial(predict, model)
    return _Data(train, test, images, labels, drawn, networks)


def _attack_bound(config: Study, ledger: Path) -> float:
    """Return the bound that the certificate states, so that the two pages agree."""
    if not config.privacy.private:
        return 1.0
    bounds = spending.membership(spending.events(Ledger(ledger).entries()), config.privacy.delta)
    return dict(bounds)[_FALSE_ALARMS]


def _measure(config: Study, data: _Data, folders: Mapping[str, Path], ledger: Path) -> tuple[dict[str, Any], _Series]:
    logs.say("evaluate", patients=len(data.test), pairs=len(data.images))
    dice, floor = _dice(config, data)
    near = nearness(_records(data.train), _records(data.test), data.images)
    epsilon = Ledger(ledger).spent(config.privacy.delta) if config.privacy.private else math.inf
    crowds = _anatomy(config, data)
    report = {
        "study": config.name,
        "unit": "patient",
        "epsilon": epsilon,
        "delta": config.privacy.delta,
        "attack": {
            "false_positive_rate": _FALSE_ALARMS,
            "true_positive_rate_at_most": _attack_bound(config, ledger),
        },
        "n_train_patients": len(data.train),
        "n_pairs": len(data.images),
        "n_empty": int((data.labels.flatten(1).amax(dim=1) == 0).sum()),
        "labellers": store.read_manifest(folders["synthetic"]).details.get(LABELLERS, 0),
        "dice": dice,
        "floor": floor,
        "relative_to_real": _relative(dice),
        "agreement": _agreement(config, data),
        "memorisation": {
            "median_ratio": near.median_ratio,
            "nearer_than_held_out_p5": near.nearer_than_held_out,
            "synthetic_median": float(np.median(near.synthetic)),
            "held_out_median": float(np.median(near.held_out)),
        },
        "fidelity": _fidelity(config, data),
        "label_maps": {
            **compare(crowds["real"], crowds["synthetic"], crowds["train"], _names(config)),
            "titles": _measure_titles(config),
        },
        "reconstruction": codec_quality(data.test, folders["autoencoder"], _real_networks(data), config.grid.classes),
    }
    losses = json.loads((folders["segmenter"] / "training.json").read_text(encoding="utf-8"))["loss"]
    return report, _Series(near, crowds, losses)


def _dice(config: Study, data: _Data) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the Dice blocks by regime and the block of the image-blind floor."""
    truth, classes = [patient.labels for patient in data.test], config.grid.classes
    shape = mean_shape([patient.labels for patient in data.train], classes) if data.train else truth[0][0] * 0
    floor = _block(config, {0: patient_dice(constant_prediction(shape, truth), truth, classes)}, "floor")
    floor.pop("seeds")
    blocks = {}
    for regime, networks in data.networks.items():
        tables = {
            seed: patient_dice([network(patient.images) for patient in data.test], truth, classes)
            for seed, network in networks.items()
        }
        blocks[regime] = _block(config, tables, regime)
    if "real_only" in blocks:
        real = blocks["real_only"]["mean"]
        blocks = {name: {**block, "skill": skill(block["mean"], floor["mean"], real)} for name, block in blocks.items()}
    return blocks, floor


def _block(config: Study, tables: Mapping[int, np.ndarray], name: str) -> dict[str, Any]:
    """Return mean, interval, labels and seeds of ``(patient, label)`` tables; seeds are averaged patient by patient."""
    table = known_mean(np.stack(list(tables.values())), axis=0)
    random = generator(config.seed, "evaluate", "bootstrap", name)
    draws = config.evaluate.bootstrap
    means = patient_means(table)
    return {
        **bootstrap(means, draws, random).to_json(),
        "per_label": {
            label: bootstrap(table[:, value - 1], draws, random).to_json()
            for value, label in sorted(config.grid.labels.items())
            if value > 0
        },
        "n_patients": int((~np.isnan(means)).sum()),
        "seeds": {str(seed): float(known_mean(patient_means(one), axis=0)) for seed, one in tables.items()},
    }


def _relative(dice: Mapping[str, Any]) -> dict[str, float]:
    real = dice["real_only"]["mean"] if "real_only" in dice else 0.0
    return {name: block["mean"] / real for name, block in dice.items() if name != "real_only" and real > 0}


def _real_networks(data: _Data) -> list[Network]:
    return list(data.networks.get("real_only", {}).values())


def _agreement(config: Study, data: _Data) -> dict[str, Any] | None:
    networks = _real_networks(data)
    if not networks:
        return None
    table = label_agreement(networks, data.images[: len(data.drawn)], data.drawn, config.grid.classes)
    block = _block(config, {0: table}, "agreement")
    return {"mean": block["mean"], "ci95": block["ci95"], "per_label": block["per_label"], "n_pairs": len(table)}


def _fidelity(config: Study, data: _Data) -> dict[str, float]:
    """Return discrepancy and similarity, each with the same of real images as its yardstick."""
    seed = derive_seed(config.seed, "evaluate", "fidelity")
    train, test = _records(data.train), _records(data.test)
    return {
        "mmd_synthetic": discrepancy(train, data.images, seed),
        "mmd_held_out": discrepancy(train, test, seed),
        "ssim_within_synthetic": similarity_within(data.images, _SSIM_PAIRS, seed),
        "ssim_within_real": similarity_within(train, _SSIM_PAIRS, seed),
    }


def _names(config: Study) -> list[str]:
    return [name for value, name in sorted(config.grid.labels.items()) if value > 0]


def _anatomy(config: Study, data: _Data) -> dict[str, Anatomy]:
    """Measure the label maps of held-out patients, of the synthetic pairs, and of train patients as a yardstick."""
    crowds = {
        "real": torch.cat([patient.labels for patient in data.test]),
        "synthetic": data.labels,
        "train": torch.cat([patient.labels for patient in data.train]) if data.train else data.labels[:0],
    }
    spread = {name: np.linspace(0, len(m) - 1, min(len(m), _MEASURED_MAPS)).astype(int) for name, m in crowds.items()}
    return {
        name: anatomy([maps[index].numpy() for index in spread[name]], config.grid.classes, config.grid.spacing_mm)
        for name, maps in crowds.items()
    }


def _records(patients: list[Patient]) -> Tensor:
    return torch.cat([patient.images for patient in patients])


def _draw(config: Study, data: _Data, report: Mapping[str, Any], series: _Series, folder: Path) -> None:
    count = config.evaluate.montage
    real = [(p.images[len(p.images) // 2], p.labels[len(p.images) // 2]) for p in data.test[:count]]
    synthetic = list(zip(data.images[:count], data.labels[:count], strict=True))
    upright = config.grid.spacing_mm is not None
    figures.montage({"real (held out)": real, "synthetic": synthetic}, folder / "montage.png", upright)
    figures.montage({"synthetic": synthetic}, folder / "synthetic.png", upright)
    figures.dice(report["dice"], report["floor"], folder / "dice.png")
    figures.distances(series.nearness.synthetic, series.nearness.held_out, folder / "memorisation.png")
    figures.label_maps(_drawn_measures(config, series.anatomy), folder / "label_maps.png")
    figures.losses(series.losses, folder / "losses.png")


def _measure_titles(config: Study) -> dict[str, str]:
    """Return what a person calls the measures of a label, with their units."""
    flat = config.grid.spatial_dims == 2
    units = ("pixels", "pixels") if config.grid.spacing_mm is None else (("mm²", "mm") if flat else ("mm³", "mm²"))
    titles = {
        "volume": f"{'area' if flat else 'volume'} ({units[0]})",
        "surface": f"{'perimeter' if flat else 'surface'} ({units[1]})",
        "components": "separate parts",
        "touching": "share at other labels",
    }
    if config.grid.classes == 2:
        titles.pop("touching")
    return titles


def _drawn_measures(
    config: Study, crowds: Mapping[str, Anatomy]
) -> dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]:
    return {
        name: {
            title: (crowds["real"].measures[kind][:, index], crowds["synthetic"].measures[kind][:, index])
            for kind, title in _measure_titles(config).items()
        }
        for index, name in enumerate(_names(config))
    }


def _tracked(report: Mapping[str, Any]) -> dict[str, float]:
    values: dict[str, float] = {"floor": report["floor"]["mean"], "epsilon": spending.round_up(report["epsilon"])}
    for regime, block in report["dice"].items():
        values[f"dice/{regime}"] = block["mean"]
        if block.get("skill") is not None:
            values[f"skill/{regime}"] = block["skill"]
        values.update({f"dice/{regime}/{label}": one["mean"] for label, one in block["per_label"].items()})
    if report["agreement"]:
        values["agreement"] = report["agreement"]["mean"]
    values.update({f"relative_to_real/{name}": value for name, value in report["relative_to_real"].items()})
    values.update({f"fidelity/{name}": value for name, value in report["fidelity"].items()})
    if report["label_maps"]["plausible"]["synthetic"] is not None:
        values["label_maps/plausible"] = report["label_maps"]["plausible"]["synthetic"]
    values["memorisation/median_ratio"] = report["memorisation"]["median_ratio"]
    return values


def _plain(value: Any) -> Any:
    """Return JSON values: infinity as the text "inf", NaN as null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    return value
