"""Stage ``train``: the mask-conditioned denoiser, pre-trained on public phantoms, then moved by patients under DP-SGD.

Order of events: appearance statistics (one or two noisy sums) dress the phantoms; the denoiser learns from them,
which costs nothing more; then a few parameters take T noisy steps on patients. A killed run goes on within its
reservation: finished steps are kept, started ones are lost, fresh noise is drawn. Without privacy all parameters learn
from patients, and networks may learn to label pairs.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from medsynth import logs, store
from medsynth.config import Study
from medsynth.devices import open_device
from medsynth.diffusion.fitting import Draw, fit
from medsynth.diffusion.generator import (
    APPEARANCE,
    WEIGHTS,
    Generator,
    build_generator,
    load_dresser,
    save_generator,
)
from medsynth.files import replace_bytes
from medsynth.imaging.augmentation import mirrored
from medsynth.models.autoencoder import load_codec
from medsynth.models.drafting import Drafting, open_drafting
from medsynth.models.fitting import Report
from medsynth.randomness import generator
from medsynth.stages import labellers, private_training
from medsynth.stages.appearance_sums import plan_sums
from medsynth.stages.inputs import config_digest, stage_inputs
from medsynth.stages.masks import load_masks
from medsynth.stages.training_job import LOG_EVERY, STATE, Job
from medsynth.store import Manifest
from medsynth.tracking import Tracker

_PRETRAINED = "pretrained.safetensors"
_UNFINISHED_PUBLIC, _UNFINISHED_OPEN = "pretraining.pt", "training.pt"  # what a killed training goes on from
_LEAST_SPREAD = 1e-3  # of a latent channel: one that is the same in all patients has none
_GRAM_MAPS = 48  # label maps that stand for the patients' in the least squares of appearance


def run(config: Study, inputs: Mapping[str, Path], out: Path, tracker: Tracker) -> Manifest:
    """Write ``generator/``: the denoiser (averaged weights), the released appearance statistics, and labellers.

    Args:
        config: sections ``grid``, ``privacy``, ``masks``, ``encode``, ``train``.
        inputs: ``cohort``, ``autoencoder``, ``masks`` and ``ledger``.
        out: the new folder.
        tracker: receives losses and epsilon as a step series.
    """
    digest = config_digest(config, "train")
    parents = stage_inputs(inputs, "cohort", "autoencoder", "masks")
    with store.create(out, "train", digest, parents, keep_partial=True) as folder:
        job = Job(config, inputs, folder.path, digest, open_device(config.compute), tracker)
        state = _open_state(job)
        torch.manual_seed(job.seed("weights"))
        built = build_generator(config.grid, config.train, load_codec(inputs["autoencoder"])).to(job.device)
        if config.train.pretrain_steps:
            _pretrain(job, built, state)
        elif config.train.appearance.enabled:
            _appearance(job, appearance_space(job), state)
        count = private_training.choose_trainable(config.train, built)
        if config.train.steps:
            logs.say("training on patients", trainable_parameters=count, private=config.privacy.private)
            (private_training.train_privately if config.privacy.private else _train_openly)(job, built, state)
        if config.train.labelling.networks:
            _reserve_openly(job, state)
            labellers.train_labellers(job)
        save_generator(built, config.grid, folder.path)
        entries = _close(job, state)
        return folder.finish(
            _sensitivity(job, entries),
            ledger_entries=entries,
            details={
                "trainable_parameters": count if config.train.steps else 0,
                "labellers": config.train.labelling.networks,
            },
            scratch=(_PRETRAINED, _UNFINISHED_PUBLIC, _UNFINISHED_OPEN, *private_training.SCRATCH, STATE),
        )


def _sensitivity(job: Job, entries: tuple[str, ...]) -> store.Sensitivity:
    """Return internal for whatever read patients, or the masks of a study that did, without privacy."""
    masks = store.read_manifest(job.inputs["masks"])
    return "released" if masks.releasable and (job.config.privacy.private or not entries) else "internal"


def _open_state(job: Job) -> dict[str, Any]:
    """Return what an interrupted run of the same settings left, or start afresh."""
    read = ("cohort", "autoencoder", "masks")
    wanted = {"digest": job.digest, "parents": {name: store.read_manifest(job.inputs[name]).digest for name in read}}
    path = job.folder / STATE
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if {key: found.get(key) for key in wanted} == wanted:
            logs.say("going on with an interrupted training")
            labellers.clear(job)
            return found
    shutil.rmtree(job.folder)
    job.folder.mkdir()
    state: dict[str, Any] = {**wanted, "entries": {}}
    job.save(state)
    return state


def _close(job: Job, state: Mapping[str, Any]) -> tuple[str, ...]:
    """Complete the training's reservation and return the ledger entries."""
    entry = state["entries"].get("training")
    if entry is not None:
        written = [job.folder / WEIGHTS, *labellers.files(job)]
        outputs = {path.name: store.digest_file(path) for path in written}
        # A private run that was killed after this line finds the same weights again, and the reservation complete.
        if not any(e["id"] == entry and e["outputs"] == outputs for e in job.ledger.entries()):
            job.ledger.complete(entry, outputs)
    return tuple(state["entries"].values())


# ---------------------------------------------------------------------------------------------------- pre-training


def _pretrain(job: Job, built: Generator, state: dict[str, Any]) -> None:
    kept = job.folder / _PRETRAINED
    if kept.is_file():
        built.denoiser.load_state_dict(load_file(kept))
        return
    settings = job.config.train
    latents, masks = _phantom_latents(job, built, _dresser(job, state), settings.pretrain_phantoms)
    draw = _draw_from(latents, masks, settings.pretrain_batch_size, job.device)
    stream = torch.Generator().manual_seed(job.seed("pretrain"))
    report = _reporter(job, "pretrain_loss")
    unfinished = job.folder / _UNFINISHED_PUBLIC
    steps, rate = settings.pretrain_steps, settings.pretrain_learning_rate
    fit(built.denoiser, draw, "pre-training on phantoms", steps, rate, settings, stream, report, unfinished)
    replace_bytes(kept, save({k: v.detach().cpu().contiguous() for k, v in built.denoiser.state_dict().items()}))


def _dresser(job: Job, state: dict[str, Any]) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
    """Return what gives a label map an image: by released appearance, or by that of the phantoms."""
    from medsynth.imaging.phantom import render

    if not job.config.train.appearance.enabled:
        return lambda label, rng: render(label, job.config.grid, rng)
    space = appearance_space(job)
    _appearance(job, space, state)
    return load_dresser(job.folder, space).draft


def _appearance(job: Job, space: Drafting, state: dict[str, Any]) -> None:
    """Release the appearance statistics of the patients (once; a resumed run reads them back)."""
    from medsynth.privacy.entropy import open_entropy

    path = job.folder / APPEARANCE
    if "appearance" not in state["entries"] and path.is_file():
        before = job.ledger.completed(job.digest, job.parents, {APPEARANCE: store.digest_file(path)})
        state["entries"] |= {"appearance": before} if before else {}
    if "appearance" not in state["entries"]:
        sums = plan_sums(job.config, space, job.plan.appearance_noise_multiplier)
        entry = job.reserve(sums.plans, resume=True)
        released = io.BytesIO()
        np.savez(released, **vars(sums.measure(job.patients(), open_entropy(job.config.privacy.entropy))))
        # Completed before anything is on disk, as in stage masks: no kill buys a second release.
        job.ledger.complete(entry, {APPEARANCE: hashlib.sha256(released.getvalue()).hexdigest()})
        path.write_bytes(released.getvalue())
        state["entries"]["appearance"] = entry
        job.save(state)


def appearance_space(job: Job) -> Drafting:
    """Return the layout of the appearance statistics, with label maps of the stage ``masks`` and no patient's."""
    source = load_masks(job.inputs["masks"])
    maps = [source.draw(job.seed("appearance-map", index)) for index in range(_GRAM_MAPS)]
    return open_drafting(job.config.grid, job.config.train.appearance, maps)


def _phantom_latents(
    job: Job, built: Generator, dress: Callable[[np.ndarray, np.random.Generator], np.ndarray], count: int
) -> tuple[Tensor, Tensor]:
    """Return latents and encoded masks of public (or released) pairs: drawn label maps, dressed images."""
    source = load_masks(job.inputs["masks"])
    latents, masks = [], []
    for index in logs.progress(range(count), "rendering phantoms", count):
        label = source.draw(job.seed("phantom-label", index))
        image = dress(label, generator(job.config.seed, "train", "phantom-image", index))
        tensor = torch.from_numpy(np.ascontiguousarray(image)).to(job.device)
        latents.append(built.codec.encode(tensor[None]).cpu())
        masks.append(built.masks(torch.from_numpy(label)[None].to(job.device)).cpu())
    return torch.cat(latents), torch.cat(masks)


def _draw_from(latents: Tensor, masks: Tensor, size: int, device: torch.device) -> Draw:
    def draw(stream: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(0, len(latents), (size,), generator=stream)
        return latents[rows].to(device), masks[rows].to(device)

    return draw


def _reporter(job: Job, name: str) -> Report:
    def report(losses: Sequence[float]) -> None:
        if len(losses) % LOG_EVERY == 0:
            job.tracker.metrics({name: fmean(losses[-LOG_EVERY:])}, step=len(losses))
            job.record(name, losses)

    return report


def _train_openly(job: Job, built: Generator, state: dict[str, Any]) -> None:
    """Train on patients without privacy."""
    settings = job.config.train
    _reserve_openly(job, state)
    if not settings.pretrain_steps:  # nothing was learnt yet with the spreads of phantoms
        _measure_spread(job, built)
    draw = _draw_patients(job, built)
    stream = torch.Generator().manual_seed(job.seed("batches"))
    report, unfinished = _reporter(job, "loss"), job.folder / _UNFINISHED_OPEN
    steps, rate = settings.steps, settings.learning_rate
    fit(built.denoiser, draw, "training WITHOUT privacy", steps, rate, settings, stream, report, unfinished)


def _measure_spread(job: Job, built: Generator) -> None:
    """Tell the denoiser how widely each channel of patients' latents spreads, without privacy."""
    latents = torch.cat([built.codec.encode(patient.images.to(job.device)).cpu() for patient in job.patients()])
    spread = built.denoiser.preconditioning.spread
    spread.copy_(latents.std(dim=(0, *range(2, latents.ndim))).clamp(min=_LEAST_SPREAD).view_as(spread))


def _draw_patients(job: Job, built: Generator) -> Draw:
    """Return what draws batches of patients' records, as they are or mirrored and turned, without privacy."""
    settings = job.config.train
    if not settings.mirrored:
        encoded = job.encoded_patients(built)
        latents = torch.cat([rows for _, rows, _ in encoded])
        masks = torch.cat([rows for _, _, rows in encoded])
        return _draw_from(latents, masks, settings.batch_size, job.device)
    grid, patients = job.config.grid, job.patients()
    square = len({*grid.shape}) == 1 and len({*(grid.spacing_mm or (1.0,))}) == 1
    images, labels = torch.cat([one.images for one in patients]), torch.cat([one.labels for one in patients])

    def draw(stream: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(0, len(images), (settings.batch_size,), generator=stream)
        seen = [mirrored(images[row], labels[row], stream, turned=square) for row in rows.tolist()]
        chosen = torch.stack([image for image, _ in seen]), torch.stack([label for _, label in seen])
        return built.codec.encode(chosen[0].to(job.device)), built.masks(chosen[1].to(job.device))

    return draw


def _reserve_openly(job: Job, state: dict[str, Any]) -> None:
    """Tell the ledger, once, that patients train without privacy: nothing that follows can be certified."""
    from medsynth.privacy.accounting import Event

    # A completed reservation takes no other weights, and on some devices the last digits differ: it is made anew.
    done = {entry["id"] for entry in job.ledger.entries() if entry["status"] == "complete"}
    if state["entries"].get("training") in {None, *done}:
        state["entries"]["training"] = job.reserve([Event("nonprivate")])
        job.save(state)
