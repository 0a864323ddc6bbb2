"""The questions that :mod:`medsynth.release.verify` asks about a release; each returns what is wrong, in words.

What the statement may hold at all is asked in :mod:`medsynth.release.contents`.

Nothing here trusts anything that it reads: whoever changed a release may have signed it anew with a key of his own, so
that each part is compared with the others, and what follows from the ledger is computed again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from medsynth.errors import VerificationError
from medsynth.privacy import pld
from medsynth.privacy.ledger import RELATION, UNIT
from medsynth.release import card, endorsements, recompute, signing, spending
from medsynth.release.ancestry import broken_edges, parse_nodes
from medsynth.release.manifests import release_manifest
from medsynth.release.marks import (
    ANCESTRY,
    CERTIFICATE,
    ENDORSEMENTS,
    LEDGER,
    PUBLIC_KEY,
    STATEMENT_TYPE,
    UNCERTIFIED,
    UNSIGNED,
)
from medsynth.release.opened import Release, mapping, parse
from medsynth.release.statement import DELTA_SHARES, NOT_COVERED, PREDICATE_TYPE, membership_in_words
from medsynth.store import MANIFEST, canonical_json, json_text

_CLAIM_FIELDS = frozenset(
    {
        "epsilon",
        "delta",
        "unit",
        "relation",
        "accountant",
        "budget",
        "declared_patients",
        "epsilon_at",
        "membership",
        "linkage",
        "trials",
    }
)
_ACCOUNTANTS = frozenset({"pld", "prv", "rdp"})


def uncertified(release: Release) -> list[str]:
    """Whether the mark of an uncertified release is absent."""
    if (release.folder / UNCERTIFIED).exists():
        return [f"the file {UNCERTIFIED} says that this release makes no privacy promise"]
    return []


def signature(release: Release) -> list[str]:
    """Whether the envelope is the one text that the key signed."""
    text = (release.folder / CERTIFICATE).read_bytes()
    envelope, payload = signing.open_envelope(text)
    if not release.signer:
        return [f"{PUBLIC_KEY} is missing or unreadable, and no key was given"]
    problems = []
    try:
        signing.check_signature(envelope, payload, release.signer)
    except VerificationError as error:
        problems.append(str(error))
    try:
        signing.require_canonical(text, envelope)
    except VerificationError as error:
        problems.append(str(error))
    if payload != canonical_json(release.statement):
        problems.append("what was signed is not in the one form that 'certify' writes: no reader may take it two ways")
    return problems


def statement(release: Release) -> list[str]:
    """Whether it is a certificate of the version that this code knows."""
    signed = release.statement
    if signed.get("_type") != STATEMENT_TYPE:
        return [f"_type is {signed.get('_type')!r}, expected {STATEMENT_TYPE!r}: this is no in-toto statement"]
    if signed.get("predicateType") != PREDICATE_TYPE:
        return [_other_version(release)]
    return [f"the statement has an unknown part '{key}'" for key in signed.keys() - _STATEMENT_FIELDS]


_STATEMENT_FIELDS = frozenset({"_type", "subject", "predicateType", "predicate"})


def of_this_version(release: Release) -> bool:
    """Whether the certificate is of the version whose parts can be judged here."""
    return release.statement.get("predicateType") == PREDICATE_TYPE


def _other_version(release: Release) -> str:
    found = str(release.statement.get("predicateType"))
    family, _, known = PREDICATE_TYPE.rpartition(":")
    match = re.fullmatch(rf"{re.escape(family)}:(\d+)", found)
    if match is None:
        return f"predicateType is {found!r}, expected {PREDICATE_TYPE!r}: this is no certificate of medsynth"
    writer = mapping(release.predicate, "implementation").get("medsynth")
    which = f"medsynth {writer}, which wrote it" if isinstance(writer, str) else "the medsynth that wrote it"
    return (
        f"this is a certificate of version {match[1]}, and this medsynth judges version {known} only: verify it with "
        f"{which}, or ask the hospital to certify the release again"
    )


def files(release: Release) -> list[str]:
    """Whether every file that the certificate names is there and unchanged, and nothing else."""
    subject, tree = release.statement["subject"], release.tree
    named = {str(entry["name"]): str(entry["digest"]["sha256"]) for entry in subject}
    found = tree.digests
    problems = list(tree.odd)
    problems += [] if len(named) == len(subject) else ["the certificate names a file twice"]
    problems += [f"{name} is missing" for name in sorted(named.keys() - found.keys())]
    problems += [f"{name} is not named by the certificate" for name in sorted(found.keys() - named.keys() - UNSIGNED)]
    problems += [
        f"{name} was changed: its SHA-256 is not the certificate's"
        for name in sorted(named.keys() & found.keys())
        if found[name] != named[name]
    ]
    needed = {parent.as_posix() for name in named for parent in Path(name).parents}
    problems += [f"the folder {name}/ is not named by the certificate" for name in sorted(tree.folders - needed)]
    return problems or ([] if named else ["the certificate names no file"])


def key(release: Release) -> list[str]:
    """Whether the key in the release is the one that was given, or one that it endorses."""
    path = release.folder / PUBLIC_KEY
    if not path.is_file():
        return [f"{PUBLIC_KEY} is missing"]
    problems = []
    if not release.pem or path.read_bytes() != release.pem:
        problems.append(f"{PUBLIC_KEY} in the release was changed: it is not a public key as 'certify' writes it")
    if release.given is not None and release.given != release.pem and not release.chain:
        problems.append(f"{PUBLIC_KEY} in the release is not the key that was given")
        if release.pem and (release.folder / ENDORSEMENTS).is_file():
            try:
                endorsements.follow((release.folder / ENDORSEMENTS).read_bytes(), release.given, release.pem)
            except VerificationError as error:
                problems.append(str(error))
    return problems


def manifest(release: Release) -> list[str]:
    """Whether ``manifest.json`` is the text that ``export`` writes, with the digest of every file."""
    raw, values = _read_manifest(release)
    named = mapping(values, "files")
    found = {name: digest for name, digest in release.tree.digests.items() if name != MANIFEST}
    wrong = sorted(name for name in named.keys() | found.keys() if named.get(name) != found.get(name))
    problems = [f"{MANIFEST} gives another digest for {name}, or does not know it" for name in wrong]
    if raw != json_text(values):
        problems.append(f"{MANIFEST} was changed: it is not the text that 'export' writes")
    return problems


def origin(release: Release) -> list[str]:
    """Whether ``manifest.json`` is the one that follows from the signed statement."""
    _, values = _read_manifest(release)
    expected = release_manifest(
        release.statement, release.tree.digests[CERTIFICATE], release.tree.digests.get(PUBLIC_KEY, "")
    )
    wanted: dict[str, Any] = json.loads(canonical_json(asdict(expected)))
    wrong = sorted(name for name in wanted.keys() | values.keys() if _differ(values, wanted, name))
    return [f"{MANIFEST}: '{name}' is not what follows from the certificate" for name in wrong]


def ledger(release: Release) -> list[str]:
    """Whether the ledger's chain is whole and the certificate names all of it."""
    book, predicate = release.ledger(), release.predicate
    if not book.path.is_file():
        return [f"{LEDGER} is missing"]
    book.verify_chain()
    entries, problems = book.entries(), []
    if book.head != predicate["ledger"]["head"] or len(entries) != predicate["ledger"]["entries"]:
        problems.append("its head is not the one in the certificate: lines were changed, added or dropped")
    recorded, claimed = [spending.mechanism(entry) for entry in entries], predicate["mechanisms"]
    problems += [_other_mechanism(*pair) for pair in zip(recorded, claimed, strict=False) if pair[0] != pair[1]]
    if len(recorded) != len(claimed):
        problems.append(
            f"the mechanisms in the certificate are not those of the ledger: {len(claimed)} instead of {len(recorded)}"
        )
    return problems + spending.taints(entries)


def _other_mechanism(recorded: Mapping[str, Any], claimed: Mapping[str, Any]) -> str:
    parts = sorted(name for name in recorded.keys() | claimed.keys() if _differ(recorded, claimed, name))
    return (
        f"the mechanisms in the certificate are not those of the ledger: stage '{recorded['stage']}' differs in "
        f"{', '.join(parts)} (events hold sigma, rate and steps; sensitivity the clip norm)"
    )


def ancestry(release: Release) -> list[str]:
    """Whether every folder leads back to mechanisms in the ledger."""
    signed = release.predicate["ancestry"]
    problems = []
    if json.loads((release.folder / ANCESTRY).read_text(encoding="utf-8")) != signed:
        problems.append(f"{ANCESTRY} is not what the certificate says")
    return problems + broken_edges(parse_nodes(signed), release.ledger().entries())


def claim(release: Release) -> list[str]:
    """Whether the claim is complete, of the one kind that is certified, and consistent."""
    said = release.claim
    problems = [f"the claim lacks '{name}'" for name in sorted(_CLAIM_FIELDS - said.keys())]
    problems += [f"the claim has an unknown part '{name}'" for name in sorted(said.keys() - _CLAIM_FIELDS)]
    for name, value in (("unit", UNIT), ("relation", RELATION), ("accountant", "pld")):
        if said[name] != value:
            problems.append(f"{name} is {said[name]!r}: a release is certified for {value!r} only")
    numbers = [said["epsilon"], said["delta"], said["budget"], said["declared_patients"]]
    if any(isinstance(number, bool) or not isinstance(number, int | float) for number in numbers):
        return [*problems, "epsilon, delta, budget and declared_patients must be numbers"]
    if not isinstance(said["declared_patients"], int) or said["declared_patients"] < 1:
        return [*problems, f"declared_patients is {said['declared_patients']}: expected a whole number of at least 1"]
    if not (math.isfinite(said["epsilon"]) and 0 <= said["epsilon"] <= said["budget"]):
        problems.append(f"epsilon {said['epsilon']} is not within the budget of {said['budget']}")
    limit = 1 / (10 * said["declared_patients"])
    if not 0 < said["delta"] <= limit * (1 + 1e-9):
        problems.append(f"delta {said['delta']:g} is above 1/(10 N) = {limit:g} for the declared patients")
    return problems + _other_budget(release)


def _other_budget(release: Release) -> list[str]:
    """Whether what the release was made with was reserved for the delta and the budget that are claimed."""
    claimed = {"epsilon": release.claim["budget"], "delta": release.claim["delta"]}
    named = {identity for node in release.predicate["ancestry"] for identity in node["ledger_entries"]}
    return [
        f"ledger entry {entry['id'][:12]} was reserved for {name} {reserved.get(name)}, the claim says {value:g}"
        for entry in release.ledger().entries()
        if entry["id"] in named and isinstance(reserved := entry["budget"], dict)
        for name, value in claimed.items()
        if reserved.get(name) != value
    ]


def epsilon(release: Release) -> list[str]:
    """Whether what the ledger costs, computed again, is what is claimed, at every delta that is stated."""
    said = release.claim
    events = spending.events(release.ledger().entries())
    stated = {row["delta"]: row["epsilon"] for row in said["epsilon_at"]}
    problems = []
    if list(stated) != [said["delta"] / share for share in DELTA_SHARES]:
        problems.append("epsilon_at must state delta, delta/10 and delta/100")
    for delta, claimed in [(said["delta"], said["epsilon"]), *stated.items()]:
        for name, computed in recompute.epsilons(events, delta).items():
            wrong = recompute.contradiction(claimed, computed)
            if wrong:
                problems.append(
                    f"the ledger costs epsilon {computed:g} at delta {delta:g} ({name}), the certificate claims "
                    f"{claimed:g}: {wrong}"
                )
    return problems


def accountants(release: Release) -> list[str]:
    """Whether the other accountants' figures can be those of the ledger; PLD's is the one that is claimed."""
    said, claimed = release.predicate["accountants"], release.claim
    if set(said) != _ACCOUNTANTS:
        return [f"accountants names {', '.join(sorted(said))}: expected {', '.join(sorted(_ACCOUNTANTS))}"]
    least, _ = pld.epsilon_bounds(spending.events(release.ledger().entries()), claimed["delta"])
    problems = [
        f"{name} gives epsilon {value!r}, and the ledger costs at least {least:g}"
        for name, value in said.items()
        if isinstance(value, bool) or not isinstance(value, int | float) or value < least - spending.TOLERANCE
    ]
    if not problems and spending.round_up(said["pld"]) != claimed["epsilon"]:
        problems.append(f"pld gives epsilon {said['pld']!r}, which does not round up to {claimed['epsilon']:g}")
    return problems


def account(release: Release) -> list[str]:
    """Whether what the certificate says of all studies of these patients follows from the events that it names."""
    return spending.check_account(release.predicate, release.ledger().entries(), recompute.epsilons)


def membership(release: Release) -> list[str]:
    """Whether the bounds on membership attacks follow from the ledger."""
    said = release.claim
    events = spending.events(release.ledger().entries())
    bounds = recompute.membership(events, said["delta"])
    rows = said["membership"]
    if [row["false_positive_rate"] for row in rows] != list(spending.FALSE_POSITIVE_RATES):
        return ["the bounds on membership attacks are not those for 0.1, 1, 5 and 10 % false positives"]
    problems = []
    for row in rows:
        rate, most = row["false_positive_rate"], row["true_positive_rate_at_most"]
        low = [name for name in bounds if not bounds[name][rate] - spending.TOLERANCE <= most <= 1]
        if low:
            problems.append(
                f"the bound on membership attacks at {rate:.1%} false positives is {most:g}, which is below what was "
                f"spent ({' and '.join(low)})"
            )
        if row["in_words"] != membership_in_words(rate, most):
            problems.append(f"the words on membership attacks at {rate:.1%} false positives do not say the number")
    return problems


def limits(release: Release) -> list[str]:
    """Whether the certificate says everything that it does not cover."""
    said = list(release.predicate["not_covered"])
    problems = [f"not_covered lacks: {line}" for line in NOT_COVERED if line not in said]
    problems += [f"not_covered has an unknown line: {line}" for line in said if line not in NOT_COVERED]
    return problems or ([] if said == list(NOT_COVERED) else ["the lines of not_covered are in another order"])


def words(release: Release) -> list[str]:
    """Whether the pages for people are, byte for byte, the ones that follow from the certificate."""
    problems = []
    for name, text in card.pages(release.predicate, signing.key_id(release.pem)).items():
        found, expected = (release.folder / name).read_bytes(), text.encode()
        if found == expected:
            continue
        known, held = expected.split(b"\n"), found.split(b"\n")
        problems += [f"{name} does not say '{line.decode()}'" for line in known if line not in held]
        more = [line.decode(errors="replace") for line in held if line not in known]
        problems += [f"{name} says what the certificate does not: '{line}'" for line in more]
        problems += [] if problems else [f"{name} says the lines of the certificate in another order or number"]
    return problems


def _read_manifest(release: Release) -> tuple[bytes, dict[str, Any]]:
    try:
        raw = (release.folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise VerificationError(f"{MANIFEST} is missing") from None
    values = parse(raw)
    if not values:
        raise VerificationError(f"{MANIFEST} was changed: it is no JSON object")
    return raw, values


def _differ(one: Mapping[str, Any], other: Mapping[str, Any], name: str) -> bool:
    return name not in one or name not in other or one[name] != other[name]
