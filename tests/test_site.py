"""Where a site keeps what outlives a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from medsynth.errors import StoreError
from medsynth.site import accounts, signing_keys, site_home, site_key


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


def test_the_key_is_drawn_once_and_is_the_owners(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEDSYNTH_HOME", str(tmp_path / "home"))
    key = site_key()
    assert len(key) == 32 and site_key() == key
    assert (tmp_path / "home").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "home" / "site.key").stat().st_mode & 0o777 == 0o600
    assert accounts().stat().st_mode & 0o777 == 0o700
    monkeypatch.setenv("MEDSYNTH_HOME", str(tmp_path / "other"))
    assert site_key() != key


def test_a_damaged_key_is_not_replaced_in_silence() -> None:
    site_key()
    path = site_home() / "site.key"
    path.write_bytes(b"short")
    with pytest.raises(StoreError, match="restore it from a copy"):
        site_key()
    assert path.read_bytes() == b"short"


def test_a_home_that_cannot_be_made_says_what_to_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("MEDSYNTH_HOME", str(tmp_path / "file" / "home"))
    for act in (site_key, accounts):
        with pytest.raises(StoreError, match=r"MEDSYNTH_HOME cannot be used .*kept between runs"):
            act()


def test_a_lost_key_is_not_drawn_anew_beside_accounts() -> None:
    key = site_key()
    path = site_home() / "site.key"
    path.unlink()
    assert site_key() != key, "nothing rests on it yet"
    path.unlink()
    (accounts() / ("a" * 32)).mkdir()
    with pytest.raises(StoreError, match=r"is gone.*restore it from a backup"):
        site_key()
    assert not path.exists()


def test_a_key_that_others_can_read_is_refused() -> None:
    site_key()
    (site_home() / "site.key").chmod(0o640)
    with pytest.raises(StoreError, match="chmod 600"):
        site_key()
