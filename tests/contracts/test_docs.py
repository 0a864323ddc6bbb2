"""The documents tell the truth: commands exist, links resolve, settings are described, no machine path leaks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from medsynth import errors

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "pipelines").rglob("*.md")])
TEXT = {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".sbatch", ".service", ""}
MACHINE = re.compile(r"(?<![\w.])/(work|farm|root|home)/[A-Za-z_.]")


def tracked(*patterns: str) -> list[Path]:
    result = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip("no git checkout")
    return [ROOT / line for line in result.stdout.splitlines() if (ROOT / line).is_file()]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_commands_exist(page: Path) -> None:
    named = re.findall(r"(?:^ {4}|`)make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE)
    assert set(named) <= targets()


def test_continuous_integration_calls_the_readme_commands() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ("make test", "make demo"):
        assert re.search(rf"^ {{4}}{command}\b", readme, re.MULTILINE) and f"timed {command}" in script


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/-]+\.md", str(yaml.safe_load(text)["nav"])))
    assert listed == {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}


def test_config_reference_is_fresh() -> None:
    script = ROOT / "docs" / "write_config_reference.py"
    result = subprocess.run([sys.executable, script], cwd=ROOT, capture_output=True, text=True, check=True)
    page = (ROOT / "docs/reference/config.md").read_text(encoding="utf-8")
    assert page == result.stdout, "run `make docs` and commit docs/reference/config.md"


def test_cli_reference_names_every_verb() -> None:
    from medsynth.cli import verbs

    page = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    command = typer.main.get_command(verbs.app)
    assert isinstance(command, typer.core.TyperGroup)
    assert [verb for verb in command.commands if f"`{verb}`" not in page and f"medsynth {verb}" not in page] == []


def test_the_page_on_keys_names_every_option_of_theirs() -> None:
    from medsynth.cli.keys import keys_app

    page = (ROOT / "docs/how-to/verify-a-release.md").read_text(encoding="utf-8")
    group = typer.main.get_command(keys_app)
    assert isinstance(group, typer.core.TyperGroup)
    options = {
        o for command in group.commands.values() for one in command.params for o in one.opts if o.startswith("--")
    }
    assert "--passphrase" in options
    assert not {option for option in options if not re.search(rf"{option}(?![\w-])", page)}


def test_environments_that_the_pages_make_are_ignored_by_git() -> None:
    made = {name for page in PAGES for name in re.findall(r"-m venv ([\w.-]+)", page.read_text(encoding="utf-8"))}
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert "verify-env" in made and {f"/{name}/" for name in made} <= set(ignored)


def test_the_table_of_pitfalls_and_the_tests_name_each_other() -> None:
    page = (ROOT / "docs/explanation/what-epsilon-covers.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \|", page, re.MULTILINE)
    named = set(re.findall(r"`(test_\w+)`", page))
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    written = set(re.findall(r"def (test_\w+)", code))
    assert [int(row) for row in rows] == list(range(1, 24))
    assert named - written == set()
    assert {name for name in written if name.startswith("test_pitfall_")} - named == set()


def test_exit_codes_are_the_errors_of_the_code() -> None:
    page = (ROOT / "docs/reference/exit-codes.md").read_text(encoding="utf-8")
    written = {name: int(code) for code, name in re.findall(r"^\| (\d) \| `(\w+)`", page, re.MULTILINE)}
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, errors.MedsynthError)]
    assert written == {c.__name__: c.exit_code for c in classes}


def test_no_path_of_a_machine_is_tracked() -> None:
    leaks = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked()
        if path.suffix in {".py", ".md", ".yaml", ".yml", ".toml", ".txt", ".sbatch", ""}
        and path.stat().st_size < 2**20
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if MACHINE.search(line) and "MACHINE = " not in line
    ]
    assert leaks == []


def test_no_tracked_file_is_large() -> None:
    assert [path.name for path in tracked() if path.stat().st_size > 2**20] == []


def test_pins_are_exact_and_portable() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
