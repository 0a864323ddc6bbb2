"""The part of stage ``train`` that patients move: T noisy steps of DP-SGD on the parameters that were chosen for it.

Steps are claimed in a journal before a patient is read for them. A killed run goes on within its reservation: finished
steps are kept, started ones are lost, fresh noise is drawn.

Under ``torchrun`` rank 0 does all of this, and the other ranks :func:`assist`: each clips its share of the drawn
patients, adds the noise of its slice of the coordinates and takes the same steps. They have no coins, average, journal
or ledger; how many they are changes nothing but the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from medsynth import __version__, logs, store
from medsynth.config import Study, Train
from medsynth.devices import open_device
from medsynth.diffusion.fitting import open_ema
from medsynth.diffusion.generator import Generator, build_generator
from medsynth.diffusion.objective import Batch, noise_rows, row_loss
from medsynth.errors import PrivacyError, StoreError
from medsynth.files import replacing
from medsynth.models.adapters import add_adapters, select_trainable
from medsynth.models.autoencoder import load_codec
from medsynth.models.denoiser import Denoiser, Preconditioning
from medsynth.privacy.distributed import Ranks, Replica, open_ranks
from medsynth.randomness import derive_seed
from medsynth.stages.inputs import config_digest
from medsynth.stages.training_job import LOG_EVERY, Job
from medsynth.tracking import Tracker

if TYPE_CHECKING:
    from medsynth.privacy.gradients import Backend
    from medsynth.privacy.journal import StepJournal
    from medsynth.privacy.mechanism import DpSgd
    from medsynth.privacy.preflight import Evidence

_CHECKPOINT = "checkpoint.pt"
_JOURNAL = "steps.jsonl"
SCRATCH = (_CHECKPOINT, _JOURNAL, f"{_JOURNAL}.lock")
"""Files that are there only until the stage is finished."""
_BEHIND = "behind"  # in the state: the ledger's last line before the training was reserved
_CLAIM = 5  # steps that are claimed, and at worst lost, together
_PREFLIGHT_UNITS = 4
_EPSILON_POINTS = 8


@dataclass(frozen=True)
class Call:
    """What rank 0 says when private steps begin.

    Attributes:
        version: of this package, whose code all ranks must run.
        settings: digest of the settings that the stage depends on.
        mechanism: the plan that rank 0 accounts for; all ranks clip and add noise by it.
        cohort: digest of the folder that the patients are read from.
        autoencoder: digest of the folder that the codec is read from.
    """

    version: str
    settings: str
    mechanism: DpSgd
    cohort: str
    autoencoder: str


def choose_trainable(settings: Train, built: Generator) -> int:
    """Add the adapters that the study wants, freeze what patients may not move, and count what they may."""
    if settings.trainable == "lora":
        device = next(built.denoiser.parameters()).device
        add_adapters(built.denoiser, settings.lora_rank)
        built.denoiser.to(device)
    return select_trainable(built.denoiser, settings.trainable)


def train_privately(job: Job, built: Generator, state: dict[str, Any]) -> None:
    """Take T steps of DP-SGD on patients; see the module's first lines for what a kill means."""
    from medsynth.privacy.mechanism import DpSgd
    from medsynth.privacy.preflight import refuse_modules

    settings = job.config.train
    model = built.denoiser.train()
    refuse_modules(model)
    public = public_batches(job, built)
    _name_reservation(job, state)
    # A run that goes on takes the norm that was reserved: computed again, its last digit may differ.
    clip_norm = settings.clip_norm or _reserved_norm(job, state) or _public_gradient_norm(model, public)
    backend, evidence = _checked_backend(job, model, public, clip_norm)
    trained = job.config.declared_in_training
    mechanism = DpSgd(
        name="denoiser",
        sampling_rate=settings.sampling_rate,
        steps=settings.steps,
        noise_multiplier=job.plan.training_noise_multiplier,
        clip_norm=clip_norm,
        denominator=settings.sampling_rate * trained,
    )
    journal = _reserve(job, state, mechanism, evidence)
    _require_reserved(job, mechanism, state["entries"]["training"])
    curve = _epsilon_curve(job, mechanism, state["entries"]["training"])
    _private_steps(job, built, backend, mechanism, journal, curve)


def _reserve(job: Job, state: dict[str, Any], mechanism: DpSgd, evidence: Evidence) -> StepJournal:
    """Return the journal of the reservation that the state names; there is a new one of both where one is missing."""
    from medsynth.privacy.journal import StepJournal

    path, entries = job.folder / _JOURNAL, state["entries"]
    if "training" not in entries or not path.exists():
        # Without the journal of its spent steps no earlier reservation can be gone on with: this one is new.
        path.unlink(missing_ok=True)
        entries.pop("training", None)
        state.pop(_BEHIND, None)
        job.save(state)
        # Before the state says where the reservation will be: without a journal nothing could go on with it.
        StepJournal(path, mechanism.steps)
        state[_BEHIND] = job.ledger.head
        job.save(state)
        entries["training"] = job.reserve([mechanism], preflight=evidence.to_json(), sensitivity=_unit(job))
        job.save(state)
    return StepJournal(path, mechanism.steps)


def _name_reservation(job: Job, state: dict[str, Any]) -> None:
    """Name the reservation of a run that was killed before its state could: nobody took a step of it."""
    if "training" in state["entries"] or _BEHIND not in state:
        return
    job.ledger.reconcile()  # the account is written first
    for entry in job.ledger.entries():
        if (entry["previous"], entry["config_digest"]) == (state[_BEHIND], job.digest):
            state["entries"]["training"] = entry["id"]


def _reserved(job: Job, entry: str | None) -> dict[str, Any]:
    return next((one for one in job.ledger.entries() if one["id"] == entry), {})


def _reserved_norm(job: Job, state: Mapping[str, Any]) -> float | None:
    entry = _reserved(job, state["entries"].get("training"))
    return entry["sensitivity"]["clip_norms"].get("denoiser") if entry else None


def _require_reserved(job: Job, mechanism: DpSgd, entry: str) -> None:
    """Refuse to go on with another plan than was reserved: its cost would not be what the ledger says."""
    found, events, norms = _reserved(job, entry), [mechanism.event().to_json()], {"denoiser": mechanism.clip_norm}
    if not found or found["events"] != events or found["sensitivity"]["clip_norms"] != norms:
        raise PrivacyError(
            "the interrupted training was reserved with another noise, sampling rate, number of steps or clip norm "
            "than this one would use: continue with the settings, code and machine that began it, or run it again with "
            "--replace (what was reserved stays spent)"
        )


def _private_steps(
    job: Job, built: Generator, backend: Backend, mechanism: DpSgd, journal: StepJournal, curve: Mapping[int, float]
) -> None:
    settings, ranks = job.config.train, open_ranks()
    replica = _replica(job, built.denoiser, ranks, mechanism)
    model, optimizer = built.denoiser, replica.optimizer
    parameters = [p for p in model.parameters() if p.requires_grad]
    ema = open_ema(model, settings.ema_decay)
    _restore(job, model, optimizer, ema)
    ranks.call(_call(job, mechanism))
    replica.join()
    encoded = job.encoded_patients(built)
    steps = journal.claimed_steps(_CLAIM)
    for step in logs.progress(steps, "training under privacy", settings.steps - journal.next_step):
        drawn = mechanism.draw(len(encoded), replica.entropy)
        ranks.call((step, drawn))
        units = _units(job, model, [encoded[index] for index in ranks.share(drawn)], step)
        norms = _step(job, replica, backend, units, step)
        ema.step(parameters)
        if _is_kept(settings, step):
            _keep(job, model, optimizer, ema)
        if step + 1 in curve:
            job.tracker.metrics({"epsilon": curve[step + 1]}, step=step + 1)
        if norms:
            job.tracker.metrics({"internal_gradient_norm": float(np.median(norms))}, step=step + 1)
    ranks.call(None)
    ema.copy_to(parameters)


def _replica(job: Job, model: Denoiser, ranks: Ranks, mechanism: DpSgd) -> Replica:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=job.config.train.learning_rate, fused=True)
    return Replica(ranks, model, optimizer, mechanism, ranks.open_entropy(job.config.privacy.entropy))


def _step(job: Job, replica: Replica, backend: Backend, units: list[Batch], step: int) -> list[float]:
    """Take a step as every rank does, and return the norms of all patients on rank 0 where they are logged."""
    found = backend.clipped_sum(units)
    replica.step(found)
    if _is_kept(job.config.train, step) and not replica.align() and replica.ranks.first:
        logs.say("the weights of the processes differed by rounding; all took those of rank 0")
    return replica.ranks.gather_norms(found.norms) if (step + 1) % LOG_EVERY == 0 else []


def _is_kept(settings: Train, step: int) -> bool:
    return (step + 1) % _CLAIM == 0 or step + 1 == settings.steps


def assist(config: Study, inputs: Mapping[str, Path], ranks: Ranks, call: Call) -> None:
    """Take this rank's part in every step until rank 0 says that there are no more; nothing is drawn or written.

    *Guarantees*: what leaves this process is a sum of gradients that were clipped, one patient at a time, to the
    clip norm that rank 0 accounts for, by a backend that passed the preflight on this machine too, and the noisy mean
    of its slice, by the plan that rank 0 accounts for.

    Args:
        config: the study.
        inputs: ``cohort`` and ``autoencoder``.
        ranks: this process's place; not rank 0.
        call: what rank 0 said when it began.

    Raises:
        StoreError: this process has another version of the package, study, cohort or autoencoder than rank 0.
        PrivacyError: the preflight failed here.
        MedsynthError: rank 0 has ended.
    """
    job = Job(config, inputs, inputs["cohort"], config_digest(config, "train"), open_device(config.compute), Tracker())
    if _call(job, call.mechanism) != call:
        raise StoreError(
            "this process has another version of medsynth, study, cohort or autoencoder than rank 0: give all the same"
        )
    built = build_generator(config.grid, config.train, load_codec(inputs["autoencoder"])).to(job.device)
    choose_trainable(config.train, built)
    model = built.denoiser.train()
    replica = _replica(job, model, ranks, call.mechanism)
    replica.join()
    backend, _ = _checked_backend(job, model, public_batches(job, built), call.mechanism.clip_norm)
    encoded = job.encoded_patients(built)
    while (told := ranks.await_call()) is not None:
        step, drawn = told
        units = _units(job, model, [encoded[index] for index in ranks.share(drawn)], step)
        _step(job, replica, backend, units, step)


def _call(job: Job, mechanism: DpSgd) -> Call:
    digests = {name: store.read_manifest(job.inputs[name]).digest for name in ("cohort", "autoencoder")}
    return Call(__version__, config_digest(job.config, "train"), mechanism, **digests)


def _checked_backend(
    job: Job, model: torch.nn.Module, public: list[Batch], clip_norm: float
) -> tuple[Backend, Evidence]:
    from medsynth.privacy.gradients import open_backend
    from medsynth.privacy.preflight import preflight

    backend = open_backend(job.config.train.backend, model, row_loss, clip_norm)
    return backend, preflight(backend, model, row_loss, public[:_PREFLIGHT_UNITS], clip_norm)


def _units(job: Job, model: Denoiser, patients: list[tuple[str, Tensor, Tensor]], step: int) -> list[Batch]:
    return [unit_batch(job, model.preconditioning, *patient, step) for patient in patients]


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


def _epsilon_curve(job: Job, mechanism: DpSgd, entry: str) -> dict[int, float]:
    """Return epsilon of everything in the ledger with only the first t steps of reservation ``entry``, for a few t."""
    from medsynth.privacy.accounting import epsilon
    from medsynth.privacy.ledger import charged_events

    before = charged_events([other for other in job.ledger.entries() if other["id"] != entry])
    points = np.unique(np.linspace(1, mechanism.steps, _EPSILON_POINTS).astype(int))
    event, trials = mechanism.event(), job.config.privacy.trials
    return {int(t): epsilon([*before, replace(event, count=int(t) * trials)], job.config.privacy.delta) for t in points}


def _keep(job: Job, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: Any) -> None:
    trainable = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    with replacing(job.folder / _CHECKPOINT) as file:
        torch.save({"parameters": trainable, "optimizer": optimizer.state_dict(), "ema": ema.state_dict()}, file)


def _restore(job: Job, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema: Any) -> None:
    path = job.folder / _CHECKPOINT
    if not path.is_file():
        return
    kept = torch.load(path, map_location=job.device, weights_only=True)
    model.load_state_dict(kept["parameters"], strict=False)
    optimizer.load_state_dict(kept["optimizer"])
    ema.load_state_dict(kept["ema"])
