"""Embedding tables: a unit's gradient is non-zero only in the rows that it looked up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medsynth.privacy.engine.part import Backward, Layer, Part, Saved, full, inner_product, scale_rows


@dataclass(frozen=True)
class EmbeddingTable:
    """The table: ``G_i[v] = sum_{t: index_it = v} g_it``.

    G uses ``|G_i|^2 = sum_{t,u} [index_it = index_iu] <g_it, g_iu>``: no table a unit is built.
    """

    index: Tensor
    grad: Tensor
    units: int
    shape: torch.Size

    @property
    def held(self) -> tuple[Tensor, ...]:
        """Output gradient; the indices cannot be poisoned."""
        return (self.grad,)

    def key(self) -> tuple[Any, ...]:
        """Sizes of a unit."""
        rows = self.grad.shape[0] // self.units
        return "embedding", tuple(self.grad.shape[1:]), rows, tuple(self.shape), self.grad.dtype

    def methods(self) -> tuple[str, ...]:
        """A sum into a table a unit."""
        return ("table",)

    def samples(self, first: int, last: int, method: str) -> Tensor:
        """Return ``G_i`` as tables."""
        index, grad = (t[first:last] for t in self._positions(self.grad))
        result = grad.new_zeros(last - first, *self.shape)
        return result.scatter_add_(1, index.unsqueeze(-1).expand_as(grad), grad)

    def grams(self) -> tuple[str, ...]:
        """Gram matrices over positions."""
        return ("gram",)

    def squares(self, method: str) -> Tensor:
        """Return the sum of ``<g_it, g_iu>`` over pairs of equal indices."""
        index, grad = self._positions(self.grad)
        same = (index.unsqueeze(1) == index.unsqueeze(2)).to(grad.dtype)
        return inner_product(torch.bmm(grad, grad.mT), same)

    def contractions(self) -> tuple[str, ...]:
        """One sum into the table."""
        return ("native",)

    def contract(self, factors: Tensor, held: tuple[Tensor, ...], method: str) -> Tensor:
        """Return the ordinary gradient of scaled output gradients."""
        grad = scale_rows(full(held[0]), factors).reshape(-1, self.shape[1])
        return grad.new_zeros(self.shape).index_add_(0, self.index.reshape(-1), grad)

    def _positions(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        return self.index.reshape(self.units, -1), full(grad).reshape(self.units, -1, self.shape[1])


class EmbeddingFamily:
    """``nn.Embedding``."""

    def refusal(self, module: nn.Module) -> str | None:
        """Refuse what changes the table in the forward pass, or scales by what other patients look up."""
        assert isinstance(module, nn.Embedding)
        if module.max_norm is not None:
            return "max_norm changes the table without noise"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq divides by how often other patients look a row up"
        return "sparse gradients cannot carry noise" if module.sparse else None

    def prepare(self, layer: Layer, input: Tensor) -> tuple[Tensor, None]:
        """Return the indices."""
        return input, None

    def run(self, layer: Layer, value: Tensor, extra: None) -> tuple[Tensor, Saved]:
        """Return the rows of the table."""
        assert layer.weight is not None
        return torch.nn.functional.embedding(value, layer.weight), (value,)

    def back(self, layer: Layer, saved: Saved, grad: Tensor, extra: None, units: int, wanted: bool) -> Backward:
        """Return the table; the padding row gets no gradient."""
        (index,) = saved
        parts: dict[str, Part] = {}
        if layer.weight is not None and "weight" in layer.trained:
            padding = layer.module.padding_idx
            if padding is not None:
                grad = grad.masked_fill((index == padding).unsqueeze(-1), 0)
            parts["weight"] = EmbeddingTable(index, grad, units, layer.weight.shape)
        return Backward(None, {}, parts)
