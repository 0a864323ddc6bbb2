"""Rules on what privacy costs: audits, noise beside signal, and too few patients for an epsilon."""

from __future__ import annotations

import math

from medsynth.doctor import thresholds as limits
from medsynth.doctor.evidence import INTERNAL, PUBLIC, Evidence
from medsynth.doctor.finding import Change, Finding, above, below, beyond
from medsynth.privacy.budget import gaussian_epsilon, gaussian_mu
from medsynth.privacy.scale_law import MEASURED

_LARGEST_EPSILON = 50  # that is worth naming: beyond it, more patients are the only advice

_STATISTICS = {
    "pose": (
        "what is released of place and size of the label maps",
        "how far patients differ in it",
        (Change("privacy.shares.masks", "raise"), Change("masks.mean_clip_norm", "lower")),
    ),
    "shape": (
        "the released mean shape of the label maps",
        "how far patients differ from it",
        (
            Change("privacy.shares.masks", "raise"),
            Change("masks.coefficients", "lower"),
            Change("masks.mean_clip_norm", "lower"),
        ),
    ),
    "spread": (
        "the released variety of the label maps",
        "that variety",
        (
            Change("masks.spread_clip_norm", "lower", "where labels lie in one place"),
            Change("privacy.shares.masks", "raise"),
        ),
    ),
    "appearance": (
        "what is released of the images (appearance)",
        "the clip norm of a patient's vector",
        (
            Change("privacy.shares.appearance", "raise"),
            Change("train.appearance.coefficients", "lower"),
            Change("train.appearance.levels", "lower"),
        ),
    ),
}


def failed_audits(evidence: Evidence) -> list[Finding]:
    """Audits that fail or are broken: quality comes after that."""
    bad = [one for one in evidence.audits if one.verdict in ("fail", "broken")]
    names = ", ".join(f"{one.audit} of {one.subject} ({one.verdict})" for one in bad)
    return beyond(
        Finding(
            rule="audits",
            kind="stop",
            says="Audits do not hold: find out why first, because what looks like quality may be leakage.",
            figure=names,
            value=float(len(bad)),
            threshold=limits.AUDITS,
            off=above(float(len(bad)), limits.AUDITS),
            changes=(),
            source=INTERNAL,
        )
    )


def noisy_statistics(evidence: Evidence) -> list[Finding]:
    """Released statistics whose privacy noise is not small beside what they say."""
    found = []
    for name, (what, signal, changes) in _STATISTICS.items():
        ratio = evidence.noise.get(name)
        if ratio is None:
            continue
        found += beyond(
            Finding(
                rule=f"noise-{name}",
                kind="quality",
                says=f"Much of {what} is privacy noise.",
                figure=f"noise {ratio:.2f} times {signal}",
                value=ratio,
                threshold=limits.STATISTIC_NOISE,
                off=above(ratio, limits.STATISTIC_NOISE),
                changes=changes + _template(evidence) if name == "appearance" else changes,
                source=PUBLIC,
            )
        )
    return found


def _template(evidence: Evidence) -> tuple[Change, ...]:
    """Return the advice to guess what noise hides, where a public template may show it."""
    study = evidence.study
    appearance = study.train.appearance
    if not study.grid.mr_volumes or appearance.factors or appearance.template_centre_mm is not None:
        return ()
    where = "for T1-weighted MRI of the brain: where the organ lies in the public MNI152 template"
    return (Change("train.appearance.template_centre_mm", "set", where),)


def noisy_training(evidence: Evidence) -> list[Finding]:
    """DP-SGD that adds nothing, by the law of scale."""
    reached, count = evidence.reach, evidence.trainable
    if reached is None or not count:
        return []
    train, share = evidence.study.train, "privacy.shares.training"
    gain, most = MEASURED.expected(reached, count), MEASURED.most_parameters(reached)
    larger = most is not None and most > count and train.trainable != "all"
    return beyond(
        Finding(
            rule="noise-training",
            kind="quality",
            says="Private steps cost budget and teach the denoiser little: noise hides what so many patients say, or "
            "so few parameters cannot hold it.",
            figure=f"expected to add {gain:.2f} of skill: {count:,} parameters, {train.steps} steps, reach "
            f"{reached:.3g}",
            value=gain,
            threshold=limits.TRAINING_GAIN,
            off=below(gain, limits.TRAINING_GAIN),
            changes=(
                *((Change("train.trainable", "set", "to all"),) if larger else ()),
                Change("train.steps", "set", "to 0: statistics alone, which then get its share"),
                Change("train.sampling_rate", "raise"),
                Change(share, "raise"),
            ),
            source=PUBLIC,
        )
    )


def few_patients(evidence: Evidence) -> list[Finding]:
    """Statistics that drown at this epsilon, put as the number of patients, or the epsilon, that they would need."""
    ratios = {name: evidence.noise[name] for name in _STATISTICS if name in evidence.noise}
    if not ratios:
        return []
    name = max(ratios, key=lambda one: ratios[one])
    off, privacy = above(ratios[name], limits.STATISTIC_NOISE), evidence.study.privacy
    # Noise over signal goes with 1 / (mu N).
    patients = privacy.declared_patients * off
    epsilon = gaussian_epsilon(gaussian_mu(privacy.epsilon, privacy.delta) * off, privacy.delta)
    what = _STATISTICS[name][0]
    at = f"epsilon {epsilon:.3g}" if epsilon <= _LARGEST_EPSILON else f"more than epsilon {_LARGEST_EPSILON}"
    return beyond(
        Finding(
            rule="few-patients",
            kind="quality",
            says=f"{privacy.declared_patients} declared patients are too few for epsilon {privacy.epsilon:g}, as the "
            "budget is split now.",
            figure=f"for {what}, about {_rounded(patients)} patients are needed, or {at}",
            value=patients,
            threshold=limits.Threshold(
                float(privacy.declared_patients),
                f"declared; noise over signal falls as 1/(mu N), should be at most {limits.STATISTIC_NOISE.value:g}",
            ),
            off=off,
            changes=(
                Change("privacy.declared_patients", "raise", "with the cohort"),
                Change("privacy.epsilon", "raise"),
            ),
            source=PUBLIC,
        )
    )


def _rounded(count: float) -> str:
    """Return two digits of a number: no more is known of it."""
    digits = max(0, math.floor(math.log10(count)) - 1)
    return f"{math.ceil(count / 10**digits) * 10**digits:,}"


PRIVACY_RULES = (failed_audits, noisy_statistics, noisy_training, few_patients)
