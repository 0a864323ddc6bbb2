"""Check a release against its certificate, offline: no torch, no data, no network.

All checks run and all failures are listed, so that one look says what is wrong. The questions themselves are in
:mod:`medsynth.release.checks` and :mod:`medsynth.release.contents`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from medsynth.errors import MedsynthError, VerificationError
from medsynth.release import checks, contents, endorsements, opened, recompute, signing
from medsynth.release.audits import OF_MECHANISMS
from medsynth.release.marks import CERTIFICATE, ENDORSEMENTS, PUBLIC_KEY
from medsynth.release.opened import Question, Release

Asked = tuple[str, str, Question]
"""A check's name, what holds when there is no problem, and the question."""
CANNOT_SHOW: tuple[str, ...] = (
    "that this code really ran on the cohort, or that the ledger names every access: the signer vouches for both",
    "that no patient is registered under two identifiers, and that public inputs hold no patient of the cohort",
    "that the images are useful: the Dice on real patients stays inside the hospital",
)


@dataclass(frozen=True)
class Check:
    """One question about a release and what is wrong (nothing: it holds).

    Attributes:
        holds: what is true of the release when there is no problem.
    """

    name: str
    problems: tuple[str, ...] = ()
    holds: str = ""

    @property
    def ok(self) -> bool:
        """Whether the check holds."""
        return not self.problems

    def line(self) -> str:
        """Return the check as a line for a terminal."""
        return f"{'ok    ' if self.ok else 'FAILED'}  {self.name:<11}  {self.holds}".rstrip()


@dataclass(frozen=True)
class Report:
    """What :func:`verify` found.

    Attributes:
        checks: every check in the order it ran.
        claim: what the certificate claims; trust it only when :attr:`ok`.
        account: in words, what all studies of the same patients cost together; trust it only when :attr:`ok`.
        signer: SHA-256 of the public key that the signature was checked with.
        signer_known: whether that key came from the caller (or is endorsed by one that did), not from the release.
        chain: ids of the keys from the one given to the signer, where they differ.
        accountants: by which epsilon was computed again.
        audited: whether an audit of the mechanisms is named.
    """

    checks: tuple[Check, ...]
    claim: Mapping[str, Any] = field(default_factory=dict)
    account: str = ""
    signer: str | None = None
    signer_known: bool = False
    chain: tuple[str, ...] = ()
    accountants: tuple[str, ...] = ()
    audited: bool = False

    @property
    def ok(self) -> bool:
        """Whether every check holds."""
        return bool(self.checks) and all(check.ok for check in self.checks)

    @property
    def failures(self) -> list[str]:
        """Every problem, led by the name of its check."""
        return [_printable(f"{check.name}: {problem}") for check in self.checks for problem in check.problems]

    def lines(self) -> list[str]:
        """Return the report as lines for a terminal."""
        lines = [check.line() for check in self.checks]
        lines += [f"  - {failure}" for failure in self.failures]
        lines += self._verdict()
        if self.signer is not None:
            lines.append(f"key: {signing.fingerprint(self.signer)}")
        if self.chain:
            lines.append(
                f"the key given was replaced {len(self.chain) - 1} time(s), each by endorsement of the one before"
            )
        if not self.signer_known:
            lines.append(
                "WHO SIGNED WAS NOT CHECKED: the key came with the release. Pass --key with a public key that you "
                "received from the hospital by another way."
            )
        lines += ["What this cannot show:", *(f"  - {line}" for line in CANNOT_SHOW)]
        return [_printable(line) for line in lines]

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON values, for machines."""
        return {
            "verified": self.ok,
            "checks": [{**asdict(check), "ok": check.ok} for check in self.checks],
            "claim": dict(self.claim),
            "account": self.account,
            "signer": self.signer,
            "signer_known": self.signer_known,
            "chain": list(self.chain),
            "accountants": list(self.accountants),
            "audited": self.audited,
            "cannot_show": list(CANNOT_SHOW),
        }

    def require(self) -> None:
        """Raise when a check failed.

        Raises:
            VerificationError: with every problem.
        """
        if not self.ok:
            raise VerificationError("\n".join(["the release does not hold:", *(f"  {line}" for line in self.failures)]))

    def _verdict(self) -> list[str]:
        if not self.ok:
            return [f"NOT VERIFIED: {len(self.failures)} problem(s)"]
        claim = self.claim
        return [
            f"VERIFIED: ({claim['epsilon']:g}, {claim['delta']:g})-differential privacy, unit {claim['unit']}, "
            f"relation {claim['relation']}, accountant {claim['accountant']}",
            self.account,
            f"epsilon was computed again by: {' and '.join(self.accountants)}",
            *(() if self.audited else ("NO AUDIT OF THE MECHANISMS WAS RUN: the certificate names none",)),
        ]


def verify(release: Path, public_key: Path | None = None) -> Report:
    """Check signature, ledger, files, ancestry and claim of a release.

    Args:
        release: the folder ``release/``.
        public_key: PEM file of the hospital's key, received by another way; None takes the one in the release, which
            shows that nothing was changed but not who signed. A former key of the hospital will do when the release
            carries the endorsements that lead from it to the key that signed.

    Returns:
        the report; it is ``ok`` only when every check holds.

    Raises:
        VerificationError: there is no such folder, it cannot be read, or the key given is no public Ed25519 key.
    """
    read = _open(release, public_key)
    signer = signing.key_id(read.signer) if read.signer else None
    known = public_key is not None
    if not (release / CERTIFICATE).is_file():
        certified, (name, holds, _), *_ = _of_any_certificate()
        missing = Check(name, (f"{CERTIFICATE} is missing: nothing vouches for this release",), holds)
        return Report((_ask(read, *certified), missing), signer_known=known)
    questions = [*_of_any_certificate(), *(_of_this_version() if checks.of_this_version(read) else ())]
    answers = tuple(_ask(read, *question) for question in questions)
    asked = recompute.accountants()
    return Report(answers, read.claim, _account(read), signer, known, read.chain, asked, _audited(read))


def _printable(line: str) -> str:
    """Return a line whose control characters are written out: names of files are the sender's to choose."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in line)


def _of_any_certificate() -> tuple[Asked, ...]:
    return (
        ("certified", "it is not marked as uncertified", checks.uncertified),
        ("signature", "the certificate was signed with the key, and nothing in it changed since", checks.signature),
        ("statement", "the certificate is of the version that this medsynth knows", checks.statement),
        ("files", "every file is there and unchanged, and there is no other", checks.files),
        ("key", "public.pem is the key that signed, and the one that was given", checks.key),
        ("manifest", "manifest.json lists exactly these files", checks.manifest),
    )


def _of_this_version() -> tuple[Asked, ...]:
    return (
        ("contents", "the certificate has no part that nobody checks", contents.contents),
        ("origin", "manifest.json follows from the certificate", checks.origin),
        ("ledger", "the ledger's chain is whole, and the certificate names every spend in it", checks.ledger),
        ("ancestry", "all that was made from patients went through a spend in the ledger", checks.ancestry),
        ("claim", "it is a promise for a patient, within the budget, with delta at most 1/(10 N)", checks.claim),
        ("epsilon", "epsilon, computed again from the ledger, is what is claimed", checks.epsilon),
        ("accountants", "the other accountants do not contradict it", checks.accountants),
        ("account", "the spend of all studies of these patients, computed again, is what is said", checks.account),
        ("membership", "the bounds on membership attacks follow from the ledger", checks.membership),
        ("limits", "everything that the promise does not cover is said", checks.limits),
        ("words", "dataset card and PRIVACY.md are what follows from the certificate", checks.words),
    )


def _account(release: Release) -> str:
    return str(opened.mapping(release.predicate, "account").get("in_words", ""))


def _audited(release: Release) -> bool:
    rows = release.predicate.get("audits")
    named = [row.get("audit") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    return any(isinstance(name, str) and name in OF_MECHANISMS for name in named)


def _ask(release: Release, name: str, holds: str, question: Question) -> Check:
    try:
        return Check(name, tuple(question(release)), holds)
    except MedsynthError as error:
        return Check(name, (str(error),), holds)
    except (LookupError, TypeError, ValueError, AttributeError, OSError, ArithmeticError, RecursionError) as error:
        problem = f"cannot be checked, a part is missing or unreadable ({type(error).__name__}: {error})"
        return Check(name, (problem,), holds)


def _open(release: Path, public_key: Path | None) -> Release:
    if not release.is_dir():
        raise VerificationError("there is no release in the given folder: expected the folder written by 'export'")
    given = _read_given(public_key) if public_key is not None else None
    pem, chain = _read_own(release), []
    if given is not None and pem and given != pem and (release / ENDORSEMENTS).is_file():
        try:
            chain = endorsements.follow((release / ENDORSEMENTS).read_bytes(), given, pem)
        except (VerificationError, OSError):
            chain = []  # the check of the key says why
    return Release(release, opened.scan(release), pem, given, tuple(chain), _read_statement(release))


def _read_given(path: Path) -> bytes:
    try:
        return signing.canonical_pem(path.read_bytes())
    except OSError as error:
        raise VerificationError(f"the public key given cannot be read: {error.strerror}") from error


def _read_own(release: Path) -> bytes:
    try:
        return signing.canonical_pem((release / PUBLIC_KEY).read_bytes())
    except (OSError, VerificationError):
        return b""


def _read_statement(release: Path) -> dict[str, Any]:
    try:
        return opened.parse(signing.open_envelope((release / CERTIFICATE).read_bytes())[1])
    except (OSError, VerificationError):
        return {}
