"""Where a site keeps what outlives a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from medsynth.site import signing_keys, site_home


def test_the_variable_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEDSYNTH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert site_home() == tmp_path / "home" and signing_keys() == tmp_path / "home" / "keys"
    assert not site_home().exists()


def test_then_the_state_folder_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MEDSYNTH_HOME")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert site_home() == tmp_path / "state" / "medsynth"


@pytest.mark.parametrize("state", ["", "relative/state"])
def test_a_relative_state_folder_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, state: str) -> None:
    monkeypatch.delenv("MEDSYNTH_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", state)
    assert site_home() == tmp_path / ".local" / "state" / "medsynth"


def test_a_relative_variable_means_the_same_folder_from_everywhere(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDSYNTH_HOME", "here")
    first = site_home()
    monkeypatch.chdir("/")
    assert first == tmp_path / "here" and first.is_absolute()
