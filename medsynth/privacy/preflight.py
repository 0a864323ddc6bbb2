"""Before the first patient is read: does this backend clip this model rightly? Compared with a naive loop.

It runs on PUBLIC batches (phantoms) of the real shape; its evidence goes into the ledger. No preflight, no training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medsynth.errors import PrivacyError
from medsynth.privacy.gradients import Backend, Batch, RowLoss

# Single-precision gradients summed in another order differ by 1e-6..1e-5 of their norm; a wrong layer rule by 1e-2 up.
NORM_TOLERANCE = 1e-3
SUM_TOLERANCE = 1e-3
# The clip itself is exact up to rounding; this is the promise on which sensitivity rests.
CLIP_TOLERANCE = 1e-6

# Layers whose output for one patient depends on the other patients of a batch, or which keep statistics of patients
# outside of the gradient (pitfall 9); by class name, so that look-alikes of any library are found.
_CROSS_PATIENT = ("BatchNorm", "BatchRenorm", "GhostNorm", "VectorQuantiz", "EMAQuantiz", "Codebook")


@dataclass(frozen=True)
class Evidence:
    """What the preflight measured, with public inputs only.

    Attributes:
        backend: name of the backend.
        clip_norm: the clip norm that training will use.
        batches: how many public batches were compared.
        max_norm_error: largest relative error of a norm before the clip.
        sum_error: relative error of the clipped sum, at the given clip norm and at one that binds.
        max_clipped_norm: largest norm with which one batch entered a sum, divided by the clip norm.
        passed: whether all three are within tolerance.
    """

    backend: str
    clip_norm: float
    batches: int
    max_norm_error: float
    sum_error: float
    max_clipped_norm: float
    passed: bool

    def to_json(self) -> dict[str, Any]:
        """Return the evidence as JSON values, for the ledger."""
        return asdict(self)


def refuse_modules(model: nn.Module) -> None:
    """Refuse models whose layers mix patients or remember them outside of the clipped gradient.

    Raises:
        PrivacyError: names every such layer and what to use instead.
    """
    bad = [
        f"{name or 'model'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if any(mark in type(module).__name__ for mark in _CROSS_PATIENT)
        or (isinstance(module, nn.modules.instancenorm._InstanceNorm) and module.track_running_stats)
    ]
    if bad:
        raise PrivacyError(
            "layers that mix patients or keep statistics of them cannot be trained on patients: "
            f"{', '.join(bad)}; use GroupNorm or LayerNorm, and a fixed or public codebook"
        )


def preflight(
    backend: Backend, model: nn.Module, row_loss: RowLoss, batches: Sequence[Batch], clip_norm: float
) -> Evidence:
    """Compare a backend with a naive loop over public batches; the model is left as it was.

    *Guarantees*: none by itself; it falsifies a backend whose norms, sum or clip are wrong on this model and shape.
    One draw of the randomness inside the model (dropout) would fail it, so such models are refused by their figures.

    Args:
        backend: the backend that training will use, with ``clip_norm``.
        model: the model that it was opened for.
        row_loss: the loss that it was opened for.
        batches: PUBLIC batches of the real shape, at least two, best with different numbers of rows.
        clip_norm: the clip norm that training will use.

    Raises:
        PrivacyError: a forbidden layer, too few batches, or figures beyond the tolerances.
    """
    refuse_modules(model)
    if len(batches) < 2:
        raise PrivacyError(f"the preflight needs at least two public batches, got {len(batches)}")
    if backend.clip_norm != clip_norm:
        raise PrivacyError(f"the backend clips at {backend.clip_norm:g}, the plan says {clip_norm:g}")
    before = [buffer.clone() for buffer in model.buffers()]
    gradients = [_naive_gradient(model, row_loss, batch) for batch in batches]
    if not all(torch.equal(old, new) for old, new in zip(before, model.buffers(), strict=True)):
        raise PrivacyError("a layer changed its buffers in the forward pass: it would remember patients without noise")
    norms = [math.sqrt(sum(float((part**2).sum()) for part in gradient)) for gradient in gradients]
    if not all(math.isfinite(norm) and norm > 0 for norm in norms):
        raise PrivacyError("the preflight's public batches give gradients that vanish or are not finite")
    # Gradients of a fresh model may all be shorter than the clip norm: half the smallest one binds for sure.
    binding = min(norms) / 2
    figures = [_compare(backend.at(bound), batches, gradients, norms, bound) for bound in (clip_norm, binding)]
    norm_error, sum_error, clipped = (max(column) for column in zip(*figures, strict=True))
    passed = norm_error <= NORM_TOLERANCE and sum_error <= SUM_TOLERANCE and clipped <= 1 + CLIP_TOLERANCE
    evidence = Evidence(backend.name, clip_norm, len(batches), norm_error, sum_error, clipped, passed)
    if not passed:
        raise PrivacyError(
            f"preflight of gradient backend '{backend.name}' failed on public batches: norm error {norm_error:.2e} "
            f"(allowed {NORM_TOLERANCE:g}), sum error {sum_error:.2e} (allowed {SUM_TOLERANCE:g}), largest clipped "
            f"norm {clipped:.6f} C (allowed 1 + {CLIP_TOLERANCE:g}): use train.backend 'unit'"
        )
    return evidence


def _naive_gradient(model: nn.Module, row_loss: RowLoss, batch: Batch) -> list[Tensor]:
    """Return one patient's gradient in float64, by a plain backward into ``.grad`` (no code of the backends)."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    row_loss(model, batch).mean().backward()
    result = []
    for parameter, grad in zip(parameters, kept, strict=True):
        found = parameter.grad
        result.append((torch.zeros_like(parameter) if found is None else found).detach().double())
        parameter.grad = grad
    return result


def _compare(
    backend: Backend, batches: Sequence[Batch], gradients: list[list[Tensor]], norms: list[float], bound: float
) -> tuple[float, float, float]:
    """Return the norm error, the sum error and the largest clipped norm / bound."""
    together = backend.clipped_sum(batches)
    norm_error = max(abs(got - want) / want for got, want in zip(together.norms, norms, strict=True))
    expected = [
        sum((part * min(1.0, bound / norm) for part, norm in zip(parts, norms, strict=True)), torch.zeros(()))
        for parts in zip(*gradients, strict=True)
    ]
    distance = _length([got - want for got, want in zip(together.tensors, expected, strict=True)])
    alone = [_length(backend.clipped_sum([batch]).tensors) for batch in batches]
    # Relative to the shortest summand: opposite gradients may cancel in the sum.
    return norm_error, distance / min(bound, *norms), max(alone) / bound


def _length(parts: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float((part.double() ** 2).sum()) for part in parts))
