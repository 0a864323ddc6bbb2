"""Stage folders: whole or not there, and each says what it was made from."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medsynth import store
from medsynth.errors import StoreError
from medsynth.store import MANIFEST


def finished(
    out: Path, text: str = "value", parents: dict[str, Path] | None = None, kind: str = "public"
) -> store.Manifest:
    with store.create(out, "stage", "0" * 64, parents) as folder:
        (folder.path / "deep").mkdir()
        (folder.path / "deep" / "file.txt").write_text(text)
        return folder.finish(kind)  # type: ignore[arg-type]


def test_a_finished_folder_says_what_is_in_it(tmp_path: Path) -> None:
    manifest = finished(tmp_path / "one")
    assert store.is_done(tmp_path / "one") and store.read_manifest(tmp_path / "one") == manifest
    assert manifest.files == {"deep/file.txt": store.digest_file(tmp_path / "one" / "deep" / "file.txt")}
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_the_manifest_is_the_last_thing_and_appears_with_the_folder(tmp_path: Path) -> None:
    with store.create(tmp_path / "one", "stage", "0" * 64) as folder:
        assert not (tmp_path / "one").exists() and not (folder.path / MANIFEST).exists()
        assert not store.is_done(tmp_path / "one") and not store.is_done(folder.path)
        folder.finish("public")
    assert store.is_done(tmp_path / "one")


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_half_written_folder_is_removed(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), store.create(tmp_path / "one", "stage", "0" * 64) as folder:
        (folder.path / "file").write_text("half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_never_finished_is_an_error_and_removed(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="without finishing"), store.create(tmp_path / "one", "stage", "0" * 64):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_left_is_removed_or_found_again(tmp_path: Path) -> None:
    for keep in (True, False):
        left = store.partial(tmp_path / "one")
        left.mkdir()
        (left / "file").write_text("left")
        with store.create(tmp_path / "one", "stage", "0" * 64, keep_partial=keep) as folder:
            assert (folder.path / "file").exists() == keep
            folder.finish("public")
        (tmp_path / "one").rename(tmp_path / f"kept-{keep}")


def test_a_stage_that_resumes_keeps_its_partial_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stop"), store.create(tmp_path / "one", "s", "0", keep_partial=True) as folder:
        (folder.path / "file").write_text("half")
        raise ValueError("stop")
    assert (store.partial(tmp_path / "one") / "file").exists() and not (tmp_path / "one").exists()


def test_a_folder_is_gone_on_with_for_the_same_settings_and_inputs_alone(tmp_path: Path) -> None:
    finished(tmp_path / "parent")

    def begin(config_digest: str, scratch: str | None = None) -> tuple[bool, list[str]]:
        """Open the folder, leave a file and a scratch folder, and be killed; return what was found at the start."""
        inputs = {"parent": tmp_path / "parent"}
        with (
            contextlib.suppress(KeyboardInterrupt),
            store.create(tmp_path / "one", "s", config_digest, inputs, keep_partial=True) as folder,
        ):
            found = folder.resume(scratch=scratch), sorted(path.name for path in folder.path.glob("[!u]*"))
            (folder.path / "half").write_text("half")
            (folder.path / ".pool").mkdir(exist_ok=True)
            raise KeyboardInterrupt
        return found

    assert begin("1") == (False, [])
    assert begin("1") == (True, [".pool", "half"])
    assert begin("1", scratch=".pool") == (True, ["half"])
    assert begin("2") == (False, [])
    finished(tmp_path / "other")
    shutil.rmtree(tmp_path / "parent")
    with store.create(tmp_path / "parent", "another", "0" * 64) as folder:
        folder.finish("public")
    assert begin("2") == (False, []), "another parent"
    with store.create(tmp_path / "one", "s", "2", {"parent": tmp_path / "parent"}, keep_partial=True) as folder:
        assert folder.resume()
        shutil.rmtree(folder.path / ".pool")
        assert set(folder.finish("public").files) == {"half"}


def test_a_run_that_is_stopped_while_it_digests_its_files_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: Path) -> dict[str, str]:
        raise OSError(28, "No space left on device")

    def begin() -> tuple[bool, store.StageFolder]:
        with store.create(tmp_path / "one", "s", "1", keep_partial=True) as folder:
            found = folder.resume()
            (folder.path / "value").write_text("made in hours")
            (folder.path / "steps").write_text("what going on needs")
            folder.finish("public", scratch=["steps", "none"])
        return found, folder

    with monkeypatch.context() as patch:
        patch.setattr(store, "digest_tree", full)
        with pytest.raises(StoreError, match="No space left"):
            begin()
    assert (store.partial(tmp_path / "one") / "steps").exists()
    found, folder = begin()
    assert found and folder.manifest is not None and set(folder.manifest.files) == {"value"}
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [MANIFEST, "value"]


@pytest.mark.parametrize("moment", range(4))
def test_a_folder_that_was_finished_is_put_in_its_place_whenever_its_run_was_killed(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before that, nothing that the run needs to go on is missing."""
    out, calls = tmp_path / "one", iter(range(99))
    own = {"replace": os.replace, "unlink": Path.unlink}

    def killed(kind: str) -> Callable[..., None]:
        def stopped(path: Path, *rest: Any, **named: Any) -> None:
            if moment == next(calls):
                raise KeyboardInterrupt
            own[kind](path, *rest, **named)

        return stopped

    with pytest.raises(KeyboardInterrupt), store.create(out, "s", "1", keep_partial=True) as folder:
        for name in ("value", "steps", "state"):
            (folder.path / name).write_text(name)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", killed("replace"))
            patch.setattr(Path, "unlink", killed("unlink"))
            folder.finish("public", scratch=["steps", "state"])
    assert not store.is_done(out)
    if moment == 0:
        assert all((store.partial(out) / name).exists() for name in ("value", "steps", "state"))
        return
    store.settle(out)
    assert sorted(path.name for path in out.iterdir()) == [MANIFEST, "value"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]


def test_what_was_finished_as_a_replacement_waits_until_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "one"
    old = finished(out)
    with monkeypatch.context() as patch:
        patch.setattr(store, "settle", lambda *_: None)  # killed before it
        with pytest.raises(StoreError), store.set_aside(out), store.create(out, "s", "2") as folder:
            (folder.path / "value").write_text("new")
            folder.finish("public")
            raise StoreError("stopped")
    assert store.read_manifest(out) == old
    store.settle(out)
    assert store.read_manifest(out) == old
    store.settle(out, replace=True)
    assert (out / "value").read_text() == "new" and store.read_manifest(out).config_digest == "2"


def test_an_existing_folder_is_refused_and_untouched(tmp_path: Path) -> None:
    before = finished(tmp_path / "one")
    with pytest.raises(StoreError, match="--replace"), store.create(tmp_path / "one", "stage", "1" * 64):
        pytest.fail("the block ran")
    assert store.read_manifest(tmp_path / "one") == before


def test_an_unwritable_place_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StoreError, match="cannot write"), store.create(tmp_path / "file" / "one", "stage", "0" * 64):
        pytest.fail("the block ran")


def test_a_full_disk_is_a_store_error_without_a_path(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No space left") as caught, store.create(tmp_path / "one", "s", "0" * 64):
        raise OSError(28, "No space left on device", "patient-name.nii.gz")
    assert "patient" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_parents_must_be_finished_and_are_named_by_digest(tmp_path: Path) -> None:
    parent = finished(tmp_path / "parent")
    child = finished(tmp_path / "child", parents={"parent": tmp_path / "parent"})
    assert child.parents == {"parent": parent.digest}
    (tmp_path / "unfinished").mkdir()
    with pytest.raises(StoreError, match="'unfinished' is not finished"):
        finished(tmp_path / "other", parents={"unfinished": tmp_path / "unfinished"})


def test_a_digest_changes_with_any_byte_and_only_then(tmp_path: Path) -> None:
    one, same, other = (finished(tmp_path / str(i), text) for i, text in enumerate(("value", "value", "valuE")))
    assert one.digest == same.digest != other.digest


def test_the_digest_of_a_private_folder_is_salted(tmp_path: Path) -> None:
    """Whoever knows all patients but one could else test for that one."""
    one, same = (finished(tmp_path / name, kind="private") for name in ("one", "same"))
    assert one.files == same.files and one.digest != same.digest


@pytest.mark.parametrize("text", ["{", "{}", '{"unknown": 1, "ledger_entries": []}', "[]"])
def test_an_unreadable_manifest_is_said(text: str, tmp_path: Path) -> None:
    finished(tmp_path / "one")
    (tmp_path / "one" / MANIFEST).write_text(text)
    with pytest.raises(StoreError, match="unreadable manifest"):
        store.read_manifest(tmp_path / "one")


@pytest.mark.parametrize(
    ("kind", "may"), [("public", True), ("released", True), ("internal", False), ("private", False)]
)
def test_only_public_and_released_may_leave(kind: str, may: bool, tmp_path: Path) -> None:
    assert finished(tmp_path / kind, kind=kind).releasable == may


def test_canonical_json_does_not_depend_on_order() -> None:
    assert store.digest_of({"b": 1, "a": [1, 2]}) == store.digest_of(json.loads('{"a": [1,2],   "b": 1}'))


def test_a_run_folder_is_written_by_one_process_at_a_time(tmp_path: Path, root: Path) -> None:
    run = tmp_path / "run"
    code = (
        "import sys\nfrom pathlib import Path\nfrom medsynth import store\n"
        "with store.alone_in(Path(sys.argv[1]), 'run'): print('in')"
    )

    def other() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, str(run)]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)

    with store.alone_in(run, "run"):
        assert stat.S_IMODE(run.stat().st_mode) == 0o700
        assert "another process is writing the run folder" in other().stderr
        with pytest.raises(StoreError, match="wait until it ends"), store.alone_in(run, "run"):
            pytest.fail("the block ran")
    assert other().stdout == "in\n"
    with pytest.raises(KeyboardInterrupt), store.alone_in(run, "run"):
        raise KeyboardInterrupt
    assert other().stdout == "in\n", "a run that was stopped holds nothing"


def test_a_run_folder_that_cannot_be_made_is_a_store_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with (
        pytest.raises(StoreError, match="cannot write the output folder"),
        store.alone_in(tmp_path / "file" / "x", "output"),
    ):
        pytest.fail("the block ran")


def test_a_file_of_the_run_that_cannot_be_written_is_a_store_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "replace_bytes", full)
    with pytest.raises(StoreError, match="cannot write the run folder: No space left on device"):
        store.write_bytes(tmp_path / "study.yaml", b"")
