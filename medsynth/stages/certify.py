"""certify: render what will leave, walk back to the cohort, and sign what the ledger says it cost."""

from __future__ import annotations

import contextlib
import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medsynth import store
from medsynth.config import Study
from medsynth.errors import CertificationError
from medsynth.imaging.cohort import read_pairs
from medsynth.logs import say
from medsynth.privacy.account import Release
from medsynth.privacy.accounting import Event, epsilon
from medsynth.privacy.ledger import Ledger
from medsynth.release import audits, card, contents, gate, keys, manifests, payload, signing, spending, statement
from medsynth.release.ancestry import LINEAGE, ROOT, Ancestry, Node, walk
from medsynth.release.marks import (
    ANCESTRY,
    CERTIFICATE,
    DATASET_CARD,
    ENDORSEMENTS,
    LEDGER,
    PAYLOAD,
    PRIVACY_PAGE,
    PUBLIC_KEY,
    UNCERTIFIED,
)
from medsynth.stages.inputs import config_digest, open_ledger, stage_inputs
from medsynth.stages.masks import SETTINGS
from medsynth.store import Manifest
from medsynth.tracking import Tracker

AGREEMENT = 0.02
"""PLD and PRV may differ by this much at any epsilon up to :data:`AGREEMENT_UP_TO`."""
AGREEMENT_UP_TO = 10.0
"""Above, the allowance grows in proportion (0.2 % of epsilon)."""
# Measured (two Gaussian mechanisms and 300 steps at rate 0.25): 0.0101 at epsilon 1.3, 0.0107 at 11, 0.0123 at 50,
# 0.0173 at 228. Nearly all of it is the error of 0.01 that PRV adds to stay an upper bound at any epsilon: an allowance
# relative to epsilon would let true disagreements pass. What is left grows slowly, hence the slope far out.


def run(config: Study, inputs: Mapping[str, Path], out: Path, tracker: Tracker) -> Manifest:
    """Write ``certificate/``: the payload of the release and the signed statement over it.

    Args:
        config: the study; what is claimed comes from the ledger, not from here.
        inputs: ``synthetic``, ``audit`` (its findings may refuse), ``ledger``, ``keys``, ``account`` (what else was
            reserved for these patients; without it the statement calls that unknown), and any ancestor folder that does
            not lie beside ``synthetic``.
        out: the folder to write.
        tracker: receives epsilon by accountant.

    Raises:
        CertificationError: something in the ancestry cannot be certified and ``export.uncertified`` is not set, or
            (always) a folder was changed since it was finished.
        PrivacyError: the ledger belongs to the account of another cohort, or lacks lines that the account knows.
    """
    folders = stage_inputs(inputs, "synthetic")
    ledger = open_ledger(inputs)
    ledger.reconcile()
    ancestry = walk(folders["synthetic"], inputs)
    reasons = gate.refusals(ancestry, ledger, config.privacy)
    reasons += _other_settings(config, ancestry) + _other_sources(config, ancestry) + _promises(config)
    if "audit" in inputs:  # always, but in tests of this stage alone
        reasons += audits.refusals(inputs["audit"], ancestry[ROOT].digest)
        reasons += audits.unaudited(inputs["audit"]) if config.privacy.private else []
        reasons += audits.left_out(inputs["audit"]) if config.audit.generator or config.audit.pairs else []
    if reasons and not config.export.uncertified:
        raise CertificationError(gate.explain(reasons))
    # a missing passphrase stops this now, not after everything is rendered
    key = None if reasons else keys.open_key(inputs["keys"])
    with store.create(out, "certify", config_digest(config, "certify"), folders) as folder:
        body = folder.path / PAYLOAD
        body.mkdir()
        pairs = read_pairs(folders["synthetic"])
        count = payload.write_payload(body, pairs, config.grid, config.export, certified=not reasons)
        if key is None:
            _leave_uncertified(config, body, count, reasons)
            return folder.finish("internal", details={"certified": False, "pairs": count})
        # Nobody reserves or certifies beside this: the statement names all that the account holds when it is signed.
        with ledger.account.locked() if ledger.account is not None else contextlib.nullcontext():
            signed = _state(config, inputs, folder.path, count, ancestry, ledger, key)
            _sign(folder.path, key, signed)
            _note_release(ledger, signed)
            _tell(tracker, signed, count)
            return folder.finish("released", details=manifests.certificate_details(signed["predicate"]))


def _other_settings(config: Study, ancestry: Ancestry) -> list[str]:
    """Return which folders of patients' another study made (pitfalls 2 and 18).

    The certificate says by the configuration how records became patients, what was declared, which delta was promised
    and what the public inputs are: all of it must be what ran.
    """
    return [
        f"'{node.folder}' was made with other settings than this study's, so that the certificate would describe "
        f"another run: certify with the study that made it, or run stage '{node.stage}' again"
        for node in ancestry.nodes
        if node.sensitivity != "public" and not _own(config, node)
    ]


def _other_sources(config: Study, ancestry: Ancestry) -> list[str]:
    """Return which public folders are not what this study makes: their source would be unknown (pitfall 21).

    The certificate names public inputs by the configuration; a codec from elsewhere may have seen the same patients.
    """
    return [
        f"'{node.folder}' calls itself public, but this study's settings do not make it, so that its source is "
        f"unknown: run stage '{node.stage}' again"
        for node in ancestry.nodes
        if node.sensitivity == "public"
        if not _own(config, node)
        or (node.stage == "masks" and set(ancestry.manifests[node.folder].files) != {SETTINGS})
    ]


def _own(config: Study, node: Node) -> bool:
    return node.stage not in LINEAGE or config_digest(config, node.stage) == node.config_digest


def _promises(config: Study) -> list[str]:
    """Return which words of the study no certificate may hold; 'export' would refuse what was signed with them."""
    linkage = {"linkage": statement.linkage_rule(config)}
    dataset, public = statement.dataset_facts(config), statement.public_inputs(config)
    said = {"dataset": dataset, "claim": linkage, "public_inputs": public, "audits": []}
    return [f"{problem}: say it in other words" for problem in contents.promises(said)]


def _leave_uncertified(config: Study, body: Path, count: int, reasons: list[str]) -> None:
    (body / UNCERTIFIED).write_text(card.uncertified_note(reasons), encoding="utf-8")
    dataset = statement.dataset_facts(config)
    (body / DATASET_CARD).write_text(card.dataset_card(dataset, count, None), encoding="utf-8")
    (body / PRIVACY_PAGE).write_text(card.uncertified_page(dataset), encoding="utf-8")
    say("release without certificate", reasons=len(reasons))


def _state(
    config: Study,
    inputs: Mapping[str, Path],
    out: Path,
    count: int,
    ancestry: Ancestry,
    ledger: Ledger,
    key: signing.SigningKey,
) -> dict[str, Any]:
    """Return the statement, with every earlier release in it; the same statement made again is none."""
    entries, body = ledger.entries(), out / PAYLOAD
    events = spending.events(entries)
    nodes = [node.as_json() for node in ancestry.nodes]
    predicate = functools.partial(
        statement.predicate,
        statement.claim_of(events, config),
        accountants=agreeing_accountants(events, config.privacy.delta),
        mechanisms=[spending.mechanism(entry) for entry in entries],
        ledger={"head": ledger.head, "entries": len(entries)},
        ancestry=nodes,
        public=statement.public_inputs(config),
        audited=audits.summary(audits.read_findings(inputs["audit"])) if "audit" in inputs else [],
        facts=manifests.build_facts(count, config_digest(config, "certify"), config_digest(config, "export")),
        dataset=statement.dataset_facts(config),
    )
    shutil.copyfile(inputs["ledger"], body / LEDGER)
    payload.write_json(body / ANCESTRY, nodes)
    if endorsed := keys.read_endorsements(inputs["keys"]):
        (body / ENDORSEMENTS).write_bytes(endorsed)

    def state_without(last: str) -> dict[str, Any]:
        others = ledger.account.others(entries, last) if ledger.account is not None else None
        said = predicate(account=spending.account(others, entries, config.privacy.delta))
        for name, text in card.pages(said, signing.key_id(signing.public_pem(key))).items():
            (body / name).write_text(text, encoding="utf-8")
        return statement.build(store.digest_tree(body), said)

    last = ledger.account.last_release(entries) if ledger.account is not None else ""
    stated = state_without(last)
    return stated if last in ("", store.digest_of(stated)) else state_without("")


def _tell(tracker: Tracker, signed: Mapping[str, Any], count: int) -> None:
    claim, accountants = signed["predicate"]["claim"], signed["predicate"]["accountants"]
    tracker.metrics({"epsilon": claim["epsilon"], **{f"epsilon_{name}": spent for name, spent in accountants.items()}})
    say("certified", epsilon=claim["epsilon"], delta=claim["delta"], unit=claim["unit"], pairs=count)


def _note_release(ledger: Ledger, signed: dict[str, Any]) -> None:
    if ledger.account is not None:
        claim, digest = signed["predicate"]["claim"], store.digest_of(signed)
        ledger.account.release(ledger.entries(), Release(digest, claim["epsilon"], claim["delta"]))


def allowance(spent: float) -> float:
    """Return by how much two accountants may differ where one says epsilon ``spent``."""
    return AGREEMENT * max(1.0, spent / AGREEMENT_UP_TO)


def agreeing_accountants(events: list[Event], delta: float) -> dict[str, float]:
    """Return epsilon by ``pld``, ``prv`` and ``rdp``.

    Args:
        events: everything that the ledger holds.
        delta: failure probability of the claim.

    Raises:
        CertificationError: PLD and PRV, two independent implementations, differ by more than :func:`allowance`.
    """
    values = {
        "pld": epsilon(events, delta, "pld"),
        "prv": epsilon(events, delta, "prv"),
        "rdp": epsilon(events, delta, "rdp"),
    }
    if abs(values["pld"] - values["prv"]) > allowance(values["pld"]):
        raise CertificationError(
            f"two accountants disagree: epsilon {values['pld']:.4f} (PLD) and {values['prv']:.4f} (PRV) for the same "
            "ledger. Nothing is certified until it is known why: report it with the ledger"
        )
    return values


def _sign(out: Path, key: signing.SigningKey, signed: dict[str, Any]) -> None:
    (out / CERTIFICATE).write_bytes(store.json_text(signing.sign(store.canonical_json(signed), key)))
    (out / PUBLIC_KEY).write_bytes(signing.public_pem(key))
