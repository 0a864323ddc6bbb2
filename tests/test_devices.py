"""Where a stage computes, and which process this is."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from medsynth import devices
from medsynth.config import Compute
from medsynth.devices import open_device, rank_and_size, share_cores
from medsynth.errors import ConfigError


@pytest.mark.parametrize(
    ("rank", "size", "expected"),
    [(None, None, (0, 1)), ("", "", (0, 1)), ("3", "1", (0, 1)), ("1", "2", (1, 2)), (None, "2", (0, 2))],
)
def test_one_process_is_the_only_one_unless_several_were_announced(
    rank: str | None, size: str | None, expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert rank_and_size() == expected


def test_variables_that_are_no_numbers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="whole numbers"):
        rank_and_size()


def test_processes_that_share_a_machine_take_one_thread_each(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    open_device(Compute(device="cpu"))
    open_device(Compute(device="cpu", threads=3))
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    open_device(Compute(device="cpu"))
    assert taken == [1, 3]


@pytest.mark.parametrize(
    ("quota", "expected"),
    [("400000 100000", 4), ("50000 100000", 1), ("9900000 100000", 16), ("max 100000", 16), ("", 16)],
)
def test_threads_are_no_more_than_a_containers_quota(
    quota: str, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if quota:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    taken: list[int] = []
    monkeypatch.setattr(devices, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 12)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert devices.usable_cores() == expected
    open_device(Compute(device="cpu"))
    open_device(Compute(device="cpu", threads=14))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    open_device(Compute(device="cpu"))
    assert taken == [min(expected, 12), 14]


@pytest.fixture
def kept_tf32() -> Iterator[None]:
    """The settings as they were, afterwards."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("kept_tf32")
def test_a_gpu_does_not_round_what_must_be_clipped_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own setting rounds factors of convolutions to 10 bits (TF32)."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    torch.backends.cudnn.allow_tf32 = True
    assert open_device(Compute(device="cpu")).type == "cpu" and torch.backends.cudnn.allow_tf32
    for asked in ("cuda", "auto"):
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        assert open_device(Compute(device=asked)).type == "cuda"
        assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize(("rank", "code"), [("1", 0), ("0", 8)])
def test_other_verbs_run_on_rank_0_alone(
    rank: str, code: int, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    command = [sys.executable, "-m", "medsynth.cli", "verify", str(tmp_path / "absent")]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stderr
    assert bool(result.stdout + result.stderr) == (rank == "0")


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_waiting_threads_give_their_core_away_unless_the_environment_says_otherwise(
    given: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.environ", {**os.environ, **given})
    share_cores()
    assert str(os.environ.get("GOMP_SPINCOUNT")) == expected


def test_the_command_line_says_so_before_torch_is_there(root: Path) -> None:
    """libgomp reads its environment once, when it is loaded."""
    code = (
        "import os, sys\n"
        "from medsynth.cli import verbs\n"
        "verbs.app = lambda: print('torch' in sys.modules, os.environ['GOMP_SPINCOUNT'])\n"
        "verbs.main()\n"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=root, env=clean, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "5000"]
