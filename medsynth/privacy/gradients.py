"""Per-patient clipped gradient sums: what a backend promises, and the door to the backends.

One patient is one clip unit: the mean gradient over all of its rows (records x noise draws) is clipped once. Sums are
kept in double precision, but for what the matrix products of one backward pass add up in single precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from medsynth.errors import PrivacyError
from medsynth.privacy.mechanism import clip_factor

Batch = dict[str, Tensor]
"""One patient's tensors; the first axis of each is the row."""

RowLoss = Callable[[nn.Module, Batch], Tensor]
"""(model, batch) -> one loss a row; a function of the batch only (noise and time steps lie in the batch)."""


@dataclass(frozen=True)
class ClippedSum:
    """The sum of clipped patient gradients.

    Attributes:
        tensors: one a trainable parameter, in the order of ``model.parameters()``; float64, or float32 from a
            single backward pass over all patients. Nothing else holds them: the noise may take their place.
        norms: L2 norm of each patient's gradient before the clip; 0 for a patient that was not finite. Private.
    """

    tensors: list[Tensor]
    norms: list[float]


class Backend(Protocol):
    """A way to compute :class:`ClippedSum`; all of them give the same numbers."""

    @property
    def name(self) -> str:
        """Its name in the configuration."""

    @property
    def clip_norm(self) -> float:
        """L2 bound on one patient's gradient."""

    def clipped_sum(self, batches: Sequence[Batch]) -> ClippedSum:
        """Return the clipped sum over patients, one batch each; an empty list gives zeros."""

    def at(self, clip_norm: float) -> Backend:
        """Return the same backend with another clip norm (the preflight needs one that binds)."""


def open_backend(name: str, model: nn.Module, row_loss: RowLoss, clip_norm: float) -> Backend:
    """Open a backend for a model whose trainable parameters are already chosen (``requires_grad``).

    Args:
        name: ``bookkeeping`` (one backward for many patients), ``unit`` (autograd patient by patient, the reference)
            or ``opacus`` (GradSampleModule hooks).
        model: the denoiser; its state is not changed.
        row_loss: losses by row.
        clip_norm: L2 bound on one patient's gradient.

    Raises:
        PrivacyError: unknown name, a model with nothing to train, or parameters that the backend cannot clip.
    """
    if not trainable(model):
        raise PrivacyError("the model has no trainable parameter: nothing to train privately")
    if name == "bookkeeping":
        from medsynth.privacy.engine.bookkeeping import BookkeepingBackend

        return BookkeepingBackend(model, row_loss, clip_norm)
    if name == "unit":
        from medsynth.privacy.gradients_unit import UnitBackend

        return UnitBackend(model, row_loss, clip_norm)
    if name == "opacus":
        from medsynth.privacy.gradients_opacus import OpacusBackend

        return OpacusBackend(model, row_loss, clip_norm)
    raise PrivacyError(f"unknown gradient backend '{name}': expected bookkeeping, unit or opacus")


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained, in the order of every clipped sum."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def zero_sums(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return one float64 zero tensor a parameter."""
    return [torch.zeros_like(parameter, dtype=torch.float64, requires_grad=False) for parameter in parameters]


def add_clipped(sums: Sequence[Tensor], gradient: Sequence[Tensor | None], clip_norm: float) -> float:
    """Add one patient's gradient, clipped, to ``sums`` in place.

    Args:
        sums: float64 accumulators, owned by the caller.
        gradient: one tensor a parameter; None where the parameter was not used.
        clip_norm: L2 bound over all tensors together.

    Returns:
        The norm before the clip, 0 for a gradient that is not finite (which then adds nothing).
    """
    squares = [part.double().square().sum() for part in gradient if part is not None]
    norm = float(torch.stack(squares).sum().sqrt()) if squares else 0.0
    factor = clip_factor(norm, clip_norm)
    if factor == 0.0:
        return 0.0
    for total, part in zip(sums, gradient, strict=True):
        if part is not None:
            total.add_(part.detach(), alpha=factor)
    return norm


def rows_of(batch: Batch) -> int:
    """Return the number of rows of one patient.

    Raises:
        PrivacyError: no tensors, no rows, or tensors of different lengths.
    """
    lengths = {int(value.shape[0]) for value in batch.values()}
    if len(lengths) != 1 or 0 in lengths:
        raise PrivacyError("a patient's batch needs tensors with one and the same number of rows, at least one")
    return lengths.pop()


def check_losses(losses: Tensor, rows: int) -> Tensor:
    """Return ``losses`` if there is one a row, as the clip unit needs.

    Raises:
        PrivacyError: another shape, e.g. a loss that was already averaged over patients.
    """
    if losses.shape != (rows,):
        raise PrivacyError(f"row_loss must return one loss a row, shape ({rows},), got {tuple(losses.shape)}")
    return losses
