"""What ``manifest.json`` of a release must say, computed from the signed statement alone.

The manifest is written after the certificate and names it, so it cannot be signed itself. But every value in it follows
from signed ones and from the digests of the envelope and the key; a verifier computes it again and compares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medsynth.release.marks import CERTIFICATE, PAYLOAD, PUBLIC_KEY
from medsynth.store import Manifest


def certificate_details(predicate: Mapping[str, Any]) -> dict[str, Any]:
    """Return the details that stage ``certify`` writes into the manifest of a certified folder.

    ``ledger`` and ``account`` tell later whether anything was reserved since.
    """
    claim = predicate["claim"]
    return {
        "certified": True,
        "pairs": predicate["build"]["pairs"],
        "epsilon": claim["epsilon"],
        "delta": claim["delta"],
        "ledger": predicate["ledger"]["head"],
        "account": predicate["account"]["state"],
    }


def build_facts(pairs: int, certify: str, export: str) -> dict[str, Any]:
    """Return what the statement signs so that both manifests can be computed from it.

    Args:
        pairs: number of pairs in the payload.
        certify: digest of the configuration of stage ``certify``.
        export: digest of the configuration of stage ``export``.
    """
    return {"pairs": pairs, "config_digests": {"certify": certify, "export": export}}


def certificate_manifest(statement: Mapping[str, Any], envelope: str, key: str) -> Manifest:
    """Return the manifest of ``certificate/`` that belongs to a statement.

    Args:
        statement: the signed statement.
        envelope: SHA-256 of ``certificate.dsse.json``.
        key: SHA-256 of ``public.pem``.

    Raises:
        KeyError, IndexError, TypeError: the statement lacks a part.
    """
    predicate = statement["predicate"]
    build = predicate["build"]
    root = predicate["ancestry"][0]
    return Manifest(
        stage="certify",
        sensitivity="released",
        config_digest=build["config_digests"]["certify"],
        parents={root["folder"]: root["digest"]},
        files={f"{PAYLOAD}/{name}": digest for name, digest in _subject(statement).items()}
        | {CERTIFICATE: envelope, PUBLIC_KEY: key},
        details=certificate_details(predicate),
        medsynth_version=predicate["implementation"]["medsynth"],
    )


def release_manifest(statement: Mapping[str, Any], envelope: str, key: str) -> Manifest:
    """Return the manifest of ``release/`` that belongs to a statement (arguments as :func:`certificate_manifest`)."""
    predicate = statement["predicate"]
    return Manifest(
        stage="export",
        sensitivity="released",
        config_digest=predicate["build"]["config_digests"]["export"],
        parents={"certificate": certificate_manifest(statement, envelope, key).digest},
        files=_subject(statement) | {CERTIFICATE: envelope, PUBLIC_KEY: key},
        medsynth_version=predicate["implementation"]["medsynth"],
    )


def _subject(statement: Mapping[str, Any]) -> dict[str, str]:
    return {str(entry["name"]): str(entry["digest"]["sha256"]) for entry in statement["subject"]}
