"""Linear layers: y = x W^T + b over any number of positions (rows, tokens, voxels) of a unit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from medsynth.privacy.engine.part import Backward, Layer, Part, Saved, cast_parameters, full, inner_product, scale_rows


@dataclass(frozen=True)
class LinearWeight:
    """The weight: with positions t of unit i, ``G_i = sum_t g_it x_it^T`` (Goodfellow 2015).

    S instantiates it by one batched product; G uses ``|G_i|^2 = sum_{t,u} <x_it, x_iu> <g_it, g_iu>``.
    """

    value: Tensor
    grad: Tensor
    units: int

    @property
    def shape(self) -> torch.Size:
        """Shape of the weight, (out, in)."""
        return torch.Size((self.grad.shape[-1], self.value.shape[-1]))

    @property
    def held(self) -> tuple[Tensor, ...]:
        """Input and output gradient."""
        return self.value, self.grad

    def key(self) -> tuple[Any, ...]:
        """Sizes of a unit."""
        rows = self.value.shape[0] // self.units
        return "linear", tuple(self.value.shape[1:]), tuple(self.grad.shape[1:]), rows, self.value.dtype

    def methods(self) -> tuple[str, ...]:
        """One batched product."""
        return ("product",)

    def samples(self, first: int, last: int, method: str) -> Tensor:
        """Return ``G_i`` by a batched product over positions."""
        x, g = (self._positions(t)[first:last] for t in (self.value, self.grad))
        return torch.bmm(g.mT, x)

    def grams(self) -> tuple[str, ...]:
        """Gram matrices over positions, where they are not far larger than the weight."""
        positions = self._positions(self.value).shape[1]
        return ("gram",) if positions**2 <= 8 * self.shape.numel() else ()

    def squares(self, method: str) -> Tensor:
        """Return ``<X_i X_i^T, G_i G_i^T>``."""
        x, g = self._positions(self.value), self._positions(self.grad)
        if x.shape[1] == 1:
            return torch.linalg.vector_norm(x, dim=(1, 2)).mul_(torch.linalg.vector_norm(g, dim=(1, 2))).square_()
        return inner_product(torch.bmm(x, x.mT), torch.bmm(g, g.mT))

    def contractions(self) -> tuple[str, ...]:
        """One product."""
        return ("native",)

    def contract(self, factors: Tensor, held: tuple[Tensor, ...], method: str) -> Tensor:
        """Return ``(c g)^T x``, one product."""
        x, g = held
        if g.shape[-1] <= x.shape[-1]:
            g = scale_rows(full(g), factors)
        else:
            x = scale_rows(full(x), factors)
        return full(g).flatten(0, -2).T @ full(x).flatten(0, -2)

    def _positions(self, tensor: Tensor) -> Tensor:
        return full(tensor).reshape(self.units, -1, tensor.shape[-1])


class LinearFamily:
    """``nn.Linear``."""

    def refusal(self, module: nn.Module) -> str | None:
        """Return None: every linear layer can be treated."""
        return None

    def prepare(self, layer: Layer, input: Tensor) -> tuple[Tensor, None]:
        """Return the input."""
        return input, None

    def run(self, layer: Layer, value: Tensor, extra: None) -> tuple[Tensor, Saved]:
        """Return ``x W^T + b``."""
        value, weight, bias = cast_parameters(layer, value)
        return torch.nn.functional.linear(value, weight, bias), (value,)  # type: ignore[arg-type]  # it has a weight

    def back(self, layer: Layer, saved: Saved, grad: Tensor, extra: None, units: int, wanted: bool) -> Backward:
        """Return ``g W``, the bias ``sum_t g_it`` and the weight."""
        (value,) = saved
        small = {}
        if "bias" in layer.trained:
            bias = full(grad)
            small["bias"] = bias if bias.shape[:-1] == (units,) else bias.reshape(units, -1, bias.shape[-1]).sum(1)
        parts: dict[str, Part] = {}
        if "weight" in layer.trained:
            parts["weight"] = LinearWeight(value, grad, units)
        assert layer.weight is not None
        return Backward(grad @ layer.weight.to(grad.dtype) if wanted else None, small, parts)
