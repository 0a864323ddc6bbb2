"""Time and memory of per-patient gradients against a plain training step: a study's own denoiser, on phantoms.

The variants are interleaved, so that a busy machine disturbs all of them alike. Each variant's memory (what one step
adds to the peak) is measured in a process of its own.

    python pipelines/bench_dp_step.py [--config configs/hippocampus-3d.yaml] [--patients 8] [--draws 4] [--repeats 5]
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
from torch import nn

from medsynth import config
from medsynth.config import Study
from medsynth.diffusion.generator import build_generator
from medsynth.diffusion.objective import noise_rows, row_loss
from medsynth.imaging.phantom import phantom_pairs
from medsynth.models.adapters import add_adapters, select_trainable
from medsynth.models.autoencoder import build_codec
from medsynth.privacy.gradients import Batch, open_backend

VARIANTS = ("plain", "unit", "opacus")


def open_study(study: Study, patients: int, draws: int) -> tuple[nn.Module, list[Batch]]:
    """Return the denoiser, as trained on patients, and one batch a phantom patient."""
    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in phantom_pairs(study.grid, patients, 0))
    codec = build_codec(study.grid, study.encode)
    codec.eval().requires_grad_(False)
    codec.calibrate(images)
    built = build_generator(study.grid, study.train, codec)
    if study.train.trainable == "lora":
        add_adapters(built.denoiser, study.train.lora_rank)
    select_trainable(built.denoiser, study.train.trainable)
    latents, masks = codec.encode(images), built.masks(labels)
    stream = torch.Generator().manual_seed(0)
    preconditioning, dropout = built.denoiser.preconditioning, study.train.mask_dropout
    rows = [torch.full((draws,), patient) for patient in range(patients)]
    return built.denoiser, [noise_rows(latents[r], masks[r], preconditioning, dropout, stream) for r in rows]


def open_step(variant: str, model: nn.Module, batches: list[Batch]) -> Callable[[], object]:
    if variant != "plain":
        backend = open_backend(variant, model, row_loss, 1.0)
        return lambda: backend.clipped_sum(batches)
    whole = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}

    def plain() -> None:
        model.zero_grad(set_to_none=True)
        row_loss(model, whole).mean().backward()

    return plain


def peak_mib() -> float:
    """Return the process's peak resident memory; `ru_maxrss` would carry over the parent's across exec."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def print_memory(variant: str, study: Study, patients: int, draws: int) -> None:
    model, batches = open_study(study, patients, draws)
    step = open_step(variant, model, batches)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts again from what is in use now
    before = peak_mib()
    step()
    print(json.dumps({"mib": peak_mib() - before}))


def memory_of(variant: str) -> float:
    """Run this script again with the same arguments for one variant's memory."""
    command = [sys.executable, *sys.argv, "--memory", variant]
    return float(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["mib"])


def interleaved(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Return the seconds of each step, after one round that warms up."""
    seconds: dict[str, list[float]] = {variant: [] for variant in steps}
    for repeat in range(repeats + 1):
        for variant, step in steps.items():
            started = time.perf_counter()
            step()
            if repeat:
                seconds[variant].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/hippocampus-3d.yaml"))
    parser.add_argument("--patients", type=int, default=8)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", choices=VARIANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    study = config.load(arguments.config)
    if arguments.memory:
        print_memory(arguments.memory, study, arguments.patients, arguments.draws)
        return
    model, batches = open_study(study, arguments.patients, arguments.draws)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    seconds = interleaved({name: open_step(name, model, batches) for name in VARIANTS}, arguments.repeats)
    plain = statistics.median(seconds["plain"])
    print(
        f"{study.name}: {trained} trained parameters, {arguments.patients} patients x {arguments.draws} draws, "
        f"{arguments.threads} thread(s)"
    )
    print(f"{'variant':<8} {'median s':>9} {'min s':>8} {'ratio':>6} {'MiB added':>10}")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"{name:<8} {median:>9.3f} {min(times):>8.3f} {median / plain:>6.2f} {memory_of(name):>10.0f}")


if __name__ == "__main__":
    main()
