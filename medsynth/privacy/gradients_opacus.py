"""Clipped sums by Opacus' per-sample gradient hooks: many patients in one backward.

Opacus 1.6.0 computes Conv2d per-sample gradients wrongly, without a word, when a layer's input is not contiguous. So
every Conv2d input is made contiguous here, and the preflight still compares the result with a naive loop.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from torch import Tensor, nn

from medsynth.errors import PrivacyError
from medsynth.privacy.gradients import (
    Batch,
    ClippedSum,
    RowLoss,
    add_clipped,
    check_losses,
    rows_of,
    trainable,
    zero_sums,
)

# Rows of one forward: per-sample gradients take rows x parameters x 4 bytes.
MAX_ROWS = 64


@dataclass(frozen=True)
class OpacusBackend:
    """Clipped sums by Opacus hooks; see :class:`medsynth.privacy.gradients.Backend`.

    *Guarantees*: what enters the sum for one patient is at most ``clip_norm`` long, because the instantiated gradient
    itself is clipped (unlike ghost clipping). That it is the patient's own gradient rests on Opacus' layer rules:
    hence the preflight.

    Attributes:
        model: must be in training mode, else Opacus records nothing (refused).
        row_loss: losses by row.
        clip_norm: L2 bound on one patient's gradient.
        contiguous: repair the inputs of Conv2d; switched off only to show that the preflight catches it.
    """

    model: nn.Module
    row_loss: RowLoss
    clip_norm: float
    contiguous: bool = True
    name: str = "opacus"

    def at(self, clip_norm: float) -> OpacusBackend:
        """Return the same backend with another clip norm."""
        return replace(self, clip_norm=clip_norm)

    def clipped_sum(self, batches: Sequence[Batch]) -> ClippedSum:
        """Return the clipped sum over patients, one batch each; an empty list gives zeros."""
        if not all(module.training for module in self.model.modules()):
            raise PrivacyError(
                "Opacus records nothing of layers in eval mode: call model.train(), or use backend 'unit'"
            )
        parameters = trainable(self.model)
        sums = zero_sums(parameters)
        norms: list[float] = []
        with _hooked(self.model, self.contiguous):
            for group in _groups(batches):
                for gradient in self._patient_gradients(group, parameters):
                    norms.append(add_clipped(sums, gradient, self.clip_norm))
        return ClippedSum(sums, norms)

    def _patient_gradients(self, group: Sequence[Batch], parameters: Sequence[nn.Parameter]) -> list[list[Tensor]]:
        """Return each patient's mean gradient, patients x parameters."""
        rows = [rows_of(batch) for batch in group]
        owner = torch.repeat_interleave(torch.tensor(rows)).to(parameters[0].device)
        merged = {key: torch.cat([batch[key] for batch in group]).contiguous() for key in group[0]}
        means = [parameter.new_zeros((len(group), *parameter.shape)) for parameter in parameters]
        for start in range(0, sum(rows), MAX_ROWS):
            chunk = {key: value[start : start + MAX_ROWS] for key, value in merged.items()}
            part = owner[start : start + MAX_ROWS]
            for mean, sample in zip(means, self._row_gradients(chunk, len(part), parameters), strict=True):
                if sample is not None:
                    mean.index_add_(0, part, sample)
        for index, count in enumerate(rows):
            for mean in means:
                mean[index] /= count
        return [[mean[index] for mean in means] for index in range(len(group))]

    def _row_gradients(self, batch: Batch, rows: int, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
        losses = check_losses(self.row_loss(self.model, batch), rows)
        with warnings.catch_warnings():
            # The first layer's input needs no gradient; Opacus uses the gradient of its output only.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            losses.sum().backward()
        return [_take_sample(parameter, rows) for parameter in parameters]


def _take_sample(parameter: nn.Parameter, rows: int) -> Tensor | None:
    sample: Any = getattr(parameter, "grad_sample", None)
    total = parameter.grad
    parameter.grad = None
    parameter.grad_sample = None  # type: ignore[attr-defined]  # Opacus hangs it on the parameter
    if sample is None and total is None:
        return None
    if not isinstance(sample, Tensor) or sample.shape[0] != rows:
        raise PrivacyError(
            "Opacus gave no per-sample gradient for a trained parameter (a weight used outside its layer, "
            "or a batch axis that is not first): use train.backend 'unit'"
        )
    return sample.detach()


def _groups(batches: Sequence[Batch]) -> Iterator[list[Batch]]:
    """Yield whole patients together, at most MAX_ROWS rows a group unless one patient alone has more."""
    group: list[Batch] = []
    rows = 0
    for batch in batches:
        count = rows_of(batch)
        if group and rows + count > MAX_ROWS:
            yield group
            group, rows = [], 0
        group.append(batch)
        rows += count
    if group:
        yield group


@contextlib.contextmanager
def _hooked(model: nn.Module, contiguous: bool) -> Iterator[None]:
    """Attach Opacus' hooks for the time of the block and leave the model as it was."""
    kept = [(parameter, parameter.grad) for parameter in trainable(model)]
    for parameter, _ in kept:
        parameter.grad = None
    repairs = [
        module.register_forward_pre_hook(_contiguous_inputs)
        for module in model.modules()
        if contiguous and isinstance(module, nn.Conv2d)
    ]
    try:
        hooks = GradSampleHooks(model, loss_reduction="sum", strict=True)
    except NotImplementedError as error:
        for repair in repairs:
            repair.remove()
        raise PrivacyError(f"Opacus refuses the model: {error}; use train.backend 'unit'") from None
    try:
        yield
    finally:
        hooks.cleanup()
        for repair in repairs:
            repair.remove()
        for module in model.modules():
            # Left behind when a forward or backward raised.
            module.__dict__.pop("activations", None)
            module.__dict__.pop("max_batch_len", None)
        for parameter, grad in kept:
            parameter.grad = grad


def _contiguous_inputs(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(value.contiguous() for value in inputs)
