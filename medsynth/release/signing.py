"""DSSE envelopes signed with Ed25519; the one door to ``cryptography`` for signatures.

Source: Dead Simple Signing Envelope, specification v1.0.2 (protocol and envelope); RFC 8032 (Ed25519).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
import stat
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from medsynth.errors import CertificationError, VerificationError

PAYLOAD_TYPE = "application/vnd.in-toto+json"
PRIVATE_KEY = "private.pem"
_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def load_or_create_key(folder: Path) -> Ed25519PrivateKey:
    """Read the signing key of ``folder``, or make one that only its owner may read.

    Args:
        folder: holds ``private.pem`` (PKCS #8, mode 0600) and ``public.pem``; made when absent.

    Raises:
        CertificationError: the key is unreadable, no Ed25519 key, or readable by others.
    """
    path = folder / PRIVATE_KEY
    try:
        if not path.exists():
            _create_key(path)
        if path.stat().st_mode & _OTHERS:
            raise CertificationError(f"the signing key '{path.name}' may be read by others: make its mode 0600")
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except OSError as error:
        raise CertificationError(f"the folder of the signing key cannot be used: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise CertificationError(f"'{path.name}' is no unencrypted PEM private key: replace it") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise CertificationError(f"'{path.name}' is no Ed25519 key: replace it")
    return key


def public_pem(key: Ed25519PrivateKey) -> bytes:
    """Return the public half of ``key`` as PEM (SubjectPublicKeyInfo)."""
    return _pem(key.public_key())


def key_id(pem: bytes) -> str:
    """Return the SHA-256 of a public key's DER form, which names it in envelopes and in words.

    Raises:
        VerificationError: ``pem`` is no Ed25519 public key.
    """
    return _key_id(_load_public(pem))


def canonical_pem(pem: bytes) -> bytes:
    """Return the one PEM text that stands for the key in ``pem``, as :func:`public_pem` writes it.

    Raises:
        VerificationError: ``pem`` is no Ed25519 public key.
    """
    return _pem(_load_public(pem))


def pae(payload_type: str, payload: bytes) -> bytes:
    """Return the bytes that are signed: DSSE v1 pre-authentication encoding.

    >>> pae("http://example.com/HelloWorld", b"hello world")
    b'DSSEv1 29 http://example.com/HelloWorld 11 hello world'
    """
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def sign(payload: bytes, key: Ed25519PrivateKey) -> dict[str, Any]:
    """Return the DSSE envelope of ``payload`` signed by ``key``, as JSON values."""
    signature = key.sign(pae(PAYLOAD_TYPE, payload))
    return {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"keyid": _key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}],
    }


def open_envelope(text: bytes) -> tuple[dict[str, Any], bytes]:
    """Parse an envelope without checking its signature.

    Returns:
        the envelope and its payload; trust neither before :func:`check_signature`.

    Raises:
        VerificationError: no DSSE envelope, or another payload type than in-toto.
    """
    try:
        envelope = json.loads(text)
        payload = base64.b64decode(envelope["payload"], validate=True)
        kind, signatures = envelope["payloadType"], envelope["signatures"]
    except (ValueError, KeyError, TypeError) as error:
        raise VerificationError("the certificate is no DSSE envelope") from error
    if kind != PAYLOAD_TYPE:
        raise VerificationError(f"the certificate's payload type is '{kind}', expected '{PAYLOAD_TYPE}'")
    if not isinstance(signatures, list) or not signatures:
        raise VerificationError("the certificate carries no signature")
    return envelope, payload


def check_signature(envelope: dict[str, Any], payload: bytes, pem: bytes) -> None:
    """Check that one signature of the envelope was made over ``payload`` by the key ``pem``.

    Raises:
        VerificationError: none was; the message names the key expected.
    """
    key = _load_public(pem)
    message = pae(str(envelope["payloadType"]), payload)
    for entry in envelope["signatures"]:
        try:
            key.verify(base64.b64decode(entry["sig"], validate=True), message)
            return
        except (InvalidSignature, binascii.Error, KeyError, TypeError, ValueError):
            continue
    raise VerificationError(f"the certificate was not signed by the key {_key_id(key)[:16]}, or was changed since")


def _create_key(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    # O_EXCL with the mode at creation: the key is at no time readable by others
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(file.fileno())
    (path.parent / "public.pem").write_bytes(public_pem(key))


def _pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _load_public(pem: bytes) -> Ed25519PublicKey:
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise VerificationError("the public key is no PEM file") from error
    if not isinstance(key, Ed25519PublicKey):
        raise VerificationError("the public key is no Ed25519 key")
    return key


def _key_id(key: Ed25519PublicKey) -> str:
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()
