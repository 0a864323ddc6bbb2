"""Keys of a site: who can read them, how they are protected, and how trust passes from one to the next."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
from filelock import FileLock
from typer.testing import CliRunner

from medsynth import site
from medsynth.cli.verbs import app
from medsynth.config import Study
from medsynth.errors import CertificationError, VerificationError
from medsynth.release import endorsements, keys, signing

LONG = "correct horse battery staple"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "keys"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Somebody sits there and types these lines, one a question."""
    answers: list[str] = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("getpass.getpass", lambda prompt: answers.pop(0))
    return answers


def private(folder: Path) -> Path:
    return folder / "private.pem"


def write_secret(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_key_is_made_once_and_only_its_owner_reads_it(folder: Path) -> None:
    first, second = keys.open_key(folder), keys.open_key(folder)
    assert signing.public_pem(first) == signing.public_pem(second) == (folder / "public.pem").read_bytes()
    assert stat.S_IMODE(private(folder).stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o622])
def test_a_key_that_others_may_read_is_refused(folder: Path, mode: int) -> None:
    keys.open_key(folder)
    private(folder).chmod(mode)
    with pytest.raises(CertificationError, match="0600"):
        keys.open_key(folder)
    with pytest.raises(CertificationError, match="0600"):
        keys.rotate(folder)


def test_a_second_new_key_is_refused(folder: Path) -> None:
    identity = keys.create(folder)
    with pytest.raises(CertificationError, match="keys rotate"):
        keys.create(folder)
    assert keys.known_keys(folder) == [keys.KeyInfo(identity, active=True, protected=False)]


@pytest.mark.parametrize(("missing", "left"), [("public.pem", "private.pem"), ("private.pem", "public.pem")])
def test_half_a_key_is_called_that_by_every_verb_and_never_replaced(folder: Path, missing: str, left: str) -> None:
    identity = keys.create(folder)
    kept = (folder / left).read_bytes()
    (folder / missing).unlink()
    asked = [keys.known_keys, keys.public, keys.create, lambda folder: keys.hand_out(folder, None)]
    if missing == "private.pem":  # the others go on with the private half alone, and write the public one again
        asked += [keys.open_key, keys.protect, keys.rotate]
    for ask in asked:
        with pytest.raises(CertificationError, match=rf"there is {left} and no {missing}.*backup.*move {left} away"):
            ask(folder)
    assert (folder / left).read_bytes() == kept and not (folder / missing).exists()
    if missing == "public.pem":
        keys.open_key(folder)
        assert [info.key_id for info in keys.known_keys(folder)] == [identity]
        return
    (folder / left).rename(folder / "old.pem")
    assert keys.create(folder) != identity


def test_making_a_key_says_how_to_protect_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys.open_key(folder)
    assert "medsynth keys protect" in capsys.readouterr().err
    keys.open_key(folder)
    assert capsys.readouterr().err == ""


def test_a_protected_key_needs_its_passphrase(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.create(folder, LONG.encode())
    assert b"ENCRYPTED" in private(folder).read_bytes()
    with pytest.raises(CertificationError, match="MEDSYNTH_KEY_PASSPHRASE") as raised:
        keys.open_key(folder)
    assert raised.value.exit_code == 7
    monkeypatch.setenv("MEDSYNTH_KEY_PASSPHRASE", LONG + "r")
    with pytest.raises(CertificationError, match="does not open") as raised:
        keys.open_key(folder)
    assert LONG not in str(raised.value)
    monkeypatch.setenv("MEDSYNTH_KEY_PASSPHRASE", LONG)
    assert signing.public_pem(keys.open_key(folder)) == keys.public(folder)


def test_a_passphrase_may_come_from_a_file_of_its_owner(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.create(folder, LONG.encode())
    file = write_secret(tmp_path / "secret", LONG + "\n")
    monkeypatch.setenv("MEDSYNTH_KEY_PASSPHRASE_FILE", str(file))
    keys.open_key(folder, ask=False)
    file.chmod(0o644)
    with pytest.raises(CertificationError, match="passphrase file may be read by others"):
        keys.open_key(folder)
    write_secret(file, "\n")
    with pytest.raises(CertificationError, match="passphrase file is empty"):
        keys.open_key(folder)
    file.unlink()
    with pytest.raises(CertificationError, match="passphrase file cannot be read"):
        keys.open_key(folder)


def test_the_passphrase_is_asked_for_at_a_terminal_but_not_by_a_long_run(folder: Path, terminal: list[str]) -> None:
    keys.create(folder, LONG.encode())
    terminal.append(LONG)
    keys.open_key(folder)
    with pytest.raises(CertificationError, match="nobody can be asked"):
        keys.open_key(folder, ask=False)


def test_a_new_passphrase_is_typed_twice(terminal: list[str]) -> None:
    terminal += [LONG, LONG, LONG, LONG + "r", "short", "short"]
    assert keys.new_passphrase() == LONG.encode()
    with pytest.raises(CertificationError, match="differ"):
        keys.new_passphrase()
    with pytest.raises(CertificationError, match="at least 12"):
        keys.new_passphrase()


def test_a_new_key_is_protected_where_the_environment_holds_a_passphrase(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDSYNTH_KEY_PASSPHRASE", "short")
    with pytest.raises(CertificationError, match="too short: use at least 12"):
        keys.open_key(folder)
    monkeypatch.setenv("MEDSYNTH_KEY_PASSPHRASE", LONG)
    keys.open_key(folder)
    assert keys.known_keys(folder)[0].protected


def test_protecting_keeps_the_public_key(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CertificationError, match="no key to protect"):
        keys.protect(folder)
    keys.create(folder)
    before = keys.public(folder)
    keys.protect(folder, write_secret(tmp_path / "secret", LONG))
    assert keys.known_keys(folder)[0].protected and keys.public(folder) == before
    monkeypatch.setenv("MEDSYNTH_KEY_PASSPHRASE", LONG)
    keys.protect(folder, write_secret(tmp_path / "secret", LONG * 2))
    with pytest.raises(CertificationError, match="does not open"):
        keys.open_key(folder)


def test_rotation_retires_the_old_key_and_endorses_the_new_one(folder: Path) -> None:
    first = keys.create(folder)
    pem = keys.public(folder)
    second, third = keys.rotate(folder), keys.rotate(folder)
    assert keys.known_keys(folder)[0].key_id == third
    assert {info.key_id: info.active for info in keys.known_keys(folder)} == {first: False, second: False, third: True}
    lines = keys.read_endorsements(folder)
    assert endorsements.follow(lines, pem, keys.public(folder)) == [first, second, third]
    middle = (folder / "retired" / f"{second}.public.pem").read_bytes()
    assert endorsements.follow(lines, middle, keys.public(folder)) == [second, third]
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in folder.rglob("*private.pem"))
    assert len(list(folder.rglob("*private.pem"))) == 3


def test_trust_never_runs_backwards(folder: Path) -> None:
    keys.create(folder)
    old = keys.public(folder)
    keys.rotate(folder)
    with pytest.raises(VerificationError, match="no endorsement connects them"):
        endorsements.follow(keys.read_endorsements(folder), keys.public(folder), old)


def test_the_old_private_key_can_be_deleted(folder: Path) -> None:
    first = keys.create(folder)
    keys.rotate(folder, delete_old=True)
    assert keys.known_keys(folder)[1] == keys.KeyInfo(first, active=False, protected=None)
    assert [p.name for p in folder.rglob("*private.pem")] == ["private.pem"]


def test_a_stolen_key_endorses_nobody(folder: Path) -> None:
    keys.create(folder)
    first = keys.public(folder)
    keys.rotate(folder)
    second = keys.public(folder)
    keys.rotate(folder, stolen=True)
    assert keys.read_endorsements(folder) == b""
    for old in (first, second):
        with pytest.raises(VerificationError, match="no endorsement connects them"):
            endorsements.follow(keys.read_endorsements(folder), old, keys.public(folder))


def test_rotation_takes_over_the_protection(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys.create(folder, LONG.encode())
    with pytest.raises(CertificationError, match="nobody can be asked"):
        keys.rotate(folder)
    monkeypatch.setenv("MEDSYNTH_KEY_PASSPHRASE", LONG)
    keys.rotate(folder)
    assert [info.protected for info in keys.known_keys(folder)] == [True, True]
    keys.open_key(folder)


@pytest.mark.parametrize("stop_at", [".public.pem", ".private.pem", "endorsements.jsonl", "private.pem", "public.pem"])
def test_a_rotation_that_is_stopped_anywhere_leaves_a_key_that_works(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stop_at: str
) -> None:
    keys.create(folder)
    given = keys.public(folder)
    real = keys._write

    def stopped(path: Path, content: bytes, mode: int) -> None:
        if path.name == stop_at or (stop_at.startswith(".") and path.name.endswith(stop_at)):
            raise KeyboardInterrupt
        real(path, content, mode)

    with monkeypatch.context() as patch:
        patch.setattr(keys, "_write", stopped)
        with pytest.raises(KeyboardInterrupt):
            keys.rotate(folder)
    key = keys.open_key(folder)
    assert signing.public_pem(key) == keys.public(folder)
    keys.rotate(folder)
    assert endorsements.follow(keys.read_endorsements(folder), given, keys.public(folder))


def test_an_endorsement_by_somebody_else_is_refused(folder: Path) -> None:
    keys.create(folder)
    thief = signing.new_key()
    for lines in (endorsements.endorse(signing.public_pem(thief), thief), b""):
        with pytest.raises(VerificationError, match="no endorsement connects them"):
            endorsements.follow(lines, keys.public(folder), signing.public_pem(thief))
    with pytest.raises(VerificationError, match=r"endorsements\.jsonl, line 1"):
        endorsements.follow(b"{}\n", keys.public(folder), signing.public_pem(thief))


def test_an_endorsement_in_the_name_of_the_trusted_key_is_checked_with_it(folder: Path) -> None:
    key, thief = keys.open_key(folder), signing.new_key()
    trusted, wanted = signing.public_pem(key), signing.public_pem(thief)
    genuine = endorsements.endorse(wanted, key)
    assert len(endorsements.follow(genuine, trusted, wanted)) == 2
    _, statement = signing.open_envelope(genuine)
    forged = json.dumps(signing.sign(statement, thief)).encode()
    with pytest.raises(VerificationError, match="not signed by"):
        endorsements.follow(forged, trusted, wanted)


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_an_unreadable_key_is_refused(folder: Path, content: bytes) -> None:
    folder.mkdir()
    private(folder).write_bytes(content)
    private(folder).chmod(0o600)
    with pytest.raises(CertificationError, match="no PEM private key"):
        keys.open_key(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is unwritable for root")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CertificationError, match="cannot be used"):
        keys.open_key(tmp_path / "keys")
    tmp_path.chmod(0o700)


def test_a_folder_that_cannot_be_locked_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(CertificationError, match=r"cannot be used \(Permission denied\): set MEDSYNTH_HOME"):
        keys.open_key(folder)


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("")
    with pytest.raises(CertificationError, match="cannot be used"):
        keys.open_key(tmp_path / "keys")


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["keys", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_the_verbs_work_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no key yet" in run("list")
    first = run("new")
    assert "fingerprint" in first
    secret = write_secret(tmp_path / "secret", LONG)
    assert "protected" in run("protect", "--passphrase-file", str(secret))
    monkeypatch.setenv("MEDSYNTH_KEY_PASSPHRASE_FILE", str(secret))
    assert "endorsement" in run("rotate")
    listed = run("list").splitlines()
    assert [line.split()[0] for line in listed] == ["active", "retired"] and all("passphrase" in x for x in listed)
    shown = run("public")
    assert shown.startswith("-----BEGIN PUBLIC KEY-----")
    assert "fingerprint" in run("public", "--out", str(tmp_path / "hospital.pem"))
    assert (tmp_path / "hospital.pem").read_bytes() == keys.public(site.signing_keys())
    assert "trust the old key no more" in run("rotate", "--stolen", "--delete-old")
    assert "PRIVATE" not in "".join((first, shown, *listed))


def test_handing_out_the_public_key_overwrites_nothing(folder: Path, tmp_path: Path) -> None:
    keys.create(folder)
    secret = private(folder).read_bytes()
    link = tmp_path / "link.pem"
    link.symlink_to(tmp_path / "nowhere")
    other = write_secret(tmp_path / "other.pem", "a thesis")
    for out in (private(folder), other, link, tmp_path):
        with pytest.raises(CertificationError, match="choose another name"):
            keys.hand_out(folder, out)
    assert private(folder).read_bytes() == secret and other.read_text() == "a thesis"
    assert not (tmp_path / "nowhere").exists()
    for _ in range(2):
        keys.hand_out(folder, tmp_path / "hospital.pem")
    assert (tmp_path / "hospital.pem").read_bytes() == keys.public(folder)
    with pytest.raises(CertificationError, match="cannot be written"):
        keys.hand_out(folder, tmp_path / "missing" / "hospital.pem")


def test_without_a_key_there_is_nothing_to_hand_out() -> None:
    with pytest.raises(CertificationError, match="keys new"):
        run("public")
    with pytest.raises(CertificationError, match="keys new"):
        run("rotate")


def test_a_run_with_a_protected_key_and_no_passphrase_stops_before_it_reads_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_study: Study
) -> None:
    from medsynth import study

    keys.create(site.signing_keys(), LONG.encode())
    monkeypatch.setattr(study, "run_stage", lambda *args, **more: pytest.fail("a stage was started"))
    with pytest.raises(CertificationError, match="MEDSYNTH_KEY_PASSPHRASE"):
        study.run_study(tiny_study, None, tmp_path / "run")
