"""Affine parameters of GroupNorm, InstanceNorm and LayerNorm: per-unit gradients for the price of the plain ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from medsynth.privacy.engine.part import Backward, Layer, Saved, full, sum_rows


class GroupNormFamily:
    """``nn.GroupNorm``: ``y = w xhat + b``, so ``dw_c = sum_p g_i[c,p] xhat_i[c,p]``, ``db_c = sum_p g_i[c,p]``.

    The native backward sums them over the batch. Run with the batch folded into the channels, (1, n C) channels in n G
    groups, it computes the same input gradient and sums over positions only: per-row gradients for nothing.
    """

    def refusal(self, module: nn.Module) -> str | None:
        """Return None: every group norm can be treated."""
        return None

    def prepare(self, layer: Layer, input: Tensor) -> tuple[Tensor, int]:
        """Return the input and the number of groups."""
        return input, layer.module.num_groups

    def run(self, layer: Layer, value: Tensor, extra: int) -> tuple[Tensor, Saved]:
        """Return the normalised input; statistics in single precision, as autocast runs norms."""
        if torch.is_autocast_enabled(value.device.type):
            value = full(value)
        value = value.contiguous()
        n, channels = value.shape[:2]
        sizes = (n, channels, math.prod(value.shape[2:]), extra)
        output, mean, rstd = torch.native_group_norm(value, layer.weight, layer.bias, *sizes, layer.module.eps)
        return output, (value, mean, rstd)

    def back(self, layer: Layer, saved: Saved, grad: Tensor, extra: int, units: int, wanted: bool) -> Backward:
        """Return the input's gradient and both affine gradients, per unit."""
        value, mean, rstd = saved
        n, channels = value.shape[:2]
        weight: Tensor | None = layer.weight
        if weight is not None:  # n times over; Tensor.repeat takes ten times as long
            weight = weight.detach().to(value.dtype).expand(n, channels).reshape(-1)
        grad = grad.contiguous().to(value.dtype)
        mask = (wanted, "weight" in layer.trained, "bias" in layer.trained)
        folded = (1, n * channels, *value.shape[2:])
        grad_input, *affine = torch.ops.aten.native_group_norm_backward(
            grad.view(folded),
            value.view(folded),
            mean.view(1, -1),
            rstd.view(1, -1),
            weight,
            1,
            n * channels,
            math.prod(value.shape[2:]),
            n * extra,
            mask,
        )
        small = {
            name: sum_rows(full(found).view(n, channels), units)
            for name, found in zip(("weight", "bias"), affine, strict=True)
            if name in layer.trained
        }
        return Backward(grad_input.view_as(value) if wanted else None, small, {})


class InstanceNormFamily(GroupNormFamily):
    """``nn.InstanceNorm1d`` to ``nn.InstanceNorm3d``: group norms with one channel a group (Ulyanov et al. 2016)."""

    def refusal(self, module: nn.Module) -> str | None:
        """Refuse running statistics: they remember patients without noise."""
        return "keeps running statistics of patients" if getattr(module, "track_running_stats", False) else None

    def prepare(self, layer: Layer, input: Tensor) -> tuple[Tensor, int]:
        """Return the input and as many groups as channels."""
        return input, input.shape[1]


class LayerNormFamily:
    """``nn.LayerNorm``: the same sums over positions, ``xhat`` computed again from saved mean and deviation."""

    def refusal(self, module: nn.Module) -> str | None:
        """Return None: every layer norm can be treated."""
        return None

    def prepare(self, layer: Layer, input: Tensor) -> tuple[Tensor, None]:
        """Return the input."""
        return input, None

    def run(self, layer: Layer, value: Tensor, extra: None) -> tuple[Tensor, Saved]:
        """Return the normalised input; statistics in single precision, as autocast runs norms."""
        if torch.is_autocast_enabled(value.device.type):
            value = full(value)
        shape = list(layer.module.normalized_shape)
        output, mean, rstd = torch.native_layer_norm(value, shape, layer.weight, layer.bias, layer.module.eps)
        return output, (value, mean, rstd)

    def back(self, layer: Layer, saved: Saved, grad: Tensor, extra: None, units: int, wanted: bool) -> Backward:
        """Return the input's gradient and both affine gradients, per unit."""
        value, mean, rstd = saved
        shape = list(layer.module.normalized_shape)
        small = {}
        if "weight" in layer.trained:
            standard = (full(value) - mean) * rstd
            small["weight"] = (full(grad) * standard).reshape(units, -1, *shape).sum(1)
        if "bias" in layer.trained:
            small["bias"] = full(grad).reshape(units, -1, *shape).sum(1)
        result = None
        if wanted:
            result = torch.ops.aten.native_layer_norm_backward(
                grad.contiguous(), value, shape, mean, rstd, layer.weight, layer.bias, (True, False, False)
            )[0]
        return Backward(result, small, {})
