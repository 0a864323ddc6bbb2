"""Time of a private step over ranks, against one rank with one thread at the same logical batch; checks the sums.

    torchrun --nproc-per-node 2 -m pipelines.ddp_step [--config 2d-16-n64] [--backend bookkeeping] [--rounds 9]

A step is the product's: coins, gradients, exchange, noise and optimizer (no averaged weights and no checkpoint, which
cost one process as much). Every rank uses one thread. A round takes one step with the patients shared out and one with
all of them on rank 0 while the others wait without computing, so that a busy machine disturbs both alike. ``speedup``
is of wall-clock times; ``cpu_speedup`` compares CPU times, the slowest rank's with the single one's: what is left where
other work takes the cores away.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from medsynth.devices import rank_and_size
from medsynth.privacy.distributed import Ranks, Replica, close_ranks, open_ranks
from medsynth.privacy.gradients import Backend, Batch, ClippedSum, open_backend, trainable
from medsynth.privacy.mechanism import DpSgd
from pipelines.bench.configurations import CONFIGURATIONS, TINY, Problem, open_problem

TOLERANCE = 1e-5


class Stepper:
    """A model that is trained by one rank or by all of them."""

    def __init__(self, problem: Problem, ranks: Ranks, backend: str) -> None:
        self.problem, self.ranks, self.steps = problem, ranks, 0
        model = problem.copy()
        self.backend: Backend = open_backend(backend, model, problem.row_loss, problem.clip_norm)
        self.mechanism = DpSgd("bench", 0.5, 1000, 1.0, problem.clip_norm, float(len(problem.batches)))
        optimizer = torch.optim.Adam(trainable(model), lr=1e-5, fused=True)
        self.replica = Replica(ranks, model, optimizer, self.mechanism, ranks.open_entropy("os"))
        self.replica.join()

    def clipped_sum(self, batches: list[Batch]) -> ClippedSum:
        """Return the sum over this rank's share, not exchanged."""
        return self.backend.clipped_sum(self.ranks.share(batches))

    def quiet_sum(self, batches: list[Batch]) -> list[Tensor]:
        """Return the sum over all ranks as a step without noise would give it."""
        quiet = replace(self.mechanism, noise_multiplier=0.0, denominator=1.0)
        return self.ranks.noisy_mean(quiet, self.clipped_sum(batches), self.replica.entropy)

    def step(self) -> None:
        """Take one step on the whole logical batch; the coins are tossed, but all patients are taken."""
        batches = self.problem.batches
        if self.ranks.first:
            self.mechanism.draw(len(batches), self.replica.entropy)
            self.ranks.call((self.steps, list(range(len(batches)))))
        else:
            self.ranks.await_call()
        self.replica.step(self.clipped_sum(batches))
        self.steps += 1


def check(alone: Stepper, shared: Stepper, count: int) -> float:
    """Return the relative difference between the sum of all ranks and that of one, over ``count`` patients."""
    batches = alone.problem.batches[:count]
    all_ranks, one = shared.quiet_sum(batches), alone.quiet_sum(batches)
    distance = sum(float((a - b).square().sum()) for a, b in zip(one, all_ranks, strict=True))
    length = sum(float(a.square().sum()) for a in one)
    return (distance / length) ** 0.5 if length else distance**0.5


def same_weights(stepper: Stepper) -> bool:
    """Whether all ranks hold bit for bit the same parameters."""
    own = torch.cat([p.detach().flatten() for p in trainable(stepper.replica.model)])
    first = own.clone()
    dist.broadcast(first, src=0)
    found = torch.tensor(int(torch.equal(own, first)))
    dist.all_reduce(found, op=dist.ReduceOp.MIN)
    return bool(found)


def seconds(step: Callable[[], None]) -> tuple[float, float]:
    """Return the wall seconds of a step, from all ranks ready to all ranks done, and the slowest rank's CPU seconds."""
    dist.barrier()
    started, spent = time.perf_counter(), time.process_time()
    step()
    cpu = torch.tensor(time.process_time() - spent)
    dist.all_reduce(cpu, op=dist.ReduceOp.MAX)
    return time.perf_counter() - started, float(cpu)


def measure(problem: Problem, ranks: Ranks, backend: str, rounds: int) -> dict[str, Any]:
    """Return times, speed-up and checks; those of rank 0 count."""
    # The process that works alone is a group of one: it reduces nothing and draws its own noise.
    alone, shared = Stepper(problem, Ranks(), backend), Stepper(problem, ranks, backend)
    counts = {"all": len(problem.batches), "one (empty shares)": 1, "none": 0}
    differences = {name: check(alone, shared, count) for name, count in counts.items()}

    def by_one() -> None:
        if ranks.first:
            alone.step()

    times: dict[str, list[tuple[float, float]]] = {"one rank": [], "all ranks": []}
    for number in range(rounds + 1):
        for name, step in (("one rank", by_one), ("all ranks", shared.step)):
            found = seconds(step)
            if number:  # the first warms up
                times[name].append(found)
    walls, cpus = ([one[i] / both[i] for one, both in zip(*times.values(), strict=True)] for i in (0, 1))
    medians = {
        name: [statistics.median(column) for column in zip(*found, strict=True)] for name, found in times.items()
    }
    return {
        "config": problem.configuration.name,
        "backend": backend,
        "ranks": ranks.size,
        "threads_per_rank": torch.get_num_threads(),
        "one_rank_s": medians["one rank"][0],
        "all_ranks_s": medians["all ranks"][0],
        "speedup": statistics.median(walls),
        "speedup_range": [min(walls), max(walls)],
        "cpu_speedup": statistics.median(cpus),
        "load_average": os.getloadavg()[0],
        "relative_difference": differences,
        "sums_agree": max(differences.values()) <= TOLERANCE,
        "weights_stay_equal": same_weights(shared),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=[*CONFIGURATIONS, TINY.name], default="2d-16-n64")
    parser.add_argument("--backend", default="bookkeeping")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if rank_and_size()[1] < 2:
        parser.error("start it with torchrun --nproc-per-node 2 -m pipelines.ddp_step")
    ranks = open_ranks()
    configuration = {TINY.name: TINY, **CONFIGURATIONS}[arguments.config]
    result = measure(open_problem(configuration, clip_norm=100.0), ranks, arguments.backend, arguments.rounds)
    if ranks.first:
        text = json.dumps(result, indent=1)
        print(text)
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(text + "\n", encoding="utf-8")
    close_ranks()
    if not (result["sums_agree"] and result["weights_stay_equal"]):
        raise SystemExit("the ranks disagree")


if __name__ == "__main__":
    main()
