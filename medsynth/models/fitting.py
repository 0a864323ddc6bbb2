"""Fitting a network on values that need no protection (phantoms; patients in a study without privacy)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from medsynth import logs
from medsynth.errors import MedsynthError
from medsynth.files import replacing

_MOST_MISSED = 20  # steps in a row without a finite gradient: more is no accident
_KEEP_EVERY_S = 60.0  # at most so much of a killed fit is lost

Loss = Callable[[torch.Generator], Tensor]
"""Draw a batch from a stream and return its loss."""

Report = Callable[[Sequence[float]], None]
"""Receive the losses of all steps so far, the newest last."""


@dataclass(frozen=True)
class Recipe:
    """AdamW (Loshchilov, Hutter 2019) under a one-cycle rate (Smith, Topin 2019).

    Attributes:
        steps: how many.
        learning_rate: the peak.
        warm_up: share of the steps in which the rate rises.
        weight_decay: of AdamW.
        gradient_bound: L2 norm that a step's gradient is cut to.
    """

    steps: int
    learning_rate: float
    warm_up: float = 0.3
    weight_decay: float = 0.0
    gradient_bound: float = 1.0


def fit(
    model: nn.Module,
    loss_of: Loss,
    what: str,
    recipe: Recipe,
    stream: torch.Generator,
    report: Report,
    *,
    average: EMAModel | None = None,
    keep: Path | None = None,
) -> None:
    """Train ``model`` in place; with an ``average`` it is left with its averaged weights.

    Args:
        model: the network.
        loss_of: gives the loss of a batch.
        what: what the progress bar calls it.
        recipe: how long and how fast.
        stream: randomness of the batches.
        report: called after every step.
        average: of the weights that are trained.
        keep: file in which an unfinished fit is kept once a minute. A killed one goes on from there, and on the same
            device ends with the weights that it would have had. It is as sensitive as what is drawn; whoever called
            removes it.

    Raises:
        MedsynthError: many steps in a row gave no finite gradient.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=max(recipe.steps, 2), pct_start=recipe.warm_up
    )
    streams = _Streams(stream, parameters[0].device)
    parts: dict[str, _Part] = {"model": model, "optimizer": optimizer, "rate": rate, "streams": streams}
    if average is not None:
        parts["average"] = average
    losses = _go_on(keep, parts)
    if average is not None:
        average.to(device=parameters[0].device)
    model.train()
    kept, missed = time.monotonic(), 0
    for _ in logs.progress(range(len(losses), recipe.steps), what, recipe.steps - len(losses)):
        loss = loss_of(stream)
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, recipe.gradient_bound)
        missed = 0 if norm.isfinite() else missed + 1
        if missed == _MOST_MISSED:
            raise MedsynthError(
                f"{what}: {missed} steps in a row gave no finite gradient; lower the learning rate, or set "
                "train.precision to float32"
            )
        if not missed:  # kernels in half precision give NaN now and then: that batch teaches nothing
            optimizer.step()
            rate.step()
            if average is not None:
                average.step(parameters)
        losses.append(float(loss.detach()))
        report(losses)
        if keep is not None and time.monotonic() - kept >= _KEEP_EVERY_S:
            with replacing(keep) as file:
                torch.save({"losses": losses, **{name: part.state_dict() for name, part in parts.items()}}, file)
            kept = time.monotonic()
    if average is not None:
        average.copy_to(parameters)


class _Part(Protocol):
    """What an unfinished fit is made of."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


class _Streams:
    """The stream of the batches, and those of torch, which a network may draw from where it lies."""

    def __init__(self, batches: torch.Generator, device: torch.device) -> None:
        self._batches = batches
        self._gpu = device if device.type == "cuda" else None

    def state_dict(self) -> dict[str, Any]:
        gpu = {} if self._gpu is None else {"gpu": torch.cuda.get_rng_state(self._gpu)}
        return {"batches": self._batches.get_state(), "cpu": torch.get_rng_state(), **gpu}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._batches.set_state(state_dict["batches"])
        torch.set_rng_state(state_dict["cpu"])
        if self._gpu is not None and "gpu" in state_dict:  # it may have been kept on another device
            torch.cuda.set_rng_state(state_dict["gpu"], self._gpu)


def _go_on(path: Path | None, parts: Mapping[str, _Part]) -> list[float]:
    """Set all parts to where a killed fit kept them, and return the losses of the steps that it had done."""
    if path is None or not path.is_file():
        return []
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; nothing is lost but time
        logs.say("what was kept of the training cannot be read: it begins again", reason=type(error).__name__)
        return []
    if found.keys() != {*parts, "losses"}:
        logs.say("what was kept of the training is of another version: it begins again")
        return []
    for name, part in parts.items():
        part.load_state_dict(found[name])
    losses: list[float] = found["losses"]
    logs.say("going on with what was kept of the training", steps_done=len(losses))
    return losses
