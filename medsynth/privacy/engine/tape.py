"""One forward and backward in which every trained layer hands its input and output gradient over.

For the time of the block each trained layer's ``forward`` is replaced by an autograd function that computes the same
output, and whose backward computes the input's gradient but no weight gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medsynth.errors import PrivacyError
from medsynth.privacy.engine.part import Backward, Layer

Receive = Callable[["Call", Backward], None]


class Call:
    """One trained layer during one step: how often it ran, and where its gradients go."""

    def __init__(self, layer: Layer, units: int, rows: int, receive: Receive, anchor: Tensor) -> None:
        self.layer = layer
        self.units = units
        self.rows = rows
        self.receive = receive
        self.anchor = anchor
        self.forwards = 0
        self.treated = False

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Run the layer and remember the call."""
        try:
            value, extra = self.layer.family.prepare(self.layer, *args, **kwargs)
        except (TypeError, ValueError) as error:
            raise PrivacyError(f"layer {self.layer.name}: {error}; use train.backend 'unit'") from None
        if not torch.is_grad_enabled():
            return self.layer.family.run(self.layer, value, extra)[0]
        if value.shape[0] != self.rows:
            raise PrivacyError(
                f"layer {self.layer.name} sees {value.shape[0]} rows of a batch of {self.rows}: its gradient cannot be "
                "told apart by patient; keep the batch axis first, or use train.backend 'unit'"
            )
        self.forwards += 1
        output: Tensor = _Run.apply(value, self.anchor, self, extra)  # type: ignore[no-untyped-call]  # torch's own
        return output


class _Run(torch.autograd.Function):
    """A layer whose backward gives its parameters' gradients to the call, not to autograd.

    The anchor requires a gradient, so that backward reaches layers whose input needs none; it never gets one.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, anchor: Tensor, call: Call, extra: Any) -> Tensor:
        output, saved = call.layer.family.run(call.layer, value, extra)
        ctx.save_for_backward(*saved)
        ctx.call, ctx.extra, ctx.dtype = call, extra, value.dtype
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None, None]:
        call: Call = ctx.call
        found = call.layer.family.back(
            call.layer, ctx.saved_tensors, grad, ctx.extra, call.units, ctx.needs_input_grad[0]
        )
        call.receive(call, found)
        grad_input = found.grad_input
        return None if grad_input is None else grad_input.to(ctx.dtype), None, None, None


@contextlib.contextmanager
def recording(
    layers: Sequence[Layer], parameters: Sequence[nn.Parameter], units: int, rows: int, receive: Receive
) -> Iterator[list[Call]]:
    """Replace the layers' forwards for the time of the block, and leave the model as it was.

    Args:
        layers: from :func:`medsynth.privacy.engine.layers.trained_layers`.
        parameters: the trained parameters; their ``grad`` is put aside, so that one which appears can be seen.
        units: clip units of the batch.
        rows: rows of the batch, the same number a unit, a unit's rows one after the other.
        receive: gets each call's gradients during the backward pass.
    """
    anchor = torch.zeros((), device=parameters[0].device, requires_grad=True)
    kept = [parameter.grad for parameter in parameters]
    calls = [Call(layer, units, rows, receive, anchor) for layer in layers]
    for parameter in parameters:
        parameter.grad = None
    try:
        for call in calls:
            call.layer.module.__dict__["forward"] = call
        yield calls
    finally:
        for layer in layers:
            layer.module.__dict__.pop("forward", None)
        for parameter, grad in zip(parameters, kept, strict=True):
            parameter.grad = grad


def refuse_functional_use(model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
    """Refuse parameters that autograd gave a gradient although no layer did: they are used outside of their layer.

    Raises:
        PrivacyError: names them.
    """
    if all(parameter.grad is None for parameter in parameters):
        return
    names = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    raise PrivacyError(
        f"parameters used outside of their layer's forward cannot be clipped: {', '.join(names)}; "
        "use train.backend 'unit'"
    )
