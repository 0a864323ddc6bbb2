"""What the audits mean for a certificate: which of them refuse it, and what of them may be said outside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from medsynth.errors import StoreError
from medsynth.privacy.audit.finding import Finding
from medsynth.privacy.audit.finding import refusals as refusals_of
from medsynth.store import read_manifest

FINDINGS = "findings.json"
ROC = "roc.png"
SCORES = "scores.npz"
"""Of the attacks on the generator, a number a patient: ``generator_members``, ``drafts_strangers``, ..."""
SIDES = ("members", "strangers")
OF_MECHANISMS = frozenset({"record-replay", "per-unit gradients", "distributional step", "one run with canaries"})
"""The audits of the mechanisms themselves; no certificate without one of them."""


def read_findings(folder: Path) -> list[Finding]:
    """Read what stage ``audit`` wrote.

    Raises:
        StoreError: the folder is unfinished, or its findings are unreadable.
    """
    read_manifest(folder)
    try:
        raw = json.loads((folder / FINDINGS).read_text(encoding="utf-8"))
        return [Finding.from_json(values) for values in raw["findings"]]
    except (OSError, KeyError, TypeError, ValueError):
        raise StoreError("the audit folder holds no readable findings: run `medsynth audit` again") from None


def refusals(folder: Path, synthetic: str) -> list[str]:
    """Return why the audits refuse a certificate.

    *Guarantees*: empty only where every audit that ran caught its positive control, no lower bound on epsilon lies
    above its claim, and the audits were of these very pairs.

    Args:
        folder: the finished ``audit/``.
        synthetic: digest of the pairs that are to be certified.

    Raises:
        StoreError: there is no finished audit.
    """
    findings = read_findings(folder)
    if read_manifest(folder).parents.get("synthetic") != synthetic:
        return ["'audit' was made from other synthetic pairs: run `medsynth audit` again"]
    return refusals_of(findings)


def unaudited(folder: Path) -> list[str]:
    """Return a refusal where no audit of the mechanisms ran: a certificate needs one of them at least."""
    if any(one.audit in OF_MECHANISMS for one in read_findings(folder)):
        return []
    names = ", ".join(sorted(OF_MECHANISMS))
    return [f"no audit of the mechanisms was run ({names}): switch one on in section 'audit', then `medsynth audit`"]


def left_out(folder: Path) -> list[str]:
    """Return a refusal where too few patients were there for the audits of results, though the study asks for them.

    Which audits are signed then follows from the study alone, and tells nobody how many patients were held back.
    """
    if any(one.reads_patients and one.audit not in OF_MECHANISMS for one in read_findings(folder)):
        return []
    return [
        "membership and copies were not audited, which takes two patients on each side: hold back more "
        "(ingest.test_fraction), or set audit.generator and audit.pairs to false, then `medsynth audit`"
    ]


def summary(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Return what may be signed: which audits ran, and the verdict of those that read no patient."""
    return [
        {"audit": one.audit, "subject": one.subject, **({} if one.reads_patients else {"verdict": one.verdict})}
        for one in findings
    ]
