"""Rules on time and memory."""

from __future__ import annotations

from medsynth.doctor import thresholds as limits
from medsynth.doctor.evidence import Evidence
from medsynth.doctor.finding import Change, Finding, above, beyond

_SECONDS = 3600
_TIME = {
    "encode": "encode.steps",
    "masks": "masks.coefficients",
    "train": "train.pretrain_steps",
    "synthesise": "synthesise.steps",
    "segment": "segment.steps",
    "audit": "audit.repeats",
    "evaluate": "evaluate.agreement_pairs",
    "certify": "synthesise.pairs",
    "export": "export.dicom_pairs",
}
_MEMORY = {
    "encode": "encode.batch_size",
    "train": "train.pretrain_batch_size",
    "synthesise": "synthesise.batch_size",
    "segment": "segment.batch_size",
}
_SOURCE = "internal: resources.json"


def slow_run(evidence: Evidence) -> list[Finding]:
    """A run that takes longer than the shipped studies; the stage that takes most of it."""
    seconds = {verb: one["elapsed_s"] for verb, one in evidence.resources.items()}
    if not seconds:
        return []
    hours, longest = sum(seconds.values()) / _SECONDS, max(seconds, key=lambda verb: seconds[verb])
    knob = _TIME.get(longest)
    return beyond(
        Finding(
            rule="time",
            kind="cost",
            says=f"The run takes long, most of it in stage {longest}.",
            figure=f"{hours:.1f} hours, {seconds[longest] / sum(seconds.values()):.0%} of it there",
            value=hours,
            threshold=limits.HOURS,
            off=above(hours, limits.HOURS),
            changes=(
                *((Change(knob, "lower"),) if knob else ()),
                Change("compute.threads", "raise"),
                Change("compute.device", "set", "to cuda where there is a GPU"),
            ),
            source=_SOURCE,
        )
    )


def tight_memory(evidence: Evidence) -> list[Finding]:
    """A run that nearly fills the machine; the first stage in which it does."""
    shares = {verb: one["peak_memory_gib"] / one["machine_memory_gib"] for verb, one in evidence.resources.items()}
    if not shares:
        return []
    # The peak is that of the process so far: the first stage that reaches it has caused it.
    most = max(shares, key=lambda verb: shares[verb])
    knob = _MEMORY.get(most)
    return beyond(
        Finding(
            rule="memory",
            kind="cost",
            says=f"The run nearly fills the machine's memory, in stage {most}.",
            figure=f"{evidence.resources[most]['peak_memory_gib']:.1f} GiB, {shares[most]:.0%} of the machine",
            value=shares[most],
            threshold=limits.MEMORY,
            off=above(shares[most], limits.MEMORY),
            changes=(
                *((Change(knob, "lower"),) if knob else ()),
                Change("compute.workers", "lower"),
                Change("grid.shape", "lower"),
            ),
            source=_SOURCE,
        )
    )


COST_RULES = (slow_run, tight_memory)
