"""The commands are frozen: scripts of a site go on working, and `--help` answers at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer

VERBS = {
    "phantom",
    "run",
    "ingest",
    "encode",
    "masks",
    "train",
    "synthesise",
    "segment",
    "audit",
    "compare",
    "doctor",
    "evaluate",
    "certify",
    "export",
    "verify",
    "quarantine",
    "keys",
    "budget",
    "config",
}
HEAVY = ("torch", "monai", "diffusers", "opacus", "mlflow", "highdicom", "matplotlib", "scipy", "pandas")


def medsynth(*arguments: str, root: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from medsynth.cli.verbs import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=root, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def group() -> click.Group:
    from medsynth.cli import verbs

    command = typer.main.get_command(verbs.app)
    assert isinstance(command, typer.core.TyperGroup)
    return command


def test_verbs_are_frozen(group: click.Group) -> None:
    assert set(group.commands) == VERBS


def test_every_verb_says_what_it_does(group: click.Group) -> None:
    assert [name for name, command in group.commands.items() if not command.help] == []


def test_help_loads_nothing_heavy(root: Path) -> None:
    code = (
        "import sys, atexit; atexit.register(lambda: print('LOADED', *{n.partition('.')[0] for n in sys.modules}));"
        "from medsynth.cli.verbs import main; sys.exit(main())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "--help"], cwd=root, capture_output=True, text=True, check=True
    )
    loaded = set(result.stdout.splitlines()[-1].removeprefix("LOADED").split())
    assert "medsynth" in loaded and not loaded.intersection(HEAVY)
    assert all(verb in result.stdout for verb in VERBS)


def test_config_show_fills_in_the_defaults(root: Path) -> None:
    result = medsynth("config", "show", "configs/demo.yaml", root=root)
    assert result.returncode == 0, result.stderr
    assert "sampling_rate" in result.stdout and "declared_patients" in result.stdout


def test_typo_in_a_config_has_its_path_and_exit_code(root: Path, tmp_path: Path) -> None:
    study = tmp_path / "typo.yaml"
    text = (root / "configs" / "demo.yaml").read_text(encoding="utf-8")
    study.write_text(text.replace("declared_patients", "declared_patient"), encoding="utf-8")
    result = medsynth("config", "show", str(study), root=root)
    assert result.returncode == 2
    assert "privacy.declared_patient" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("out", ["file", "file/hospital"])
def test_a_phantom_hospital_that_cannot_be_written_has_its_exit_code(root: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("no folder")
    result = medsynth("phantom", "--out", str(tmp_path / out), "--patients", "2", root=root)
    assert result.returncode == 4, result.stderr
    assert "Not a directory; name an --out folder" in result.stderr and str(tmp_path) not in result.stderr


def test_missing_release_has_its_exit_code(root: Path, tmp_path: Path) -> None:
    result = medsynth("verify", str(tmp_path / "absent"), root=root)
    assert result.returncode == 8
    assert "Traceback" not in result.stderr
