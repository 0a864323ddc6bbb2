"""The audits of mechanisms: the study's code, clip norms, rates and noise, on neighbouring cohorts and on canaries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from medsynth import logs, store
from medsynth.config import Study
from medsynth.diffusion.generator import Generator
from medsynth.diffusion.objective import Batch, row_loss
from medsynth.imaging.cohort import Patient
from medsynth.models.adapters import select_trainable
from medsynth.models.drafting import open_drafting
from medsynth.privacy.audit import one_run, per_unit, replay, step
from medsynth.privacy.audit.finding import Finding
from medsynth.privacy.entropy import open_entropy
from medsynth.privacy.gradients import open_backend
from medsynth.privacy.ledger import Ledger
from medsynth.privacy.mechanism import DpSgd, GaussianSum
from medsynth.stages import masks, private_training, train
from medsynth.stages.appearance_sums import AppearanceSums
from medsynth.stages.training_job import Job
from medsynth.tracking import Tracker

if TYPE_CHECKING:
    from medsynth.privacy.chain import Record

_COHORT = 5  # patients of record-replay beside the hostile ones: neighbours need no more, and each costs a backward
_GRADIENT_BATCHES = 4
_HUGE = 1e6


@dataclass(frozen=True)
class Executed:
    """The mechanisms of the study as the ledger says that they ran."""

    masks: bool
    appearance: tuple[GaussianSum, ...]
    training: DpSgd | None


def executed(config: Study, inputs: Mapping[str, Path]) -> Executed:
    """Read the mechanisms behind ``masks/`` and ``generator/`` from the ledger; none of them without privacy."""
    if not config.privacy.private:
        return Executed(False, (), None)
    entries = {entry["id"]: entry for entry in Ledger(inputs["ledger"]).entries()}
    named = [entries[name] for name in store.read_manifest(inputs["generator"]).ledger_entries]
    space = open_drafting(config.grid, config.train.appearance)
    appearance = [_sums(entry, space.size) for entry in named if entry["mechanisms"][0] == "gaussian_sum:appearance"]
    training = [_sgd(entry) for entry in named if entry["mechanisms"] == ["dp_sgd:denoiser"]]
    return Executed(config.masks.source == "statistics", next(iter(appearance), ()), next(iter(training), None))


def audit_mechanisms(
    config: Study, inputs: Mapping[str, Path], built: Generator, patients: list[Patient], device: torch.device
) -> Iterator[Finding]:
    """Yield what the audits of the study's mechanisms find, one after the other.

    Args:
        config: the study; its section ``audit`` says which audits run.
        inputs: ``cohort``, ``autoencoder``, ``masks``, ``generator`` and ``ledger``.
        built: the trained generator.
        patients: train patients.
        device: where the generator lies.
    """
    ran, settings = executed(config, inputs), config.audit
    job = Job(config, inputs, inputs["generator"], "", device, Tracker())
    select_trainable(built.denoiser, config.train.trainable)
    built.denoiser.train()
    if settings.record_replay:
        logs.say("audit: record-replay on neighbouring cohorts")
        yield from _replays(job, ran, built, patients)
    if settings.gradients and ran.training is not None:
        logs.say("audit: per-unit gradients")
        batches = private_training.public_batches(job, built)[:_GRADIENT_BATCHES]
        clip_norm = ran.training.clip_norm
        yield per_unit.audit_gradients(config.train.backend, built.denoiser, row_loss, batches, clip_norm)
    built.denoiser.eval().requires_grad_(False)
    yield from _canaries(config, ran)


def _canaries(config: Study, ran: Executed) -> Iterator[Finding]:
    """Yield the audits that read no patient: fresh noise, made-up canaries."""
    entropy, settings = open_entropy("os"), config.audit
    if settings.step:
        logs.say("audit: one step, with and without a canary", repeats=settings.repeats)
        if ran.masks or ran.appearance:
            plan = ran.appearance[0] if ran.appearance else GaussianSum("noisy sums", 1, 1.0, 1.0, 1.0)
            yield step.audit_sum(plan, entropy, repeats=settings.repeats)
        if ran.training:
            yield step.audit_sgd(ran.training, entropy, repeats=settings.repeats)
    if settings.one_run and ran.training:
        count = one_run.enough_canaries(ran.training, settings.canaries)
        logs.say("audit: canaries through the whole training", canaries=count)
        yield one_run.audit_training(ran.training, entropy, canaries=count)


def _replays(job: Job, ran: Executed, built: Generator, patients: list[Patient]) -> Iterator[Finding]:
    cohort = [*patients[:_COHORT], *hostile_patients(patients[0])]
    real = min(job.config.audit.neighbours, len(cohort) - 3)
    # The hostile ones come last: all of them are taken out, and so are the first real ones.
    neighbours = [*range(real), *range(len(cohort) - 3, len(cohort))]
    if ran.masks:

        def run_masks(missing: int | None, wrap: replay.Wrap) -> None:
            masks.rerun(job.config, [p for number, p in enumerate(cohort) if number != missing], wrap)

        yield replay.audit_sums(run_masks, neighbours, "masks")
    if ran.appearance:
        space = train.appearance_space(job)

        def run_appearance(missing: int | None, wrap: replay.Wrap) -> None:
            left = [patient for number, patient in enumerate(cohort) if number != missing]
            AppearanceSums(space, tuple(map(wrap, ran.appearance))).release(left, open_entropy("test_only"))

        yield replay.audit_sums(run_appearance, neighbours, "appearance")
    if ran.training is not None:
        yield _replay_training(job, ran.training, built, cohort, neighbours)


def _replay_training(
    job: Job, mechanism: DpSgd, built: Generator, cohort: list[Patient], neighbours: list[int]
) -> Finding:
    @cache
    def encoded(number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return job.encoded(built, cohort[number])

    def unit(number: int) -> Batch:
        return private_training.unit_batch(job, built.denoiser.preconditioning, f"audit-{number}", *encoded(number), 0)

    backend = open_backend(job.config.train.backend, built.denoiser, row_loss, mechanism.clip_norm)
    return replay.audit_steps(mechanism, backend, unit, len(cohort), neighbours)


def hostile_patients(like: Patient) -> list[Patient]:
    """Return three patients who would break what is not clipped: NaN, huge values, and labels that fill the grid.

    Args:
        like: any patient, for the shapes only.
    """
    image, label = torch.zeros_like(like.images[:1]), torch.zeros_like(like.labels[:1])
    axes = torch.meshgrid(*(torch.arange(size) for size in label.shape[1:]), indexing="ij")
    checks = torch.stack(axes).sum(dim=0) % 2
    return [
        Patient("hostile-nan", torch.full_like(image, float("nan")), checks[None].to(label.dtype)),
        Patient("hostile-huge", torch.full_like(image, _HUGE), torch.ones_like(label)),
        Patient("hostile-many", _HUGE * torch.randn(4, *image.shape[1:]), label.repeat(4, *[1] * (label.ndim - 1)) + 1),
    ]


def _sums(entry: Record, size: int) -> tuple[GaussianSum, ...]:
    names = [mechanism.partition(":")[2] for mechanism in entry["mechanisms"]]
    norms, denominators = entry["sensitivity"]["clip_norms"], entry["denominators"]
    return tuple(
        GaussianSum(name, size, norms[name], event["noise_multiplier"], denominators[name])
        for name, event in zip(names, entry["events"], strict=True)
    )


def _sgd(entry: Record) -> DpSgd:
    (name, clip_norm), event = next(iter(entry["sensitivity"]["clip_norms"].items())), entry["events"][0]
    return DpSgd(
        name=name,
        sampling_rate=event["sampling_rate"],
        steps=event["count"],
        noise_multiplier=event["noise_multiplier"],
        clip_norm=clip_norm,
        denominator=entry["denominators"][name],
    )
