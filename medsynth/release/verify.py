"""Check a release against its certificate, offline: no torch, no data, no network.

All checks run and all failures are listed, so that one look says what is wrong.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medsynth.errors import MedsynthError, VerificationError
from medsynth.privacy.accounting import Event, epsilon
from medsynth.privacy.ledger import RELATION, UNIT, Ledger
from medsynth.release import signing, spending
from medsynth.release.ancestry import broken_edges, parse_nodes
from medsynth.release.manifests import release_manifest
from medsynth.release.marks import (
    ANCESTRY,
    CERTIFICATE,
    LEDGER,
    PUBLIC_KEY,
    STATEMENT_TYPE,
    UNCERTIFIED,
    UNSIGNED,
)
from medsynth.release.statement import PREDICATE_TYPE
from medsynth.store import MANIFEST, canonical_json, digest_file, digest_tree, manifest_text

EPSILON_TOLERANCE = 1e-6
"""Claims are rounded up; this much only covers floating-point differences between machines."""
CANNOT_SHOW: tuple[str, ...] = (
    "that this code really ran on the cohort, or that the ledger names every access: the signer vouches for both",
    "that no patient is registered under two identifiers, and that public inputs hold no patient of the cohort",
    "that the images are useful: the Dice on real patients stays inside the hospital",
)


@dataclass(frozen=True)
class Check:
    """One question about a release and what is wrong (nothing: it holds)."""

    name: str
    problems: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether the check holds."""
        return not self.problems


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found.

    Attributes:
        checks: every check in the order it ran.
        claim: what the certificate claims; trust it only when :attr:`ok`.
        signer: SHA-256 of the public key that the signature was checked with.
        signer_known: whether that key came from the caller, not out of the release itself.
    """

    checks: tuple[Check, ...]
    claim: Mapping[str, Any] = field(default_factory=dict)
    signer: str | None = None
    signer_known: bool = False

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return bool(self.checks) and all(check.ok for check in self.checks)

    @property
    def failures(self) -> list[str]:
        """Every problem, led by the name of its check."""
        return [f"{check.name}: {problem}" for check in self.checks for problem in check.problems]

    def lines(self) -> list[str]:
        """Return the report as lines for a terminal."""
        lines = [f"{'ok    ' if check.ok else 'FAILED'}  {check.name}" for check in self.checks]
        lines += [f"  - {failure}" for failure in self.failures]
        if self.ok:
            claim = self.claim
            lines.append(
                f"VERIFIED: ({claim['epsilon']:g}, {claim['delta']:g})-differential privacy, unit {claim['unit']}, "
                f"relation {claim['relation']}, accountant {claim['accountant']}"
            )
        else:
            lines.append(f"NOT VERIFIED: {len(self.failures)} problem(s)")
        if self.signer is not None:
            lines.append(f"signed with key {self.signer}")
        if not self.signer_known:
            lines.append(
                "WHO SIGNED WAS NOT CHECKED: the key came with the release. Pass --key with a public key that you "
                "received from the hospital by another way."
            )
        return [*lines, "What this cannot show:", *(f"  - {line}" for line in CANNOT_SHOW)]

    def require(self) -> None:
        """Raise when a check failed.

        Raises:
            VerificationError: with every problem.
        """
        if not self.ok:
            raise VerificationError("\n".join(["the release does not hold:", *(f"  {line}" for line in self.failures)]))


def verify(release: Path, public_key: Path | None = None) -> Report:
    """Check signature, ledger, files, ancestry and claim of a release.

    Args:
        release: the folder ``release/``.
        public_key: PEM file of the hospital's key, received by another way; None takes the one in the release, which
            shows that nothing was changed but not who signed.

    Returns:
        the report; it is ``ok`` only when every check holds.

    Raises:
        VerificationError: there is no such folder, or the key given cannot be read.
    """
    if not release.is_dir():
        raise VerificationError("there is no release in the given folder: expected the folder written by 'export'")
    pem = _read_key(public_key if public_key is not None else release / PUBLIC_KEY, public_key is not None)
    known = public_key is not None
    checks = [_check("certified", lambda: _uncertified(release))]
    if not (release / CERTIFICATE).is_file():
        checks.append(Check("signature", (f"{CERTIFICATE} is missing: nothing vouches for this release",)))
        return Report(tuple(checks), signer_known=known)
    opened: list[tuple[dict[str, Any], bytes]] = []
    checks.append(_check("signature", lambda: _signature(release, pem, opened)))
    statement = _parse(opened[0][1]) if opened else {}
    predicate = _mapping(statement, "predicate")
    claim = _mapping(predicate, "claim")
    questions: dict[str, Callable[[], Sequence[str]]] = {
        "statement": lambda: _statement(statement),
        "files": lambda: _files(release, statement),
        "key": lambda: _key(release, pem, known),
        "manifest": lambda: _manifest(release),
        "origin": lambda: _origin(release, statement),
        "ledger": lambda: _ledger(release, predicate),
        "ancestry": lambda: _ancestry(release, predicate),
        "claim": lambda: _claim(claim),
        "epsilon": lambda: _epsilon(release, claim),
        "words": lambda: _words(release, claim),
    }
    checks += [_check(name, question) for name, question in questions.items()]
    return Report(tuple(checks), claim, signing.key_id(pem) if pem else None, known)


def _check(name: str, question: Callable[[], Sequence[str]]) -> Check:
    try:
        return Check(name, tuple(question()))
    except MedsynthError as error:
        return Check(name, (str(error),))
    except (KeyError, TypeError, ValueError, AttributeError, OSError, OverflowError) as error:
        return Check(name, (f"cannot be checked, a part is missing or unreadable ({type(error).__name__}: {error})",))


def _read_key(path: Path, given: bool) -> bytes:
    try:
        pem = path.read_bytes()
        signing.key_id(pem)
        return pem
    except OSError as error:
        if given:
            raise VerificationError(f"the public key given cannot be read: {error.strerror}") from error
        return b""
    except VerificationError:
        if given:
            raise
        return b""


def _parse(payload: bytes) -> dict[str, Any]:
    try:
        value = json.loads(payload)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _mapping(value: Mapping[str, Any], key: str) -> dict[str, Any]:
    child = value.get(key)
    return child if isinstance(child, dict) else {}


def _uncertified(release: Path) -> list[str]:
    if (release / UNCERTIFIED).exists():
        return [f"the file {UNCERTIFIED} says that this release makes no privacy promise"]
    return []


def _signature(release: Path, pem: bytes, opened: list[tuple[dict[str, Any], bytes]]) -> list[str]:
    envelope, payload = signing.open_envelope((release / CERTIFICATE).read_bytes())
    opened.append((envelope, payload))
    if not pem:
        return [f"{PUBLIC_KEY} is missing or unreadable, and no key was given"]
    signing.check_signature(envelope, payload, pem)
    return []


def _key(release: Path, pem: bytes, given: bool) -> list[str]:
    path = release / PUBLIC_KEY
    if not path.is_file():
        return [f"{PUBLIC_KEY} is missing"]
    if not pem or path.read_bytes() != signing.canonical_pem(pem):
        which = (
            "is not the key that was given" if given else "was changed: it is not a public key as 'certify' writes it"
        )
        return [f"{PUBLIC_KEY} in the release {which}"]
    return []


def _statement(statement: Mapping[str, Any]) -> list[str]:
    expected = {"_type": STATEMENT_TYPE, "predicateType": PREDICATE_TYPE}
    return [
        f"{key} is {statement.get(key)!r}, expected {value!r}"
        for key, value in expected.items()
        if statement.get(key) != value
    ]


def _files(release: Path, statement: Mapping[str, Any]) -> list[str]:
    named = {str(entry["name"]): str(entry["digest"]["sha256"]) for entry in statement["subject"]}
    links = sorted(p.relative_to(release).as_posix() for p in release.rglob("*") if p.is_symlink())
    found = {p.relative_to(release).as_posix(): p for p in release.rglob("*") if p.is_file() and not p.is_symlink()}
    problems = [f"{name} is a link, not a file" for name in links]
    problems += [f"{name} is missing" for name in sorted(named.keys() - found.keys())]
    problems += [f"{name} is not named by the certificate" for name in sorted(found.keys() - named.keys() - UNSIGNED)]
    problems += [
        f"{name} was changed: its SHA-256 is not the certificate's"
        for name in sorted(named.keys() & found.keys())
        if digest_file(found[name]) != named[name]
    ]
    return problems or ([] if named else ["the certificate names no file"])


def _manifest(release: Path) -> list[str]:
    raw, values = _read_manifest(release)
    named, found = _mapping(values, "files"), digest_tree(release)
    wrong = sorted(name for name in named.keys() | found.keys() if named.get(name) != found.get(name))
    problems = [f"{MANIFEST} gives another digest for {name}, or does not know it" for name in wrong]
    if raw != manifest_text(values):
        problems.append(f"{MANIFEST} was changed: it is not the text that 'export' writes")
    return problems


def _origin(release: Path, statement: Mapping[str, Any]) -> list[str]:
    """Compare the manifest with the one that follows from the signed statement."""
    _, values = _read_manifest(release)
    expected = release_manifest(statement, digest_file(release / CERTIFICATE), digest_file(release / PUBLIC_KEY))
    wanted: dict[str, Any] = json.loads(canonical_json(asdict(expected)))
    wrong = sorted(key for key in wanted.keys() | values.keys() if key not in values or values[key] != wanted.get(key))
    return [f"{MANIFEST}: '{key}' is not what follows from the certificate" for key in wrong]


def _read_manifest(release: Path) -> tuple[bytes, dict[str, Any]]:
    try:
        raw = (release / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise VerificationError(f"{MANIFEST} is missing") from None
    values = _parse(raw)
    if not values:
        raise VerificationError(f"{MANIFEST} was changed: it is no JSON object")
    return raw, values


def _ledger(release: Path, predicate: Mapping[str, Any]) -> list[str]:
    ledger = Ledger(release / LEDGER)
    ledger.verify_chain()
    problems = []
    if ledger.head != predicate["ledger"]["head"]:
        problems.append("its head is not the one in the certificate: lines were changed, added or dropped")
    recorded = [spending.mechanism(entry) for entry in ledger.entries()]
    if recorded != predicate["mechanisms"]:
        problems.append("the mechanisms in the certificate are not those of the ledger (sigma, rate, steps or outputs)")
    return problems + spending.taints(ledger.entries())


def _ancestry(release: Path, predicate: Mapping[str, Any]) -> list[str]:
    signed = predicate["ancestry"]
    problems = []
    if json.loads((release / ANCESTRY).read_text(encoding="utf-8")) != signed:
        problems.append(f"{ANCESTRY} is not what the certificate says")
    entries = [str(entry["id"]) for entry in Ledger(release / LEDGER).entries()]
    return problems + broken_edges(parse_nodes(signed), entries)


def _claim(claim: Mapping[str, Any]) -> list[str]:
    problems = []
    for key, value in (("unit", UNIT), ("relation", RELATION), ("accountant", "pld")):
        if claim[key] != value:
            problems.append(f"{key} is {claim[key]!r}: a release is certified for {value!r} only")
    if not (math.isfinite(claim["epsilon"]) and 0 <= claim["epsilon"] <= claim["budget"]):
        problems.append(f"epsilon {claim['epsilon']} is not within the budget of {claim['budget']}")
    limit = 1 / (10 * claim["declared_patients"])
    if not 0 < claim["delta"] <= limit * (1 + 1e-9):
        problems.append(f"delta {claim['delta']:g} is above 1/(10 N) = {limit:g} for the declared patients")
    return problems


def _epsilon(release: Path, claim: Mapping[str, Any]) -> list[str]:
    events: list[Event] = spending.events(Ledger(release / LEDGER).entries())
    problems = []
    costs = [(claim["delta"], claim["epsilon"], epsilon(events, claim["delta"]))]
    costs += [(row["delta"], row["epsilon"], spending.cost_at(events, row["delta"])) for row in claim["epsilon_at"]]
    for delta, claimed, recomputed in costs:
        if claimed < recomputed - EPSILON_TOLERANCE:
            problems.append(
                f"the ledger costs epsilon {recomputed:g} at delta {delta:g}, the certificate claims {claimed:g}"
            )
    bounds = dict(spending.membership(events, claim["delta"]))
    for row in claim["membership"]:
        rate, most = row["false_positive_rate"], row["true_positive_rate_at_most"]
        if most < bounds.get(rate, 1.0) - EPSILON_TOLERANCE:
            problems.append(f"the bound on membership attacks at {rate:.1%} false positives is below what was spent")
    return problems


def _words(release: Path, claim: Mapping[str, Any]) -> list[str]:
    text = f"epsilon = {claim['epsilon']:g}, delta = {claim['delta']:g}"
    names = ("DATASET_CARD.md", "PRIVACY.md")
    return [
        f"{name} does not say '{text}'" for name in names if text not in (release / name).read_text(encoding="utf-8")
    ]
