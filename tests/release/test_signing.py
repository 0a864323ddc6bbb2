"""Properties of the envelope: another implementation accepts it, and nothing about it can be changed."""

from __future__ import annotations

import base64
import copy
import json
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key

from medsynth.errors import CertificationError, VerificationError
from medsynth.release import signing


def test_another_implementation_verifies_our_envelope(tmp_path: Path) -> None:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import SSlibKey

    key = signing.load_or_create_key(tmp_path / "keys")
    envelope = signing.sign(b'{"a": 1}', key)
    theirs = Envelope.from_dict(copy.deepcopy(envelope))
    public = SSlibKey.from_crypto(key.public_key(), keyid=envelope["signatures"][0]["keyid"])
    assert list(theirs.verify([public], threshold=1)) == [public.keyid]
    assert theirs.pae() == signing.pae(signing.PAYLOAD_TYPE, b'{"a": 1}')


def test_we_verify_the_envelope_of_another_implementation() -> None:
    from securesystemslib.dsse import Envelope
    from securesystemslib.signer import CryptoSigner

    signer = CryptoSigner.generate_ed25519()
    theirs = Envelope(b"payload", signing.PAYLOAD_TYPE, {})
    theirs.sign(signer)
    pem = signer.public_key.keyval["public"].encode()
    public = signer.public_key
    assert public.scheme == "ed25519"
    envelope, payload = signing.open_envelope(json.dumps(theirs.to_dict()).encode())
    raw = bytes.fromhex(pem.decode())
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    encoded = Ed25519PublicKey.from_public_bytes(raw).public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    signing.check_signature(envelope, payload, encoded)


def test_private_key_is_readable_by_its_owner_only_and_is_used_again(tmp_path: Path) -> None:
    first = signing.load_or_create_key(tmp_path / "keys")
    second = signing.load_or_create_key(tmp_path / "keys")
    assert stat.S_IMODE((tmp_path / "keys" / "private.pem").stat().st_mode) == 0o600
    assert signing.public_pem(first) == signing.public_pem(second) == (tmp_path / "keys" / "public.pem").read_bytes()


def test_private_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    signing.load_or_create_key(tmp_path)
    (tmp_path / "private.pem").chmod(0o644)
    with pytest.raises(CertificationError, match="0600"):
        signing.load_or_create_key(tmp_path)


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_unreadable_private_key_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "private.pem").write_bytes(content)
    (tmp_path / "private.pem").chmod(0o600)
    with pytest.raises(CertificationError, match=r"private\.pem"):
        signing.load_or_create_key(tmp_path)


def test_private_key_of_another_kind_is_refused(tmp_path: Path) -> None:
    pem = generate_private_key(SECP256R1()).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "private.pem").write_bytes(pem)
    (tmp_path / "private.pem").chmod(0o600)
    with pytest.raises(CertificationError, match="Ed25519"):
        signing.load_or_create_key(tmp_path)


def test_changed_payload_or_other_key_fails(tmp_path: Path) -> None:
    key, other = (signing.load_or_create_key(tmp_path / name) for name in ("a", "b"))
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
    key = signing.load_or_create_key(tmp_path)
    envelope = signing.sign(b"payload", key)
    for bad in ({}, {"sig": 3}, {"sig": "%%"}, {"sig": base64.b64encode(b"short").decode()}):
        with pytest.raises(VerificationError, match="not signed by"):
            signing.check_signature({**envelope, "signatures": [bad]}, b"payload", signing.public_pem(key))
