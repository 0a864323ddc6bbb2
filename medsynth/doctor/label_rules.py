"""Rules on label maps: are they the anatomy of the patients, and do labels keep their neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from medsynth.doctor import thresholds as limits
from medsynth.doctor.evidence import INTERNAL, Evidence
from medsynth.doctor.finding import Change, Finding, below, beyond

_WORDS = {
    "volume": "size",
    "surface": "surface",
    "components": "separate parts",
    "touching": "share of its surface at other labels",
}
_ALIKE = 0.1  # where real maps are all alike, a tenth of their value counts as one standard deviation


def implausible_maps(evidence: Evidence) -> list[Finding]:
    """Label maps outside the range of held-out patients; not where other volumes were asked for."""
    drawn = evidence.number("label_maps", "plausible", "synthetic")
    real = evidence.number("label_maps", "plausible", "train")
    if drawn is None or not real or evidence.volume_factors:
        return []
    return beyond(
        Finding(
            rule="implausible-label-maps",
            kind="quality",
            says=f"Label maps are not the patients' anatomy; farthest off: {_farthest(evidence.at('label_maps'))}.",
            figure=f"{drawn:.0%} lie within what held-out patients measure; {real:.0%} of training patients do",
            value=drawn / real,
            threshold=limits.PLAUSIBLE,
            off=below(drawn / real, limits.PLAUSIBLE),
            changes=_shape_changes(evidence),
            source=INTERNAL,
        )
    )


def lost_relations(evidence: Evidence) -> list[Finding]:
    """Labels that in real maps touch, never touch or enclose one another, and in generated ones do not."""
    worst = evidence.number("label_maps", "relations", "worst")
    if worst is None:
        return []
    kinds = {"touching": "touch", "apart": "stay apart", "nested": "stay enclosed"}
    shares = [
        (share, f"{pair} {verb}")
        for kind, verb in kinds.items()
        for pair, share in evidence.at("label_maps", "relations", kind).items()
        if share is not None
    ]
    share, pair = min(shares)
    return beyond(
        Finding(
            rule="lost-relations",
            kind="quality",
            says="Neighbouring labels lose each other, which real anatomy never shows.",
            figure=f"{pair} in {share:.0%} of the synthetic label maps",
            value=share,
            threshold=limits.RELATIONS,
            off=below(share, limits.RELATIONS),
            changes=_shape_changes(evidence),
            source=INTERNAL,
        )
    )


def _farthest(found: Mapping[str, Any]) -> str:
    """Return the label and measure that lie farthest from real ones, in words, with both medians."""
    candidates = []
    for label, values in found["labels"].items():
        for kind, one in values["measures"].items():
            if "wasserstein" in one:
                apart = one["wasserstein_sd"]
                if apart is None:
                    apart = one["wasserstein"] / max(_ALIKE * abs(one["real"]["p50"]), 1e-9)
                candidates.append((apart, label, kind, one))
    if not candidates:
        return "a label is missing"
    _, label, kind, one = max(candidates, key=lambda candidate: candidate[0])
    drawn, real = (f"{_short(crowd['p5'])} to {_short(crowd['p95'])}" for crowd in (one["synthetic"], one["real"]))
    return f"{_WORDS[kind]} of {label} (nine in ten {drawn}, real {real})"


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _shape_changes(evidence: Evidence) -> tuple[Change, ...]:
    noise = max((evidence.noise.get(name, 0.0) for name in ("pose", "shape", "spread")), default=0.0)
    if noise > limits.NOISY_DETAIL * limits.STATISTIC_NOISE.value:
        return (
            Change("privacy.shares.masks", "raise"),
            Change("masks.coefficients", "lower"),
            Change("masks.spread_clip_norm", "lower"),
        )
    return (
        Change("masks.coefficients", "raise"),
        Change("masks.band_voxels", "raise"),
        Change("masks.min_component_voxels", "raise"),
    )


LABEL_RULES = (implausible_maps, lost_relations)
