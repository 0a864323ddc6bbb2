"""The signed statement: an in-toto Statement v1 whose predicate is the privacy claim of a release.

Source: in-toto Attestation Framework, Statement v1. The predicate is written from executed events (the ledger) and
from manifests, never from what the configuration hoped for.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any

from medsynth import __version__
from medsynth.privacy.accounting import Event, epsilon
from medsynth.privacy.ledger import RELATION, UNIT
from medsynth.release import spending
from medsynth.release.marks import STATEMENT_TYPE

if TYPE_CHECKING:  # whoever verifies needs no pydantic
    from medsynth.config import Study

PREDICATE_TYPE = "urn:medsynth:dp-certificate:5"
"""Its number changes with any part of the predicate, with :data:`NOT_COVERED` and with the pages, words included."""
DELTA_SHARES = (1, 10, 100)
"""Epsilon is stated at the claimed delta and at these parts of it."""
_IMPLEMENTATION = (
    "numpy",
    "torch",
    "monai",
    "nilearn",
    "diffusers",
    "opacus",
    "dp-accounting",
    "cryptography",
    "pydicom",
    "highdicom",
)

NOT_COVERED: tuple[str, ...] = (
    "knobs (steps, clip norms, model size) that were chosen by looking at results on this cohort in other runs: the "
    "claim charges the trials that were declared beforehand, the account every other study that the site knows",
    "looks at the cohort without a mechanism (studies with infinite epsilon, internal reports and audits): nothing is "
    "charged for them",
    "errors in the code, in the operating system's random numbers or in floating-point arithmetic",
    "that this code really ran on that cohort: the signature says who claims it",
    "the folders that stay inside (cohort, segmenter, report, MLflow) and every number measured on real patients, such "
    "as a Dice: publishing one costs privacy that is not counted here",
    "relatives and other people whose data say something about a patient: the unit is one person",
    "one person who is registered under two identifiers: he or she counts as two units",
    "what is true of the population: a release may teach that a disease has a look, and so something about everybody "
    "who has it, whether in the cohort or not",
    "studies of the same patients that the site's account does not know: at another site, under another site folder, "
    "or of records under another identifier and with other pixels; their epsilons add up",
    "one person whose files touch another's: of two with equal pixels only the first is read, and of an image and a "
    "segmentation that name two patients neither, so that whether such a person is read depends on the other",
    "what is said of the site's account (how many other studies of some of these patients it knows, what all cost "
    "together, which of them were certified, its name in the ledger): one common patient ties two cohorts to one "
    "account, so that whoever holds two releases of a site, or knows of another study there, may learn that somebody "
    "is in both",
    "that the public inputs hold no patient of this cohort, and that constants of the code that were set while looking "
    "at public images (MSD hippocampus, Kvasir-SEG) were set on other patients than these",
)


@dataclass(frozen=True)
class Claim:
    """What a certificate promises.

    Attributes:
        epsilon: composed over every ledger entry, rounded up.
        delta: failure probability, at most 1/(10 declared_patients).
        accountant: which accountant gave ``epsilon``.
        budget: epsilon that the configuration allowed.
        declared_patients: public, declared size of the cohort.
        epsilon_at: (delta, epsilon) pairs of the same events, rounded up.
        membership: (false-positive rate, greatest true-positive rate) of any attack on membership, rounded up.
        linkage: the rule by which records became one patient.
        trials: studies of the declared sweep that ``epsilon`` charges; 1: no sweep.
    """

    epsilon: float
    delta: float
    budget: float
    declared_patients: int
    epsilon_at: tuple[tuple[float, float], ...]
    membership: tuple[tuple[float, float], ...]
    linkage: str
    trials: int = 1
    accountant: str = "pld"
    unit: str = UNIT
    relation: str = RELATION

    def as_json(self) -> dict[str, Any]:
        """Return the claim as JSON values."""
        return {
            "epsilon": self.epsilon,
            "delta": self.delta,
            "unit": self.unit,
            "relation": self.relation,
            "accountant": self.accountant,
            "budget": self.budget,
            "declared_patients": self.declared_patients,
            "epsilon_at": [{"delta": delta, "epsilon": epsilon} for delta, epsilon in self.epsilon_at],
            "membership": [
                {
                    "false_positive_rate": fpr,
                    "true_positive_rate_at_most": tpr,
                    "in_words": membership_in_words(fpr, tpr),
                }
                for fpr, tpr in self.membership
            ],
            "linkage": self.linkage,
            "trials": self.trials,
        }


def claim_of(events: Sequence[Event], config: Study) -> Claim:
    """Return what may be promised for executed ``events``; the configuration gives delta, budget and declared size."""
    delta = config.privacy.delta
    deltas = [delta / share for share in DELTA_SHARES]
    return Claim(
        epsilon=spending.round_up(epsilon(events, delta)),
        delta=delta,
        budget=config.privacy.epsilon,
        declared_patients=config.privacy.declared_patients,
        epsilon_at=tuple((value, spending.cost_at(events, value)) for value in deltas),
        membership=spending.membership(events, delta),
        linkage=linkage_rule(config),
        trials=config.privacy.trials,
    )


def membership_in_words(fpr: float, tpr: float) -> str:
    """Return one bound on membership attacks in the words of a privacy officer."""
    return (
        f"An attacker who wrongly accuses at most {fpr:.1%} of people outside the cohort recognises at most {tpr:.1%} "
        f"of the patients in it."
    )


def linkage_rule(config: Study) -> str:
    """Return, in words, by what rule records became one patient."""
    pattern = config.ingest.patient_id_pattern
    files = f"the first group of the expression {pattern} on the file name" if pattern else "the file name"
    return (
        "All records of one identifier are one patient: DICOM Patient ID (0010,0020) where the input is DICOM, "
        f"otherwise {files}. A person under two identifiers counts as two patients."
    )


def public_inputs(config: Study) -> list[str]:
    """Return what entered the release without costing privacy (beyond what is charged), with its provenance."""
    phantoms = config.encode.phantoms
    learnt = f"learnt from {phantoms.count} procedural phantoms (seed {phantoms.seed}), drawn by medsynth from no image"
    codec = learnt if config.encode.codec == "kl" else "fixed and orthonormal, learnt from nothing"
    inputs = [
        f"latent codec '{config.encode.codec}': {codec}",
        "voxel grid, label names, size range and every knob: constants of the configuration",
    ]
    if config.train.pretrain_steps:
        inputs.append(f"pre-training of the denoiser on {config.train.pretrain_phantoms} {_pretraining(config)}")
    if config.synthesise.drafted:
        inputs.append("drafts of images, drawn from the released appearance statistics (charged above)")
    if config.privacy.private and config.train.appearance.template_centre_mm is not None:
        inputs.append(
            "guess at what noise hides of the appearance: the MNI152 template (ICBM 2009 nonlinear symmetric, T1; "
            "Fonov et al. 2011), the mean MRI of 152 volunteers, from the library nilearn"
        )
    if config.train.appearance.enabled and config.train.appearance.texture == "lit_surface":
        inputs.append("what drafts show beside light and contrast: procedural scenes, drawn by medsynth from no image")
    if config.masks.source == "public_shapes":
        inputs.append("label maps from public shapes")
    return inputs


def _pretraining(config: Study) -> str:
    """Return what the phantoms of pre-training were made of; what came from patients was charged at its release."""
    drawn, dressed = config.masks.source == "statistics", config.train.appearance.enabled
    if drawn:
        return f"phantoms drawn from the released mask {'and appearance ' if dressed else ''}statistics (charged above)"
    if dressed:
        return "phantoms of public shapes, with intensities from the released appearance statistics (charged above)"
    return "procedural phantoms"


def implementation() -> dict[str, str]:
    """Return the versions of what the certificate rests on (read from package metadata; nothing is imported)."""
    versions = {"medsynth": __version__, "python": ".".join(map(str, sys.version_info[:3]))}
    for name in _IMPLEMENTATION:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def dataset_facts(config: Study) -> dict[str, Any]:
    """Return what the pages say of the data set itself: public values of the configuration."""
    grid, export = config.grid, config.export
    return {
        "name": _one_line(export.dataset_name),
        "description": _one_line(config.description),
        "licence": _one_line(export.licence),
        "modality": grid.modality,
        "spatial_dims": grid.spatial_dims,
        "spacing_mm": None if grid.spacing_mm is None else list(grid.spacing_mm),
        "labels": {str(value): _one_line(name) for value, name in sorted(grid.labels.items())},
    }


def _one_line(text: str) -> str:
    return " ".join(text.split())


def predicate(
    claim: Claim,
    *,
    accountants: Mapping[str, float],
    mechanisms: Sequence[Mapping[str, Any]],
    ledger: Mapping[str, Any],
    account: Mapping[str, Any],
    ancestry: Sequence[Mapping[str, Any]],
    public: Sequence[str],
    facts: Mapping[str, Any],
    dataset: Mapping[str, Any],
    audited: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Return what the statement says; the pages for people are written from it alone.

    Args:
        claim: what is promised.
        accountants: epsilon by accountant, unrounded, for the same events and delta.
        mechanisms: what each entry of the ledger ran.
        ledger: head (hash of the last line) and number of entries.
        account: everything that was ever reserved for the same patients, see :func:`spending.account`.
        ancestry: nodes of the walk back to the cohort.
        public: public inputs in words.
        facts: what the manifests of the two last folders are computed from, see ``release/manifests.py``.
        dataset: see :func:`dataset_facts`.
        audited: which audits ran, see ``release/audits.py``; never what they measured on patients.
    """
    return {
        "claim": claim.as_json(),
        "accountants": dict(accountants),
        "mechanisms": [dict(mechanism) for mechanism in mechanisms],
        "ledger": dict(ledger),
        "ancestry": [dict(node) for node in ancestry],
        "not_covered": list(NOT_COVERED),
        "public_inputs": list(public),
        "account": dict(account),
        "audits": [dict(audit) for audit in audited],
        "dataset": dict(dataset),
        "build": dict(facts),
        "implementation": implementation(),
    }


def build(files: Mapping[str, str], said: Mapping[str, Any]) -> dict[str, Any]:
    """Return the statement that is signed.

    Args:
        files: SHA-256 of every released file by relative POSIX path; the certificate itself and the key left out.
        said: the predicate.
    """
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(files.items())],
        "predicateType": PREDICATE_TYPE,
        "predicate": dict(said),
    }
