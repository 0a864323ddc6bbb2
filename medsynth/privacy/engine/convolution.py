"""Convolutions and transposed convolutions of one, two or three dimensions, with any stride, dilation and groups."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from medsynth.privacy.engine.gram import Axis, box_matrix, box_sum, joined, joined_share
from medsynth.privacy.engine.part import (
    Backward,
    Layer,
    Part,
    Saved,
    by_unit,
    cast_parameters,
    full,
    inner_product,
    scale_rows,
    sum_rows,
)

# Floats of Gram matrices that are worked on at a time: they stay in a core's cache.
_BLOCK = 2**18
# Squared number of positions up to which the box sum is one product with a constant matrix.
_DENSE = 256
# Share of a kernel that meets voxels, not padding, up to which the contraction is worth a try tap by tap.
_SEEN = 0.5
# Floats of unfolded patches of a whole batch up to which they are worth a try.
_UNFOLDED = 2**26

_Ints = tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Stride, padding, dilation, transposed, output padding and groups, as ``torch.convolution`` takes them."""

    stride: _Ints
    padding: _Ints
    dilation: _Ints
    transposed: bool
    output_padding: _Ints
    groups: int

    def arguments(self, groups: int | None = None) -> tuple[Any, ...]:
        """Return the arguments after the tensors, with other groups if given."""
        return (self.stride, self.padding, self.dilation, self.transposed, self.output_padding, groups or self.groups)

    def pointwise(self, shape: torch.Size) -> bool:
        """Whether a weight of this shape sees one voxel at a time."""
        ones = all(size == 1 for size in (*shape[2:], *self.stride))
        return ones and not any(self.padding) and not any(self.output_padding)

    def product(self, weight: Tensor, value: Tensor) -> bool:
        """Whether to run it as a batched product, which takes half the time of a pointwise convolution on the CPU."""
        plain = self.groups == 1 and not self.transposed and value.device.type == "cpu" and value.is_contiguous()
        return plain and self.pointwise(weight.shape)


@dataclass(frozen=True)
class ConvolutionWeight:
    """The weight of ``y[o] = sum_j W_j x[s o + d j - p]``: ``G_i = sum_o g_i[o] u_i[o]^T`` with unfolded patches u.

    For a transposed convolution input and output gradient change places, and the rest is the same.

    - *grouped*, *single*, *unfold*: G_i itself; the batch as groups of one convolution, one weight gradient a unit, or
      a batched product with unfolded patches.
    - *swapped*: for few output channels and stride 1, a batched product with unfolded patches of the output gradient:
      ``W_j = sum_q g[q - d j + p] x[q]^T``.
    - *box*, *dense*: ``|G_i|^2 = <U_i^T U_i, G_i^T G_i>`` (Goodfellow 2015; Bu et al. 2022, eq. 2.2), with the Gram
      matrix of patches as a box sum of that of the input (see :mod:`medsynth.privacy.engine.gram`).
    - contraction: ``sum_i c_i G_i`` is the ordinary weight gradient for output gradients scaled by c: *native*, or by
      *taps*, ``W_j = sum_o g[o] x[s o + d j - p]^T``, one product a kernel offset over the voxels that it joins.
    """

    value: Tensor
    grad: Tensor
    units: int
    geometry: Geometry
    shape: torch.Size

    @property
    def held(self) -> tuple[Tensor, ...]:
        """Input and output gradient."""
        return self.value, self.grad

    def key(self) -> tuple[Any, ...]:
        """Sizes of a unit, geometry and memory layout."""
        layout = self.value.is_contiguous(), self.grad.is_contiguous()
        sizes = tuple(self.value.shape[1:]), tuple(self.grad.shape[1:]), tuple(self.shape)
        return "convolution", *sizes, self.value.shape[0] // self.units, self.geometry, layout, self.value.dtype

    def methods(self) -> tuple[str, ...]:
        """Ways to instantiate; a pointwise convolution is a batched product."""
        if self._pointwise():
            return ("unfold", "grouped")
        taps = math.prod(self.shape[2:])
        found = ["grouped", "single"]
        if taps * self._patched().numel() <= _UNFOLDED:
            found.append("unfold")
        if self._swappable() and taps * self.grad.numel() <= _UNFOLDED:
            found.append("swapped")
        return tuple(found)

    def samples(self, first: int, last: int, method: str) -> Tensor:
        """Return ``G_i`` by one of :meth:`methods`."""
        rows = self.value.shape[0] // self.units
        x, g = (full(t[first * rows : last * rows]) for t in (self.value, self.grad))
        if method == "unfold":
            return self._by_patches(x, g, last - first)
        if method == "swapped":
            return self._by_patches_of_gradient(x, g, last - first)
        if method == "single":
            each = zip(x.split(rows), g.split(rows), strict=True)
            return torch.stack([self._weight_gradient(a, b) for a, b in each])
        return self._by_groups(x, g, last - first)

    def grams(self) -> tuple[str, ...]:
        """Ways to take Gram norms; none where Gram matrices cost far more than the weight gradient."""
        source, seen, _ = self._roles()
        rows = self.value.shape[0] // self.units
        inputs, outputs = (rows * math.prod(t.shape[2:]) for t in (source, seen))
        work = inputs**2 * source.shape[1] + outputs**2 * seen.shape[1]
        if work > 4 * outputs * self.shape.numel():
            return ()
        small = max(inputs, outputs) ** 2 // rows**2 <= _DENSE
        return ("dense", "box") if small and not self._pointwise() else ("box",)

    def squares(self, method: str) -> Tensor:
        """Return ``<box_sum(X_i^T X_i), G_i^T G_i>``, summed over groups, a few units at a time."""
        source, seen, axes = self._roles()
        rows = source.shape[0] // self.units
        positions = rows * max(math.prod(source.shape[2:]), math.prod(seen.shape[2:]))
        step = max(1, min(self.units, _BLOCK // positions**2))
        found = []
        for first in range(0, self.units, step):
            part = slice(first * rows, (first + step) * rows)
            found.append(self._gram_squares(full(source[part]), full(seen[part]), axes, rows, method))
        return torch.cat(found) if len(found) > 1 else found[0]

    def contractions(self) -> tuple[str, ...]:
        """The native weight gradient; also by taps on maps so small that most of the kernel meets padding."""
        tried = self.geometry.groups == 1 and joined_share(self._roles()[2]) <= _SEEN
        return ("native", "taps") if tried else ("native",)

    def contract(self, factors: Tensor, held: tuple[Tensor, ...], method: str) -> Tensor:
        """Return the ordinary weight gradient, with the smaller of input and output gradient scaled."""
        x, g = (full(t) for t in held)
        if g.numel() <= x.numel():
            g = scale_rows(g, factors)
        else:
            x = scale_rows(x, factors)
        return self._by_taps(x, g) if method == "taps" else self._weight_gradient(x, g)

    def _patched(self) -> Tensor:
        return self.grad if self.geometry.transposed else self.value

    def _pointwise(self) -> bool:
        return self.geometry.pointwise(self.shape)

    def _roles(self) -> tuple[Tensor, Tensor, tuple[Axis, ...]]:
        """Return the tensor whose patches enter, the one at whose positions they are centred, and the axes."""
        source, seen = (self.grad, self.value) if self.geometry.transposed else (self.value, self.grad)
        geometry = self.geometry
        sizes = (source.shape[2:], seen.shape[2:], self.shape[2:], geometry.stride, geometry.padding, geometry.dilation)
        return source, seen, tuple(Axis(*values) for values in zip(*sizes, strict=True))

    def _gram_squares(self, source: Tensor, seen: Tensor, axes: tuple[Axis, ...], rows: int, method: str) -> Tensor:
        units, groups = source.shape[0] // rows, self.geometry.groups
        left, right = (_gram(t, units, groups) for t in (source, seen))
        inputs, outputs = ([axis.size for axis in axes], [axis.output for axis in axes])
        if method == "dense":
            before, after = math.prod(inputs), math.prod(outputs)
            left = _pairs(left, rows, before) @ box_matrix(axes, left.dtype, left.device)
            right = _pairs(right, rows, after)
        else:
            left = box_sum(left.view(-1, rows, *inputs, rows, *inputs), axes)
            right = right.view(-1, rows, *outputs, rows, *outputs)
        return inner_product(left.contiguous().view(units, -1), right.reshape(units, -1))

    def _by_groups(self, x: Tensor, g: Tensor, units: int) -> Tensor:
        """Return ``G_i`` as the weight gradient of one convolution whose groups are the units."""
        x, g = (_units_as_channels(t, units) for t in (x, g))
        # Only its shape counts, but it must be contiguous: an expanded one would be copied.
        weight = x.new_empty(units * self.shape[0], *self.shape[1:])
        arguments = self.geometry.arguments(units * self.geometry.groups)
        result = torch.ops.aten.convolution_backward(g, x, weight, None, *arguments, (False, True, False))
        return result[1].view(units, *self.shape)

    def _by_patches(self, x: Tensor, g: Tensor, units: int) -> Tensor:
        """Return ``G_i`` as a batched product of output gradients and unfolded patches."""
        source, seen = (g, x) if self.geometry.transposed else (x, g)
        groups = self.geometry.groups
        if units == x.shape[0] and groups == 1 and self._pointwise():
            return torch.bmm(seen.flatten(2), source.flatten(2).mT).view(units, *self.shape)
        patches = _unfold(source, self._roles()[2])
        taps = math.prod(self.shape[2:])
        rows = source.shape[0] // units
        left = seen.reshape(units, rows, groups, seen.shape[1] // groups, -1)
        right = patches.reshape(units, rows, groups, source.shape[1] // groups * taps, -1)
        if rows == 1:
            product = left[:, 0] @ right[:, 0].mT
        else:
            # One product over (rows, positions) of a unit.
            product = left.permute(0, 2, 3, 1, 4).flatten(3) @ right.permute(0, 2, 1, 4, 3).flatten(2, 3)
        return product.reshape(units, *self.shape)

    def _swappable(self) -> bool:
        geometry = self.geometry
        plain = geometry.groups == 1 and not geometry.transposed and all(stride == 1 for stride in geometry.stride)
        fits = all(axis.padding <= axis.dilation * (axis.kernel - 1) for axis in self._roles()[2])
        return plain and fits and 2 * self.shape[0] <= self.shape[1]

    def _by_patches_of_gradient(self, x: Tensor, g: Tensor, units: int) -> Tensor:
        """Return ``G_i`` from patches of the output gradient, whose taps run backwards."""
        axes = tuple(
            Axis(
                axis.output, axis.size, axis.kernel, 1, axis.dilation * (axis.kernel - 1) - axis.padding, axis.dilation
            )
            for axis in self._roles()[2]
        )
        patches = by_unit(_unfold(g, axes).reshape(g.shape[0], -1, math.prod(x.shape[2:])), units)
        values = by_unit(x.flatten(2), units)
        product = (values @ patches.mT).sum(1) if values.shape[1] > 1 else values[:, 0] @ patches[:, 0].mT
        shape = (units, self.shape[1], self.shape[0], *self.shape[2:])
        return product.view(shape).transpose(1, 2).flip(tuple(range(3, len(shape)))).contiguous()

    def _by_taps(self, x: Tensor, g: Tensor) -> Tensor:
        """Return the weight gradient without what meets padding: half to a third of the time on 2 x 2 x 2 voxels."""
        source, seen = (g, x) if self.geometry.transposed else (x, g)
        inputs, outputs = (t.flatten(2).flatten(0, 1).T.contiguous() for t in (source, seen))
        found = x.new_zeros(math.prod(self.shape[2:]), *self.shape[:2])
        for tap, reached, met in joined(self._roles()[2], x.device):
            left = outputs.index_select(0, reached).view(-1, self.shape[0])
            torch.mm(left.T, inputs.index_select(0, met).view(-1, self.shape[1]), out=found[tap])
        return found.flatten(1).T.contiguous().view(self.shape)

    def _weight_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        weight = x.new_empty(self.shape)
        result: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward(
            g, x, weight, None, *self.geometry.arguments(), (False, True, False)
        )
        return result[1]


class ConvolutionFamily:
    """``nn.Conv1d`` to ``nn.Conv3d`` and ``nn.ConvTranspose1d`` to ``nn.ConvTranspose3d``."""

    def refusal(self, module: nn.Module) -> str | None:
        """Return None: every one of these layers can be treated."""
        return None

    def prepare(self, layer: Layer, input: Tensor, output_size: list[int] | None = None) -> tuple[Tensor, Geometry]:
        """Return the padded input, and the geometry that is left."""
        module = layer.module
        dims = len(module.kernel_size)
        if input.ndim != dims + 2:
            raise ValueError(f"expected a batch axis, a channel axis and {dims} more, got {tuple(input.shape)}")
        geometry: Geometry | None = layer.notes.get("geometry")
        if geometry is None:
            geometry = layer.notes["geometry"] = _geometry(module)
        if module.padding_mode != "zeros":
            input = functional.pad(input, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        elif isinstance(module.padding, str) and not any(geometry.padding):
            input = functional.pad(input, module._reversed_padding_repeated_twice)
        if output_size is not None:
            sizes = (module.stride, module.padding, module.kernel_size, dims, module.dilation)
            geometry = replace(geometry, output_padding=tuple(module._output_padding(input, output_size, *sizes)))
        return input, geometry

    def run(self, layer: Layer, value: Tensor, extra: Geometry) -> tuple[Tensor, Saved]:
        """Return the convolution."""
        value, weight, bias = cast_parameters(layer, value)
        assert weight is not None
        if extra.product(weight, value):
            # Written into a tensor that is no view: a model may change it in place.
            output = value.new_empty(value.shape[0], weight.shape[0], *value.shape[2:])
            each, columns = weight.detach().flatten(1).expand(value.shape[0], -1, -1), value.flatten(2)
            if bias is None:
                torch.bmm(each, columns, out=output.flatten(2))
            else:
                torch.baddbmm(bias.detach().unsqueeze(1), each, columns, out=output.flatten(2))
            return output, (value,)
        return torch.convolution(value, weight, bias, *extra.arguments()), (value,)

    def back(self, layer: Layer, saved: Saved, grad: Tensor, extra: Geometry, units: int, wanted: bool) -> Backward:
        """Return the input's gradient, the bias ``sum_o g_i[o]`` and the weight."""
        (value,) = saved
        assert layer.weight is not None
        if not grad.is_contiguous():
            # A slice of a concatenation, say: copied once instead of at every use, and the rest of it is let go.
            grad = grad.contiguous()
        small = {}
        if "bias" in layer.trained:
            small["bias"] = sum_rows(full(grad).flatten(2).sum(2), units)
        parts: dict[str, Part] = {}
        if "weight" in layer.trained:
            parts["weight"] = ConvolutionWeight(value, grad, units, extra, layer.weight.shape)
        result = None
        if wanted:
            weight = layer.weight.detach().to(grad.dtype)
            if extra.product(weight, grad):
                # Not matmul: it would fold the batch, and hand on a copy with its channels last.
                each = weight.flatten(1).T.expand(grad.shape[0], -1, -1)
                result = torch.bmm(each, grad.flatten(2)).view(value.shape)
            else:
                mask = (True, False, False)
                result = torch.ops.aten.convolution_backward(grad, value, weight, None, *extra.arguments(), mask)[0]
        return Backward(result, small, parts)


def _geometry(module: Any) -> Geometry:
    """Return a module's geometry; padding that is uneven or not zero is left to be put on the input."""
    padding = module.padding
    if module.padding_mode != "zeros":
        padding = (0,) * len(module.kernel_size)
    elif isinstance(padding, str):
        pads = module._reversed_padding_repeated_twice
        even = pads[0::2] == pads[1::2]
        padding = tuple(pads[0::2][::-1]) if even else (0,) * len(module.kernel_size)
    return Geometry(module.stride, padding, module.dilation, module.transposed, module.output_padding, module.groups)


def _units_as_channels(value: Tensor, units: int) -> Tensor:
    """Return (rows, units * channel, *spatial)."""
    if units == value.shape[0]:
        return value.reshape(1, -1, *value.shape[2:])
    return by_unit(value, units).transpose(0, 1).flatten(1, 2)


def _gram(value: Tensor, units: int, groups: int) -> Tensor:
    """Return Gram matrices over (row, position), (units * groups, positions, positions)."""
    if units == value.shape[0]:
        columns = value.reshape(units * groups, value.shape[1] // groups, -1)
    else:
        rows = value.shape[0] // units
        columns = value.reshape(units, rows, groups, value.shape[1] // groups, -1).permute(0, 2, 3, 1, 4)
        columns = columns.reshape(units * groups, value.shape[1] // groups, -1)
    return torch.bmm(columns.mT, columns)


def _pairs(gram: Tensor, rows: int, positions: int) -> Tensor:
    """Return (units, rows^2, positions^2) of (units, rows * positions, rows * positions)."""
    if rows == 1:
        return gram.reshape(-1, 1, positions * positions)
    blocks = gram.view(-1, rows, positions, rows, positions).transpose(2, 3)
    return blocks.reshape(-1, rows * rows, positions * positions)


def _unfold(value: Tensor, axes: tuple[Axis, ...]) -> Tensor:
    """Return the patches as a strided view, (batch, channel, *kernel, *output)."""
    if any(axis.padding for axis in axes):
        value = functional.pad(value, _padding(axes))
    value = value.contiguous()
    strides = value.stride()[2:]
    sizes = [axis.kernel for axis in axes] + [axis.output for axis in axes]
    steps = [stride * axis.dilation for stride, axis in zip(strides, axes, strict=True)]
    steps += [stride * axis.stride for stride, axis in zip(strides, axes, strict=True)]
    return value.as_strided((*value.shape[:2], *sizes), (*value.stride()[:2], *steps))


def _padding(axes: tuple[Axis, ...]) -> list[int]:
    return [axis.padding for axis in reversed(axes) for _ in range(2)]
