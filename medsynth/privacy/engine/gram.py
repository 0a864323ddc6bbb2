"""Gram matrices of unfolded patches without unfolding.

Write ``X`` for a unit's input, (channel, position), and ``A = X^T X`` for its Gram matrix over positions. Column o of
the unfolded input stacks the inputs at positions ``s o + d j - p`` for all kernel offsets j (stride s, dilation d,
padding p), so the Gram matrix of the unfolded input is a sum of shifted copies of A along its diagonals,

    A'[o, o'] = sum_j A[s o + d j - p, s o' + d j - p],

with zero outside. The offsets of the axes are independent: the sum is taken one axis at a time (k adds an axis).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a convolution: sizes of input and output, kernel, stride, padding, dilation."""

    size: int
    output: int
    kernel: int
    stride: int
    padding: int
    dilation: int

    def taps(self) -> list[tuple[slice, slice]]:
        """Return, for each kernel offset, the outputs that it reaches and the inputs that they see, widest first."""
        found = []
        for tap in range(self.kernel):
            shift = self.dilation * tap - self.padding
            low = max(0, -(shift // self.stride))
            high = min(self.output - 1, (self.size - 1 - shift) // self.stride)
            if high >= low:
                start = self.stride * low + shift
                stop = self.stride * high + shift + 1
                found.append((slice(low, high + 1), slice(start, stop, self.stride)))
        return sorted(found, key=lambda pair: pair[0].start - pair[0].stop)


def box_sum(gram: Tensor, axes: Sequence[Axis]) -> Tensor:
    """Return the Gram matrix of unfolded patches.

    Args:
        gram: (units, rows, *input, rows, *input), Gram matrix over rows and positions of the input.
        axes: the spatial axes.

    Returns:
        (units, rows, *output, rows, *output).
    """
    count = len(axes)
    for index, axis in enumerate(axes):
        first, second = 2 + index, 3 + count + index
        taps = axis.taps()
        if not taps:
            raise ValueError("a kernel that sees nothing but padding has no Gram matrix")
        outputs, inputs = taps[0]
        seen = _part(gram, first, second, inputs)
        if outputs == slice(0, axis.output):
            if len(taps) == 1:
                gram = seen
                continue
            summed = seen.clone(memory_format=torch.contiguous_format)
        else:
            sizes = list(gram.shape)
            sizes[first] = sizes[second] = axis.output
            summed = gram.new_zeros(sizes)
            _part(summed, first, second, outputs).add_(seen)
        for outputs, inputs in taps[1:]:
            _part(summed, first, second, outputs).add_(_part(gram, first, second, inputs))
        gram = summed
    return gram


@functools.lru_cache(maxsize=64)
def box_matrix(axes: tuple[Axis, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return :func:`box_sum` of one row as a matrix, (input^2, output^2), for maps of few voxels."""
    inputs = math.prod(axis.size for axis in axes)
    sizes = [axis.size for axis in axes]
    identity = torch.eye(inputs * inputs, dtype=dtype, device=device)
    return box_sum(identity.view(-1, 1, *sizes, 1, *sizes), axes).flatten(1)


def _part(gram: Tensor, first: int, second: int, where: slice) -> Tensor:
    index: list[slice] = [slice(None)] * gram.ndim
    index[first] = index[second] = where
    return gram[tuple(index)]
