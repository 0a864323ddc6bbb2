"""Chained lines on disk: a crash at any byte and a full disk cost nothing that was acknowledged."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medsynth.errors import StoreError, VerificationError
from medsynth.privacy.chain import Chain, parse_chain

APPENDS = """
import sys
from pathlib import Path
from medsynth.privacy.chain import Chain
chain = Chain(Path(sys.argv[1]))
while True:
    with chain.locked():
        records = chain.mended()
        acknowledged = chain.append(chain.seal(records, {"type": "line", "number": len(records), "fill": "x" * 5000}))
    print(acknowledged, flush=True)
"""
FULL = """
import resource, sys
from pathlib import Path
from medsynth.errors import StoreError
from medsynth.privacy.chain import Chain
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
chain = Chain(Path(sys.argv[1]))
try:
    while True:
        print(chain.append(chain.seal(chain.mended(), {"fill": "x" * 300})), flush=True)
except StoreError as error:
    print(error)
"""


def put(chain: Chain, **record: Any) -> str:
    with chain.locked():
        return chain.append(chain.seal(chain.mended(), record))


def test_lines_are_read_back_in_order(tmp_path: Path) -> None:
    chain = Chain(tmp_path / "lines")
    names = [put(chain, number=number) for number in range(3)]
    assert [record["id"] for record in chain.records()] == names
    assert [record["number"] for record in chain.records()] == [0, 1, 2]


def test_wherever_the_last_line_is_cut_the_lines_above_stay(tmp_path: Path) -> None:
    chain = Chain(tmp_path / "lines")
    kept = [put(chain, number=0), put(chain, number=1)]
    size = chain.path.stat().st_size
    last = put(chain, number=2)
    whole = chain.path.read_bytes()
    for cut in range(size, len(whole)):
        chain.path.write_bytes(whole[:cut])
        if cut > size:
            with pytest.raises(VerificationError, match="line 3 is incomplete"):
                chain.records()
        lines = [record["id"] for record in chain.mended()]
        assert lines == ([*kept, last] if cut == len(whole) - 1 else kept), cut
        put(chain, number=3)
        assert [record["id"] for record in chain.records()][:2] == kept


def test_a_cut_inside_an_earlier_line_is_not_mended(tmp_path: Path) -> None:
    chain = Chain(tmp_path / "lines")
    for number in range(3):
        put(chain, number=number)
    whole = chain.path.read_bytes()
    chain.path.write_bytes(whole[:20] + whole[25:])
    with pytest.raises(VerificationError, match=r"line 1 .*restore the file from a copy"):
        chain.mended()
    assert chain.path.read_bytes() == whole[:20] + whole[25:]


@pytest.mark.parametrize("written", [0, 1, 60, None])
def test_a_full_disk_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: Any) -> None:
    chain = Chain(tmp_path / "lines")
    put(chain, number=0)
    before = chain.path.read_bytes()
    real = os.write
    calls: list[int] = []

    def write(handle: int, data: Any) -> int:
        calls.append(len(data))
        if len(calls) > 1 or written == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle, data[:written])

    def sync(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", write)
        if written is None:  # all of it was written, but it does not come to disk
            patch.setattr(os, "fsync", sync)
        with pytest.raises(StoreError, match=r"No space left.*run the same command again"):
            put(chain, number=1)
    assert chain.path.read_bytes() == before
    put(chain, number=1)
    assert len(chain.records()) == 2


def test_a_disk_that_is_full_for_good_is_mended_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = Chain(tmp_path / "lines")
    put(chain, number=0)

    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: real(handle, data[:30]) if len(data) > 150 else fail())
        patch.setattr(os, "ftruncate", fail)
        with pytest.raises(StoreError):
            put(chain, number=1, fill="x" * 20)
    assert not chain.path.read_bytes().endswith(b"\n")
    put(chain, number=2)
    assert [record["number"] for record in chain.records()] == [0, 2]


def test_the_operating_systems_limit_is_met_without_a_torn_line(tmp_path: Path, root: Path) -> None:
    path = tmp_path / "lines"
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(path)], cwd=root, capture_output=True, text=True, check=True
    )
    *acknowledged, message = result.stdout.splitlines()
    assert "cannot be written" in message and "make room" in message
    assert [record["id"] for record in Chain(path).records()] == acknowledged != []


def test_kill_nine_in_the_middle_of_appends_loses_nothing_acknowledged(tmp_path: Path, root: Path) -> None:
    path = tmp_path / "lines"
    acknowledged: list[str] = []
    for turn in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", APPENDS, str(path)], cwd=root, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        acknowledged += [process.stdout.readline().strip() for _ in range(3 + 2 * turn)]
        os.kill(process.pid, signal.SIGKILL)
        acknowledged += [line for line in process.stdout.read().split("\n")[:-1] if line]
        process.stdout.close()
        process.wait()
        with Chain(path).locked():
            found = [record["id"] for record in Chain(path).mended()]
        # one line may have come to disk without being told of
        assert [name for name in found if name in set(acknowledged)] == acknowledged
        assert len(found) - len(acknowledged) <= turn + 1
    assert len(parse_chain(path.read_bytes())) >= len(acknowledged) > 50


@pytest.mark.parametrize("garbage", [b"1\n", b'"text"\n', b"null\n", b'{"id":NaN}\n', b"\0\n", b"\xc3\x28\n"])
def test_garbage_is_named_by_its_line(tmp_path: Path, garbage: bytes) -> None:
    chain = Chain(tmp_path / "lines", "account")
    put(chain, number=0)
    with chain.path.open("ab") as file:
        file.write(garbage)
    with pytest.raises(VerificationError, match="account line 2"):
        chain.mended()


def test_an_unwritable_place_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("where a folder should be")
    chain = Chain(tmp_path / "file" / "lines")
    with pytest.raises(StoreError, match=r"cannot be (locked|written)"), chain.locked():
        chain.append(chain.seal([], {"number": 0}))


def test_new_files_get_the_mode_that_was_asked_for(tmp_path: Path) -> None:
    put(Chain(tmp_path / "lines", "account", 0o600), number=0)
    assert (tmp_path / "lines").stat().st_mode & 0o777 == 0o600
