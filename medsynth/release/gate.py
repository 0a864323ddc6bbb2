"""What may leave: the rules that stand between finished stage folders and a certificate.

Each refusal says which folder or ledger entry is at fault and what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from medsynth.config import Privacy
from medsynth.privacy.accounting import epsilon
from medsynth.privacy.chain import Record
from medsynth.privacy.ledger import Ledger
from medsynth.release import spending
from medsynth.release.ancestry import LINEAGE, Ancestry, Node

MIN_SALT_CHARACTERS = 32
"""128 bits in hexadecimal: nobody guesses the salt in a cohort's manifest."""


def refusals(ancestry: Ancestry, ledger: Ledger, privacy: Privacy) -> list[str]:
    """Return why the release cannot be certified; empty when it can.

    *Guarantees*: when empty, every folder that read patients holds only outputs of mechanisms that the ledger charges,
    everything else in the ancestry is computed from those and from public values, and all that the ledger ever
    reserved, in every declared trial, composes to at most ``privacy.epsilon`` at ``privacy.delta``.

    Args:
        ancestry: the walk from ``synthetic/`` back to the cohort.
        ledger: the ledger of the run; all of its entries are charged, those of discarded runs too, because a
            restart is a choice that was made on patients.
        privacy: budget, delta, declared number of patients.

    Raises:
        VerificationError: the ledger's chain is broken.
    """
    entries = ledger.entries()
    reasons = [reason for node in ancestry.nodes for reason in _judge(node, ancestry, entries)]
    reasons += spending.taints(entries)
    return reasons + _over_budget(entries, privacy) + _sweep_over_claim(ledger, entries, privacy)


def explain(reasons: Sequence[str]) -> str:
    """Return the message of a refusal."""
    lines = "\n".join(f"  - {reason}" for reason in reasons)
    return (
        f"this release cannot be certified, for {len(reasons)} reason(s):\n{lines}\n"
        "when the study was changed, `medsynth run` with --replace makes the stages again that the change concerns; "
        "as it is, its export is refused unless the config says export.uncertified: true (it is marked UNCERTIFIED)"
    )


def _judge(node: Node, ancestry: Ancestry, entries: Sequence[Record]) -> Iterator[str]:
    if node.sensitivity == "private":
        yield from _judge_cohort(node, ancestry)
        return
    if node.stage not in LINEAGE:
        yield (
            f"'{node.folder}' was written by stage '{node.stage}': what is measured on patients may stop a release, "
            "never shape it; synthesise from autoencoder/, masks/ and generator/ only"
        )
    if node.sensitivity == "internal":
        yield (
            f"'{node.folder}' is internal: it was computed on patients without a mechanism and may not leave, nor may "
            f"anything made from it; run stage '{node.stage}' with a finite privacy.epsilon"
        )
    read_patients = [name for name in node.parents if ancestry[name].sensitivity == "private"]
    if node.sensitivity == "public" and ancestry.descends_from_patients(node.folder):
        yield f"'{node.folder}' calls itself public but was made from patients: run stage '{node.stage}' again"
    if read_patients and not node.ledger_entries and node.sensitivity != "internal":
        yield _unledgered(node)
    for identity in node.ledger_entries:
        entry = next((entry for entry in entries if entry["id"] == identity), None)
        yield from _judge_entry(node, entry, identity, read_patients, ancestry.manifests[node.folder].files)


def _judge_cohort(node: Node, ancestry: Ancestry) -> Iterator[str]:
    if node.folder == ancestry.nodes[0].folder or node.stage != "ingest":
        yield f"'{node.folder}' is private: only the output of 'ingest' may be, and it is never released"
    # its digest leaves in the ledger: without a salt, whoever knows all patients but one could test for that one
    if len(str(ancestry.manifests[node.folder].details.get("salt", ""))) < MIN_SALT_CHARACTERS:
        yield f"the manifest of '{node.folder}' holds no salt, so its digest would betray patients: ingest again"


def _unledgered(node: Node) -> str:
    if node.stage == "synthesise":
        return (
            f"'{node.folder}' read patients directly: a patient's mask or image may never condition what is sampled; "
            "sample from masks/ and generator/ only"
        )
    if node.stage == "encode":
        return (
            f"'{node.folder}' (the latent codec) was trained on patients without a mechanism: train it on phantoms or "
            "use the fixed wavelet"
        )
    return (
        f"'{node.folder}' read patients, but names no ledger entry: what stage '{node.stage}' spent is unknown; "
        "run it again"
    )


def _judge_entry(
    node: Node, entry: Record | None, identity: str, read_patients: Sequence[str], files: Mapping[str, str]
) -> Iterator[str]:
    label = f"'{node.folder}', ledger entry {identity[:12]}"
    if entry is None:
        yield f"{label}: the ledger holds no such entry; certify with the ledger that the stage wrote to"
        return
    if entry["status"] != "complete":
        yield f"{label}: reserved but never completed; let stage '{node.stage}' finish"
        return
    if entry["config_digest"] != node.config_digest:
        yield f"{label}: the ledger charged another configuration than the folder was made with; run the stage again"
    if any(name not in entry["parents"] for name in read_patients) or any(
        node.parents.get(name) != digest for name, digest in entry["parents"].items()
    ):
        yield f"{label}: the ledger charged other input folders than this one was made from; run the stage again"
    if not entry["outputs"]:
        yield f"{label}: it names no output; run stage '{node.stage}' again"
    for name, digest in entry["outputs"].items():
        if files.get(name) != digest:
            yield f"{label}: '{name}' in the folder is not what the mechanism put out; run the stage again"


def _over_budget(entries: Sequence[Record], privacy: Privacy) -> list[str]:
    if not privacy.private:
        return ["privacy.epsilon is infinite: a study without privacy is never certified"]
    limit = 1 / (10 * privacy.declared_patients)
    reasons = []
    if privacy.delta > limit:
        reasons.append(f"delta {privacy.delta:g} is above 1/(10 N) = {limit:g} for the declared patients")
    spent = epsilon(spending.events(entries), privacy.delta)
    if spending.round_up(spent) > privacy.epsilon:
        reasons.append(
            f"the ledger holds epsilon {spent:g}, the budget is {privacy.epsilon:g}: spends are never refunded: start "
            "a new run folder, or raise privacy.epsilon"
        )
    return reasons


def _sweep_over_claim(ledger: Ledger, entries: Sequence[Record], privacy: Privacy) -> list[str]:
    """Compare what a sweep was declared to cost (this study, so many times) with what its studies really reserved."""
    if ledger.account is None or spending.trials(entries) == 1 or not privacy.private:
        return []
    claimed = epsilon(spending.events(entries), privacy.delta)
    spent = epsilon(ledger.account.sweep(entries), privacy.delta)
    if spent <= claimed:
        return []
    return [
        f"the studies of this sweep reserved epsilon {spent:g} together, and the claim for "
        f"{spending.trials(entries)} trials like this one is {claimed:g}: certify the study of the sweep that cost most"
    ]
