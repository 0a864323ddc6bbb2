"""The layers of the package hold, and the package's door stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "monai", "diffusers", "opacus", "mlflow", "highdicom", "pydicom", "matplotlib", "scipy", "nibabel")


def test_import_contracts_hold(root: Path) -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    result = subprocess.run([linter, "--no-cache"], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


def test_package_doors_hold_only_their_sentence(root: Path) -> None:
    for door in (root / "medsynth").glob("*/__init__.py"):
        body = ast.parse(door.read_text(encoding="utf-8")).body
        assert len(body) == 1 and isinstance(body[0], ast.Expr), f"{door.parent.name}/__init__.py does something"


def loaded_by(statement: str, root: Path) -> set[str]:
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    result = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    return set(result.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "module", ["medsynth", "medsynth.config", "medsynth.store", "medsynth.logs", "medsynth.cli.verbs"]
)
def test_light_modules_import_nothing_heavy(module: str, root: Path) -> None:
    assert not loaded_by(f"import {module}", root).intersection(HEAVY)


def test_verification_imports_no_torch(root: Path) -> None:
    loaded = loaded_by("import medsynth.release.verify, medsynth.privacy.accounting, medsynth.privacy.ledger", root)
    assert not loaded.intersection({"torch", "monai", "diffusers", "opacus", "mlflow", "highdicom"})


@pytest.mark.parametrize("stage", ["certify", "export", "ingest", "encode", "masks", "train", "synthesise", "segment"])
def test_each_stage_can_be_imported_first(stage: str, root: Path) -> None:
    assert "medsynth" in loaded_by(f"import medsynth.stages.{stage}", root)
