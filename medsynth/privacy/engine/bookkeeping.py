"""The backend: one forward and one backward for many patients, and exact flat clipping."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from medsynth.errors import PrivacyError
from medsynth.privacy.engine.choice import Chooser, discarded_squares, kept_pieces, squared_lengths, weighted_sum
from medsynth.privacy.engine.layers import trained_layers
from medsynth.privacy.engine.part import Backward, Layer, Part
from medsynth.privacy.engine.tape import Call, recording, refuse_functional_use
from medsynth.privacy.gradients import (
    Batch,
    ClippedSum,
    RowLoss,
    add_clipped,
    check_losses,
    rows_of,
    trainable,
    zero_sums,
)

# Rows of one forward and backward; more patients are treated in several, and their sums added.
MAX_ROWS = 128
# Bytes of per-patient gradients that may be kept in one backward beyond the activations that they replace.
KEEP_BYTES = 2**25
# Norms and factors are rounded to float32: the clip aims so much below the bound.
CLIP_MARGIN = 1.5e-6


@dataclass(frozen=True)
class BookkeepingBackend:
    """Clipped sums in one backward (Bu et al. 2023, "book-keeping"); see :class:`medsynth.privacy.gradients.Backend`.

    *Guarantees*: each patient enters the sum with an L2 norm of at most ``clip_norm`` (1 + 1e-6): norms are exact up to
    float32 rounding, and raised by a bound on it. That a layer's rule is right rests on its equation, on the tests,
    and on the preflight. A patient that is not finite adds exactly nothing.

    Attributes:
        model: any mixture of the layers in :data:`medsynth.privacy.engine.layers.FAMILIES` and of functions without
            parameters that keep rows apart.
        row_loss: losses by row.
        clip_norm: L2 bound on one patient's gradient.
        max_rows: rows of one forward and backward; a patient with more is treated alone, by plain autograd.
        chooser: picks the rules and remembers their timing.
        found: the layers of the model, found once.

    Raises:
        PrivacyError: when opened, names the trained parameters that have no rule.
    """

    model: nn.Module
    row_loss: RowLoss
    clip_norm: float
    max_rows: int = MAX_ROWS
    chooser: Chooser = field(default_factory=lambda: Chooser(KEEP_BYTES))
    found: dict[str, Any] = field(default_factory=dict)
    name: str = "bookkeeping"

    def __post_init__(self) -> None:
        self._layers()

    def at(self, clip_norm: float) -> BookkeepingBackend:
        """Return the same backend with another clip norm."""
        return replace(self, clip_norm=clip_norm)

    def clipped_sum(self, batches: Sequence[Batch]) -> ClippedSum:
        """Return the clipped sum over patients, one batch each; an empty list gives zeros."""
        layers, parameters = self._layers()
        norms = [0.0] * len(batches)
        sums: list[Tensor] | None = None
        for indices, rows in _groups(batches, self.max_rows):
            group = [batches[index] for index in indices]
            if rows > self.max_rows:
                found = self._alone(group[0], parameters)
            else:
                found = self._together(group, rows, layers, parameters)
            sums = found.tensors if sums is None else _added(sums, found.tensors)
            for index, norm in zip(indices, found.norms, strict=True):
                norms[index] = norm
        return ClippedSum(zero_sums(parameters) if sums is None else sums, norms)

    def _layers(self) -> tuple[list[Layer], list[nn.Parameter]]:
        """Return the trained layers and parameters, looked up again only when some were replaced, frozen or thawed."""
        state: list[tuple[int, bool]] = []
        modules: list[nn.Module | None] = [self.model]
        seen = set()
        for module in modules:  # it grows; Module.modules() takes several times as long
            if module is not None and module not in seen:
                seen.add(module)
                state += [(id(p), p.requires_grad) for p in module._parameters.values() if p is not None]
                modules += module._modules.values()
        if self.found.get("state") != state:
            self.found.update(state=state, layers=trained_layers(self.model), parameters=trainable(self.model))
        return cast(list[Layer], self.found["layers"]), cast(list[nn.Parameter], self.found["parameters"])

    def _together(
        self, group: Sequence[Batch], rows: int, layers: Sequence[Layer], parameters: Sequence[nn.Parameter]
    ) -> ClippedSum:
        """Return the clipped sum of patients with ``rows`` rows each, in one forward and backward."""
        merged = {key: torch.cat([batch[key] for batch in group]) for key in group[0]}
        total = rows * len(group)
        books = _Books(self.chooser, len(group), self.chooser.keep_bytes)
        with recording(layers, parameters, len(group), total, books.receive):
            losses = check_losses(self.row_loss(self.model, merged), total)
            del merged
            torch.autograd.backward(losses, torch.full_like(losses, 1 / rows))
            refuse_functional_use(self.model, parameters)
            del losses
        with torch.no_grad():
            norms = books.norms()
            sums = books.close(norms, self.clip_norm, parameters)
        return ClippedSum(sums, [float(norm) for norm in norms.tolist()])

    def _alone(self, batch: Batch, parameters: Sequence[nn.Parameter]) -> ClippedSum:
        """Return one patient's clipped gradient, accumulated over its rows; autograd sees one unit only."""
        rows = rows_of(batch)
        mean = [torch.zeros_like(parameter, requires_grad=False) for parameter in parameters]
        for start in range(0, rows, self.max_rows):
            chunk = {key: value[start : start + self.max_rows] for key, value in batch.items()}
            losses = check_losses(self.row_loss(self.model, chunk), rows_of(chunk))
            for total, part in zip(
                mean, torch.autograd.grad(losses.sum() / rows, parameters, allow_unused=True), strict=True
            ):
                if part is not None:
                    total.add_(part)
        sums = zero_sums(parameters)
        return ClippedSum(sums, [add_clipped(sums, mean, self.clip_norm)])


class _Books:
    """What one backward leaves: squared norms by unit, and what the clipped sum is made of."""

    def __init__(self, chooser: Chooser, units: int, left: int) -> None:
        self._chooser = chooser
        self._units = units
        self._left = left
        self._squares: list[Tensor] = []
        self._samples: dict[nn.Parameter, Tensor] = {}
        self._kept: list[tuple[nn.Parameter, list[Tensor]]] = []
        self._held: list[tuple[nn.Parameter, Part, str]] = []
        self._repeated: dict[nn.Parameter, list[Part]] = {}

    def receive(self, call: Call, found: Backward) -> None:
        """Book one call of a layer: small gradients as they are, larger ones by the cheapest rule."""
        for name, sample in found.small.items():
            parameter = call.layer.parameter(name)
            before = self._samples.get(parameter)
            self._samples[parameter] = sample if before is None else before + sample
        for name, part in found.parts.items():
            parameter = call.layer.parameter(name)
            if call.forwards > 1:
                # The norm of a sum has cross terms: wait for the other calls.
                self._repeated.setdefault(parameter, []).append(part)
            elif call.treated:
                raise PrivacyError(
                    f"layer {call.layer.name} ran again during the backward pass (activation checkpointing?): "
                    "use train.backend 'unit'"
                )
            else:
                self._book(parameter, part)
        call.treated = call.forwards == 1

    def _book(self, parameter: nn.Parameter, part: Part) -> None:
        rule, taken = self._chooser.choose(part, self._left)
        self._left -= taken
        if rule.kind == "keep":
            squares, kept = kept_pieces(part, rule.method)
            self._squares.append(squares)
            self._kept.append((parameter, kept))
            return
        self._squares.append(
            part.squares(rule.method) if rule.kind == "gram" else discarded_squares([part], rule.method)
        )
        self._held.append((parameter, part, rule.contraction))

    def norms(self) -> Tensor:
        """Return each unit's norm in float64; 0 where it is not finite."""
        for parameter, parts in self._repeated.items():
            self._squares.append(discarded_squares(parts))
            self._held += [(parameter, part, part.contractions()[0]) for part in parts]
        if self._samples:
            together = torch.cat([sample.flatten(1) for sample in self._samples.values()], 1)
            self._squares.append(squared_lengths(together.unsqueeze(1)))
            self._together: Tensor = together
        if not self._squares:
            return torch.zeros(self._units, dtype=torch.float64)
        norms = torch.stack([s if s.dtype == torch.float64 else s.double() for s in self._squares]).sum(0).sqrt()
        self._finite = norms.isfinite()
        return norms.where(self._finite, 0.0)

    def close(self, norms: Tensor, clip_norm: float, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return ``sum_i min(1, C / norm_i) G_i`` by parameter; units that are not finite add nothing."""
        factors = (clip_norm / (norms * (1 + CLIP_MARGIN))).clamp_(max=1.0)
        sums: dict[nn.Parameter, Tensor] = {}
        if not self._squares:
            return zero_sums(parameters)
        clean = bool(self._finite.all())
        factors = factors.where(self._finite, 0.0)
        if self._samples:
            total = factors.to(self._together.dtype) @ self._clean(self._together, clean)
            pieces = total.split([sample[0].numel() for sample in self._samples.values()])
            sums.update(zip(self._samples, pieces, strict=True))
        while self._kept:
            parameter, rows = self._kept.pop()
            sums[parameter] = weighted_sum(factors.to(rows[0].dtype), rows if clean else self._clean_pieces(rows))
        while self._held:
            parameter, part, way = self._held.pop()
            found = part.contract(factors, tuple(self._clean(tensor, clean) for tensor in part.held), way)
            sums[parameter] = sums[parameter] + found if parameter in sums else found
        return [
            sums[p].view(p.shape) if p in sums else torch.zeros_like(p, dtype=norms.dtype, requires_grad=False)
            for p in parameters
        ]

    def _clean_pieces(self, pieces: list[Tensor]) -> list[Tensor]:
        parts = self._finite.split([piece.shape[0] for piece in pieces])
        return [piece.where(finite.unsqueeze(1), 0.0) for piece, finite in zip(pieces, parts, strict=True)]

    def _clean(self, tensor: Tensor, clean: bool) -> Tensor:
        """Return ``tensor`` with the rows of units that are not finite put to zero: zero times NaN is NaN."""
        if clean:
            return tensor
        finite = self._finite.repeat_interleave(tensor.shape[0] // self._units)
        return tensor.where(finite.view(-1, *(1,) * (tensor.ndim - 1)), 0.0)


def _added(sums: Sequence[Tensor], more: Sequence[Tensor]) -> list[Tensor]:
    """Return the sum in double precision; ``sums`` is overwritten where it is in double precision already."""
    return [total.double().add_(part) for total, part in zip(sums, more, strict=True)]


def _groups(batches: Sequence[Batch], max_rows: int) -> Iterator[tuple[list[int], int]]:
    """Yield indices of patients with one number of rows, as many as fit into ``max_rows``, and that number."""
    by_rows: dict[int, list[int]] = {}
    for index, batch in enumerate(batches):
        by_rows.setdefault(rows_of(batch), []).append(index)
    for rows, indices in by_rows.items():
        step = max(1, max_rows // rows)
        for start in range(0, len(indices), step):
            yield indices[start : start + step], rows
