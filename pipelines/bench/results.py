"""What the benchmark writes and prints: one entry a configuration, engine and number of threads."""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from medsynth.files import replace_bytes
from pipelines.bench.configurations import CPU
from pipelines.bench.measuring import Agreement, Bench, Timing, ratios, wall_ratios

Entry = dict[str, Any]
GOALS = {"time": (1.15, 1.25), "memory": (1.10, 1.20)}  # geometric mean, and the worst configuration


def entry(
    bench: Bench, engine: str, threads: int, memory: float | str | None, plain_memory: float | str | None
) -> Entry:
    """Return one engine's results as JSON values.

    Args:
        bench: after its rounds.
        engine: the engine.
        threads: threads of torch.
        memory: MiB that its step adds to the peak, or why that is not known.
        plain_memory: the same of the plain step.
    """
    problem = bench.problem
    found: Entry = {
        "config": problem.configuration.name,
        "engine": engine,
        "threads": threads,
        "device": problem.place.name,
        "precision": problem.place.precision,
        "patients": len(problem.batches),
        "draws": problem.configuration.draws,
        "trained_parameters": problem.trained,
        "load_average": round(os.getloadavg()[0], 2),
        "time_ratio": None,
        "time_spread": None,
        "memory_ratio": None,
        "max_relative_error": None,
        "correct": None,
    }
    if engine in bench.errors:
        found["error"] = bench.errors[engine]
        found["correct"] = None if bench.errors[engine].startswith("n/a") else False
        return found
    found |= _time(bench.timings[engine], bench.timings["plain"])
    if isinstance(memory, float) and isinstance(plain_memory, float):
        found |= {"memory_ratio": memory / plain_memory, "memory_mib": memory}
    elif isinstance(memory, str):
        found["memory_error"] = memory
    return found | _agreement(bench.agreements.get(engine))


def _time(timing: Timing, plain: Timing) -> Entry:
    found, walls = ratios(timing, plain), wall_ratios(timing, plain)
    result: Entry = {
        "time_ratio": statistics.median(found),
        "time_spread": quartiles(found),
        "wall_ratio": statistics.median(walls),
        "cpu_s": statistics.median(timing.cpu.values()),
        "wall_s": statistics.median(timing.wall.values()),
        "rounds": len(found),
    }
    if timing.noise:
        # The same step, had its noise come from torch.normal: what the engine costs without our secure noise.
        noise, other = statistics.median(timing.noise), statistics.median(timing.torch_noise)
        step = statistics.median(plain.cpu.values())
        result |= {"noise_s": noise, "time_ratio_torch_noise": result["time_ratio"] + (other - noise) / step}
    return result


def _agreement(found: Agreement | None) -> Entry:
    if found is None:
        return {}
    return {
        "max_relative_error": max(found.norm_error, found.sum_error),
        "norm_error": found.norm_error,
        "sum_error": found.sum_error,
        "clipped_norm": found.clipped_norm,
        "tolerance": found.tolerance,
        "correct": found.correct,
    }


def quartiles(values: Sequence[float]) -> list[float]:
    """Return the first and third quartile, by linear interpolation."""
    if len(values) == 1:
        return [values[0], values[0]]
    cuts = statistics.quantiles(values, n=4, method="inclusive")
    return [cuts[0], cuts[2]]


def geometric_mean(entries: Sequence[Entry], key: str) -> float | None:
    """Return the geometric mean of ``key`` over the entries that have it; None if none has."""
    found = [e[key] for e in entries if e.get(key)]
    return math.exp(statistics.fmean(math.log(value) for value in found)) if found else None


def save(entries: Sequence[Entry], path: Path) -> None:
    """Write the results; a reader never sees half of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(path, (json.dumps(list(entries), indent=1) + "\n").encode())


def cell(found: Entry | None) -> str:
    """Return one engine's time and memory as they stand in a table."""
    if found is None:
        return ""
    if "error" in found:
        return "n/a" if found["error"].startswith("n/a") else "error"
    memory = f"{found['memory_ratio']:.2f}" if found["memory_ratio"] else "?"
    text = f"{found['time_ratio']:.2f} / {memory}"
    return text if found["correct"] is not False else f"{text} {_verdict(found)}"


def _verdict(found: Entry) -> str:
    """Return what is not right: gradients, or only a clip norm that rounding exceeds (which epsilon does not allow)."""
    tolerance = found.get("tolerance", CPU.tolerance)
    exact = max(found.get(kind, math.inf) for kind in ("norm_error", "sum_error")) <= tolerance
    return "OVER" if exact and found.get("clipped_norm", math.inf) <= 1 + tolerance else "WRONG"


def rows(entries: Sequence[Entry], threads: int) -> tuple[list[str], list[list[str]]]:
    """Return the header and the rows of the table: engines beside each other, then geometric means."""
    chosen = [e for e in entries if e["threads"] == threads]
    configs = list(dict.fromkeys(e["config"] for e in chosen))
    engines = [name for name in dict.fromkeys(e["engine"] for e in chosen) if name != "plain"]
    by = {(e["config"], e["engine"]): e for e in chosen}
    body = []
    for config in configs:
        plain = by.get((config, "plain"))
        seconds = f"{plain['cpu_s'] * 1000:.0f} ms" if plain and plain.get("cpu_s") else ""
        body.append([config, seconds, *(cell(by.get((config, engine))) for engine in engines)])
    means = ["geometric mean", ""]
    for engine in engines:
        own = [e for e in chosen if e["engine"] == engine]
        found = [geometric_mean(own, key) for key in ("time_ratio", "memory_ratio")]
        means.append(" / ".join("?" if value is None else f"{value:.2f}" for value in found))
    return ["configuration", "plain step", *engines], [*body, means]


def details(entries: Sequence[Entry]) -> list[str]:
    """Return lines on our engine's spread, noise and goals, on what is wrong and on what failed."""
    lines = []
    for threads in sorted({e["threads"] for e in entries}):
        own = [e for e in entries if e["engine"] == "bookkeeping" and e["threads"] == threads and e["time_ratio"]]
        for e in own:
            low, high = e["time_spread"]
            lines.append(
                f"bookkeeping, {e['config']}, {threads} thread(s): {e['time_ratio']:.2f} (quartiles {low:.2f} to "
                f"{high:.2f}, {e['rounds']} rounds); {e['time_ratio_torch_noise']:.2f} with torch.normal noise; "
                f"wall clock {e['wall_ratio']:.2f}; error {e['max_relative_error']:.1e}"
            )
        for name, (mean, worst) in GOALS.items():
            values = [e[f"{name}_ratio"] for e in own if e[f"{name}_ratio"]]
            if values:
                average = geometric_mean(own, f"{name}_ratio") or math.nan
                met = "met" if average <= mean and max(values) <= worst else "NOT met"
                lines.append(
                    f"bookkeeping, {name}, {threads} thread(s): mean {average:.3f} (goal {mean}), worst "
                    f"{max(values):.3f} (goal {worst}): {met}"
                )
    for e in entries:
        where = f"{e['engine']}, {e['config']}, {e['threads']} thread(s)"
        if e["correct"] is False and "error" not in e:
            lines.append(
                f"{_verdict(e)}: {where}: norms off by {e['norm_error']:.1e}, sum by {e['sum_error']:.1e}, "
                f"clipped to {e['clipped_norm']:.7f} C"
            )
        if "error" in e and e["threads"] == min(x["threads"] for x in entries):
            lines.append(f"{where}: {e['error']}")
    return lines


def place_of(found: Entry) -> tuple[str, str]:
    """Return device and precision of an entry; one of before there was a choice names neither."""
    return found.get("device", CPU.name), found.get("precision", CPU.precision)


def _where(entries: Sequence[Entry], threads: int) -> str:
    """Return what was measured where, as titles say it."""
    places = {place_of(e) for e in entries if e["threads"] == threads}
    return f"{threads} thread(s), {', '.join(' '.join(place) for place in sorted(places))}"


def table(entries: Sequence[Entry], threads: int) -> Table:
    """Return the results of one number of threads for a terminal."""
    header, body = rows(entries, threads)
    found = Table(title=f"{_where(entries, threads)}: time / peak memory, relative to the plain step")
    for name in header:
        found.add_column(name, justify="left" if name == header[0] else "right")
    for row in body[:-1]:
        found.add_row(*row)
    found.add_section()
    found.add_row(*body[-1])
    return found


def markdown(entries: Sequence[Entry]) -> str:
    """Return all tables for the documentation."""
    parts = []
    for threads in sorted({e["threads"] for e in entries}):
        header, body = rows(entries, threads)
        lines = [header, ["---"] + ["---:"] * (len(header) - 1), *body]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        parts.append(
            f"{threads} thread{'s' if threads > 1 else ''}, time / memory relative to the plain step:\n\n{text}\n"
        )
    return "\n".join(parts)
