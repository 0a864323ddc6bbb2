"""The engines under test, each set up as its own users would: one step from the batch to the moved weights."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from medsynth.privacy.entropy import open_entropy
from medsynth.privacy.gradients import Batch, ClippedSum, open_backend, trainable
from medsynth.privacy.mechanism import DpSgd
from pipelines.bench.configurations import Problem

NOISE_MULTIPLIER = 1.0
LEARNING_RATE = 1e-5


class Unable(Exception):
    """The engine cannot do what the configuration asks for; its message says why."""


class Engine(Protocol):
    """One way to take a training step."""

    noise_seconds: float

    def step(self) -> None:
        """Take one step on the problem's whole batch."""

    def last(self) -> ClippedSum | None:
        """Return what the first step summed, before the noise; None for the plain step."""

    def clip(self, batches: Sequence[Batch]) -> ClippedSum:
        """Return the clipped sum of a few patients without a step."""

    def parameters(self) -> list[nn.Parameter]:
        """Return the trained parameters."""

    def release(self) -> None:
        """Let go of what a step leaves until the next one: gradients, per-sample gradients, sums."""


@dataclass
class Plain:
    """Forward, mean loss, backward, optimizer step: no privacy, the measure of all others."""

    problem: Problem
    noise_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.model = self.problem.copy()
        self.optimizer = _optimizer(self.model)

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.problem.row_loss(self.model, self.problem.whole).mean().backward()
        self.optimizer.step()

    def last(self) -> ClippedSum | None:
        return None

    def clip(self, batches: Sequence[Batch]) -> ClippedSum:
        raise Unable("a plain step clips nothing")

    def parameters(self) -> list[nn.Parameter]:
        return trainable(self.model)

    def release(self) -> None:
        self.optimizer.zero_grad()


@dataclass
class Ours:
    """A backend of :mod:`medsynth.privacy.gradients` with the mechanism's own noise, as stage ``train`` uses it."""

    problem: Problem
    backend_name: str
    noise_seconds: float = 0.0
    _last: ClippedSum | None = None
    _first: bool = True

    def __post_init__(self) -> None:
        self.model = self.problem.copy()
        self.optimizer = _optimizer(self.model)
        self.backend = open_backend(self.backend_name, self.model, self.problem.row_loss, self.problem.clip_norm)
        count = float(len(self.problem.batches))
        self.mechanism = DpSgd("bench", 0.5, 1000, NOISE_MULTIPLIER, self.problem.clip_norm, count)
        self.entropy = open_entropy("os")

    def step(self) -> None:
        self.optimizer.zero_grad()
        total = self.backend.clipped_sum(self.problem.batches)
        if self._first:  # the noise takes the place of the sum
            self._last = ClippedSum([tensor.clone() for tensor in total.tensors], total.norms)
            self._first = False
        started = self.problem.place.seconds()
        noisy = self.mechanism.noisy_mean(total.tensors, self.entropy)
        self.noise_seconds = self.problem.place.seconds() - started
        for parameter, gradient in zip(self.parameters(), noisy, strict=True):
            parameter.grad = gradient.reshape(parameter.shape)
        self.optimizer.step()

    def last(self) -> ClippedSum | None:
        return self._last

    def clip(self, batches: Sequence[Batch]) -> ClippedSum:
        return self.backend.clipped_sum(batches)

    def parameters(self) -> list[nn.Parameter]:
        return trainable(self.model)

    def release(self) -> None:
        self._last = None
        self.optimizer.zero_grad()


@dataclass
class OpacusHooks:
    """Opacus' GradSampleModule and DPOptimizer; ``functorch`` takes every layer's gradient by vmap.

    Its clip unit is the row: a patient's rows cannot be averaged before the clip.
    """

    problem: Problem
    functorch: bool = False
    noise_seconds: float = 0.0

    def __post_init__(self) -> None:
        from opacus.grad_sample import GradSampleModule
        from opacus.optimizers import DPOptimizer

        _refuse_draws(self.problem)
        self.module = GradSampleModule(self.problem.copy(), force_functorch=self.functorch)
        self.optimizer = DPOptimizer(_optimizer(self.module), **_opacus_settings(self.problem))

    def step(self) -> None:
        self._backward(self.problem.whole)
        self.optimizer.step()

    def last(self) -> ClippedSum | None:
        rows = [p.grad_sample.flatten(1).double().square().sum(1) for p in self.parameters()]  # type: ignore[attr-defined]
        return ClippedSum(_summed(self.parameters()), torch.stack(rows).sum(0).sqrt().tolist())

    def clip(self, batches: Sequence[Batch]) -> ClippedSum:
        self._backward(_join(batches))
        self.optimizer.clip_and_accumulate()
        found = self.last()
        assert found is not None
        return found

    def parameters(self) -> list[nn.Parameter]:
        return trainable(self.module)

    def release(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, batch: Batch) -> None:
        self.optimizer.zero_grad()
        self.problem.row_loss(self.module, batch).mean().backward()


@dataclass
class OpacusGhost:
    """Opacus' fast gradient clipping with ghost norms: two backward passes, as its loss wrapper runs them."""

    problem: Problem
    noise_seconds: float = 0.0

    def __post_init__(self) -> None:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping

        _refuse_draws(self.problem)
        settings = _opacus_settings(self.problem)
        self.module = GradSampleModuleFastGradientClipping(
            self.problem.copy(), max_grad_norm=self.problem.clip_norm, use_ghost_clipping=True
        )
        self.optimizer = DPOptimizerFastGradientClipping(_optimizer(self.module), **settings)

    def step(self) -> None:
        self._backward(self.problem.whole)
        self.optimizer.step()

    def last(self) -> ClippedSum | None:
        return ClippedSum(_summed(self.parameters()), self.module.per_sample_gradient_norms.double().tolist())

    def clip(self, batches: Sequence[Batch]) -> ClippedSum:
        self._backward(_join(batches))
        self.optimizer.accumulate()
        found = self.last()
        assert found is not None
        return found

    def parameters(self) -> list[nn.Parameter]:
        return trainable(self.module)

    def release(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def _backward(self, batch: Batch) -> None:
        from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

        self.optimizer.zero_grad()
        criterion = DPLossFastGradientClipping(
            self.module, self.optimizer, _Criterion(self.module, self.problem), "mean"
        )
        criterion(batch).backward()


class _Criterion:
    """The loss in the form that Opacus wraps: a callable with ``reduction``."""

    reduction = "mean"

    def __init__(self, module: nn.Module, problem: Problem) -> None:
        self.module, self.problem = module, problem

    def __call__(self, batch: Batch) -> Tensor:
        return self.problem.row_loss(self.module, batch)


@dataclass
class Vmap:
    """``torch.func``: vmap of grad over patients, then clip, sum and noise by hand."""

    problem: Problem
    noise_seconds: float = 0.0
    _last: ClippedSum | None = field(default=None)

    def __post_init__(self) -> None:
        self.model = self.problem.copy()
        self.optimizer = _optimizer(self.model)
        self.names = [name for name, p in self.model.named_parameters() if p.requires_grad]

    def step(self) -> None:
        self._last = None
        self.optimizer.zero_grad()
        sums, norms = self._clipped(self.problem.batches)
        scale = NOISE_MULTIPLIER * self.problem.clip_norm
        for parameter, total in zip(self.parameters(), sums, strict=True):
            parameter.grad = (total + torch.normal(0.0, scale, total.shape, device=total.device)) / len(norms)
        self.optimizer.step()
        self._last = ClippedSum([total.double() for total in sums], norms.tolist())

    def last(self) -> ClippedSum | None:
        return self._last

    def clip(self, batches: Sequence[Batch]) -> ClippedSum:
        sums, norms = self._clipped(batches)
        return ClippedSum([total.double() for total in sums], norms.tolist())

    def parameters(self) -> list[nn.Parameter]:
        return trainable(self.model)

    def release(self) -> None:
        self._last = None
        self.optimizer.zero_grad()

    def _clipped(self, batches: Sequence[Batch]) -> tuple[list[Tensor], Tensor]:
        from torch.func import functional_call, grad, vmap

        trained = dict(zip(self.names, (p.detach() for p in self.parameters()), strict=True))
        stacked = {key: torch.stack([batch[key] for batch in batches]) for key in batches[0]}

        def loss(weights: dict[str, Tensor], batch: Batch) -> Tensor:
            def model(*inputs: Tensor) -> Any:
                return functional_call(self.model, weights, inputs)

            return self.problem.row_loss(model, batch).mean()  # type: ignore[arg-type]  # called like the module

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            samples = vmap(grad(loss), in_dims=(None, 0))(trained, stacked)
        rows = [samples[name].flatten(1) for name in self.names]
        norms = torch.stack([row.square().sum(1) for row in rows]).sum(0).sqrt()
        factors = (self.problem.clip_norm / norms).clamp(max=1.0)
        sums = [factors @ row for row in rows]
        return [total.view_as(p) for total, p in zip(sums, self.parameters(), strict=True)], norms


ENGINES: dict[str, Callable[[Problem], Engine]] = {
    "plain": Plain,
    "bookkeeping": lambda problem: Ours(problem, "bookkeeping"),
    "naive-loop": lambda problem: Ours(problem, "unit"),
    "opacus-hooks": OpacusHooks,
    "opacus-ghost": OpacusGhost,
    "opacus-functorch": lambda problem: OpacusHooks(problem, functorch=True),
    "vmap": Vmap,
}


def torch_noise_seconds(engine: Engine, problem: Problem) -> float:
    """Return the seconds of noise by ``torch.normal`` and of the division, for the same parameters."""
    sums = [torch.zeros_like(p, requires_grad=False) for p in engine.parameters()]
    scale, started = NOISE_MULTIPLIER * problem.clip_norm, problem.place.seconds()
    for total in sums:
        (total + torch.normal(0.0, scale, total.shape, device=total.device)) / 2
    return problem.place.seconds() - started


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer with its state in place, so that no measured step allocates it."""
    parameters = trainable(model)
    optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _opacus_settings(problem: Problem) -> dict[str, Any]:
    return {
        "noise_multiplier": NOISE_MULTIPLIER,
        "max_grad_norm": problem.clip_norm,
        "expected_batch_size": len(problem.batches),
    }


def _refuse_draws(problem: Problem) -> None:
    if problem.configuration.draws > 1:
        raise Unable("n/a: its clip unit is the row, not the patient")


def _join(batches: Sequence[Batch]) -> Batch:
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def _summed(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [p.summed_grad.detach().double() for p in parameters]  # type: ignore[attr-defined]  # set by DPOptimizer
