"""Fitting the denoiser on values that need no protection (phantoms; patients in a study without privacy)."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from medsynth import logs
from medsynth.config import Train
from medsynth.diffusion.objective import noise_rows, row_loss
from medsynth.models.denoiser import Denoiser

Draw = Callable[[torch.Generator], tuple[Tensor, Tensor]]
"""Return one batch: clean latents and encoded label maps."""

Report = Callable[[int, float], None]
"""Receive the step and the loss."""

_GRADIENT_BOUND = 1.0
_WARM_UP = 0.15  # share of the steps in which the rate rises
_KEEP_EVERY_S = 60.0  # at most so much of a killed training is lost


def open_ema(model: nn.Module, decay: float) -> EMAModel:
    """Return an exponential moving average of ``model``'s trainable parameters that warms up (Karras et al. 2024)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return EMAModel(parameters, decay=decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)


def fit(
    model: Denoiser,
    draw: Draw,
    what: str,
    steps: int,
    learning_rate: float,
    settings: Train,
    generator: torch.Generator,
    report: Report,
    keep: Path | None = None,
) -> None:
    """Train ``model`` in place by AdamW with a one-cycle rate and leave it with its averaged weights.

    Args:
        model: the denoiser.
        draw: gives the batches.
        what: what the progress bar calls it.
        steps: how many.
        learning_rate: the peak.
        settings: noise schedule, mask dropout, EMA decay.
        generator: randomness of batches, noise levels and noise.
        report: called at every step.
        keep: file in which an unfinished training is kept once a minute. A killed one goes on from there, and on the
            same device ends with the weights that it would have had. It is as sensitive as what is drawn; whoever
            called removes it.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=max(steps, 2), pct_start=_WARM_UP)
    ema = open_ema(model, settings.ema_decay)
    parts = {"model": model, "optimizer": optimizer, "rate": rate, "ema": ema}
    first = _go_on(keep, parts, generator)
    ema.to(device=parameters[0].device)
    model.train()
    kept = time.monotonic()
    for step in logs.progress(range(first, steps), what, steps - first):
        latents, masks = draw(generator)
        batch = noise_rows(latents, masks, model.preconditioning, settings.mask_dropout, generator)
        loss = row_loss(model, batch).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _GRADIENT_BOUND)
        optimizer.step()
        rate.step()
        ema.step(parameters)
        report(step, float(loss.detach()))
        if keep is not None and time.monotonic() - kept >= _KEEP_EVERY_S:
            _keep(keep, step + 1, parts, generator)
            kept = time.monotonic()
    ema.copy_to(parameters)


def _keep(path: Path, done: int, parts: dict[str, Any], generator: torch.Generator) -> None:
    scratch = path.with_suffix(".partial")
    states = {name: part.state_dict() for name, part in parts.items()}
    with scratch.open("wb") as file:
        torch.save({"done": done, "stream": generator.get_state(), **states}, file)
        file.flush()
        os.fsync(file.fileno())
    scratch.replace(path)


def _go_on(path: Path | None, parts: dict[str, Any], generator: torch.Generator) -> int:
    """Set all parts to where a killed training kept them, and return how many steps it had done."""
    if path is None or not path.is_file():
        return 0
    try:
        found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds; nothing is lost but time
        logs.say("what was kept of the training cannot be read: it begins again", reason=type(error).__name__)
        return 0
    for name, part in parts.items():
        part.load_state_dict(found[name])
    generator.set_state(found["stream"])
    logs.say("going on with what was kept of the training", steps_done=found["done"])
    return int(found["done"])
