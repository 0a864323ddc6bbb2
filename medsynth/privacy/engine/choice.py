"""Which rule treats a parameter: the cheapest on the real shapes, timed once, within a memory budget.

Whichever wins, the result is the same to rounding; only time and memory differ.

- *keep* (S): instantiate every unit's gradient, keep it, and sum with the clip factors later;
- *discard* (I): instantiate a few units at a time for their norms, then one ordinary weight gradient;
- *gram* (G): norms from Gram matrices, then one ordinary weight gradient.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from medsynth.privacy.engine.part import Part

# Bytes of gradients that are instantiated at a time, but at least of so many units: they stay in a core's cache, and
# when they are kept they fit into what the backward pass lets go, so that the heap does not grow.
_PIECE = 5 * 2**18
_FEWEST = 2
_REPEATS = 5


@dataclass(frozen=True)
class Rule:
    """How one parameter is treated: by which of the part's methods or grams, and by which of its contractions."""

    kind: Literal["keep", "discard", "gram"]
    method: str
    contraction: str = ""


@dataclass
class Chooser:
    """Rules by (layer shapes, number of units to a power of two, device, threads), timed at first sight.

    Patients are drawn by coins, so that hardly two steps have the same number of units: what wins for 60 wins for 64.

    Attributes:
        keep_bytes: how many bytes kept gradients may take in one backward, beyond the activations that they free.
        forced: kind of every rule that can have it, for tests.
    """

    keep_bytes: int
    forced: str | None = None
    cache: dict[Any, list[Rule]] = field(default_factory=dict)

    def choose(self, part: Part, left: int) -> tuple[Rule, int]:
        """Return the cheapest rule for ``part`` with ``left`` bytes to keep, and the bytes that it takes of them."""
        key = (part.key(), round(math.log2(part.units)), part.held[0].device, torch.get_num_threads(), self.forced)
        rules = self.cache.get(key)
        if rules is None:
            seconds = self._measure(part)
            rules = self.cache[key] = sorted(seconds, key=lambda rule: seconds[rule])
        for rule in rules:
            if rule.kind != "keep":
                break
            kept = _kept_bytes(part)
            if kept <= left:
                return rule, kept
        return rule, 0

    def _measure(self, part: Part) -> dict[Rule, float]:
        """Return the seconds that every rule takes."""
        factors = torch.ones(part.units, device=part.held[0].device)
        ways = {
            way: _seconds(_call(part.contract, factors, part.held, way), factors.device) for way in part.contractions()
        }
        way, contract = min(ways.items(), key=lambda item: item[1])
        seconds = {}
        for method in part.grams():
            seconds[Rule("gram", method, way)] = contract + _seconds(_call(part.squares, method), factors.device)
        for method in part.methods():
            if _kept_bytes(part) <= self.keep_bytes:
                seconds[Rule("keep", method)] = _seconds(_keep(part, method, factors), factors.device)
            seconds[Rule("discard", method, way)] = contract + _seconds(_call(_discard, part, method), factors.device)
        return {rule: cost for rule, cost in seconds.items() if rule.kind == self.forced} or seconds


def pieces(part: Part) -> Iterator[tuple[int, int]]:
    """Yield the first and last unit of what is instantiated at a time."""
    step = max(_FEWEST, 2 ** int(math.log2(max(1, _PIECE / (4 * part.shape.numel())))))
    for first in range(0, part.units, step):
        yield first, min(part.units, first + step)


def kept_pieces(part: Part, method: str) -> tuple[Tensor, list[Tensor]]:
    """Return ``|G_i|^2`` and the ``G_i``, (units of a piece, size) each."""
    found, squares = [], []
    for first, last in pieces(part):
        samples = part.samples(first, last, method)
        squares.append(squared_lengths(samples))
        found.append(samples.flatten(1))
    return torch.cat(squares), found


def weighted_sum(factors: Tensor, kept: list[Tensor]) -> Tensor:
    """Return ``sum_i factors_i G_i``; ``kept`` is emptied, so that each piece is let go once it is added."""
    kept.reverse()
    first = kept.pop()
    total = factors[: first.shape[0]] @ first
    done = first.shape[0]
    del first
    while kept:
        piece = kept.pop()
        total.addmv_(piece.T, factors[done : done + piece.shape[0]])
        done += piece.shape[0]
    return total


def discarded_squares(parts: list[Part], method: str | None = None) -> Tensor:
    """Return ``|G_i|^2`` of the sum of ``parts`` (calls of one parameter), instantiated a few units at a time."""
    found = []
    for first, last in pieces(parts[0]):
        total = parts[0].samples(first, last, method or parts[0].methods()[0])
        for part in parts[1:]:
            total = total + part.samples(first, last, method or part.methods()[0])
        found.append(squared_lengths(total))
    return torch.cat(found)


def squared_lengths(samples: Tensor) -> Tensor:
    """Return the squared length of each unit's gradient, (units, ...): float32 in short runs, added in float64."""
    runs = samples.reshape(samples.shape[0], samples.shape[1], -1)
    return torch.linalg.vector_norm(runs, dim=2).double().square_().sum(1)


def _kept_bytes(part: Part) -> int:
    """Return the bytes that *keep* needs beyond what it frees."""
    freed = sum(tensor.numel() * tensor.element_size() for tensor in part.held)
    return max(0, part.units * part.shape.numel() * 4 - freed)


def _discard(part: Part, method: str) -> Tensor:
    return discarded_squares([part], method)


def _keep(part: Part, method: str, factors: Tensor) -> Callable[[], Tensor]:
    return lambda: weighted_sum(factors, kept_pieces(part, method)[1])


def _call(function: Callable[..., Tensor], *arguments: Any) -> Callable[[], Tensor]:
    return lambda: function(*arguments)


def _seconds(work: Callable[[], Tensor], device: torch.device) -> float:
    """Return the shortest of a few runs after a first one; a first run that takes long is not repeated."""
    best = float("inf")
    # Processor time, where the work is the processor's: other processes then hardly disturb it.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    for repeat in range(_REPEATS + 1):
        start = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elapsed = clock() - start
        if repeat or elapsed > 0.5:
            best = min(best, elapsed)
        if elapsed > 0.5:
            break
    return best
