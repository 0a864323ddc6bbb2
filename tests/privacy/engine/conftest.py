"""The naive loop that every rule and every network is compared with."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from medsynth.privacy.engine.bookkeeping import KEEP_BYTES, BookkeepingBackend
from medsynth.privacy.engine.choice import Chooser
from medsynth.privacy.gradients import Batch, ClippedSum, RowLoss

Naive = Callable[[nn.Module, Sequence[Batch], float, RowLoss], tuple[list[Tensor], list[float]]]


def _naive(model: nn.Module, batches: Sequence[Batch], bound: float, loss: RowLoss) -> tuple[list[Tensor], list[float]]:
    model = copy.deepcopy(model).double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    sums, norms = [torch.zeros_like(p, requires_grad=False) for p in parameters], []
    for batch in batches:
        double = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        rows = len(next(iter(double.values())))
        mean = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        for row in range(rows):
            one = loss(model, {k: v[row : row + 1] for k, v in double.items()}).sum()
            for total, part in zip(mean, torch.autograd.grad(one, parameters, allow_unused=True), strict=True):
                if part is not None:
                    total.add_(part / rows)
        norms.append(_length(mean))
        for total, part in zip(sums, mean, strict=True):
            total.add_(part * min(1.0, bound / max(norms[-1], 1e-30)))
    return sums, norms


def _length(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))


def row_loss(model: nn.Module, batch: Batch) -> Tensor:
    """Weigh every value of a model's output differently, so that gradients neither vanish nor are alike."""
    output: Tensor = model(batch["x"])
    weights = torch.sin(torch.arange(output[0].numel(), dtype=output.dtype)).view_as(output[0])
    return (output * weights).flatten(1).sum(1) + output.square().flatten(1).mean(1)


def _assert_exact(
    model: nn.Module, batches: Sequence[Batch], loss: RowLoss = row_loss, kind: str | None = None
) -> ClippedSum:
    _, norms = _naive(model, batches, 1.0, loss)
    bound = sorted(norms)[len(norms) // 2] * 0.9
    wanted, _ = _naive(model, batches, bound, loss)
    backend = BookkeepingBackend(model, loss, bound, chooser=Chooser(KEEP_BYTES, kind))
    found = backend.clipped_sum(batches)
    assert found.norms == pytest.approx(norms, rel=1e-5)
    assert _length([a - b for a, b in zip(found.tensors, wanted, strict=True)]) <= 1e-5 * bound
    for batch in batches:
        assert _length(backend.clipped_sum([batch]).tensors) <= bound * (1 + 1e-6)
    return found


@pytest.fixture(scope="session")
def assert_exact() -> Callable[..., ClippedSum]:
    """Return a check of norms, of the clipped sum at a bound amid the norms, and of every patient's clip alone."""
    return _assert_exact


@pytest.fixture(scope="session")
def naive() -> Naive:
    """Return (model, batches, bound, row loss) -> clipped sum and norms, row by row in float64."""
    return _naive


@pytest.fixture(scope="session")
def length() -> Callable[[Sequence[Tensor]], float]:
    """Return the L2 norm over several tensors."""
    return _length
