"""Stage ``train``: the mask-conditioned denoiser, pre-trained on public phantoms, then moved by patients under DP-SGD.

Order of events: appearance statistics (one Gaussian mechanism) dress the phantoms; the denoiser learns from them,
which costs nothing more; then a few parameters take T noisy steps on patients. A killed run goes on within its
reservation: finished steps are kept, started ones are lost, fresh noise is drawn.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from medsynth import logs, store
from medsynth.config import Study
from medsynth.devices import open_device
from medsynth.diffusion.fitting import Draw, fit, open_ema
from medsynth.diffusion.generator import WEIGHTS, Generator, build_generator, save_generator
from medsynth.diffusion.objective import Batch, noise_rows, row_loss
from medsynth.models.adapters import add_adapters, select_trainable
from medsynth.models.appearance import AppearanceSpace, AppearanceStatistics
from medsynth.models.autoencoder import load_codec
from medsynth.models.denoiser import Preconditioning
from medsynth.randomness import derive_seed, generator
from medsynth.stages.inputs import config_digest, open_ledger, stage_inputs
from medsynth.stages.masks import load_masks
from medsynth.store import Manifest
from medsynth.tracking import Tracker

if TYPE_CHECKING:
    from medsynth.imaging.cohort import Patient
    from medsynth.privacy.budget import BudgetPlan
    from medsynth.privacy.entropy import Entropy
    from medsynth.privacy.gradients import Backend
    from medsynth.privacy.journal import StepJournal
    from medsynth.privacy.ledger import Ledger
    from medsynth.privacy.mechanism import DpSgd

APPEARANCE = "appearance.npz"
_PRETRAINED = "pretrained.safetensors"
_CHECKPOINT = "checkpoint.pt"
_JOURNAL = "steps.jsonl"
_STATE = "state.json"
_CLAIM = 5  # steps that are claimed, and at worst lost, together
_PREFLIGHT_UNITS = 4
_GRAM_MAPS = 48  # label maps that stand for the patients' in the least squares of appearance
_EPSILON_POINTS = 8
_LOG_EVERY = 20
_NO_CLIP = 1e12


@dataclass(frozen=True)
class Job:
    """What every step of the stage needs (and the audits, which run the same code again)."""

    config: Study
    inputs: Mapping[str, Path]
    folder: Path
    digest: str
    device: torch.device
    tracker: Tracker

    def seed(self, *names: str | int) -> int:
        """Return the seed of one of the stage's public streams."""
        return derive_seed(self.config.seed, "train", *names)

    @property
    def parents(self) -> dict[str, str]:
        """Digest of the cohort, as the ledger names it."""
        return {"cohort": store.read_manifest(self.inputs["cohort"]).digest}


def run(config: Study, inputs: Mapping[str, Path], out: Path, tracker: Tracker) -> Manifest:
    """Write ``generator/``: the denoiser (averaged weights) and the released appearance statistics.

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
        if config.train.trainable == "lora":
            add_adapters(built.denoiser, config.train.lora_rank)
            built.denoiser.to(job.device)
        count = select_trainable(built.denoiser, config.train.trainable)
        logs.say("training on patients", trainable_parameters=count, private=config.privacy.private)
        if config.train.steps:
            (_train_private if config.privacy.private else _train_openly)(job, built, state)
        save_generator(built, config.grid, folder.path)
        entries = _close(job, state)
        return folder.finish(
            _sensitivity(job, entries), ledger_entries=entries, details={"trainable_parameters": count}
        )


def _sensitivity(job: Job, entries: tuple[str, ...]) -> store.Sensitivity:
    """Return internal for whatever read patients, or the masks of a study that did, without privacy."""
    masks = store.read_manifest(job.inputs["masks"])
    return "released" if masks.releasable and (job.config.privacy.private or not entries) else "internal"


def _open_state(job: Job) -> dict[str, Any]:
    """Return what an interrupted run of the same settings left, or start afresh."""
    read = ("cohort", "autoencoder", "masks")
    wanted = {"digest": job.digest, "parents": {name: store.read_manifest(job.inputs[name]).digest for name in read}}
    path = job.folder / _STATE
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if {key: found.get(key) for key in wanted} == wanted:
            logs.say("going on with an interrupted training")
            return found
    shutil.rmtree(job.folder)
    job.folder.mkdir()
    state: dict[str, Any] = {**wanted, "entries": {}}
    _save_state(job, state)
    return state


def _save_state(job: Job, state: Mapping[str, Any]) -> None:
    scratch = job.folder / f"{_STATE}.partial"
    scratch.write_text(json.dumps(state), encoding="utf-8")
    scratch.replace(job.folder / _STATE)


def _close(job: Job, state: Mapping[str, Any]) -> tuple[str, ...]:
    """Complete the training's reservation, remove scratch files and return the ledger entries."""
    entry = state["entries"].get("training")
    if entry is not None:
        outputs = {WEIGHTS: store.digest_file(job.folder / WEIGHTS)}
        # A run that was killed after this line finds the same weights again, and the reservation complete.
        if not any(e["id"] == entry and e["outputs"] == outputs for e in _ledger(job).entries()):
            _ledger(job).complete(entry, outputs)
    for name in (_PRETRAINED, _CHECKPOINT, _JOURNAL, f"{_JOURNAL}.lock", _STATE):
        (job.folder / name).unlink(missing_ok=True)
    return tuple(state["entries"].values())


def _ledger(job: Job) -> Ledger:
    return open_ledger(job.inputs)


def _plan(job: Job) -> BudgetPlan:
    from medsynth.privacy.budget import plan_budget

    return plan_budget(job.config.privacy, job.config.train, job.config.masks)


def _patients(job: Job) -> list[Patient]:
    from medsynth.imaging.cohort import load_patients

    return load_patients(job.inputs["cohort"], job.config.grid, "train")


# ---------------------------------------------------------------------------------------------------- pre-training


def _pretrain(job: Job, built: Generator, state: dict[str, Any]) -> None:
    kept = job.folder / _PRETRAINED
    if kept.is_file():
        built.denoiser.load_state_dict(load_file(kept))
        return
    settings = job.config.train
    appearance = _appearance(job, state) if settings.appearance.enabled else None
    latents, masks = _phantom_latents(job, built, appearance, settings.pretrain_phantoms)
    draw = _draw_from(latents, masks, settings.pretrain_batch_size, job.device)
    steps = logs.progress(range(settings.pretrain_steps), "pre-training on phantoms", settings.pretrain_steps)
    stream = torch.Generator().manual_seed(job.seed("pretrain"))
    report = _reporter(job.tracker, "pretrain_loss")
    rate = settings.pretrain_learning_rate
    fit(built.denoiser, draw, steps, settings.pretrain_steps, rate, settings, stream, report)
    scratch = kept.with_suffix(".partial")
    save_file({k: v.detach().cpu().contiguous() for k, v in built.denoiser.state_dict().items()}, scratch)
    scratch.replace(kept)


def _appearance(job: Job, state: dict[str, Any]) -> AppearanceStatistics:
    """Release the appearance statistics of the patients (once; a resumed run reads them back)."""
    from medsynth.privacy.entropy import open_entropy
    from medsynth.privacy.mechanism import GaussianSum

    path = job.folder / APPEARANCE
    if "appearance" not in state["entries"] and path.is_file():
        before = _ledger(job).completed(job.digest, job.parents, {APPEARANCE: store.digest_file(path)})
        state["entries"] |= {"appearance": before} if before else {}
    if "appearance" not in state["entries"]:
        config = job.config
        space = appearance_space(job)
        denominator = config.privacy.declared_patients * (1 - config.ingest.test_fraction)
        noise = _plan(job).appearance_noise_multiplier
        mechanism = GaussianSum("appearance", space.size, _appearance_clip(job), noise, denominator)
        entry = _reserve(job, [mechanism], resume=True)
        mean = mechanism.release(appearance_vectors(_patients(job), space), open_entropy(config.privacy.entropy))
        released = io.BytesIO()
        np.savez(released, **vars(space.statistics(mean, noise * mechanism.clip_norm / denominator)))
        # Completed before anything is on disk, as in stage masks: no kill buys a second release.
        _ledger(job).complete(entry, {APPEARANCE: hashlib.sha256(released.getvalue()).hexdigest()})
        path.write_bytes(released.getvalue())
        state["entries"]["appearance"] = entry
        _save_state(job, state)
    with np.load(path) as arrays:
        return AppearanceStatistics(**{name: arrays[name] for name in arrays.files})


def appearance_vectors(patients: Iterable[Patient], space: AppearanceSpace) -> Iterator[np.ndarray]:
    """Yield one vector a patient, the mean over the patient's records."""
    for patient in patients:
        records = zip(patient.images.numpy(), patient.labels.numpy(), strict=True)
        yield np.mean([space.vector(image, label) for image, label in records], axis=0)


def appearance_space(job: Job) -> AppearanceSpace:
    """Return the layout of the appearance statistics, with label maps of the stage ``masks`` and no patient's."""
    source = load_masks(job.inputs["masks"])
    maps = [source.draw(job.seed("appearance-map", index)) for index in range(_GRAM_MAPS)]
    return AppearanceSpace(job.config.grid, job.config.train.appearance, maps)


def _appearance_clip(job: Job) -> float:
    return job.config.train.appearance.clip_norm if job.config.privacy.private else _NO_CLIP


def _phantom_latents(
    job: Job, built: Generator, appearance: AppearanceStatistics | None, count: int
) -> tuple[Tensor, Tensor]:
    """Return latents and encoded masks of public (or released) pairs: drawn label maps, dressed images."""
    from medsynth.imaging.phantom import render

    grid = job.config.grid
    source = load_masks(job.inputs["masks"])
    space = appearance_space(job)
    latents, masks = [], []
    for index in logs.progress(range(count), "rendering phantoms", count):
        label = source.draw(job.seed("phantom-label", index))
        rng = generator(job.config.seed, "train", "phantom-image", index)
        image = render(label, grid, rng) if appearance is None else space.render(label, appearance, rng)
        tensor = torch.from_numpy(np.ascontiguousarray(image)).to(job.device)
        latents.append(built.codec.encode(tensor[None]).cpu())
        masks.append(built.masks(torch.from_numpy(label)[None].to(job.device)).cpu())
    return torch.cat(latents), torch.cat(masks)


def _draw_from(latents: Tensor, masks: Tensor, size: int, device: torch.device) -> Draw:
    def draw(stream: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(0, len(latents), (size,), generator=stream)
        return latents[rows].to(device), masks[rows].to(device)

    return draw


def _reporter(tracker: Tracker, name: str) -> Any:
    recent: list[float] = []

    def report(step: int, loss: float) -> None:
        recent.append(loss)
        if (step + 1) % _LOG_EVERY == 0:
            tracker.metrics({name: float(np.mean(recent[-_LOG_EVERY:]))}, step=step + 1)

    return report


# -------------------------------------------------------------------------------------------------------- patients


def _encode_patients(job: Job, built: Generator) -> list[tuple[str, Tensor, Tensor]]:
    encoded = []
    for patient in _patients(job):
        latents = built.codec.encode(patient.images.to(job.device)).cpu()
        masks = built.masks(patient.labels.to(job.device)).cpu()
        encoded.append((patient.patient_id, latents, masks))
    return encoded


def _train_openly(job: Job, built: Generator, state: dict[str, Any]) -> None:
    """Train on patients without privacy; the ledger says so, and nothing that follows can be certified."""
    from medsynth.privacy.accounting import Event

    settings = job.config.train
    state["entries"]["training"] = _reserve(job, [Event("nonprivate")])
    _save_state(job, state)
    encoded = _encode_patients(job, built)
    latents = torch.cat([rows for _, rows, _ in encoded])
    masks = torch.cat([rows for _, _, rows in encoded])
    draw = _draw_from(latents, masks, settings.batch_size, job.device)
    steps = logs.progress(range(settings.steps), "training WITHOUT privacy", settings.steps)
    stream = torch.Generator().manual_seed(job.seed("batches"))
    report = _reporter(job.tracker, "loss")
    fit(built.denoiser, draw, steps, settings.steps, settings.learning_rate, settings, stream, report)


def _train_private(job: Job, built: Generator, state: dict[str, Any]) -> None:
    """Take T steps of DP-SGD on patients; see the module's first lines for what a kill means."""
    from medsynth.privacy.entropy import open_entropy
    from medsynth.privacy.gradients import open_backend
    from medsynth.privacy.journal import StepJournal
    from medsynth.privacy.mechanism import DpSgd
    from medsynth.privacy.preflight import preflight, refuse_modules

    settings, privacy = job.config.train, job.config.privacy
    model = built.denoiser.train()
    refuse_modules(model)
    public = public_batches(job, built)
    clip_norm = settings.clip_norm or _public_gradient_norm(model, public)
    backend = open_backend(settings.backend, model, row_loss, clip_norm)
    evidence = preflight(backend, model, row_loss, public[:_PREFLIGHT_UNITS], clip_norm)
    trained = privacy.declared_patients * (1 - job.config.ingest.test_fraction)
    mechanism = DpSgd(
        name="denoiser",
        sampling_rate=settings.sampling_rate,
        steps=settings.steps,
        noise_multiplier=_plan(job).training_noise_multiplier,
        clip_norm=clip_norm,
        denominator=settings.sampling_rate * trained,
    )
    path = job.folder / _JOURNAL
    if "training" not in state["entries"] or not path.exists():
        # Without the journal of its spent steps no earlier reservation can be gone on with: this one is new.
        path.unlink(missing_ok=True)
        state["entries"]["training"] = _reserve(job, [mechanism], preflight=evidence.to_json(), sensitivity=_unit(job))
        _save_state(job, state)
    journal = StepJournal(path, settings.steps)
    curve = _epsilon_curve(job, mechanism, state["entries"]["training"])
    _private_steps(job, built, backend, mechanism, journal, open_entropy(privacy.entropy), curve)


def _private_steps(
    job: Job,
    built: Generator,
    backend: Backend,
    mechanism: DpSgd,
    journal: StepJournal,
    entropy: Entropy,
    curve: Mapping[int, float],
) -> None:
    settings = job.config.train
    model = built.denoiser
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    ema = open_ema(model, settings.ema_decay)
    _restore(job, model, optimizer, ema)
    encoded = _encode_patients(job, built)
    steps = journal.claimed_steps(_CLAIM)
    for step in logs.progress(steps, "training under privacy", settings.steps - journal.next_step):
        units = [
            unit_batch(job, model.preconditioning, *encoded[index], step)
            for index in mechanism.draw(len(encoded), entropy)
        ]
        total = backend.clipped_sum(units)
        noisy = mechanism.noisy_mean(total.tensors, entropy)
        for parameter, gradient in zip(parameters, noisy, strict=True):
            parameter.grad = gradient.to(parameter.device).reshape(parameter.shape)
        optimizer.step()
        ema.step(parameters)
        if (step + 1) % _CLAIM == 0 or step + 1 == settings.steps:
            _keep(job, model, optimizer, ema)
        if step + 1 in curve:
            job.tracker.metrics({"epsilon": curve[step + 1]}, step=step + 1)
        if (step + 1) % _LOG_EVERY == 0 and total.norms:
            job.tracker.metrics({"internal_gradient_norm": float(np.median(total.norms))}, step=step + 1)
    ema.copy_to(parameters)


def unit_batch(
    job: Job, preconditioning: Preconditioning, patient_id: str, latents: Tensor, masks: Tensor, step: int
) -> Batch:
    """Return one patient's rows of one step: a function of the patient and public seeds, of nobody else."""
    settings = job.config.train
    stream = torch.Generator().manual_seed(job.seed("rows", step, patient_id))
    rows = torch.randperm(len(latents), generator=stream)[: settings.max_records].repeat(settings.draws)
    batch = noise_rows(latents[rows], masks[rows], preconditioning, settings.mask_dropout, stream)
    return {name: value.to(job.device) for name, value in batch.items()}


def public_batches(job: Job, built: Generator) -> list[Batch]:
    """Return batches of phantoms, made like those of patients."""
    from medsynth.imaging.phantom import phantom_pairs

    seed = derive_seed(job.config.encode.phantoms.seed, "train", "preflight")
    images, labels = phantom_pairs(job.config.grid, max(_PREFLIGHT_UNITS, 8), seed)
    batches = []
    for index in range(len(images)):
        latents = built.codec.encode(torch.from_numpy(images[index : index + 1]).to(job.device)).cpu()
        masks = built.masks(torch.from_numpy(labels[index : index + 1]).to(job.device)).cpu()
        batches.append(unit_batch(job, built.denoiser.preconditioning, f"phantom-{index}", latents, masks, 0))
    return batches


def _public_gradient_norm(model: torch.nn.Module, batches: list[Batch]) -> float:
    from medsynth.privacy.gradients import open_backend

    norms = open_backend("unit", model, row_loss, 1.0).clipped_sum(batches).norms
    return max(float(np.median(norms)), 1e-6)


def _unit(job: Job) -> dict[str, Any]:
    return {"draws": job.config.train.draws, "max_records": job.config.train.max_records}


def _reserve(job: Job, mechanisms: list[Any], **more: Any) -> str:
    privacy = job.config.privacy
    return _ledger(job).reserve(
        "train",
        mechanisms,
        epsilon=privacy.epsilon,
        delta=privacy.delta,
        noise_source=privacy.entropy,
        config_digest=job.digest,
        parents=job.parents,
        trials=privacy.trials,
        **more,
    )


def _epsilon_curve(job: Job, mechanism: DpSgd, entry: str) -> dict[int, float]:
    """Return epsilon of everything in the ledger with only the first t steps of reservation ``entry``, for a few t."""
    from medsynth.privacy.accounting import epsilon
    from medsynth.privacy.ledger import charged_events

    before = charged_events([other for other in _ledger(job).entries() if other["id"] != entry])
    points = np.unique(np.linspace(1, mechanism.steps, _EPSILON_POINTS).astype(int))
    event, trials = mechanism.event(), job.config.privacy.trials
    return {int(t): epsilon([*before, replace(event, count=int(t) * trials)], job.config.privacy.delta) for t in points}


def _keep(job: Job, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: Any) -> None:
    trainable = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    scratch = job.folder / f"{_CHECKPOINT}.partial"
    torch.save({"parameters": trainable, "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}, scratch)
    scratch.replace(job.folder / _CHECKPOINT)


def _restore(job: Job, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: Any) -> None:
    path = job.folder / _CHECKPOINT
    if not path.is_file():
        return
    kept = torch.load(path, map_location=job.device, weights_only=True)
    model.load_state_dict(kept["parameters"], strict=False)
    optimizer.load_state_dict(kept["optimizer"])
    ema.load_state_dict(kept["ema"])
