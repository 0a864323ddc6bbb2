"""What a layer family promises: one parameter's share of a backward pass, unit by unit, and how a family is asked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

# Rounding of float32 products: a Gram norm is a sum of signed terms, each off by about EPSILON of itself.
EPSILON = 2.0**-24
# How many standard deviations of rounding a Gram norm is raised by, so that it is never too small.
ROUNDING_MARGIN = 8.0

Saved = tuple[Tensor, ...]


class Part(Protocol):
    """One parameter's share of one call of its layer, over ``units`` clip units of ``rows`` rows each.

    Write ``G_i`` for unit i's gradient. A part can instantiate ``G_i``, it may know ``|G_i|^2`` without doing so, and
    it can form ``sum_i c_i G_i`` with one ordinary weight gradient.
    """

    @property
    def units(self) -> int:
        """Number of clip units."""

    @property
    def shape(self) -> torch.Size:
        """Shape of the parameter."""

    @property
    def held(self) -> tuple[Tensor, ...]:
        """The tensors that must be kept until the clip factors are known; the first axis is rows."""

    def key(self) -> tuple[Any, ...]:
        """What the speed of the rules depends on, except number of units, device and threads."""

    def methods(self) -> tuple[str, ...]:
        """Ways to instantiate, best guess first."""

    def samples(self, first: int, last: int, method: str) -> Tensor:
        """Return ``G_i`` for ``first <= i < last``, (units, *shape)."""

    def grams(self) -> tuple[str, ...]:
        """Ways to take ``|G_i|^2`` without ``G_i``; empty if there is none worth trying."""

    def squares(self, method: str) -> Tensor:
        """Return upper bounds of ``|G_i|^2``, tight to rounding, (units,), by one of :meth:`grams`."""

    def contractions(self) -> tuple[str, ...]:
        """Ways to sum, best guess first."""

    def contract(self, factors: Tensor, held: tuple[Tensor, ...], method: str) -> Tensor:
        """Return ``sum_i factors_i G_i`` from (possibly cleaned) held tensors, by one of :meth:`contractions`."""


class Family(Protocol):
    """How one kind of layer is run, differentiated and taken apart."""

    def refusal(self, module: nn.Module) -> str | None:
        """Return why this module cannot be treated, or None."""

    def prepare(self, layer: Layer, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """Return the input as the layer's core sees it (padded, say) and what else :meth:`run` needs."""

    def run(self, layer: Layer, value: Tensor, extra: Any) -> tuple[Tensor, Saved]:
        """Return the output and what the backward pass needs, the layer's input first."""

    def back(self, layer: Layer, saved: Saved, grad: Tensor, extra: Any, units: int, wanted: bool) -> Backward:
        """Return the input's gradient (if ``wanted``) and the parts of the trained parameters."""


@dataclass(frozen=True)
class Layer:
    """A module with trained parameters of its own.

    Attributes:
        name: where it is in the model.
        module: the layer.
        family: how it is treated.
        weight: its weight, trained or not; None without one.
        bias: likewise.
        trained: which of ``weight`` and ``bias`` are trained.
        notes: what the family remembers of it.
    """

    name: str
    module: Any
    family: Family
    weight: nn.Parameter | None
    bias: nn.Parameter | None
    trained: frozenset[str]
    notes: dict[str, Any] = field(default_factory=dict)

    def parameter(self, name: str) -> nn.Parameter:
        """Return the trained parameter of this name."""
        found = self.weight if name == "weight" else self.bias
        assert found is not None
        return found


@dataclass(frozen=True)
class Backward:
    """What one call of a layer gives in the backward pass.

    Attributes:
        grad_input: gradient of the input, None if nobody needs it.
        small: per-unit gradients of small parameters, (units, *shape) by name.
        parts: the larger parameters by name.
    """

    grad_input: Tensor | None
    small: dict[str, Tensor]
    parts: dict[str, Part]


def full(value: Tensor) -> Tensor:
    """Return ``value`` in at least single precision: norms and sums of half-precision tensors are taken in float32."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value


def by_unit(value: Tensor, units: int) -> Tensor:
    """Return (units, rows, ...) of (units * rows, ...); a unit's rows follow each other."""
    return value.reshape(units, value.shape[0] // units, *value.shape[1:])


def scale_rows(value: Tensor, factors: Tensor) -> Tensor:
    """Return ``value`` with the rows of unit i multiplied by ``factors_i``."""
    rows = value.shape[0] // factors.shape[0]
    each = factors.to(value.dtype)
    return value * (each if rows == 1 else each.repeat_interleave(rows)).view(-1, *(1,) * (value.ndim - 1))


def sum_rows(value: Tensor, units: int) -> Tensor:
    """Return (units, ...) of (rows, ...), summed over the rows of a unit."""
    return value if value.shape[0] == units else by_unit(value, units).sum(1)


def cast_parameters(layer: Layer, value: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return input, weight and bias in the dtype that an active autocast asks for, as they are without one."""
    weight, bias = layer.parameter("weight"), layer.bias
    if not torch.is_autocast_enabled(value.device.type):
        return value, weight, bias
    dtype = torch.get_autocast_dtype(value.device.type)
    return value.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def inner_product(left: Tensor, right: Tensor) -> Tensor:
    """Return upper bounds, tight to rounding, of ``<left_i, right_i>`` of Gram matrices; ``left`` is overwritten.

    Each term of the sum carries an independent rounding error of about 2^-24 of itself, so the sum is off by about
    2^-24 times the 2-norm of its terms: that, times ``ROUNDING_MARGIN``, is added, and a negative sum becomes zero.
    Without it, gradients that cancel over positions would get a norm that is too small, and pass unclipped.

    Args:
        left: (units, ...), overwritten.
        right: the same shape.
    """
    terms = left.mul_(right).flatten(1)
    spread = torch.linalg.vector_norm(terms, dim=1)
    return terms.sum(1).clamp_(min=0).add_(spread, alpha=ROUNDING_MARGIN * EPSILON)
