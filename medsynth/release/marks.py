"""Names of the files that carry a release's promise, or say that it has none."""

from __future__ import annotations

from medsynth.store import MANIFEST

STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
CERTIFICATE = "certificate.dsse.json"
PUBLIC_KEY = "public.pem"
ENDORSEMENTS = "endorsements.jsonl"
"""Only where keys were rotated."""
LEDGER = "ledger.jsonl"
ANCESTRY = "ancestry.json"
DATASET_CARD = "DATASET_CARD.md"
PRIVACY_PAGE = "PRIVACY.md"
UNCERTIFIED = "UNCERTIFIED"
PAYLOAD = "payload"
UNSIGNED = frozenset({CERTIFICATE, PUBLIC_KEY, MANIFEST})
"""Files of a release that its statement cannot name: the envelope itself, the key, and what is written after."""
