"""Few steps: schedulers and numbers of steps on ONE trained generator, same label maps and seeds.

    python -m pipelines.samplers RUN --out build/samplers --dice

Nothing is trained again but segmentation networks: one a seed on the run's train patients, which measures label
agreement, and with ``--dice`` one a seed on the pairs of each setting, all tested on the patients that the run holds
out. Figures are INTERNAL: to choose by Dice, give a run that holds out a part of the patients that the real study
trains on. One JSON a setting (resumable), then samplers.json and samplers.md; ``--report`` writes those of the settings
that are there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from medsynth.config import Study
    from medsynth.imaging.cohort import Patient
    from medsynth.models.segmenter import Segmenter

OUT = Path("build/samplers")
SCHEDULERS = ("ddpm", "ddim", "pndm", "dpm-solver++", "unipc")
STEPS = (5, 10, 20, 50)
MOST_CALLS = 10
TOLERANCE = 0.005
"""Dice below the best at which a setting with at most :data:`MOST_CALLS` network calls is as good as it."""
Cell = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """What every setting is measured with.

    Attributes:
        study: of the run; its ``segment`` as the command line wants it.
        run: the run's folder.
        test: patients held out of the run.
        networks: trained on real patients, one a seed.
        real: their Dice on ``test``, one a seed; None without ``dice``, which alone looks at patients held out.
        known: features of the run's train images, one tensor a network.
        seeds: of the segmentation networks.
        dice: whether to train networks on pairs.
    """

    study: Study
    run: Path
    test: list[Patient]
    networks: list[Segmenter]
    real: list[float] | None
    known: list[Tensor]
    seeds: range
    dice: bool


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder whose generator/ and masks/ are finished")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--pairs", type=int, help="a setting; default synthesise.pairs of the run")
    parser.add_argument("--scheduler", action="append", choices=SCHEDULERS, help="again for more; default all")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--more-ddpm", type=int, nargs="*", default=[250], metavar="STEPS", help="of DDPM alone")
    parser.add_argument("--dice", action="store_true", help="train networks on the pairs, too")
    parser.add_argument("--seeds", type=int, default=2, help="segmentation networks a setting")
    parser.add_argument("--segment-steps", type=int, help="default segment.steps of the run")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="write the tables of what was measured, and stop")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    import torch

    from medsynth import config, logs, store
    from medsynth.study import stored_study

    torch.set_num_threads(arguments.threads)
    asked = {"synthesise.pairs": arguments.pairs, "segment.steps": arguments.segment_steps}
    study = config.load(stored_study(arguments.run), {name: value for name, value in asked.items() if value})
    identity = {
        "generator": store.read_manifest(arguments.run / "generator").digest,
        "grid": list(study.grid.shape),
        "pairs": study.synthesise.pairs,
        "guidance": study.synthesise.guidance,
        "start": study.synthesise.start,
        "segment": study.segment.model_dump(mode="json"),
        "seeds": arguments.seeds,
        "dice": arguments.dice,
    }
    wanted = settings(arguments.scheduler or SCHEDULERS, arguments.steps, arguments.more_ddpm)
    cells = arguments.out / "settings"
    done = {key: kept for key in wanted if (kept := _kept(cells, key, identity)) is not None}
    if len(done) < len(wanted) and not arguments.report:
        bench = _open(study, arguments.run, range(arguments.seeds), arguments.dice)
        for key in logs.progress([k for k in wanted if k not in done], "settings measured", len(wanted) - len(done)):
            done[key] = {**measure(bench, *key), "identity": identity}
            _write(cells / f"{key[0]}-{key[1]}.json", json.dumps(done[key], indent=1) + "\n")
    found = [done[key] for key in wanted if key in done]
    _write(arguments.out / "samplers.json", json.dumps(found, indent=1) + "\n")
    _write(arguments.out / "samplers.md", markdown(found))
    print(markdown(found))


def settings(schedulers: Sequence[str], steps: Sequence[int], more_ddpm: Sequence[int]) -> list[tuple[str, int]]:
    """Return every (scheduler, steps) once, few steps first, so that a run that is cut short has them all."""
    found = {(name, count) for name in schedulers for count in steps}
    found |= {("ddpm", count) for count in more_ddpm if "ddpm" in schedulers}
    return sorted(found, key=lambda one: (one[1], SCHEDULERS.index(one[0])))


def _open(study: Study, run: Path, seeds: range, dice: bool) -> Bench:
    import torch

    from medsynth.imaging.cohort import load_patients
    from medsynth.models.segmenter import bottleneck_features
    from medsynth.stages.segmenter_training import write_patients

    train, test = (load_patients(run / "cohort", study.grid, split) for split in ("train", "test"))
    with tempfile.TemporaryDirectory() as scratch:
        pool = Path(scratch) / "real.safetensors"
        write_patients(pool, train)
        networks = [_train(study, pool, "real", seed) for seed in seeds]
    images = torch.cat([patient.images for patient in train])
    known = [bottleneck_features(network, images) for network in networks]
    real = [_dice(network, test, study) for network in networks] if dice else None
    return Bench(study, run, test, networks, real, known, seeds, dice)


def _train(study: Study, pool: Path, name: str, seed: int) -> Segmenter:
    import torch

    from medsynth.randomness import derive_seed
    from medsynth.stages.segmenter_training import Training, train_segmenter

    stream = derive_seed(study.seed, "samplers", "segment", seed)  # the same for all settings: they are compared
    model, _ = train_segmenter(Training(name, study.grid, study.segment, stream, (pool,)), torch.device("cpu"))
    return model.eval()


def _dice(network: Segmenter, test: Sequence[Patient], study: Study) -> float:
    import numpy as np

    from medsynth.metrics.overlap import patient_dice, patient_means
    from medsynth.models.segmenter import predict

    truth = [patient.labels for patient in test]
    predicted = [predict(network, patient.images) for patient in test]
    return float(np.nanmean(patient_means(patient_dice(predicted, truth, study.grid.classes))))


def measure(bench: Bench, scheduler: str, steps: int) -> Cell:
    """Return what one setting costs and what its pairs are worth."""
    images, labels, calls, seconds = sample(bench.study, bench.run, scheduler, steps)
    found: Cell = {
        "scheduler": scheduler,
        "steps": steps,
        "network_calls": calls,
        "cpu_s_a_pair": seconds / len(images),
        **_likeness(bench, images, labels),
        "real_dice": bench.real,
        "test_patients": len(bench.test),
        "dice": None,
    }
    if bench.dice:
        found["dice"] = _dice_of_pairs(bench, images, labels)
    return found


def sample(study: Study, run: Path, scheduler: str, steps: int) -> tuple[Tensor, Tensor, int, float]:
    """Return images, label maps, network calls a pair and CPU seconds of the sampling alone.

    Label maps and seeds are those of the study's plan, whatever the setting.
    """
    import torch

    from medsynth.diffusion.generator import load_generator
    from medsynth.imaging.transforms import pair_to_grid
    from medsynth.stages.masks import load_masks
    from medsynth.stages.synthesise import plan, render

    how = study.synthesise.model_copy(update={"scheduler": scheduler, "steps": steps})
    rows = plan(study.model_copy(update={"synthesise": how}))
    source = load_masks(run / "masks").ask(how, [row.mask_seed for row in rows])
    built = load_generator(run / "generator", run / "autoencoder")
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    built.denoiser.register_forward_pre_hook(count)
    pairs, seconds, batches = [], 0.0, range(0, len(rows), how.batch_size)
    for first in batches:
        began = time.process_time()
        pairs += render(rows[first : first + how.batch_size], built, source, study.grid, how, torch.device("cpu"))
        seconds += time.process_time() - began
    on_grid = [pair_to_grid(torch.from_numpy(p.image), torch.from_numpy(p.label), study.grid) for p in pairs]
    images, labels = (torch.stack(list(part)) for part in zip(*on_grid, strict=True))
    return images, labels, calls // len(batches), seconds


def _likeness(bench: Bench, images: Tensor, labels: Tensor) -> Cell:
    """Return label agreement and the Frechet distance to the train images in the features of real-trained networks."""
    from functools import partial

    import numpy as np

    from medsynth.metrics.agreement import label_agreement
    from medsynth.metrics.fidelity import frechet_distance
    from medsynth.models.segmenter import bottleneck_features, predict

    networks: list[Callable[[Tensor], Tensor]] = [partial(predict, network) for network in bench.networks]
    agreement = label_agreement(networks, images, labels, bench.study.grid.classes)
    distances = [
        frechet_distance(known, made := bottleneck_features(network, images), min(len(known), len(made)), 0)
        for network, known in zip(bench.networks, bench.known, strict=True)
    ]
    return {"agreement": float(np.nanmean(agreement)), "frechet": statistics.fmean(distances)}


def _dice_of_pairs(bench: Bench, images: Tensor, labels: Tensor) -> list[float]:
    import torch

    from medsynth.stages.segmenter_training import write_pool

    with tempfile.TemporaryDirectory() as scratch:
        pool = Path(scratch) / "pairs.safetensors"
        write_pool(pool, images, labels, torch.ones(len(images), dtype=torch.int64))
        return [_dice(_train(bench.study, pool, "pairs", seed), bench.test, bench.study) for seed in bench.seeds]


def chosen(cells: Sequence[Cell]) -> Cell | None:
    """Return the best setting of at most :data:`MOST_CALLS` calls, if within :data:`TOLERANCE` of the best of all.

    None where it does not, or where Dice was not measured.
    """
    known = [cell for cell in cells if cell["dice"]]
    if not known:
        return None
    best = max(statistics.fmean(cell["dice"]) for cell in known)
    near = [
        cell
        for cell in known
        if cell["network_calls"] <= MOST_CALLS and statistics.fmean(cell["dice"]) >= best - TOLERANCE
    ]
    return max(near, key=lambda cell: statistics.fmean(cell["dice"]), default=None)


def markdown(cells: Sequence[Cell]) -> str:
    """Return the table for the documentation, with what it says of the default."""
    header = "| scheduler | steps | network calls | CPU ms a pair | label agreement | Frechet | Dice (each seed) |"
    lines = [header, "|---|---:|---:|---:|---:|---:|---|"]
    for cell in sorted(cells, key=lambda one: (SCHEDULERS.index(one["scheduler"]), one["steps"])):
        lines.append(
            f"| {cell['scheduler']} | {cell['steps']} | {cell['network_calls']} | {1000 * cell['cpu_s_a_pair']:.0f} "
            f"| {cell['agreement']:.3f} | {cell['frechet']:.2f} | {_dice_text(cell['dice'])} |"
        )
    if not cells:
        return "Nothing was measured yet.\n"
    real, found = cells[0]["real_dice"], chosen(cells)
    if real:
        lines += ["", f"Real patients only: Dice {_dice_text(real)}, on {cells[0]['test_patients']} held-out patients."]
    if found is not None:
        lines.append(
            f"At most {MOST_CALLS} calls and within {100 * TOLERANCE:g} Dice points of the best: "
            f"{found['scheduler']} at {found['steps']} steps."
        )
    elif any(cell["dice"] for cell in cells):
        lines.append(
            f"No setting of at most {MOST_CALLS} calls lies within {100 * TOLERANCE:g} Dice points of the best."
        )
    return "\n".join(lines) + "\n"


def _dice_text(values: Sequence[float] | None) -> str:
    if not values:
        return "-"
    return f"{statistics.fmean(values):.3f} ({', '.join(f'{value:.3f}' for value in values)})"


def _kept(folder: Path, key: tuple[str, int], identity: Cell) -> Cell | None:
    """Return a setting that an earlier run has measured in the same way."""
    path = folder / f"{key[0]}-{key[1]}.json"
    if not path.is_file():
        return None
    found: Cell = json.loads(path.read_text(encoding="utf-8"))
    return found if found.get("identity") == identity else None


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".partial")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


if __name__ == "__main__":
    main()
