"""A collaborator verifies with four packages: no torch, no scipy, no dp-accounting, under 200 MB and a minute."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MOST_BYTES = 200 * 10**6
ABSENT = ("torch", "scipy", "dp_accounting", "opacus", "monai", "mlflow", "yaml", "nibabel", "pydicom")


def run(*command: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, env={**clean, **settings}
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with what the README of pipelines/verify says, and nothing else."""
    root, folder = Path(__file__).parents[2], tmp_path_factory.mktemp("small") / "env"
    assert run(sys.executable, "-m", "venv", folder).returncode == 0
    pip = folder / "bin" / "pip"
    needed = run(pip, "install", "--quiet", "-r", root / "pipelines/verify/requirements.txt")
    if needed.returncode != 0:
        pytest.skip("no package index can be reached from here")
    done = run(pip, "install", "--quiet", "--no-deps", root)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
def test_a_release_is_verified_after_a_small_install(small: Path, certified_run: Path, hospital_key: Path) -> None:
    size = sum(path.lstat().st_size for path in small.rglob("*") if not path.is_dir())
    assert size < MOST_BYTES, f"{size / 1e6:.0f} MB"
    missing = f"import importlib.util as u, sys; sys.exit(any(u.find_spec(name) for name in {ABSENT!r}))"
    assert run(small / "bin" / "python", "-c", missing).returncode == 0
    done = run(small / "bin" / "medsynth", "verify", certified_run / "release", "--key", hospital_key)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "VERIFIED" in done.stdout and "own accountant" in done.stdout and "dp-accounting" not in done.stdout


@pytest.mark.slow
def test_the_small_install_refuses_what_the_full_one_refuses(small: Path, release: Path, hospital_key: Path) -> None:
    (release / "PRIVACY.md").write_text("All is well.\n")
    done = run(small / "bin" / "medsynth", "verify", release, "--key", hospital_key, "--json")
    assert done.returncode == 8, done.stderr
    failed = [check["name"] for check in json.loads(done.stdout)["checks"] if not check["ok"]]
    assert {"files", "words"} <= set(failed)


@pytest.mark.slow
def test_what_the_small_install_lacks_is_said_without_a_traceback(small: Path) -> None:
    for words in (("config", "show", "configs/demo.yaml"), ("doctor", "RUN"), ("phantom", "--out", "HOSPITAL")):
        done = run(small / "bin" / "medsynth", *words)
        assert done.returncode == 1 and "full installation" in done.stderr and "Traceback" not in done.stderr
