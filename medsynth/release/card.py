"""What a release says to people: dataset card, one page for a privacy officer, and the mark of an uncertified one."""

from __future__ import annotations

from collections.abc import Sequence

from medsynth.config import Study
from medsynth.release.statement import NOT_COVERED, Claim

_HOW = """\
A generator of label maps and a mask-conditioned latent diffusion model learnt from a cohort at a hospital; every pair
was then sampled from the two."""
_HOW_CERTIFIED = """ No patient's image or segmentation conditioned a pair, and no pair was selected by
comparing it with patients."""
_HOW_TO_CHECK = """\
Install medsynth from the repository of its authors (a package of that name in a registry may be somebody else's), then
`medsynth verify RELEASE --key public.pem`, with a `public.pem` that you received from the hospital by another way.
`verify` itself loads no PyTorch and needs no GPU, no data and no network."""


def dataset_card(config: Study, pairs: int, claim: Claim | None) -> str:
    """Return ``DATASET_CARD.md``.

    Args:
        config: the study; only public values are read.
        pairs: number of image and segmentation pairs.
        claim: what the certificate promises; None when there is none.
    """
    grid, export = config.grid, config.export
    spacing = (
        "no physical spacing" if grid.spacing_mm is None else " x ".join(f"{s:g}" for s in grid.spacing_mm) + " mm"
    )
    labels = "\n".join(f"| {value} | {name} |" for value, name in sorted(grid.labels.items()))
    privacy = _claim_in_words(claim) if claim else "**None. This release carries no certificate (see `UNCERTIFIED`).**"
    about = f" {config.description}" if config.description else ""
    shown = "No image shows a patient." if claim else "Images may resemble patients of the cohort; see `UNCERTIFIED`."
    check = (
        _HOW_TO_CHECK
        if claim
        else "There is nothing to check: `medsynth verify` refuses a release without a certificate."
    )
    sampled = f"{_HOW}{_HOW_CERTIFIED}" if claim else _HOW
    return f"""# {export.dataset_name}: a synthetic dataset

{pairs} pairs of a synthetic image and its segmentation ({grid.modality}, {grid.spatial_dims}D, {spacing}).
{shown}{about}

## Privacy
{privacy}

## How it was made
{sampled}

## Files
- `nifti/` the pairs in the layout of the Medical Segmentation Decathlon (`dataset.json`, `imagesTr/`, `labelsTr/`);
  images are whole numbers, 0..1000 (grey) or 0..255 (colour)
- `dicom/` (if present) some of the pairs as DICOM series with a segmentation object, marked as synthetic data
- `png/` (if present) two-dimensional pairs as pictures

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
{export.licence}
"""


def privacy_page(config: Study, claim: Claim | None, public_inputs: Sequence[str] = (), account: str = "") -> str:
    """Return ``PRIVACY.md``: one page for a privacy officer.

    Args:
        config: the study; only public values are read.
        claim: what the certificate promises; None when there is none.
        public_inputs: further lines (public inputs) to state.
        account: in words, what was ever reserved for the same patients.
    """
    title = f"# Privacy of '{config.export.dataset_name}' on one page"
    if claim is None:
        return f"""{title}

**This release has no certificate and makes no privacy promise.** Treat it like the patients' own data: the model
that made it may have memorised them. The file `UNCERTIFIED` says why. `medsynth verify` refuses it.
"""
    bounds = "\n".join(f"| {fpr:.1%} | {tpr:.1%} |" for fpr, tpr in claim.membership)
    at = "\n".join(f"| {delta:.3g} | {epsilon:.3f} |" for delta, epsilon in claim.epsilon_at)
    covered = "\n".join(f"- {line}" for line in NOT_COVERED)
    public = "\n".join(f"- {line}" for line in public_inputs) or "- none"
    return f"""{title}

## The promise
{_claim_in_words(claim)}

## What it means for one patient
Suppose an attacker knows everything about all other patients and asks of one person: was he or she in the cohort?
Whatever method the attacker uses, and however long, the share of true members found is at most:

| false alarms the attacker accepts | true members found, at most |
|---|---|
{bounds}

Without any promise the second column could be 100 %; a blind guess gives the first column's value.

## The same spend at other failure probabilities
| delta | epsilon |
|---|---|
{at}

## Other studies of the same patients
{account}

## What one patient is
{claim.linkage}

## Inputs that cost nothing further
{public}

## What the promise does not cover
{covered}

## Who vouches for it
The statement in `certificate.dsse.json` is signed with the hospital's key and names every file of the release by its
digest; `ledger.jsonl` lists each mechanism that read patients. `medsynth verify` checks both and computes epsilon
again.
"""


def uncertified_note(reasons: Sequence[str]) -> str:
    """Return the text of the file ``UNCERTIFIED``: why there is no certificate."""
    lines = "\n".join(f"- {reason}" for reason in reasons)
    return f"""UNCERTIFIED: this release makes no privacy promise.

It was written because the configuration says `export.uncertified: true`. It could not be certified:
{lines}

Treat it like the patients' own data. `medsynth verify` refuses it.
"""


def _claim_in_words(claim: Claim) -> str:
    sweep = f", {claim.trials} times over, for the {claim.trials} studies of its declared sweep" * (claim.trials > 1)
    return (
        f"This release is ({claim.epsilon:g}, {claim.delta:g})-differentially private for the unit **{claim.unit}**:\n"
        f"epsilon = {claim.epsilon:g}, delta = {claim.delta:g}. The presence or absence of any one {claim.unit}, with "
        f"all records of\nthat person, changes the probability of anything in this release by a factor of at most "
        f"e^{claim.epsilon:g}, but for a\nfailure probability of {claim.delta:g}. The number composes everything by "
        f"which this study read the cohort{sweep}\n(accountant: {claim.accountant}; neighbouring relation: {claim.relation})."
    )
