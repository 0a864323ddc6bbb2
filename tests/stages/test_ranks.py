"""Training over two processes, by the command line: the same weights as in one, and no way to hang or to pay twice."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medsynth import config, store
from medsynth.config import Study
from medsynth.diffusion.generator import WEIGHTS
from medsynth.imaging.phantom_hospital import LABELS, write_hospital
from medsynth.privacy.entropy import ChaChaEntropy
from medsynth.privacy.ledger import Ledger
from medsynth.study import run_verb

STEPS = 12
SECONDS = 240
# Ends its process without a word, as a kill does.
DIES = """
import os, sys
from medsynth.privacy.distributed import Ranks
original, calls = Ranks.{method}, []
def stopped(self, *arguments):
    calls.append(1)
    if len(calls) == {count} and self.rank == {rank}:
        os._exit(9)
    return original(self, *arguments)
Ranks.{method} = stopped
from medsynth.cli.verbs import main
main()
"""
LIVES = "from medsynth.cli.verbs import main; main()"
# Noise that is the same for any number of processes, as long as each coordinate gets it once.
EVEN = """
from medsynth.privacy.entropy import ChaChaEntropy
def add_normal(self, total, scale):
    total += 0.05 * scale
ChaChaEntropy.add_normal = add_normal
"""
DIFFERED = "differed by rounding"


@pytest.fixture(scope="module")
def study(tiny_settings: dict[str, Any]) -> Study:
    grid = {**tiny_settings["grid"], "shape": [16, 16], "slice_axis": "S", "labels": LABELS}
    train = {**tiny_settings["train"], "steps": STEPS, "trainable": "all", "learning_rate": 0.01}
    return config.parse({**tiny_settings, "grid": grid, "train": train, "name": "ranks"})


@pytest.fixture(scope="module")
def prepared(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that comes before training, made once for all tests of this file."""
    root = tmp_path_factory.mktemp("ranks")
    write_hospital(root / "hospital", patients=12, seed=0)
    (root / "study.yaml").write_text(config.dump(study), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSYNTH_HOME", str(root / "home"))
        for verb in ("ingest", "encode", "masks"):
            run_verb(study, verb, root / "hospital", root / "run")
    return root


@pytest.fixture
def prepared_run(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Copy the run, to a site of its own that knows the cohort and on which nothing more was spent."""

    def copy(name: str) -> Path:
        monkeypatch.setenv("MEDSYNTH_HOME", str(shutil.copytree(prepared / "home", tmp_path / name / "home")))
        return Path(shutil.copytree(prepared / "run", tmp_path / name / "run"))

    return copy


@pytest.fixture
def run(prepared_run: Callable[[str], Path]) -> Path:
    return prepared_run("only")


def torchrun(*arguments: str, root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    started = subprocess.Popen(
        [*command, "-m", "medsynth.cli", *arguments],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        out, err = started.communicate(timeout=SECONDS)
    finally:
        started.terminate()  # it takes its workers along
        started.wait()
    return subprocess.CompletedProcess(command, started.returncode, out, err)


def two_processes(codes: tuple[str, str], *arguments: str, root: Path) -> list[tuple[int, str]]:
    """Start two ranks without torchrun, which would end one when the other dies; return exit codes and messages."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    variables = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=root,
            env={**variables, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, code in enumerate(codes)
    ]
    try:
        messages = [process.communicate(timeout=SECONDS)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, message) for process, message in zip(started, messages, strict=True)]


def training(run: Path) -> list[dict[str, Any]]:
    return [e for e in Ledger(run / "ledger.jsonl").entries() if e["mechanisms"] == ["dp_sgd:denoiser"]]


def start(prepared: Path, run: Path, verb: str = "train") -> tuple[str, ...]:
    return (verb, str(prepared / "study.yaml"), "--out", str(run))


@pytest.mark.slow
def test_pitfall_22_two_ranks_train_the_weights_of_one_on_one_reservation(
    study: Study, prepared: Path, prepared_run: Callable[[str], Path], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = prepared_run("alone")
    with monkeypatch.context() as patch:
        patch.setattr(ChaChaEntropy, "add_normal", lambda self, total, scale: total.add_(0.05 * scale))
        run_verb(study, "train", None, alone)
    run = prepared_run("both")
    for code, message in two_processes((EVEN + LIVES, EVEN + LIVES), *start(prepared, run), root=root):
        assert code == 0 and DIFFERED not in message, message[-3000:]
    assert len(training(run)) == 1 and training(run)[0]["status"] == "complete"
    # Everything but times, hash chain and digests is the same: the number of processes is no part of the account.
    same = ("mechanisms", "events", "sensitivity", "denominators", "sampling", "noise", "config_digest")
    assert {k: training(run)[0].get(k) for k in same} == {k: training(alone)[0].get(k) for k in same}
    # A share that got lost, or a slice without noise or with each rank's, would move Adam's steps of 0.01 by far more
    # than rounding does.
    both, one = (load_file(folder / "generator" / WEIGHTS) for folder in (run, alone))
    for name in one:
        torch.testing.assert_close(both[name], one[name], rtol=1e-5, atol=1e-5)
    assert set(store.read_manifest(run / "generator").files) == set(store.read_manifest(alone / "generator").files)


@pytest.mark.slow
def test_an_assistant_that_dies_stops_rank_0_and_one_process_goes_on_within_the_reservation(
    study: Study, prepared: Path, run: Path, root: Path
) -> None:
    dies = DIES.format(method="noisy_mean", count=3, rank=1)  # before it hands in its sum
    (code, message), (other, _) = two_processes((LIVES, dies), *start(prepared, run), root=root)
    assert (code, other) == (1, 9), message
    assert "a process that assisted in the training has ended" in message and "Traceback" not in message
    assert store.is_done(run / "masks") and not store.is_done(run / "generator")
    manifest = _resume(study, run)
    assert len(training(run)) == 1 and training(run)[0]["status"] == "complete"
    assert training(run)[0]["id"] in manifest.ledger_entries


@pytest.mark.slow
def test_a_rank_0_that_dies_ends_its_assistants(study: Study, prepared: Path, run: Path, root: Path) -> None:
    dies = DIES.format(method="agree", count=2, rank=0)  # at the second checkpoint: five steps are kept, five lost
    (code, _), (other, message) = two_processes((dies, LIVES), *start(prepared, run), root=root)
    assert (code, other) == (9, 1), message
    assert "rank 0 has ended" in message and "Traceback" not in message
    result = torchrun(*start(prepared, run), root=root)
    # The new rank 1 takes the optimizer of the checkpoint, or it would soon have other weights.
    assert result.returncode == 0 and DIFFERED not in result.stderr, result.stderr[-3000:]
    assert len(training(run)) == 1 and training(run)[0]["status"] == "complete"
    again = torchrun(*start(prepared, run), root=root)  # finished: the assistant is let go without a step
    assert again.returncode == 0 and "finished before, skipped" in again.stderr


@pytest.mark.slow
def test_an_assistant_with_another_study_is_refused(study: Study, prepared: Path, run: Path, root: Path) -> None:
    other = "import sys; sys.argv += ['--set', 'train.draws=1'];" + LIVES
    (code, _), (refused, message) = two_processes((LIVES, other), *start(prepared, run), root=root)
    assert (code, refused) == (1, 4)
    assert "study, cohort or autoencoder than rank 0" in message


def _resume(study: Study, run: Path) -> store.Manifest:
    run_verb(study, "train", None, run)
    return store.read_manifest(run / "generator")
