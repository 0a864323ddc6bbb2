"""Time and memory of per-patient gradients against a plain training step, on phantom latents.

The variants are interleaved, so that a busy machine disturbs all of them alike; ratios of medians are printed.
Each variant's peak memory is measured in a process of its own.

    python pipelines/bench_dp_step.py [--dims 3] [--patients 8] [--draws 4] [--repeats 5] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from medsynth.config import Train
from medsynth.diffusion.objective import noise_rows, row_loss, training_schedule
from medsynth.models.denoiser import Denoiser
from medsynth.privacy.gradients import Batch, open_backend

VARIANTS = ("plain", "unit", "opacus")
LATENT_CHANNELS = {2: 16, 3: 64}  # two levels of the Haar transform of one grey channel
MASK_CHANNELS = {2: 32, 3: 128}  # the same of two labels
LATENT_SHAPE = {2: (16, 16), 3: (12, 16, 12)}


def patients_of(dims: int, patients: int, draws: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    schedule = training_schedule(Train())

    def rows(channels: int) -> torch.Tensor:
        return torch.randn(draws, channels, *LATENT_SHAPE[dims], generator=generator)

    return [
        noise_rows(rows(LATENT_CHANNELS[dims]), rows(MASK_CHANNELS[dims]), schedule, 0.1, generator)
        for _ in range(patients)
    ]


def open_step(variant: str, dims: int, batches: list[Batch]) -> Callable[[], object]:
    torch.manual_seed(0)
    model = Denoiser(dims, LATENT_CHANNELS[dims], MASK_CHANNELS[dims], Train())
    if variant != "plain":
        backend = open_backend(variant, model, row_loss, 1.0)
        return lambda: backend.clipped_sum(batches)
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        row_loss(model, whole).mean().backward()

    return plain


def peak_mib() -> float:
    """Return the process's peak resident memory; ru_maxrss would carry over the parent's across exec."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def memory_of(variant: str, arguments: argparse.Namespace) -> float:
    """Return the MiB that one step adds to a process's peak."""
    command = [sys.executable, __file__, "--memory", variant, "--dims", str(arguments.dims)]
    command += ["--patients", str(arguments.patients), "--draws", str(arguments.draws)]
    command += ["--threads", str(arguments.threads)]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["mib"])


def print_memory(variant: str, arguments: argparse.Namespace) -> None:
    batches = patients_of(arguments.dims, arguments.patients, arguments.draws)
    open_step(variant, arguments.dims, batches[:1])  # imports are no cost of the step
    before = peak_mib()
    open_step(variant, arguments.dims, batches)()
    print(json.dumps({"mib": peak_mib() - before}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, choices=(2, 3), default=3)
    parser.add_argument("--patients", type=int, default=8)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        print_memory(arguments.memory, arguments)
        return
    batches = patients_of(arguments.dims, arguments.patients, arguments.draws)
    steps = {variant: open_step(variant, arguments.dims, batches) for variant in VARIANTS}
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for repeat in range(arguments.repeats + 1):
        for variant, step in steps.items():
            started = time.perf_counter()
            step()
            if repeat:  # the first round warms up
                seconds[variant].append(time.perf_counter() - started)
    plain = statistics.median(seconds["plain"])
    print(f"{arguments.dims}D, {arguments.patients} patients x {arguments.draws} draws, {arguments.threads} thread(s)")
    print(f"{'variant':<8} {'median s':>9} {'min s':>8} {'ratio':>6} {'MiB added':>10}")
    for variant, times in seconds.items():
        median = statistics.median(times)
        added = memory_of(variant, arguments)
        print(f"{variant:<8} {median:>9.3f} {min(times):>8.3f} {median / plain:>6.2f} {added:>10.0f}")


if __name__ == "__main__":
    main()
