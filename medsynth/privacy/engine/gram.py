"""Gram matrices of unfolded patches without unfolding.

Write ``X`` for a unit's input, (channel, position), and ``A = X^T X`` for its Gram matrix over positions. Column o of
the unfolded input stacks the inputs at positions ``s o + d j - p`` for all kernel offsets j (stride s, dilation d,
padding p), so the Gram matrix of the unfolded input is a sum of shifted copies of A along its diagonals,

    A'[o, o'] = sum_j A[s o + d j - p, s o' + d j - p],

with zero outside. The offsets of the axes are independent: the sum is taken one axis at a time (k adds an axis).
"""

from __future__ import annotations

import functools
import itertools
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

    def taps(self) -> list[tuple[int, slice, slice]]:
        """Return the kernel offsets that reach anything, each with its outputs and the inputs that they see."""
        found = []
        for tap in range(self.kernel):
            shift = self.dilation * tap - self.padding
            low = max(0, -(shift // self.stride))
            high = min(self.output - 1, (self.size - 1 - shift) // self.stride)
            if high >= low:
                start = self.stride * low + shift
                stop = self.stride * high + shift + 1
                found.append((tap, slice(low, high + 1), slice(start, stop, self.stride)))
        return found


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
        # The one that reaches most is copied, the others are added.
        taps = sorted(axis.taps(), key=lambda tap: tap[1].start - tap[1].stop)
        if not taps:
            raise ValueError("a kernel that sees nothing but padding has no Gram matrix")
        _, outputs, inputs = taps[0]
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
        for _, outputs, inputs in taps[1:]:
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


@functools.lru_cache(maxsize=64)
def joined(axes: tuple[Axis, ...], device: torch.device) -> tuple[tuple[int, Tensor, Tensor], ...]:
    """Return the kernel offsets that reach anything, each with its outputs and the inputs that they see.

    Args:
        axes: the spatial axes.
        device: where the indices are needed.

    Returns:
        For each offset, counted through the kernel: the offset, and two vectors of one length, of voxels counted
        through the map.
    """
    found = []
    for taps in itertools.product(*(axis.taps() for axis in axes)):
        offset, outputs, inputs = (torch.zeros(1, dtype=torch.long) for _ in range(3))
        for axis, (tap, reached, seen) in zip(axes, taps, strict=True):
            offset = offset * axis.kernel + tap
            outputs = _further(outputs, torch.arange(axis.output)[reached], axis.output)
            inputs = _further(inputs, torch.arange(axis.size)[seen], axis.size)
        found.append((int(offset), outputs.to(device), inputs.to(device)))
    return tuple(found)


def joined_share(axes: Sequence[Axis]) -> float:
    """Return how many of all pairs of kernel offset and output see a voxel; the others see padding."""
    shares = (sum(reached.stop - reached.start for _, reached, _ in axis.taps()) for axis in axes)
    return math.prod(share / (axis.kernel * axis.output) for share, axis in zip(shares, axes, strict=True))


def _further(voxels: Tensor, along: Tensor, size: int) -> Tensor:
    """Return the voxels' numbers with one axis more."""
    return (voxels.unsqueeze(1) * size + along).flatten()


def _part(gram: Tensor, first: int, second: int, where: slice) -> Tensor:
    index: list[slice] = [slice(None)] * gram.ndim
    index[first] = index[second] = where
    return gram[tuple(index)]
