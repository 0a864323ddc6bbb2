"""Pairs that are drafts of the appearance statistics (``synthesise.start`` 0): no codec and no denoiser touches them.

This is the one place that knows it; the rules speak as if every pair came from the denoiser.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from medsynth.config import Study
from medsynth.doctor import thresholds as limits
from medsynth.doctor.evidence import PUBLIC, Evidence
from medsynth.doctor.finding import Change, Finding, above, beyond

_OF_THE_DENOISER = {"lossy-codec", "latent-scale", "still-learning", "weak-denoiser", "noise-training"}
_OF_PAIRS = {"copies", "disobeyed-masks", "alike"}
_SAMPLING = ("synthesise.steps", "synthesise.guidance")
_LEARNING = ("encode.", "train.", "privacy.shares.training")
_APPEARANCE, _LABELLING = "train.appearance.", "train.labelling."


def made_of_drafts(study: Study) -> bool:
    """Return whether every pair is a draft."""
    return study.synthesise.drafts_alone


def relevant(study: Study, findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings that limit the pairs of a study, each with the changes that would alter them."""
    if not made_of_drafts(study):
        return list(findings)
    kept = [one for one in findings if one.rule not in _OF_THE_DENOISER]
    return [replace(one, changes=tuple(change for change in one.changes if _helps(one, change.key))) for one in kept]


def unused_training(evidence: Evidence) -> list[Finding]:
    """Private steps of a denoiser that makes no pair."""
    study, moved = evidence.study, evidence.trainable or 0
    if not (made_of_drafts(study) and study.privacy.private and study.train.steps):
        return []
    return beyond(
        Finding(
            rule="unused-training",
            kind="quality",
            says="DP-SGD spends privacy budget on a denoiser that makes no pair: all pairs are drafts.",
            figure=f"{study.train.steps} steps moved {moved:,} parameters; every pair is a draft",
            value=float(moved),
            threshold=limits.UNUSED,
            off=above(float(moved), limits.UNUSED),
            changes=(
                Change("train.steps", "set", "to 0: the statistics get its share"),
                Change("synthesise.start", "raise", "so that the denoiser works on the drafts"),
            ),
            source=PUBLIC,
        )
    )


def _helps(finding: Finding, key: str) -> bool:
    """Return whether a key has an effect on what was found: training knobs still cost time and may leak."""
    if key in _SAMPLING:
        return False
    return finding.rule not in _OF_PAIRS or key.startswith((_APPEARANCE, _LABELLING)) or not key.startswith(_LEARNING)
