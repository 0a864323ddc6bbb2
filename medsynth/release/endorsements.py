"""How a new signing key is trusted by those who hold an older one: each key signs its successor.

An endorsement is an in-toto statement in a DSSE envelope, one line of ``endorsements.jsonl``. It is worth as much as
the key that signed it: a stolen key endorses whom its thief likes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from medsynth.errors import VerificationError
from medsynth.release import signing
from medsynth.release.marks import ENDORSEMENTS, PUBLIC_KEY, STATEMENT_TYPE
from medsynth.store import canonical_json

ENDORSEMENT_TYPE = "urn:medsynth:key-endorsement:1"


def endorse(pem: bytes, by: signing.SigningKey) -> bytes:
    """Return the line by which the key ``by`` says that the public key ``pem`` takes its place."""
    statement = {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": PUBLIC_KEY, "digest": {"sha256": hashlib.sha256(pem).hexdigest()}}],
        "predicateType": ENDORSEMENT_TYPE,
        "predicate": {"successor": pem.decode(), "of": signing.key_id(signing.public_pem(by))},
    }
    return canonical_json(signing.sign(canonical_json(statement), by)) + b"\n"


def follow(lines: bytes, trusted: bytes, signer: bytes) -> list[str]:
    """Return the ids of the keys from the trusted one to the signer, each endorsed by the one before.

    Args:
        lines: ``endorsements.jsonl``.
        trusted: public key (PEM) that the verifier has from elsewhere.
        signer: public key (PEM) in the release.

    Raises:
        VerificationError: no unbroken chain of endorsements leads there, or a line is unreadable.
    """
    start, goal = signing.key_id(trusted), signing.key_id(signer)
    known = {start: trusted}
    chains = {start: [start]}
    # a file is written in the order of the rotations, so that one pass meets each key after the one that endorsed it
    for envelope, payload, predicate in _parse(lines):
        former, successor = str(predicate["of"]), str(predicate["successor"]).encode()
        if former in known:
            signing.check_signature(envelope, payload, known[former])
            identity = signing.key_id(successor)
            known[identity] = successor
            chains.setdefault(identity, [*chains[former], identity])
    if goal not in chains:
        raise VerificationError(
            f"the key given ({signing.fingerprint(start)[:19]}...) does not lead to the key in the release "
            f"({signing.fingerprint(goal)[:19]}...): no endorsement connects them"
        )
    return chains[goal]


def _parse(lines: bytes) -> Iterator[tuple[dict[str, Any], bytes, Mapping[str, Any]]]:
    for number, line in enumerate(lines.splitlines(), start=1):
        try:
            envelope, payload = signing.open_envelope(line)
            statement = json.loads(payload)
            if statement["predicateType"] != ENDORSEMENT_TYPE:
                raise ValueError("another kind of statement")
            yield envelope, payload, statement["predicate"]
        except (VerificationError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise VerificationError(f"{ENDORSEMENTS}, line {number}: no endorsement of a key") from error
