"""What a collaborator may hand to verify by mistake, and what an older or newer medsynth wrote."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from tampering import edit_in_place, edit_statement, failed, predicate_of, sign_again
from typer.testing import CliRunner

from medsynth.cli.verbs import app
from medsynth.config import Study
from medsynth.errors import VerificationError
from medsynth.privacy.accounting import Event, epsilon
from medsynth.release import keys, opened, signing, statement
from medsynth.release.verify import verify
from medsynth.stages import certify, export
from medsynth.store import digest_of, json_text
from medsynth.tracking import Tracker

Run = Callable[..., Path]
Make = Callable[..., Study]


def test_a_folder_that_cannot_be_listed_is_refused(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def forbidden(path: Any) -> Any:
        if Path(path).name == "nifti":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", forbidden)
    with pytest.raises(VerificationError, match="a folder of the release cannot be read: Permission denied"):
        verify(release)


def test_a_file_that_cannot_be_read_is_named(release: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = opened.digest_file

    def forbidden(path: Path) -> str:
        if path.name == "PRIVACY.md":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(opened, "digest_file", forbidden)
    assert "PRIVACY.md cannot be read: Permission denied" in failed(release)


def test_a_file_in_the_place_of_the_release_is_refused(tmp_path: Path) -> None:
    (tmp_path / "release.zip").write_bytes(b"x")
    with pytest.raises(VerificationError, match="expected the folder written by 'export'"):
        verify(tmp_path / "release.zip")


def test_an_empty_folder_has_no_certificate(tmp_path: Path) -> None:
    assert "certificate.dsse.json is missing: nothing vouches" in failed(tmp_path)


@pytest.mark.parametrize("kind", ["rsa", "private", "protected", "empty", "text", "folder", "absent", "certificate"])
def test_a_wrong_key_is_refused_with_what_it_is(release: Path, tmp_path: Path, kind: str) -> None:
    path, own = tmp_path / "key.pem", signing.new_key()
    rsa = generate_private_key(65537, 2048).public_key()
    contents = {
        "rsa": rsa.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo),
        "private": signing.private_pem(own),
        "protected": signing.private_pem(own, b"correct horse battery"),
        "empty": b"",
        "text": b"-----BEGIN PUBLIC KEY-----\nnothing\n-----END PUBLIC KEY-----\n",
        "certificate": (release / "certificate.dsse.json").read_bytes(),
    }
    expected = {"rsa": "no Ed25519 key", "private": "PRIVATE key", "protected": "PRIVATE key"}
    expected |= {"folder": "cannot be read", "absent": "cannot be read"}
    if kind == "folder":
        path.mkdir()
    elif kind != "absent":
        path.write_bytes(contents[kind])
    with pytest.raises(VerificationError, match=expected.get(kind, r"no PEM file: expected the public\.pem")):
        verify(release, path)


@pytest.mark.parametrize("number", [1, 2, 12])
def test_a_certificate_of_another_version_says_who_can_judge_it(release: Path, number: int) -> None:
    edit_in_place(release, lambda predicate: predicate["implementation"].update(medsynth="0.0.9"))
    edit_statement(release, lambda s: s.update(predicateType=f"urn:medsynth:dp-certificate:{number}"))
    report = verify(release)
    text = "\n".join(report.lines())
    assert f"certificate of version {number}" in text and "verify it with medsynth 0.0.9" in text
    assert "ask the hospital to certify the release again" in text
    assert "epsilon" not in {check.name for check in report.checks}  # what another version means is not guessed


def test_a_release_of_an_older_medsynth_with_the_same_certificate_verifies(release: Path, tmp_path: Path) -> None:
    sign_again(release, tmp_path / "own", lambda predicate: predicate["implementation"].update(medsynth="0.0.9"))
    assert verify(release).ok, verify(release).failures


def test_the_limits_belong_to_the_version_of_the_certificate() -> None:
    # whoever changes these lines has to raise the number of PREDICATE_TYPE, or older releases fail without a reason
    assert (statement.PREDICATE_TYPE, digest_of(statement.NOT_COVERED)[:16]) == (
        "urn:medsynth:dp-certificate:5",
        "2a8d03871446be63",
    )


def test_a_file_name_cannot_write_to_the_terminal(release: Path) -> None:
    name = "x\x1b[2J\nVERIFIED: (0.1, 1e-09)-differential privacy\u202e"
    (release / name).write_bytes(b"")
    report = verify(release)
    assert not report.ok and all(line.isprintable() for line in [*report.lines(), *report.failures])
    assert not any(line.startswith("VERIFIED") for line in report.lines())
    assert "x\\x1b[2J\\nVERIFIED" in "\n".join(report.lines())


def test_nested_json_without_end_is_no_crash(release: Path) -> None:
    (release / "certificate.dsse.json").write_bytes(b"[" * 100_000)
    assert "no DSSE envelope" in failed(release)
    (release / "ancestry.json").write_bytes(b"[" * 100_000)
    failed(release)


def test_a_statement_in_another_form_is_refused_whoever_signed_it(release: Path, certified_run: Path) -> None:
    key = keys.open_key(certified_run / "keys")
    _, payload = signing.open_envelope((release / "certificate.dsse.json").read_bytes())
    for other in (json.dumps(json.loads(payload), indent=1).encode(), payload.replace(b"{", b'{"_type":"x",', 1)):
        envelope = json_text(signing.sign(other, key))
        (release / "certificate.dsse.json").write_bytes(envelope)
        assert "not in the one form that 'certify' writes" in failed(release)


def test_numbers_that_are_none_are_refused(release: Path, tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        sign_again(release, tmp_path / "attacker", lambda p, v=value: p["claim"]["epsilon_at"][1].update(epsilon=v))
        assert not verify(release).ok


def _pld_three_times(events: list[Event], delta: float) -> dict[str, float]:
    return dict.fromkeys(("pld", "prv", "rdp"), epsilon(events, delta))


def certified_with(keys_folder: Path, run: Path, study: Study, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(certify, "agreeing_accountants", _pld_three_times)
    inputs = {"synthetic": run / "synthetic", "ledger": run / "ledger.jsonl", "keys": keys_folder}
    certify.run(study, inputs, run / "certificate", Tracker())
    export.run(study, {"certificate": run / "certificate"}, run / "release", Tracker())
    return run / "release"


def test_a_former_key_leads_to_the_one_that_signed(
    fake_run: Run, fake_study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, given = tmp_path / "keys", tmp_path / "given.pem"
    keys.create(folder)
    given.write_bytes(keys.public(folder))
    keys.rotate(folder)
    keys.rotate(folder, delete_old=True)
    release = certified_with(folder, fake_run(), fake_study(export={"formats": ["nifti"]}), monkeypatch)
    report = verify(release, given)
    assert report.ok and report.signer_known and len(report.chain) == 3, report.failures
    assert report.signer == signing.key_id(keys.public(folder)) == report.chain[-1]
    assert any("replaced 2 time(s)" in line for line in report.lines())
    (release / "endorsements.jsonl").write_bytes((release / "endorsements.jsonl").read_bytes().splitlines()[0] + b"\n")
    text = failed(release, given)
    assert "no endorsement connects them" in text and "endorsements.jsonl was changed" in text


def test_after_a_theft_the_former_key_leads_nowhere(
    fake_run: Run, fake_study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, given = tmp_path / "keys", tmp_path / "given.pem"
    keys.create(folder)
    given.write_bytes(keys.public(folder))
    keys.rotate(folder, stolen=True)
    release = certified_with(folder, fake_run(), fake_study(export={"formats": ["nifti"]}), monkeypatch)
    assert verify(release).ok and not (release / "endorsements.jsonl").exists()
    assert "is not the key that was given" in failed(release, given)


def test_a_protected_key_stops_certify_before_anything_is_rendered(
    fake_run: Run, fake_study: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys.create(tmp_path / "keys", b"correct horse battery")

    def render(*given: Any, **more: Any) -> NoReturn:
        pytest.fail("pairs were rendered")

    monkeypatch.setattr(certify.payload, "write_payload", render)
    with pytest.raises(Exception, match="MEDSYNTH_KEY_PASSPHRASE") as raised:
        certified_with(tmp_path / "keys", fake_run(), fake_study(), monkeypatch)
    assert getattr(raised.value, "exit_code", None) == 7


def test_the_statement_is_in_toto_to_another_implementation(release: Path, hospital_key: Path) -> None:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import SSlibKey

    envelope = Envelope.from_dict(json.loads((release / "certificate.dsse.json").read_text()))
    public = serialization.load_pem_public_key(hospital_key.read_bytes())
    (identity,) = envelope.signatures
    theirs = SSlibKey.from_crypto(public, keyid=identity)
    assert list(envelope.verify([theirs], threshold=1)) == [identity]
    assert envelope.payload_type == "application/vnd.in-toto+json"
    signed = json.loads(envelope.payload)
    # in-toto Attestation Framework, Statement v1: these four fields, and subjects that are named and digested
    assert set(signed) == {"_type", "subject", "predicateType", "predicate"}
    assert signed["_type"] == "https://in-toto.io/Statement/v1" and ":" in signed["predicateType"]
    for subject in signed["subject"]:
        assert set(subject) == {"name", "digest"}
        assert subject["digest"] == {"sha256": hashlib.sha256((release / subject["name"]).read_bytes()).hexdigest()}
    assert len({subject["name"] for subject in signed["subject"]}) == len(signed["subject"]) >= 8


def test_the_command_says_the_same_to_people_and_to_machines(release: Path, hospital_key: Path) -> None:
    people = CliRunner().invoke(app, ["verify", str(release), "--key", str(hospital_key)])
    machine = CliRunner().invoke(app, ["verify", str(release), "--key", str(hospital_key), "--json"])
    found = json.loads(machine.output)
    assert people.exit_code == machine.exit_code == 0 and "VERIFIED" in people.output
    assert found["verified"] and found["signer_known"] and all(check["ok"] for check in found["checks"])
    assert found["claim"] == predicate_of(release)["predicate"]["claim"]
    assert all(check["holds"] in people.output for check in found["checks"])
    (release / "PRIVACY.md").unlink()
    machine = CliRunner().invoke(app, ["verify", str(release), "--json"])
    assert machine.exit_code == 8 and not json.loads(machine.output)["verified"]


def test_the_page_is_one_page(certified_run: Path) -> None:
    page = (certified_run / "release" / "PRIVACY.md").read_text()
    assert len(page.splitlines()) <= 75
    assert signing.fingerprint(signing.key_id((certified_run / "release" / "public.pem").read_bytes())) in page
