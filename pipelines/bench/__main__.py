"""Time, memory and correctness of private training steps against a plain one.

    python -m pipelines.bench [--config 2d-16-n64] [--engine bookkeeping] [--threads 1] [--rounds 21] [--resume]
    python -m pipelines.bench --device cuda --bf16 --out build/bench/dp_step_gpu.json

Writes build/bench/dp_step.json after every configuration, prints a table a number of threads. ``--markdown`` prints the
tables of the last run for docs/explanation/dp-engine.md and measures nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.bench.configurations import Configuration, Place
    from pipelines.bench.measuring import Effort, MemoryServer
    from pipelines.bench.results import Entry

OUT = Path("build/bench/dp_step.json")


def _arguments() -> argparse.Namespace:
    from pipelines.bench.configurations import CONFIGURATIONS
    from pipelines.bench.engines import ENGINES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", action="append", choices=list(CONFIGURATIONS), help="again for more; default all")
    parser.add_argument("--engine", action="append", choices=list(ENGINES), help="again for more; default all")
    parser.add_argument("--rounds", type=int, default=21, help="at most so many steps an engine")
    parser.add_argument("--threads", type=int, action="append", help="again for more; default 1 and 2")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: the first GPU, one thread")
    parser.add_argument("--bf16", action="store_true", help="autocast the forward pass to bfloat16")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--resume", action="store_true", help="keep what an interrupted run has measured")
    parser.add_argument("--quick", action="store_true", help="a tiny model and few rounds: does it run at all")
    parser.add_argument("--markdown", action="store_true", help="print the tables of --out and stop")
    return parser.parse_args()


def main() -> None:
    # Threads that wait by spinning would be counted as CPU time; read once, when libgomp is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.simplefilter("ignore")
    arguments = _arguments()
    from pipelines.bench.results import details, markdown, table

    if arguments.markdown:
        print(markdown(_read(arguments.out)))
        return
    entries = _measure_all(arguments)
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else 180)
    for threads in sorted({e["threads"] for e in entries}):
        console.print(table(entries, threads))
    for line in details(entries):
        print(line)
    print(f"written to {arguments.out}")


def _measure_all(arguments: argparse.Namespace) -> list[Entry]:
    from medsynth import logs
    from medsynth.devices import compute_exactly
    from pipelines.bench.configurations import CONFIGURATIONS, TINY, Place
    from pipelines.bench.engines import ENGINES
    from pipelines.bench.measuring import Effort, MemoryServer
    from pipelines.bench.results import place_of, save

    chosen = [TINY] if arguments.quick else [CONFIGURATIONS[n] for n in arguments.config or CONFIGURATIONS]
    engines = list(dict.fromkeys(["plain", *(arguments.engine or ENGINES)]))
    effort = Effort(rounds=2, least=2) if arguments.quick else Effort(rounds=arguments.rounds)
    server = MemoryServer()
    place = Place(arguments.device, arguments.bf16)
    if place.device == "cuda":
        compute_exactly()
    kept = _read(arguments.out) if arguments.resume and arguments.out.is_file() else []
    entries = [e for e in kept if place_of(e) == (place.name, place.precision)]
    work = [(t, c) for t in arguments.threads or ([1] if place.device == "cuda" else [1, 2]) for c in chosen]
    for threads, configuration in logs.progress(work, "configurations measured", len(work)):
        done = [e for e in entries if (e["config"], e["threads"]) == (configuration.name, threads)]
        if {e["engine"] for e in done} >= set(engines):
            continue
        entries = [e for e in entries if e not in done]
        entries += _measure(configuration, place, engines, threads, effort, server, entries)
        save(entries, arguments.out)
    return entries


def _measure(
    configuration: Configuration,
    place: Place,
    engines: Sequence[str],
    threads: int,
    effort: Effort,
    server: MemoryServer,
    before: Sequence[Entry],
) -> list[Entry]:
    import torch

    from medsynth import logs
    from pipelines.bench.measuring import Bench, reference
    from pipelines.bench.results import entry

    torch.set_num_threads(threads)
    if threads > 1:  # what is compared with other libraries is one thread; here one step of theirs will do
        effort = replace(effort, seconds=0.0, own_seconds=effort.own_seconds / 2)
    problem, right = reference(configuration, place)
    bench = Bench(problem, right, engines, effort)
    what = f"{configuration.name}, {threads} thread(s)"
    for _ in logs.progress(bench.first_round(), f"{what}: first steps", len(engines)):
        pass
    for _ in logs.progress(bench.rounds(), f"{what}: rounds", effort.rounds):
        pass
    bench.close()
    known = {e["engine"]: e.get("memory_mib") for e in before if e["config"] == configuration.name}
    memory: dict[str, float | str | None] = {}
    for name in logs.progress(bench.timings, f"{what}: memory", len(bench.timings)):
        # Peak memory hardly depends on threads: measured once.
        memory[name] = known.get(name) or server.added_mib(name, problem, threads)
    return [entry(bench, name, threads, memory.get(name), memory.get("plain")) for name in engines]


def _read(path: Path) -> list[Entry]:
    found: list[Entry] = json.loads(path.read_text(encoding="utf-8"))
    return found


if __name__ == "__main__":
    main()
