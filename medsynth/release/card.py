"""What a release says to people: dataset card, one page for a privacy officer, and the mark of an uncertified one.

Both pages are functions of the signed predicate: whoever verifies writes them again and compares every byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from medsynth.release.marks import DATASET_CARD, PRIVACY_PAGE
from medsynth.release.signing import fingerprint

_HOW = """\
A generator of label maps and a mask-conditioned generator of images learnt from a cohort at a hospital; every pair
was then sampled from the two."""
_HOW_OPEN = """ Where the study asks for it (`train.labelling`), networks that learnt from patients
outlined the images anew, and the label maps are theirs."""
_HOW_CERTIFIED = """ No patient's image or segmentation conditioned a pair, and no pair was selected by
comparing it with patients."""
_HOW_TO_CHECK = """\
You need Python 3.11 or newer, the hospital's public key, received by another way than this release, and medsynth from
the repository of its authors (a package of that name in a registry may be somebody else's). In a copy of it:

    python3 -m venv verify-env
    verify-env/bin/pip install -r pipelines/verify/requirements.txt
    verify-env/bin/pip install --no-deps .
    verify-env/bin/medsynth verify RELEASE --key HOSPITAL.pem

That takes a minute and less than 200 MB; it loads no PyTorch and needs no GPU, no patient data and, once installed, no
network. It ends with `VERIFIED` and exit code 0 only when everything holds."""
_RELATIONS = {"add_or_remove_one": "one patient added or removed"}
_ACCOUNTANTS = {"pld": "privacy-loss distributions (PLD)"}


def pages(predicate: Mapping[str, Any], signer: str) -> dict[str, str]:
    """Return the text of every page of a certified release by its name.

    Args:
        predicate: what the certificate says.
        signer: id of the key that signs.
    """
    about, pairs = predicate["dataset"], predicate["build"]["pairs"]
    return {
        DATASET_CARD: dataset_card(about, pairs, predicate["claim"]),
        PRIVACY_PAGE: privacy_page(predicate, signer),
    }


def promise_line(claim: Mapping[str, Any]) -> str:
    """Return the one line in which card and page state the promise."""
    return (
        f"**epsilon = {claim['epsilon']:g}, delta = {claim['delta']:g}** for each {claim['unit']} "
        f"({_RELATIONS[claim['relation']]}; computed by {_ACCOUNTANTS[claim['accountant']]})"
    )


def pairs_line(pairs: int) -> str:
    """Return the line in which the card says how many pairs there are."""
    return f"{pairs} pairs of a synthetic image and its segmentation"


def signer_line(identity: str) -> str:
    """Return the line in which the page names the key that signed."""
    return f"Key (SHA-256): `{fingerprint(identity)}`"


def _audit_lines(audited: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return one line an audit: what it looked at, and its verdict unless it was measured on patients."""
    looked: dict[tuple[str, str], list[str]] = {}
    for one in audited:
        verdict = one.get("verdict", "read patients, so that its result stays inside")
        looked.setdefault((str(one["audit"]), str(verdict)), []).append(str(one["subject"]))
    return [f"- {audit} of {', '.join(subjects)}: {verdict}" for (audit, verdict), subjects in looked.items()]


def _size_line(claim: Mapping[str, Any]) -> str:
    size = f"Declared size of the cohort: {claim['declared_patients']} patients; epsilon allowed: {claim['budget']:g}."
    sweep = f" The claim charges {claim['trials']} studies of a declared sweep, each as much as this one."
    return size + sweep if claim["trials"] > 1 else size


def _membership_rows(claim: Mapping[str, Any]) -> list[str]:
    rows = [(row["false_positive_rate"], row["true_positive_rate_at_most"]) for row in claim["membership"]]
    return [f"| {1000 * rate:g} of 1000 | {1000 * most:g} of 1000 |" for rate, most in rows]


def _delta_rows(claim: Mapping[str, Any]) -> list[str]:
    return [f"| {row['delta']:g} | {row['epsilon']:g} |" for row in claim["epsilon_at"]]


def _bullets(lines: Sequence[str]) -> list[str]:
    return [f"- {line}" for line in lines]


def dataset_card(dataset: Mapping[str, Any], pairs: int, claim: Mapping[str, Any] | None) -> str:
    """Return ``DATASET_CARD.md``.

    Args:
        dataset: public facts, see :func:`medsynth.release.statement.dataset_facts`.
        pairs: number of image and segmentation pairs.
        claim: what the certificate promises, as JSON values; None when there is none.
    """
    millimetres = dataset["spacing_mm"]
    spacing = "no physical spacing" if millimetres is None else " x ".join(f"{s:g}" for s in millimetres) + " mm"
    values = sorted(dataset["labels"].items(), key=lambda label: int(label[0]))
    labels = "\n".join(f"| {value} | {name} |" for value, name in values)
    privacy = _promise(claim) if claim else "**None. This release carries no certificate (see `UNCERTIFIED`).**"
    about = f" {dataset['description']}" if dataset["description"] else ""
    shown = "No image shows a patient." if claim else "Images may resemble patients of the cohort; see `UNCERTIFIED`."
    check = (
        _HOW_TO_CHECK
        if claim
        else "There is nothing to check: `medsynth verify` refuses a release without a certificate."
    )
    sampled = f"{_HOW}{_HOW_CERTIFIED}" if claim else f"{_HOW}{_HOW_OPEN}"
    return f"""# {dataset["name"]}: a synthetic dataset

{pairs_line(pairs)}
({dataset["modality"]}, {dataset["spatial_dims"]}D, {spacing}).
{shown}{about}

## Privacy
{privacy}

## How it was made
{sampled}

## Files
- `nifti/` (if present) the pairs in the layout of the Medical Segmentation Decathlon (`dataset.json`, `imagesTr/`,
  `labelsTr/`); images are whole numbers, 0..1000 (grey) or 0..255 (colour)
- `dicom/` (if present) pairs as DICOM series with a segmentation object, marked as synthetic data; only some of them
  where another format holds all
- `png/` (if present) the pairs as pictures, where they are two-dimensional

## Labels
| value | name |
|---|---|
{labels}

## Intended use and limits
For developing, teaching and testing segmentation methods, and for training them before they see real data.
Not for diagnosis, not as evidence about any person, and not as the only test of a method: measure on real patients
before use. Rare findings may be absent, contrasts smoother than real ones, and the proportions of groups of patients
are not promised to be right. Images carry a hospital's equipment and population as far as the generator learnt them.

## How to check it
{check}

## Licence
{dataset["licence"]}
"""


def uncertified_page(dataset: Mapping[str, Any]) -> str:
    """Return ``PRIVACY.md`` of a release without a certificate."""
    return f"""{_title(dataset)}

**This release has no certificate and makes no privacy promise.** Treat it like the patients' own data: the model
that made it may have memorised them. The file `UNCERTIFIED` says why. `medsynth verify` refuses it.
"""


def privacy_page(predicate: Mapping[str, Any], signer: str) -> str:
    """Return ``PRIVACY.md``: one page for a privacy officer.

    Args:
        predicate: what the certificate says; the page holds nothing else, so that it can be written again.
        signer: id of the key that signs.
    """
    said = predicate["claim"]
    return f"""{_title(predicate["dataset"])}

Every figure on this page is in the signed certificate too; `medsynth verify` compares the two.

## The promise
{promise_line(said)}

No image or segmentation in this release was taken from a patient: all were drawn from models that learnt from the
cohort through random noise. Whatever one sees in the release, it is at most
{_factor(said["epsilon"])} as likely with one patient's records as without them,
and the other way round, but for a failure probability of {said["delta"]:g}.
The figure covers everything by which this study read the cohort.
{_size_line(said)}
{said["linkage"]}

## What an attacker can find out about one person
Suppose the attacker knows everything about all other patients, the models and this page, and wants to find out whether
a person was in the cohort. Whatever the method, and however long it runs:

| people outside the cohort who are wrongly accused | patients recognised, at most |
|---|---|
{_lines(_membership_rows(said))}

Without a promise the right column could be 1000 of 1000; pure guessing gives the number on the left. At smaller failure
probabilities the same study has these epsilons:

| delta | epsilon |
|---|---|
{_lines(_delta_rows(said))}

## This study and all others of the same patients
{predicate["account"]["in_words"]}

## Who signed, and how to check
{signer_line(signer)}

Compare it with what the hospital told you by another way. `DATASET_CARD.md` has the commands; they check every file and
every spend in `ledger.jsonl`, and compute epsilon again.

## What was tested inside the hospital
{_lines(_audit_lines(predicate["audits"])) or "- no audit was run"}

## What the promise does not cover
{_lines(_bullets(predicate["not_covered"]))}

## What entered from outside the cohort
{_lines(_bullets(predicate["public_inputs"])) or "- nothing"}
"""


def _title(dataset: Mapping[str, Any]) -> str:
    return f"# Privacy of '{dataset['name']}' on one page"


def _factor(epsilon: float) -> str:
    # Rounded up, as everything that bounds.
    factor = (
        f"{math.ceil(math.exp(epsilon) * 100) / 100:g}"
        if epsilon < 7
        else f"{_three_digits(math.exp(min(epsilon, 700.0))):,}"
    )
    return f"e^{epsilon:g} = {factor} times"


def _three_digits(value: float) -> int:
    # Rounded up, to fewer digits than mathematical libraries agree on: the page is written again elsewhere.
    unit = 10 ** max(0, len(str(int(value))) - 3)
    return math.ceil(value / unit) * unit


def _lines(lines: Sequence[str]) -> str:
    return "\n".join(lines)


def uncertified_note(reasons: Sequence[str]) -> str:
    """Return the text of the file ``UNCERTIFIED``: why there is no certificate."""
    lines = "\n".join(f"- {reason}" for reason in reasons)
    return f"""UNCERTIFIED: this release makes no privacy promise.

It was written because the configuration says `export.uncertified: true`. It could not be certified:
{lines}

Treat it like the patients' own data. `medsynth verify` refuses it.
"""


def _promise(claim: Mapping[str, Any]) -> str:
    return (
        f"{promise_line(claim)}\n\n"
        "What that means, and what it does not cover: `PRIVACY.md`, one page. The proof: `certificate.dsse.json`."
    )
