"""Properties of the envelope: another implementation accepts it, and nothing about it can be changed."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key as generate_rsa

from medsynth.errors import CertificationError, VerificationError
from medsynth.release import keys, signing
from medsynth.store import json_text


def test_another_implementation_verifies_our_envelope(tmp_path: Path) -> None:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import SSlibKey

    key = keys.open_key(tmp_path / "keys")
    envelope = signing.sign(b'{"a": 1}', key)
    theirs = Envelope.from_dict(copy.deepcopy(envelope))
    public = SSlibKey.from_crypto(key.public_key(), keyid=envelope["signatures"][0]["keyid"])
    assert list(theirs.verify([public], threshold=1)) == [public.keyid]
    assert theirs.pae() == signing.pae(signing.PAYLOAD_TYPE, b'{"a": 1}')


def test_we_verify_the_envelope_of_another_implementation() -> None:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner, SSlibKey

    key = signing.new_key()
    pem = signing.public_pem(key)
    signer = CryptoSigner(key, SSlibKey.from_crypto(key.public_key(), keyid=signing.key_id(pem)))
    assert signer.public_key.scheme == "ed25519"
    theirs = Envelope(b"payload", signing.PAYLOAD_TYPE, {})
    theirs.sign(signer)
    envelope, payload = signing.open_envelope(json.dumps(theirs.to_dict()).encode())
    signing.check_signature(envelope, payload, pem)


def test_an_envelope_has_one_text(tmp_path: Path) -> None:
    envelope = signing.sign(b"payload", signing.new_key())
    text = json_text(envelope)
    signing.require_canonical(text, signing.open_envelope(text)[0])
    others = (
        json.dumps(envelope).encode(),
        text + b" ",
        text.replace(b"\n", b"\r\n"),
        text.replace(b'"payloadType"', b'"payloadType": "x", "payloadType"', 1),
    )
    for other in others:
        with pytest.raises(VerificationError, match="file was changed"):
            signing.require_canonical(other, signing.open_envelope(other)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda e: e["signatures"].append(e["signatures"][0]), "exactly one signature", id="second"),
        pytest.param(lambda e: e["signatures"].clear(), "exactly one signature", id="none"),
        pytest.param(lambda e: e.update(note="x"), "not signed: 'note'", id="field"),
        pytest.param(lambda e: e["signatures"][0].update(cert="x"), "not signed: 'cert'", id="signature_field"),
        pytest.param(lambda e: e.update(payloadType="text/plain"), "payload type is 'text/plain'", id="type"),
        pytest.param(lambda e: e.update(payload="cGF5bG9hZB=="), "one base64 form", id="loose_base64"),
        pytest.param(lambda e: e["signatures"][0].update(keyid="0" * 64), "not signed by", id="other_key_id"),
    ],
)
def test_nothing_can_be_added_to_an_envelope(change: Callable[[dict[str, Any]], None], message: str) -> None:
    key = signing.new_key()
    envelope = signing.sign(b"payload", key)
    change(envelope)
    with pytest.raises(VerificationError, match=message):
        signing.check_signature(*signing.open_envelope(json_text(envelope)), signing.public_pem(key))


def test_what_is_no_public_ed25519_key_is_refused() -> None:
    key = signing.new_key()
    rsa = generate_rsa(65537, 2048).public_key()
    pem = rsa.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    for wrong, message in (
        (pem, "no Ed25519 key"),
        (b"", "no PEM file"),
        (signing.private_pem(key), "PRIVATE key"),
        (signing.private_pem(key, b"a long passphrase"), "PRIVATE key"),
    ):
        with pytest.raises(VerificationError, match=message):
            signing.key_id(wrong)


def test_private_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    pem = generate_private_key(SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "private.pem").write_bytes(pem)
    (tmp_path / "private.pem").chmod(0o600)
    with pytest.raises(CertificationError, match="Ed25519"):
        keys.open_key(tmp_path)


def test_changed_payload_or_other_key_fails(tmp_path: Path) -> None:
    key, other = (keys.open_key(tmp_path / name) for name in ("a", "b"))
    envelope = signing.sign(b"payload", key)
    signing.check_signature(envelope, b"payload", signing.public_pem(key))
    with pytest.raises(VerificationError, match="not signed by"):
        signing.check_signature(envelope, b"payloaD", signing.public_pem(key))
    with pytest.raises(VerificationError, match="not signed by"):
        signing.check_signature(envelope, b"payload", signing.public_pem(other))


@pytest.mark.parametrize(
    "envelope",
    [
        "no json",
        "[]",
        "{}",
        '{"payload": "!!", "payloadType": "application/vnd.in-toto+json", "signatures": [{}]}',
        '{"payload": "", "payloadType": "text/plain", "signatures": [{}]}',
        '{"payload": "", "payloadType": "application/vnd.in-toto+json", "signatures": []}',
    ],
)
def test_what_is_no_envelope_is_refused(envelope: str) -> None:
    with pytest.raises(VerificationError):
        signing.open_envelope(envelope.encode())


def test_malformed_signature_does_not_crash(tmp_path: Path) -> None:
    key = keys.open_key(tmp_path)
    envelope = signing.sign(b"payload", key)
    for bad in ({}, {"sig": 3}, {"sig": "%%"}, {"sig": base64.b64encode(b"short").decode()}):
        with pytest.raises(VerificationError, match="not signed by"):
            signing.check_signature({**envelope, "signatures": [bad]}, b"payload", signing.public_pem(key))
