"""How an engine is measured: time beside a plain step, peak memory of a step, agreement with a naive loop.

Time is CPU time (``time.process_time``: all threads, no waiting for others), interleaved: in each round every engine
takes one step on its own copy of the same model, and its ratio is to the plain step of the same round.

Memory is what one step adds to the peak of resident memory, in a process of its own: forked from a clean server that
has imported everything and computed nothing, warmed up by one step, trimmed (``malloc_trim``), the kernel's
high-water mark (VmHWM) reset. So it holds tensors, oneDNN's scratch and numpy's noise alike.

On a GPU time is the wall clock's, the GPU's work done, and memory what torch's allocator gave out at most.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import multiprocessing
import statistics
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from medsynth.privacy.gradients import Batch, ClippedSum, trainable
from pipelines.bench.configurations import CPU, Configuration, Place, Problem, open_problem
from pipelines.bench.engines import ENGINES, Engine, Unable, torch_noise_seconds

CLIP_TOLERANCE = 1e-6
_ALONE = 3  # patients whose clipped gradient is also measured alone
_MEMORY_STEPS = 3
_SLOW_S = 2.0  # an engine whose first step takes longer is measured from that step on, and fewer times
_MIB = 1024.0
OWN = ("plain", "bookkeeping")  # what the goals are about: measured longer


@dataclass(frozen=True)
class Reference:
    """The naive loop's result, by code that shares nothing with the engines."""

    norms: list[float]
    sums: list[Tensor]


@dataclass(frozen=True)
class Agreement:
    """How an engine's first step compares with the naive loop."""

    norm_error: float
    sum_error: float
    clipped_norm: float
    tolerance: float = CPU.tolerance

    @property
    def correct(self) -> bool:
        """Whether all figures are within tolerance."""
        return max(self.norm_error, self.sum_error) <= self.tolerance and self.clipped_norm <= 1 + CLIP_TOLERANCE


@dataclass
class Timing:
    """Seconds of an engine's steps by the place's clock (``cpu``: CPU time there) and by the wall's; index = round."""

    cpu: dict[int, float] = field(default_factory=dict)
    wall: dict[int, float] = field(default_factory=dict)
    noise: list[float] = field(default_factory=list)
    torch_noise: list[float] = field(default_factory=list)

    def forget(self) -> None:
        """Drop what was measured so far: it warmed up."""
        for measured in (self.cpu, self.wall, self.noise, self.torch_noise):
            measured.clear()


@dataclass(frozen=True)
class Effort:
    """How long to measure: at most ``rounds`` steps, within ``seconds`` for an engine, ``own_seconds`` for ours."""

    rounds: int = 21
    least: int = 5
    own_seconds: float = 4.0
    seconds: float = 1.5


def reference(configuration: Configuration, place: Place = CPU) -> tuple[Problem, Reference]:
    """Return the problem with a clip norm that half of the patients exceed, and what is right for it."""
    problem = open_problem(configuration, place=place)
    model = problem.copy()
    norms, pieces = [], []
    for batch in problem.batches:
        gradient = _naive_gradient(problem, model, batch)
        norms.append(_length(gradient))
        pieces.append(gradient if len(problem.batches) <= 16 else [])
    clip_norm = statistics.median(norms)
    sums = [torch.zeros_like(p, dtype=torch.float64, requires_grad=False) for p in trainable(model)]
    for batch, norm, piece in zip(problem.batches, norms, pieces, strict=True):
        for total, part in zip(sums, piece or _naive_gradient(problem, model, batch), strict=True):
            total.add_(part, alpha=min(1.0, clip_norm / norm))
    return replace(problem, clip_norm=clip_norm), Reference(norms, sums)


def _naive_gradient(problem: Problem, model: nn.Module, batch: Batch) -> list[Tensor]:
    model.zero_grad()
    problem.row_loss(model, batch).mean().backward()
    return [(torch.zeros_like(p) if p.grad is None else p.grad).detach().clone() for p in trainable(model)]


def compare(
    found: ClippedSum, right: Reference, alone: Sequence[float], clip_norm: float, tolerance: float = CPU.tolerance
) -> Agreement:
    """Return the errors of a first step; ``alone`` are lengths of clipped gradients of single patients."""
    norm_error = max(abs(got - want) / want for got, want in zip(found.norms, right.norms, strict=True))
    distance = _length([got - want for got, want in zip(found.tensors, right.sums, strict=True)])
    return Agreement(norm_error, distance / _length(right.sums), max(alone) / clip_norm, tolerance)


class Bench:
    """All engines of one problem, stepped in turn.

    Attributes:
        timings: by engine.
        agreements: by engine, of its first step; the plain step has none.
        errors: by engine, why it was given up.
        problem: what they are stepped on.
    """

    def __init__(self, problem: Problem, right: Reference, names: Sequence[str], effort: Effort) -> None:
        self.timings: dict[str, Timing] = {}
        self.agreements: dict[str, Agreement] = {}
        self.errors: dict[str, str] = {}
        self.problem, self._right, self._effort = problem, right, effort
        self._engines: dict[str, Engine] = {}
        for name in names:
            with self._giving_up(name):
                self._engines[name] = ENGINES[name](problem)
                self.timings[name] = Timing()
        gc.collect()
        gc.freeze()

    def first_round(self) -> Iterator[str]:
        """Step every engine once (warming up, choosing rules) and compare what it summed; yield names done."""
        for name in list(self._engines):
            with self._giving_up(name):
                self._step(name, 0)
                found = self._engines[name].last()
                if found is not None:
                    patients = self.problem.batches[:_ALONE]
                    alone = [_length(self._engines[name].clip([batch]).tensors) for batch in patients]
                    self.agreements[name] = compare(
                        found, self._right, alone, self.problem.clip_norm, self.problem.place.tolerance
                    )
            yield name
        for name, timing in self.timings.items():
            if name in OWN or not self._slow(name):
                timing.forget()
        if any(self._slow(name) for name in self._engines):
            # Slow engines keep their first step, which is set beside the plain step of this round: take a warm one.
            self._step("plain", 0)

    def rounds(self) -> Iterator[int]:
        """Go round the engines in an order that rotates; yield the number of each round done."""
        for number in range(1, self._effort.rounds + 1):
            names = [name for name in self._engines if self._due(name, number)]
            if not set(names) - {"plain"}:
                return
            shift = number % len(names)
            for name in [*names[shift:], *names[:shift]]:
                with self._giving_up(name):
                    self._step(name, number)
            yield number

    def close(self) -> None:
        """Let go of the engines; the results stay."""
        self._engines.clear()
        gc.unfreeze()
        gc.collect()

    def _due(self, name: str, number: int) -> bool:
        spent = self.timings[name].cpu
        own = name in OWN
        if own and number <= self._effort.least:
            return True
        if name == "plain":
            return any(self._due(other, number) for other in self._engines if other != "plain")
        limit = self._effort.own_seconds if own else self._effort.seconds
        return not spent or sum(spent.values()) + max(spent.values()) <= limit

    def _slow(self, name: str) -> bool:
        return self.timings[name].cpu.get(0, 0.0) > _SLOW_S

    def _step(self, name: str, number: int) -> None:
        engine, timing = self._engines[name], self.timings[name]
        gc.collect()
        place = self.problem.place
        cpu, wall = place.seconds(), time.perf_counter()
        engine.step()
        timing.cpu[number] = place.seconds() - cpu
        timing.wall[number] = time.perf_counter() - wall
        if engine.noise_seconds:
            timing.noise.append(engine.noise_seconds)
            timing.torch_noise.append(torch_noise_seconds(engine, self.problem))

    @contextlib.contextmanager
    def _giving_up(self, name: str) -> Iterator[None]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Opacus and MONAI warn about their own ways
                yield
        except Unable as reason:
            self._leave(name, str(reason))
        except Exception as error:  # whatever an engine dies of is its result
            self._leave(name, f"error: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")

    def _leave(self, name: str, why: str) -> None:
        self.errors[name] = why
        self._engines.pop(name, None)
        self.timings.pop(name, None)


def ratios(timing: Timing, plain: Timing) -> list[float]:
    """Return the ratio of each round, in CPU time or, on a GPU, on the clock, that both took part in."""
    return [seconds / plain.cpu[number] for number, seconds in timing.cpu.items() if number in plain.cpu]


def wall_ratios(timing: Timing, plain: Timing) -> list[float]:
    """Return the wall-clock ratio of each round that both took part in."""
    return [seconds / plain.wall[number] for number, seconds in timing.wall.items() if number in plain.wall]


# ---------------------------------------------------------------------------------------------------------- memory


class MemoryServer:
    """Forks clean processes that measure one engine's memory each."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pipelines.bench.preload"])

    def added_mib(self, engine: str, problem: Problem, threads: int) -> float | str:
        """Return what a step adds to the peak (median of a few), or why it could not be measured."""
        ours, theirs = self._context.Pipe(duplex=False)
        task = (engine, problem.configuration, problem.clip_norm, problem.place, threads, theirs)
        process = self._context.Process(target=_measure_memory, args=task)
        process.start()
        theirs.close()
        try:
            found: float | str = ours.recv()
        except EOFError:
            found = "error: killed"
        process.join()
        return found


def _measure_memory(
    name: str, configuration: Configuration, clip_norm: float, place: Place, threads: int, out: Any
) -> None:
    try:
        torch.set_num_threads(threads)
        warnings.simplefilter("ignore")
        problem = open_problem(configuration, clip_norm, place)
        engine = ENGINES[name](problem)
        started = time.process_time()
        first = _added_mib(engine, place)
        # The first step of an engine may also time its rules, or make what stays: it counts only where another library
        # takes long, and what a step needs is far more than what stays.
        slow = time.process_time() - started > _SLOW_S / 2
        steps = int(name in OWN) if slow else _MEMORY_STEPS
        out.send(statistics.median(_added_mib(engine, place) for _ in range(steps)) if steps else first)
    except Exception:
        out.send(f"error: {traceback.format_exc().splitlines()[-1]}")


def _added_mib(engine: Engine, place: Place) -> float:
    gc.collect()
    if place.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        engine.step()
        added = (torch.cuda.max_memory_allocated() - held) / 2**20
        engine.release()
        return added
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts again from what is in use
    before = _status_mib("VmHWM")
    engine.step()
    peak = _status_mib("VmHWM")
    engine.release()
    return peak - before


def _status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(f"{key}:")).split()[1]) / _MIB


def _length(parts: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts))
