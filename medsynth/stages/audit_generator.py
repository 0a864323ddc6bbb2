"""The audit of the generator: does its denoiser, or do its drafts, know the patients that they were made from.

What of the two a release needs is attacked: a denoiser that nothing was taught and that renders nothing knows nobody.
Both attacks read real patients of both sides, so what they find is internal; each also meets a leaky stand-in.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from medsynth import logs
from medsynth.config import Appearance, Encode, Study, Train
from medsynth.diffusion.fitting import fit
from medsynth.diffusion.generator import Dresser, Generator, build_generator
from medsynth.diffusion.recognition import familiarity, resemblance
from medsynth.imaging.cohort import Patient
from medsynth.imaging.phantom import phantom_pairs
from medsynth.metrics.membership import attack
from medsynth.models.autoencoder import build_codec
from medsynth.models.drafting import open_drafting
from medsynth.privacy.audit.finding import Finding
from medsynth.randomness import derive_seed
from medsynth.stages.audit_results import Scores, Sides, control_grid, judge_membership, random_stream

DENOISER, DRAFTS = "generator", "drafts"
"""What is attacked, as findings and curves call it."""

_CONTROL_MEMBERS, _CONTROL_STEPS = 8, 200
_CONTROL_DRAFTED, _CONTROL_COSINES = 32, (4, 4)
_SHOWS = {
    DENOISER: "Whoever has the generator and a patient's image asks how well the denoiser knows it.",
    DRAFTS: "Whoever has the appearance statistics and a patient's pair asks how near drafts for the label map come.",
}
_LIMITS = (
    "It shows whether training patients stand out beside held-out ones; a stronger attack may exist, and only epsilon "
    "bounds them all."
)


def audit_generator(
    config: Study, built: Generator, sides: Sides, bound: float, device: torch.device
) -> Iterator[tuple[Finding, Scores]]:
    """Attack membership through what the generator has of patients: its denoiser, its drafts, or both.

    Args:
        config: the study.
        built: the trained generator.
        sides: patients of both sides; at most ``audit.patients`` of each are scored.
        bound: greatest area under the curve that the claimed epsilon allows.
        device: where the generator lies.
    """
    count, seed = config.audit.patients, derive_seed(config.seed, "audit", "generator")
    chosen = Sides(sides.members[:count], sides.strangers[:count])
    if config.denoiser_counts:
        scores, leaky = familiar(built, chosen, seed, device), overfitted_scores(seed)
        yield _judged(config, DENOISER, scores, leaky, bound, "overfitted on phantoms"), scores
    if built.dresser is not None:
        scores, leaky = alike(built.dresser, chosen, seed), copied_scores(seed)
        yield _judged(config, DRAFTS, scores, leaky, bound, "statistics of one phantom each"), scores


def _judged(config: Study, subject: str, scores: Scores, leaky: Scores, bound: float, name: str) -> Finding:
    control = attack(*leaky, config.audit.bootstrap, random_stream(config, "c"))
    return judge_membership(config, subject, scores, control, bound, name, f"{_SHOWS[subject]} {_LIMITS}")


def familiar(built: Generator, sides: Sides, seed: int, device: torch.device) -> Scores:
    """Return one score a patient of each side (see :func:`familiarity`)."""

    def score(patient: Patient) -> float:
        latents, masks = built.codec.encode(patient.images.to(device)), built.masks(patient.labels.to(device))
        return familiarity(built.denoiser, latents, masks, seed)

    count = len(sides.members) + len(sides.strangers)
    people = logs.progress([*sides.members, *sides.strangers], "membership: generator", count)
    scores = np.array([score(patient) for patient in people])
    return scores[: len(sides.members)], scores[len(sides.members) :]


def overfitted_scores(seed: int) -> Scores:
    """Return the scores of a small 2D denoiser that was overfitted on a few phantoms, and of fresh phantoms."""
    space = control_grid(2)
    images, labels = map(torch.from_numpy, phantom_pairs(space, 2 * _CONTROL_MEMBERS, seed))
    settings = Train(channels=(32, 32), norm_groups=8, head_channels=16, ema_decay=0.9, mask_dropout=0.0)
    codec = build_codec(space, Encode(codec="wavelet", levels=1))
    codec.calibrate(images)
    built = build_generator(space, settings, codec)
    latents, masks = codec.encode(images[:_CONTROL_MEMBERS]), built.masks(labels[:_CONTROL_MEMBERS])
    stream = torch.Generator().manual_seed(seed)
    what = "overfitting the control"
    fit(built.denoiser, lambda _: (latents, masks), what, _CONTROL_STEPS, 4e-3, settings, stream, lambda *_: None)
    built.denoiser.eval()
    people = [Patient("", image[None], label[None]) for image, label in zip(images, labels, strict=True)]
    sides = Sides(people[:_CONTROL_MEMBERS], people[_CONTROL_MEMBERS:])
    return familiar(built, sides, seed, torch.device("cpu"))


def alike(dresser: Dresser, sides: Sides, seed: int) -> Scores:
    """Return one score a patient of each side (see :func:`resemblance`)."""
    count = len(sides.members) + len(sides.strangers)
    people = logs.progress([*sides.members, *sides.strangers], "membership: drafts", count)
    scores = np.array(
        [
            resemblance(dresser, one.images.numpy(), one.labels.numpy(), (seed, number))
            for number, one in enumerate(people)
        ]
    )
    return scores[: len(sides.members)], scores[len(sides.members) :]


def copied_scores(seed: int) -> Scores:
    """Return the scores of phantoms under drafts of their own statistics, without noise, and of fresh phantoms."""
    images, labels = phantom_pairs(control_grid(2), 2 * _CONTROL_DRAFTED, seed)
    space = open_drafting(control_grid(2), Appearance(coefficients=_CONTROL_COSINES), list(labels))
    scores = np.zeros((2, _CONTROL_DRAFTED))
    for number in range(_CONTROL_DRAFTED):
        leaky = Dresser(space, space.statistics(space.vector(images[number], labels[number]), 0.0))
        for side, other in enumerate((number, number + _CONTROL_DRAFTED)):
            scores[side, number] = resemblance(leaky, images[other, None], labels[other, None], (seed, other))
    return scores[0], scores[1]
