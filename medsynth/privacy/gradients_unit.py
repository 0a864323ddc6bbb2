"""The reference backend: ordinary autograd, one patient at a time; right for every layer there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

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


@dataclass(frozen=True)
class UnitBackend:
    """Clipped sums by one forward and backward a patient; see :class:`medsynth.privacy.gradients.Backend`.

    *Guarantees*: each patient enters the sum with an L2 norm of at most ``clip_norm``, by construction.
    """

    model: nn.Module
    row_loss: RowLoss
    clip_norm: float
    name: str = "unit"

    def at(self, clip_norm: float) -> UnitBackend:
        """Return the same backend with another clip norm."""
        return replace(self, clip_norm=clip_norm)

    def clipped_sum(self, batches: Sequence[Batch]) -> ClippedSum:
        """Return the clipped sum over patients, one batch each; an empty list gives zeros."""
        parameters = trainable(self.model)
        sums = zero_sums(parameters)
        norms = []
        for batch in batches:
            losses = check_losses(self.row_loss(self.model, batch), rows_of(batch))
            # A parameter that this patient did not reach has gradient zero: None, skipped below.
            gradient = torch.autograd.grad(losses.mean(), parameters, allow_unused=True)
            norms.append(add_clipped(sums, gradient, self.clip_norm))
        return ClippedSum(sums, norms)
