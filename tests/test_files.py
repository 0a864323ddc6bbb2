"""Files that are there as a whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from medsynth.files import replace_bytes, replacing


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced_as_a_whole_and_nothing_stays_beside_it(durable: bool, tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_bytes(path, b"old")
    with replacing(path, durable=durable) as file:
        file.write(b"n")
        file.flush()
        assert path.read_bytes() == b"old"
        file.write(b"ew")
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, OSError])
def test_a_writer_that_is_stopped_leaves_the_old_file(stopped: type[BaseException], tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_bytes(path, b"old")
    with pytest.raises(stopped), replacing(path) as file:
        file.write(b"half")
        raise stopped
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_is_in_nobodys_way_and_its_permissions_are_not_taken_over(tmp_path: Path) -> None:
    left = tmp_path / ".key.partial"
    left.write_bytes(b"half of another")
    left.chmod(0o644)
    replace_bytes(tmp_path / "key", b"secret", mode=0o600)
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    assert (tmp_path / "key").read_bytes() == b"secret"
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


def test_content_and_name_are_on_disk_before_it_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name))
    replace_bytes(tmp_path / "file", b"content")
    assert synced == [".file.partial", tmp_path.name]
    replace_bytes(tmp_path / "another", b"content", durable=False)
    assert len(synced) == 2
