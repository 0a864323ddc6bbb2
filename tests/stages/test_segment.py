"""Stage segment: the same recipe for each regime, repeatable, and clear when it fails."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from medsynth import config, store
from medsynth.config import Encode, Study
from medsynth.errors import InputError, MedsynthError, StoreError
from medsynth.imaging.cohort import Pair, write_case, write_pair
from medsynth.models import segmenter
from medsynth.models.autoencoder import build_codec, save_codec
from medsynth.privacy.accounting import Event
from medsynth.privacy.ledger import Ledger
from medsynth.stages import segment, segmenter_training
from medsynth.tracking import Tracker


def study(rank: int, **sections: Any) -> Study:
    """Return a study whose networks train in a second."""
    shape = [16] * rank if rank == 2 else [8] * rank
    raw = {
        "name": "tiny",
        "grid": {"spatial_dims": rank, "shape": shape, "spacing_mm": [1] * rank, "labels": {0: "none", 1: "organ"}},
        "privacy": {"epsilon": 8, "delta": 1e-4, "declared_patients": 16, "entropy": "test_only"},
        "encode": {"levels": 1},
        "masks": {"coefficients": [2] * rank},
        "train": {"appearance": {"coefficients": [2] * rank}},
        "segment": {"channels": [4, 8], "steps": 12, "batch_size": 2},
        "compute": {"device": "cpu", "workers": 1},
    }
    return config.parse({**raw, **sections})


def folders(study: Study, root: Path, train: int = 4, test: int = 2, pairs: int = 4) -> dict[str, Path]:
    """Write a cohort and synthetic pairs of bright squares (cubes) and return the finished folders."""
    grid, random = study.grid, torch.Generator().manual_seed(0)

    def example() -> tuple[torch.Tensor, torch.Tensor]:
        label = torch.zeros(grid.shape, dtype=torch.uint8)
        label[tuple(slice(at, at + 4) for at in torch.randint(1, 4, (len(grid.shape),), generator=random).tolist())] = 1
        return (label.float() - 0.5 + 0.1 * torch.randn(grid.shape, generator=random)).clamp(-1, 1)[None], label

    with store.create(root / "cohort", "ingest", "0" * 64) as folder:
        with (folder.path / "cases.csv").open("w", newline="") as handle:
            writer = csv.writer(handle)
            writer.writerow(["case_id", "patient_id", "split", "source", "records", "labelled", "content"])
            for number in range(train + test):
                image, label = example()
                write_case(folder.path, f"case-{number}", image[None], label[None], grid)
                split = "train" if number < train else "test"
                writer.writerow([f"case-{number}", f"patient-{number}", split, "nifti", 1, "true", f"{number:064x}"])
        folder.finish("private")
    with store.create(root / "synthetic", "synthesise", "0" * 64) as folder:
        for number in range(pairs):
            image, label = example()
            write_pair(folder.path, Pair(f"pair-{number}", image.numpy(), label.numpy()), grid)
        folder.finish("released")
    return {"cohort": root / "cohort", "synthetic": root / "synthetic"}


def reserve_masks(small: Study, root: Path) -> None:
    """Write a ledger of one mechanism beside the folders, as a finished private study has one."""
    Ledger(root / "ledger.jsonl").reserve(
        "masks",
        [Event("gaussian", 4.0)],
        epsilon=8.0,
        delta=small.privacy.delta,
        noise_source="test_only",
        config_digest="0" * 64,
        parents={},
        denominators={"mean": 16.0},
    )


@pytest.mark.parametrize("rank", [2, 3])
def test_a_network_for_each_regime_and_seed(rank: int, tmp_path: Path) -> None:
    small = study(rank, segment={"channels": [4, 8], "steps": 3, "batch_size": 2, "seeds": [0, 1]})
    manifest = segment.run(small, folders(small, tmp_path), tmp_path / "segmenter", Tracker())
    names = {f"{regime}-{seed}" for regime in small.segment.regimes for seed in (0, 1)}
    assert set(manifest.files) == {f"{name}.safetensors" for name in names} | {"training.json"}
    assert manifest.sensitivity == "internal" and set(manifest.parents) == {"cohort", "synthetic"}
    losses = json.loads((tmp_path / "segmenter" / "training.json").read_text())["loss"]
    assert {name: len(series) for name, series in losses.items()} == dict.fromkeys(names, 3)


@pytest.mark.parametrize("regime", ["real_only", "synthetic_only"])
def test_pitfall_19_a_network_of_real_patients_is_internal(regime: str, tmp_path: Path) -> None:
    small = study(2, segment={"channels": [4, 8], "steps": 2, "batch_size": 2, "regimes": [regime]})
    assert not segment.run(small, folders(small, tmp_path), tmp_path / "segmenter", Tracker()).releasable


def test_training_learns_and_is_repeatable(tmp_path: Path) -> None:
    small = study(2, segment={"channels": [4, 8], "steps": 200, "batch_size": 4, "regimes": ["synthetic_only"]})
    inputs = folders(small, tmp_path)
    first, second = (segment.run(small, inputs, tmp_path / name, Tracker()) for name in ("one", "two"))
    assert first.files == second.files
    series = json.loads((tmp_path / "one" / "training.json").read_text())["loss"]["synthetic_only-0"]
    assert sum(series[-10:]) < 0.6 * sum(series[:10])


@pytest.mark.slow
def test_workers_give_the_same_networks_as_one_process(tmp_path: Path) -> None:
    alone, together = (study(2, compute={"device": "cpu", "workers": workers}) for workers in (1, 2))
    inputs = folders(alone, tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    try:
        first = segment.run(alone, inputs, tmp_path / "one", Tracker())
    finally:
        torch.set_num_threads(threads)
    assert segment.run(together, inputs, tmp_path / "two", Tracker()).files == first.files


def test_synthetic_only_reads_no_patient_and_the_tracker_gets_losses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("patients were read")

    class Recorder(Tracker):
        def __init__(self) -> None:
            self.names: set[str] = set()

        def metrics(self, values: Any, step: int | None = None) -> None:
            self.names.update(values)

    small = study(2, segment={"channels": [4, 8], "steps": 2, "batch_size": 2, "regimes": ["synthetic_only"]})
    inputs = folders(small, tmp_path)
    monkeypatch.setattr(segment, "load_patients", refuse)
    recorder = Recorder()
    segment.run(small, inputs, tmp_path / "segmenter", recorder)
    assert recorder.names == {"loss/synthetic_only-0"}


def test_a_cohort_without_train_patients_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    small = study(2)
    with pytest.raises(InputError, match="no train patient"):
        segment.run(small, folders(small, tmp_path, train=0), tmp_path / "segmenter", Tracker())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cohort", "synthetic"]


def test_a_failed_training_names_regime_and_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise ValueError("boom")

    small = study(2)
    inputs = folders(small, tmp_path)
    monkeypatch.setattr(segment, "_train", fail)
    with pytest.raises(MedsynthError, match=r"real_only-0.*ValueError: boom"):
        segment.run(small, inputs, tmp_path / "segmenter", Tracker())


def test_networks_that_a_killed_run_trained_are_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = study(2)
    inputs, names = folders(tiny, tmp_path), []
    train = segment.train_segmenter

    def killed(training: Any, device: torch.device) -> Any:
        if len(names) == 2:
            raise KeyboardInterrupt
        names.append(training.name)
        return train(training, device)

    with monkeypatch.context() as patch:
        patch.setattr(segment, "train_segmenter", killed)
        with pytest.raises(KeyboardInterrupt):
            segment.run(tiny, inputs, tmp_path / "killed", Tracker())
    half = store.partial(tmp_path / "killed")
    assert not list(half.glob(".pools-*")), "no patient stays behind"
    (half / ".pools-left").mkdir()
    (half / ".pools-left" / "real.safetensors").write_bytes(b"patients")
    monkeypatch.setattr(segment, "train_segmenter", lambda *a: names.append(a[0].name) or train(*a))
    manifest = segment.run(tiny, inputs, tmp_path / "killed", Tracker())
    assert names == ["real_only-0", "synthetic_only-0", "mixed-0"]
    assert manifest.files == segment.run(tiny, inputs, tmp_path / "whole", Tracker()).files
    assert not list((tmp_path / "killed").glob(".*"))


def test_workers_do_not_outlive_a_run_that_is_asked_to_end(root: Path, tmp_path: Path) -> None:
    code = (
        "import os, signal, sys, time\n"
        "from medsynth import accidents\n"
        "from medsynth.stages.segmenter_training import side_by_side\n"
        "class Job:\n"
        "    name = 'long'\n"
        "def work(job, device):\n"
        "    open(f'{sys.argv[1]}/{os.getpid()}', 'w').close()\n"
        "    time.sleep(600)\n"
        "if __name__ == '__main__':\n"
        "    accidents.stop_when_asked()\n"
        "    list(side_by_side(work, [Job(), Job(), Job()], 'cpu', 2, 'segment'))\n"
    )
    script, started = tmp_path / "script.py", tmp_path / "started"
    script.write_text(code)
    started.mkdir()
    process = subprocess.Popen(
        [sys.executable, str(script), str(started)], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )
    until = time.monotonic() + 120
    while len(list(started.iterdir())) < 2 and time.monotonic() < until and process.poll() is None:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(timeout=120) == 128 + signal.SIGTERM
    workers = [Path("/proc") / path.name for path in started.iterdir()]
    assert len(workers) == 2 and not any(worker.exists() for worker in workers)


@pytest.mark.parametrize("rank", [2, 3])
def test_augmentation_keeps_images_and_labels_together(rank: int) -> None:
    labels = torch.zeros(8, *[24] * rank, dtype=torch.uint8)
    labels[(slice(None), *[slice(8, 16)] * rank)] = 1
    images = 2 * labels[:, None].float() - 1
    moved, maps = segmenter_training._augment(images, labels, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and maps.dtype == torch.uint8 and not torch.equal(maps, labels)
    inside, outside = moved[:, 0][maps == 1].mean(), moved[:, 0][maps == 0].mean()
    assert inside > 0.5 and outside < -0.5


def test_every_patient_is_as_likely_whatever_its_records() -> None:
    pool = {
        "images": torch.arange(10.0),
        "labels": torch.zeros(10),
        "starts": torch.tensor([0, 9]),
        "ends": torch.tensor([9, 10]),
    }
    random = torch.Generator().manual_seed(0)
    lonely = sum(float(segmenter_training._draw([pool], random)[0]) == 9 for _ in range(400))
    assert 150 < lonely < 250


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    small = study(2)
    segmenter.save_segmenter(segmenter.build_segmenter(small.grid, small.segment), tmp_path / "net.safetensors")
    other = small.segment.model_copy(update={"channels": (4, 12)})
    with pytest.raises(StoreError, match="run the stage segment again"):
        segmenter.load_segmenter(small.grid, other, tmp_path / "net.safetensors")


def test_patients_passed_through_the_codec_are_a_regime_of_their_own(tmp_path: Path) -> None:
    """With an exact codec it gives the real-trained network again: the same draws, the same images."""
    regimes = ["real_only", "reconstructed"]
    small = study(2, segment={"channels": [4, 8], "steps": 4, "batch_size": 2, "regimes": regimes})
    inputs = folders(small, tmp_path)
    with pytest.raises(StoreError, match="autoencoder"):
        segment.run(small, inputs, tmp_path / "segmenter", Tracker())
    trained = {}
    lossy = Encode.model_validate({"codec": "kl", "levels": 1, "channels": [8, 8]})
    for name, encode in (("exact", small.encode), ("lossy", lossy)):
        with store.create(tmp_path / name, "encode", "0" * 64) as folder:
            save_codec(build_codec(small.grid, encode), small.grid, encode, folder.path)
            folder.finish("public")
        manifest = segment.run(
            small, {**inputs, "autoencoder": tmp_path / name}, tmp_path / f"segmenter-{name}", Tracker()
        )
        assert set(manifest.parents) == {"cohort", "synthetic", "autoencoder"}
        trained[name] = json.loads((tmp_path / f"segmenter-{name}" / "training.json").read_text())["loss"]
    assert trained["exact"]["reconstructed-0"] == pytest.approx(trained["exact"]["real_only-0"], abs=1e-4)
    assert trained["lossy"]["reconstructed-0"] != pytest.approx(trained["lossy"]["real_only-0"], abs=1e-3)
