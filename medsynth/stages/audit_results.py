"""The audits of results: what an attack on membership found, and do the synthetic pairs betray patients.

They read real patients of both sides, so what they find is internal. Each runs the same code on a leaky stand-in made
of phantoms, which must turn it red.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medsynth.config import Grid, Study
from medsynth.imaging.cohort import Patient
from medsynth.imaging.phantom import phantom_pairs
from medsynth.metrics.membership import FALSE_ALARMS, Attack, area_surely, area_under, attack, grid
from medsynth.metrics.memorisation import Copies, centred, coarse, copies, relative_distances
from medsynth.privacy.accounting import membership_bound
from medsynth.privacy.audit.finding import Control, Finding
from medsynth.randomness import derive_seed, generator

ALARM = 0.6  # an area under the curve that is surely above: members are recognised
_UNSURE = 0.75  # an interval that reaches here and starts below the alarm says nothing
_CHANCE, _ATTACKS = 0.001, 4  # that an honest study is stopped by any of its attacks on membership (Bonferroni)
_COPY_EFFECT = 0.15  # by how much the share of copies must exceed chance
_FEWEST = 8  # patients a side, below which no verdict is given
_CONTROL_SIZE, _COPIED = 16, 24
_PAIRS = (
    "Whoever has only the synthetic pairs looks for the pair that is nearest to a patient's {what}. It shows whether "
    "training patients are nearer than held-out ones; it says nothing of attacks with other distances."
)
_COPIES = (
    "Synthetic {what} that crowd around training patients more than chance allows are copies or near copies. It finds "
    "memorisation that distances on a coarse grid can see, no more."
)
Scores = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class Sides:
    """Patients that the generator was trained on, and patients that no stage has trained on."""

    members: list[Patient]
    strangers: list[Patient]


def audit_pairs(config: Study, images: Tensor, labels: Tensor, sides: Sides, bound: float) -> Iterator[Finding]:
    """Yield membership inference and copy detection on the synthetic pairs alone.

    Args:
        config: the study.
        images: synthetic ``(pair, channel, *spatial)``.
        labels: synthetic ``(pair, *spatial)``.
        sides: patients of both sides.
        bound: greatest area under the curve that the claimed epsilon allows.
    """
    leaky, copied = _copied_phantoms(config.grid, derive_seed(config.seed, "audit", "copies"))
    for what, view in VIEWS.items():
        found = _distances(view, images, labels, sides)
        control = _distances(view, *copied, leaky)
        yield _nearest(config, what, found, sides, control, leaky, bound)
        yield _crowding(config, what, found, sides, control, leaky)


def allowed_area(curve: Sequence[tuple[float, float]]) -> float:
    """Return the greatest area under the curve of any membership attack.

    Args:
        curve: pairs (epsilon, delta), each of which holds; the lowest bound at each rate counts.
    """
    return area_under(np.array([min(membership_bound(*point, float(rate)) for point in curve) for rate in grid()]))


def _images(images: Tensor, labels: Tensor) -> Tensor:
    return coarse(centred(images, labels))


def _label_maps(images: Tensor, labels: Tensor) -> Tensor:
    values = range(1, max(2, int(labels.max()) + 1))
    return coarse(torch.stack([(labels == value).float() for value in values], dim=1))


VIEWS: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {"images": _images, "label maps": _label_maps}


def _distances(
    view: Callable[[Tensor, Tensor], Tensor], images: Tensor, labels: Tensor, sides: Sides
) -> NDArray[np.float64]:
    people = [*sides.members, *sides.strangers]
    sizes = [len(patient.images) for patient in people]
    # Together, so that both go through one layout of channels (label values that only some have).
    known = view(
        torch.cat([images, *(patient.images for patient in people)]),
        torch.cat([labels, *(patient.labels for patient in people)]),
    )
    return relative_distances(known[len(images) :].split(sizes), known[: len(images)])


def _nearest(
    config: Study,
    what: str,
    found: NDArray[np.float64],
    sides: Sides,
    control: NDArray[np.float64],
    leaky: Sides,
    bound: float,
) -> Finding:
    scores, red = (_split(-table.min(axis=1), side) for table, side in ((found, sides), (control, leaky)))
    measured = attack(*red, config.audit.bootstrap, random_stream(config, f"c-{what}"))
    text = _PAIRS.format(what=what)
    return judge_membership(config, f"synthetic {what}", scores, measured, bound, "noisy copies of phantoms", text)


def _crowding(
    config: Study, what: str, found: NDArray[np.float64], sides: Sides, control: NDArray[np.float64], leaky: Sides
) -> Finding:
    measured = copies(found, _trained(sides), config.audit.bootstrap, random_stream(config, f"copies-{what}"))
    red = copies(control, _trained(leaky), config.audit.bootstrap, random_stream(config, f"copies-c-{what}"))
    return Finding(
        audit="copy detection",
        subject=f"synthetic {what}",
        measures="share nearer to a training patient than to any held-out one",
        value=measured.share,
        low=measured.low,
        high=measured.high,
        allowed=measured.limit(_COPY_EFFECT),
        outcome=_copy_outcome(measured, sides),
        blocks=True,
        controls=(Control("noisy copies of phantoms", red.share, red.share > red.limit(_COPY_EFFECT)),),
        shows=_COPIES.format(what=what),
        reads_patients=True,
        detail=f"{measured.chance:.2f} by chance",
    )


def _copy_outcome(found: Copies, sides: Sides) -> Literal["pass", "fail", "cannot say"]:
    if min(len(sides.members), len(sides.strangers)) < _FEWEST or found.limit(_COPY_EFFECT) >= 1:
        return "cannot say"
    return "fail" if found.share > found.limit(_COPY_EFFECT) else "pass"


def judge_membership(
    config: Study, subject: str, scores: Scores, control: Attack, bound: float, leaky: str, shows: str
) -> Finding:
    """Return what an attack on membership found, and whether it refutes the claim.

    Args:
        config: the study.
        subject: what was attacked.
        scores: one a patient of each side; members' should be greater.
        control: the same attack on a leaky stand-in.
        bound: greatest area under the curve that the claimed epsilon allows.
        leaky: the stand-in, in words.
        shows: what the finding does and does not say.
    """
    found = attack(*scores, config.audit.bootstrap, random_stream(config, subject))
    allowed = min(ALARM, bound)
    return Finding(
        audit="membership inference",
        subject=subject,
        measures="area under the ROC curve (0.5 is chance)",
        value=found.auc,
        low=found.auc_low,
        high=found.auc_high,
        allowed=allowed,
        outcome=_attack_outcome(found, allowed, min(len(side) for side in scores)),
        # Beyond what the claimed epsilon allows, the claim itself is false; below, it is only a warning. Honest studies
        # of small epsilon must not be stopped by chance: the interval that is shown is too narrow to decide that.
        blocks=area_surely(found.auc, len(scores[0]), len(scores[1]), _CHANCE / _ATTACKS) > bound,
        controls=(Control(leaky, control.auc, control.auc_low > ALARM),),
        shows=shows,
        reads_patients=True,
        detail=f"{found.tpr:.0%} ({found.tpr_low:.0%} to {found.tpr_high:.0%}) recognised at {FALSE_ALARMS:.0%} false "
        f"alarms; the claim allows an area of {bound:.3f}",
    )


def _attack_outcome(found: Attack, allowed: float, fewest: int) -> Literal["pass", "fail", "cannot say"]:
    if fewest < _FEWEST:
        return "cannot say"
    if found.auc_low > allowed:
        return "fail"
    return "cannot say" if found.auc_high > _UNSURE else "pass"


def _copied_phantoms(space: Grid, seed: int) -> tuple[Sides, tuple[Tensor, Tensor]]:
    """Return phantom patients of both sides, and synthetic pairs that are noisy copies of the members."""
    images, labels = map(torch.from_numpy, phantom_pairs(control_grid(space.spatial_dims), 2 * _COPIED, seed))
    people = [Patient("", image[None], label[None]) for image, label in zip(images, labels, strict=True)]
    noise = torch.randn(images[:_COPIED].shape, generator=torch.Generator().manual_seed(seed))
    sides = Sides(people[:_COPIED], people[_COPIED:])
    return sides, (images[:_COPIED] + 0.1 * noise, labels[:_COPIED])


def control_grid(spatial_dims: int) -> Grid:
    """Return the small grid on which stand-ins leak."""
    values: dict[str, Any] = {"spatial_dims": spatial_dims, "shape": (_CONTROL_SIZE,) * spatial_dims}
    return Grid.model_validate({**values, "labels": {0: "background", 1: "structure"}})


def _trained(sides: Sides) -> NDArray[np.bool_]:
    return np.arange(len(sides.members) + len(sides.strangers)) < len(sides.members)


def _split(scores: NDArray[np.float64], sides: Sides) -> Scores:
    return scores[: len(sides.members)], scores[len(sides.members) :]


def random_stream(config: Study, name: str) -> np.random.Generator:
    """Return the stream of one part of the audits."""
    return generator(config.seed, "audit", name)
