"""DSSE envelopes signed with Ed25519; the one door to ``cryptography`` for signatures.

Source: Dead Simple Signing Envelope, specification v1.0.2 (protocol and envelope); RFC 8032 (Ed25519).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from medsynth.errors import CertificationError, VerificationError
from medsynth.store import json_text

PAYLOAD_TYPE = "application/vnd.in-toto+json"
SigningKey = Ed25519PrivateKey
_FIELDS = {"payload", "payloadType", "signatures"}
_SIGNATURE_FIELDS = {"keyid", "sig"}


def new_key() -> SigningKey:
    """Return a fresh signing key."""
    return Ed25519PrivateKey.generate()


def private_pem(key: SigningKey, passphrase: bytes | None = None) -> bytes:
    """Return the private key as PEM (PKCS #8), encrypted when there is a passphrase.

    The encryption is that of OpenSSL (PBES2, AES-256-CBC, PBKDF2 with 2048 rounds): the passphrase has to be long.
    """
    lock = serialization.BestAvailableEncryption(passphrase) if passphrase else serialization.NoEncryption()
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)


def is_protected(pem: bytes) -> bool:
    """Whether a private key's PEM text is encrypted (RFC 7468, section 11)."""
    return b"-----BEGIN ENCRYPTED PRIVATE KEY-----" in pem


def load_private(pem: bytes, passphrase: bytes | None = None) -> SigningKey:
    """Read a private key.

    Args:
        pem: PKCS #8 as :func:`private_pem` writes it.
        passphrase: of an encrypted key; ignored for another one.

    Raises:
        CertificationError: no PEM private key, another kind than Ed25519, or the wrong passphrase.
    """
    protected = is_protected(pem)
    if protected and not passphrase:
        raise CertificationError("the signing key is protected by a passphrase, and none was given")
    try:
        key = serialization.load_pem_private_key(pem, password=passphrase if protected else None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        if protected:
            raise CertificationError("the passphrase does not open the signing key: give the right one") from error
        raise CertificationError("the signing key is no PEM private key: restore it from a backup") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise CertificationError("the signing key is no Ed25519 key: make one with `medsynth keys new`")
    return key


def public_pem(key: SigningKey) -> bytes:
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


def sign(payload: bytes, key: SigningKey) -> dict[str, Any]:
    """Return the DSSE envelope of ``payload`` signed by ``key``, as JSON values."""
    signature = key.sign(pae(PAYLOAD_TYPE, payload))
    return {
        "payload": base64.b64encode(payload).decode(),
        "payloadType": PAYLOAD_TYPE,
        "signatures": [{"keyid": _key_id(key.public_key()), "sig": base64.b64encode(signature).decode()}],
    }


def open_envelope(text: bytes) -> tuple[dict[str, Any], bytes]:
    """Parse an envelope without checking its signature.

    DSSE allows several signatures and further fields; here an envelope has exactly one signature and no field that is
    not signed or needed, so that nothing can be added to a certificate.

    Returns:
        the envelope and its payload; trust neither before :func:`check_signature`.

    Raises:
        VerificationError: no DSSE envelope, another payload type than in-toto, or not exactly one signature.
    """
    try:
        envelope = json.loads(text)
        payload = base64.b64decode(envelope["payload"], validate=True)
        kind, signatures = envelope["payloadType"], envelope["signatures"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise VerificationError("the certificate is no DSSE envelope: it is empty, cut off or not JSON") from error
    if kind != PAYLOAD_TYPE:
        raise VerificationError(f"the certificate's payload type is '{kind}', expected '{PAYLOAD_TYPE}'")
    if base64.b64encode(payload).decode() != envelope["payload"]:
        raise VerificationError("the certificate's payload is not in the one base64 form of its bytes: it was changed")
    if not isinstance(signatures, list) or len(signatures) != 1:
        raise VerificationError("the certificate must carry exactly one signature: signatures were added or removed")
    more = envelope.keys() - _FIELDS
    if isinstance(signatures[0], dict):
        more |= signatures[0].keys() - _SIGNATURE_FIELDS
    if more:
        raise VerificationError(f"the certificate's envelope has a field that is not signed: '{min(more)}'")
    return envelope, payload


def require_canonical(text: bytes, envelope: Mapping[str, Any]) -> None:
    """Check that a file is the one text of its envelope.

    Raises:
        VerificationError: blanks, line ends, the order of keys or a repeated key differ.
    """
    if json_text(envelope) != text:
        raise VerificationError(
            "the certificate's file was changed: blanks, line ends or the order of its parts are not those that "
            "'certify' writes"
        )


def check_signature(envelope: Mapping[str, Any], payload: bytes, pem: bytes) -> None:
    """Check that the envelope's signature was made over ``payload`` by the key ``pem``.

    Raises:
        VerificationError: it was not; the message names the key expected.
    """
    key = _load_public(pem)
    entry = envelope["signatures"][0]
    try:
        signature = base64.b64decode(entry["sig"], validate=True)
        key.verify(signature, pae(str(envelope["payloadType"]), payload))
        # the signature's key id is a hint that nobody signs: a wrong one may mislead, so it is refused
        sound = entry["keyid"] == _key_id(key) and base64.b64encode(signature).decode() == entry["sig"]
    except (InvalidSignature, binascii.Error, KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise VerificationError(
            f"the certificate was not signed by the key {fingerprint(_key_id(key))[:19]}..., or was changed since"
        )


def fingerprint(identity: str) -> str:
    """Return a key's id in groups of four, to be read out and compared.

    >>> fingerprint("0123456789ab")
    '0123 4567 89ab'
    """
    return " ".join(identity[start : start + 4] for start in range(0, len(identity), 4))


def _pem(key: Ed25519PublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _load_public(pem: bytes) -> Ed25519PublicKey:
    if b"PRIVATE KEY-----" in pem:
        raise VerificationError(
            "the file is a PRIVATE key: it must not leave the hospital and checks nothing; expected public.pem"
        )
    try:
        key = serialization.load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise VerificationError("the public key is no PEM file: expected the public.pem of the hospital") from error
    if not isinstance(key, Ed25519PublicKey):
        raise VerificationError("the public key is no Ed25519 key: expected the public.pem of the hospital")
    return key


def _key_id(key: Ed25519PublicKey) -> str:
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()
