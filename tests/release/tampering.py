"""What can be done to a release: by whoever can write to it, and by whoever signs it anew with a key of his own."""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from medsynth import store
from medsynth.privacy import chain
from medsynth.privacy.accounting import Event
from medsynth.privacy.ledger import Ledger
from medsynth.release import card, keys, payload, signing, spending
from medsynth.release.manifests import release_manifest
from medsynth.release.statement import membership_in_words
from medsynth.release.verify import verify

IMAGE = "nifti/imagesTr/synthetic_0001.nii.gz"


def failed(release: Path, key: Path | None = None) -> str:
    report = verify(release, key)
    assert not report.ok
    return "\n".join(report.lines())


def predicate_of(release: Path) -> dict[str, Any]:
    envelope = json.loads((release / "certificate.dsse.json").read_text())
    return json.loads(base64.b64decode(envelope["payload"]))


def sign_again(
    release: Path,
    folder: Path,
    edit: Callable[[dict[str, Any]], object] = lambda predicate: None,
    refresh: bool = False,
    pages: bool = False,
) -> None:
    """Edit the statement and sign it as an attacker who puts his key in the place of the hospital's everywhere.

    Args:
        refresh: take the digests of all files anew too.
        pages: write the pages for people anew too.
    """
    statement = predicate_of(release)
    edit(statement["predicate"])
    key = keys.open_key(folder)
    page, ours = release / "PRIVACY.md", signing.key_id(signing.public_pem(key))
    if pages:
        write_pages(release, statement["predicate"], ours)
    page.write_text(re.sub(r"(?m)^Key \(SHA-256\):.*$", card.signer_line(ours), page.read_text()))
    for entry in statement["subject"]:
        if refresh or entry["name"] == page.name:
            entry["digest"]["sha256"] = store.digest_file(release / entry["name"])
    envelope = signing.sign(store.canonical_json(statement), key)
    (release / "certificate.dsse.json").write_bytes(store.json_text(envelope))
    (release / "public.pem").write_bytes(signing.public_pem(key))
    close_again(release, statement)


def write_pages(release: Path, predicate: dict[str, Any], signer: str) -> None:
    """Write the pages that follow from a predicate."""
    for name, text in card.pages(predicate, signer).items():
        (release / name).write_text(text)


def close_again(release: Path, statement: dict[str, Any]) -> None:
    """Write the manifest that follows from a statement, as the attacker may do too; none where it lacks a part."""
    digests = [store.digest_file(release / name) for name in ("certificate.dsse.json", "public.pem")]
    try:
        manifest = release_manifest(statement, *digests)
    except (KeyError, TypeError):
        return
    (release / "manifest.json").write_bytes(store.json_text(asdict(manifest)))


def edit_manifest(release: Path, **values: Any) -> None:
    manifest = json.loads((release / "manifest.json").read_text())
    (release / "manifest.json").write_bytes(store.json_text({**manifest, **values}))


def edit_statement(release: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the statement, keep the signature."""
    envelope = json.loads((release / "certificate.dsse.json").read_text())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    edit(statement)
    envelope["payload"] = base64.b64encode(store.canonical_json(statement)).decode()
    (release / "certificate.dsse.json").write_bytes(store.json_text(envelope))


def edit_in_place(release: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the predicate, keep the signature."""
    edit_statement(release, lambda statement: edit(statement["predicate"]))


def edit_envelope(release: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit what is around the statement."""
    envelope = json.loads((release / "certificate.dsse.json").read_text())
    edit(envelope)
    (release / "certificate.dsse.json").write_bytes(store.json_text(envelope))


def rewrite_ledger(release: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit the training's reservation, compute the chain anew, let everything follow, and sign with another key."""
    records, renamed = [json.loads(line) for line in (release / "ledger.jsonl").read_bytes().splitlines()], {}
    previous = chain.GENESIS
    for record in records:
        former = record.pop("id")
        if record["type"] == "reserve" and record["stage"] == "train":
            edit(record)
        if "entry" in record:
            record["entry"] = renamed[record["entry"]]
        record["previous"] = previous
        previous = renamed[former] = record["id"] = chain.identity(record)
    (release / "ledger.jsonl").write_bytes(b"".join(chain.canonical(record) + b"\n" for record in records))

    def follow(predicate: dict[str, Any]) -> None:
        book = Ledger(release / "ledger.jsonl")
        predicate["ledger"]["head"] = book.head
        predicate["mechanisms"] = [spending.mechanism(entry) for entry in book.entries()]
        for node in predicate["ancestry"]:
            node["ledger_entries"] = [renamed[entry] for entry in node["ledger_entries"]]
        payload.write_json(release / "ancestry.json", predicate["ancestry"])

    sign_again(release, release.parent / "attacker", follow, refresh=True)


def empty_ledger(release: Path) -> None:
    """Sign a release that claims to have read nobody: no spend, no cohort, epsilon 0, and all that follows."""
    (release / "ledger.jsonl").write_bytes(b"")
    book = Ledger(release / "ledger.jsonl")

    def forget(predicate: dict[str, Any]) -> None:
        nodes = [node for node in predicate["ancestry"] if node["folder"] != "cohort"]
        for node in nodes:
            node["parents"].pop("cohort", None)
            node["ledger_entries"] = []
        claim, account = predicate["claim"], predicate["account"]
        claim.update(epsilon=0.0, trials=1)
        for row in claim["epsilon_at"]:
            row["epsilon"] = 0.0
        for row, (rate, most) in zip(claim["membership"], spending.membership([], claim["delta"]), strict=True):
            row.update(true_positive_rate_at_most=most, in_words=membership_in_words(rate, most))
        account.update(epsilon=0.0)
        account.update(in_words=spending.account_in_words(account))
        predicate["accountants"] = dict.fromkeys(predicate["accountants"], 0.0)
        predicate.update(ancestry=nodes, mechanisms=[], ledger={"head": book.head, "entries": 0})
        payload.write_json(release / "ancestry.json", nodes)

    sign_again(release, release.parent / "attacker", forget, refresh=True, pages=True)


def node_of(predicate: dict[str, Any], folder: str) -> dict[str, Any]:
    return next(node for node in predicate["ancestry"] if node["folder"] == folder)


def event_of(predicate: dict[str, Any]) -> dict[str, Any]:
    return predicate["mechanisms"][-1]["events"][0]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


def lines(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def ancestry_edge(release: Path) -> None:
    nodes = json.loads((release / "ancestry.json").read_text())
    next(node for node in nodes if node["folder"] == "generator")["parents"]["cohort"] = "0" * 64
    (release / "ancestry.json").write_text(json.dumps(nodes))


def append(path: Path, more: bytes) -> None:
    path.write_bytes(path.read_bytes() + more)


def crlf(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def first_dicom(release: Path) -> Path:
    return sorted((release / "dicom").rglob("*.dcm"))[0]


def nest(folder: Path) -> None:
    inner = folder / "nested"
    inner.mkdir()
    (folder / "dataset.json").rename(inner / "dataset.json")


def edit_nodes(release: Path, edit: Callable[[list[dict[str, Any]]], object]) -> None:
    nodes = json.loads((release / "ancestry.json").read_text())
    edit(nodes)
    payload.write_json(release / "ancestry.json", nodes)


def append_reservation(release: Path, noise_source: str = "os") -> Ledger:
    ledger = Ledger(release / "ledger.jsonl")
    ledger.reserve(
        "masks",
        [Event("gaussian", 50.0)],
        epsilon=8,
        delta=1e-4,
        noise_source=noise_source,
        config_digest="c",
        parents=ledger.entries()[0]["parents"],
    )
    return ledger


MUTATIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "image_byte": (lambda r: flip(r / IMAGE), f"{IMAGE} was changed"),
    "image_truncated": (lambda r: truncate(r / IMAGE), f"{IMAGE} was changed"),
    "label_byte": (lambda r: flip(r / IMAGE.replace("images", "labels")), "was changed"),
    "file_dropped": (lambda r: (r / IMAGE).unlink(), f"{IMAGE} is missing"),
    "file_added": (lambda r: (r / "nifti/imagesTr/patient.nii.gz").write_bytes(b"x"), "patient.nii.gz is not named"),
    "file_renamed": (lambda r: (r / IMAGE).rename(r / "nifti/imagesTr/synthetic_0009.nii.gz"), f"{IMAGE} is missing"),
    "file_linked": (lambda r: (r / "link.nii.gz").symlink_to(r / IMAGE), "link.nii.gz is a link"),
    "epsilon_edited": (lambda r: edit_in_place(r, lambda p: p["claim"].update(epsilon=0.5)), "not signed by"),
    "sigma_edited": (lambda r: edit_in_place(r, lambda p: event_of(p).update(noise_multiplier=9.0)), "not signed by"),
    "steps_edited": (lambda r: edit_in_place(r, lambda p: event_of(p).update(count=1)), "not signed by"),
    "rate_edited": (lambda r: edit_in_place(r, lambda p: event_of(p).update(sampling_rate=0.01)), "not signed by"),
    "words_edited": (
        lambda r: (r / "PRIVACY.md").write_text((r / "PRIVACY.md").read_text().replace("epsilon = ", "epsilon = 0")),
        "PRIVACY.md does not say",
    ),
    "ledger_line_edited": (
        lambda r: lines(r / "ledger.jsonl", lambda x: [x[0].replace("8.0", "9.0"), *x[1:]]),
        "ledger line 1 was changed",
    ),
    "ledger_line_dropped": (lambda r: lines(r / "ledger.jsonl", lambda x: x[1:]), "ledger line 1 does not follow"),
    "ledger_end_dropped": (lambda r: lines(r / "ledger.jsonl", lambda x: x[:-1]), "its head is not"),
    "ledger_reordered": (lambda r: lines(r / "ledger.jsonl", lambda x: x[::-1]), "does not follow"),
    "ledger_gone": (lambda r: (r / "ledger.jsonl").unlink(), "ledger.jsonl is missing"),
    "ancestry_edge": (ancestry_edge, "ancestry.json is not what the certificate says"),
    "manifest_edited": (
        lambda r: (r / "manifest.json").write_text((r / "manifest.json").read_text().replace('"PRIVACY.md": "', "x0")),
        "manifest",
    ),
    "manifest_gone": (lambda r: (r / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest_no_json": (lambda r: (r / "manifest.json").write_bytes(b"\xff"), "manifest.json was changed"),
    "manifest_blank": (
        lambda r: (r / "manifest.json").write_bytes((r / "manifest.json").read_bytes() + b" "),
        "manifest.json was changed",
    ),
    "manifest_files": (lambda r: edit_manifest(r, files={}), f"another digest for {IMAGE}"),
    "manifest_stage": (lambda r: edit_manifest(r, stage="certify"), "'stage' is not what follows"),
    "manifest_sensitivity": (lambda r: edit_manifest(r, sensitivity="public"), "'sensitivity' is not what follows"),
    "manifest_config": (lambda r: edit_manifest(r, config_digest="0" * 64), "'config_digest' is not what follows"),
    "manifest_parents": (
        lambda r: edit_manifest(r, parents={"certificate": "0" * 64}),
        "'parents' is not what follows",
    ),
    "manifest_details": (lambda r: edit_manifest(r, details={"note": "x"}), "'details' is not what follows"),
    "manifest_version": (lambda r: edit_manifest(r, medsynth_version="9"), "'medsynth_version' is not what follows"),
    "manifest_more": (lambda r: edit_manifest(r, note="x"), "'note' is not what follows"),
    "certificate_blank": (
        lambda r: (r / "certificate.dsse.json").write_bytes((r / "certificate.dsse.json").read_bytes() + b" "),
        "another digest for certificate.dsse.json",
    ),
    "key_blank": (
        lambda r: (r / "public.pem").write_bytes((r / "public.pem").read_bytes() + b"\n"),
        "public.pem in the release was changed",
    ),
    "certificate_gone": (lambda r: (r / "certificate.dsse.json").unlink(), "certificate.dsse.json is missing"),
    "certificate_nonsense": (lambda r: (r / "certificate.dsse.json").write_text("{}"), "no DSSE envelope"),
    "key_gone": (lambda r: (r / "public.pem").unlink(), "public.pem is missing"),
    "uncertified": (lambda r: (r / "UNCERTIFIED").write_text(""), "makes no privacy promise"),
    "dicom_byte": (lambda r: flip(first_dicom(r)), ".dcm was changed"),
    "card_edited": (lambda r: replace_text(r / "DATASET_CARD.md", "epsilon = ", "epsilon = 0"), "DATASET_CARD.md does"),
    "card_appended": (lambda r: append(r / "DATASET_CARD.md", b"Harmless.\n"), "DATASET_CARD.md was changed"),
    "privacy_page_appended": (lambda r: append(r / "PRIVACY.md", b"Harmless.\n"), "PRIVACY.md was changed"),
    "delta_edited": (lambda r: edit_in_place(r, lambda p: p["claim"].update(delta=1e-5)), "PRIVACY.md does not say"),
    "epsilon_at_edited": (
        lambda r: edit_in_place(r, lambda p: p["claim"]["epsilon_at"][2].update(epsilon=0.2)),
        "the certificate claims 0.2: less than was spent",
    ),
    "membership_edited": (
        lambda r: edit_in_place(r, lambda p: p["claim"]["membership"][1].update(true_positive_rate_at_most=0.011)),
        "membership attacks at 1.0% false positives is 0.011, which is below what was spent",
    ),
    "declared_patients_raised": (
        lambda r: edit_in_place(r, lambda p: p["claim"].update(declared_patients=500)),
        "PRIVACY.md does not say 'Declared size of the cohort: 500 patients",
    ),
    "unit_edited": (lambda r: edit_in_place(r, lambda p: p["claim"].update(unit="image")), "unit is 'image'"),
    "relation_edited": (lambda r: edit_in_place(r, lambda p: p["claim"].update(relation="none")), "relation is 'none'"),
    "clip_norm_edited": (
        lambda r: edit_in_place(r, lambda p: p["mechanisms"][-1]["sensitivity"]["clip_norms"].update(denoiser=0.5)),
        "stage 'train' differs in sensitivity",
    ),
    "denominator_edited": (
        lambda r: edit_in_place(r, lambda p: p["mechanisms"][-1]["denominators"].update(denoiser=1.0)),
        "stage 'train' differs in denominators",
    ),
    "sigma_in_the_ledger": (
        lambda r: replace_text(r / "ledger.jsonl", '"noise_multiplier":3.0', '"noise_multiplier":9.0'),
        "ledger line 3 was changed",
    ),
    "steps_in_the_ledger": (
        lambda r: replace_text(r / "ledger.jsonl", '"count":20', '"count":2'),
        "ledger line 3 was changed",
    ),
    "rate_in_the_ledger": (
        lambda r: replace_text(r / "ledger.jsonl", '"sampling_rate":0.25', '"sampling_rate":0.02'),
        "ledger line 3 was changed",
    ),
    "clip_norm_in_the_ledger": (
        lambda r: replace_text(r / "ledger.jsonl", '"denoiser":1.0', '"denoiser":0.1'),
        "ledger line 3 was changed",
    ),
    "sigma_everywhere": (
        lambda r: rewrite_ledger(r, lambda e: e["events"][0].update(noise_multiplier=9.0)),
        "one of the two was changed",
    ),
    "steps_everywhere": (
        lambda r: rewrite_ledger(r, lambda e: e["events"][0].update(count=2)),
        "one of the two was changed",
    ),
    "rate_everywhere": (
        lambda r: rewrite_ledger(r, lambda e: e["events"][0].update(sampling_rate=0.02)),
        "one of the two was changed",
    ),
    "ledger_line_twice": (lambda r: lines(r / "ledger.jsonl", lambda x: [*x, x[-1]]), "does not follow the line above"),
    "ledger_line_appended": (append_reservation, "its head is not"),
    "ledger_line_ends": (lambda r: crlf(r / "ledger.jsonl"), "ledger.jsonl was changed"),
    "ancestry_node_dropped": (lambda r: edit_nodes(r, lambda nodes: nodes.pop()), "ancestry.json is not what"),
    "ancestry_sensitivity": (
        lambda r: edit_nodes(r, lambda nodes: nodes[0].update(sensitivity="public")),
        "ancestry.json is not",
    ),
    "certificate_empty": (lambda r: (r / "certificate.dsse.json").write_bytes(b""), "empty, cut off or not JSON"),
    "certificate_truncated": (
        lambda r: (r / "certificate.dsse.json").write_bytes((r / "certificate.dsse.json").read_bytes()[:2000]),
        "empty, cut off or not JSON",
    ),
    "certificate_line_ends": (lambda r: crlf(r / "certificate.dsse.json"), "certificate's file was changed"),
    "second_signature": (
        lambda r: edit_envelope(r, lambda e: e["signatures"].append({**e["signatures"][0]})),
        "exactly one",
    ),
    "no_signature": (lambda r: edit_envelope(r, lambda e: e["signatures"].clear()), "exactly one signature"),
    "envelope_field": (lambda r: edit_envelope(r, lambda e: e.update(note="x")), "not signed: 'note'"),
    "payload_type": (
        lambda r: edit_envelope(r, lambda e: e.update(payloadType="text/plain")),
        "payload type is 'text/plain'",
    ),
    "statement_type": (lambda r: edit_statement(r, lambda s: s.update(_type="x")), "this is no in-toto statement"),
    "predicate_type": (
        lambda r: edit_statement(r, lambda s: s.update(predicateType="x")),
        "no certificate of medsynth",
    ),
    "predicate_version": (
        lambda r: edit_statement(r, lambda s: s.update(predicateType="urn:medsynth:dp-certificate:1")),
        "certificate of version 1, and this medsynth judges version",
    ),
    "statement_field": (lambda r: edit_statement(r, lambda s: s.update(note="x")), "unknown part 'note'"),
    "file_hidden": (lambda r: (r / ".patient").write_bytes(b"x"), ".patient is not named"),
    "folder_empty": (lambda r: (r / "patients").mkdir(), "the folder patients/ is not named"),
    "folder_nested": (lambda r: nest(r / "nifti"), "nifti/nested/dataset.json is not named"),
    "folder_linked": (lambda r: (r / "more").symlink_to(r / "nifti"), "more is a link"),
    "pipe": (lambda r: os.mkfifo(r / "pipe"), "pipe is no regular file"),
    "file_mode": (lambda r: (r / "PRIVACY.md").chmod(0o4755), "PRIVACY.md has a special file mode"),
    "page_line_ends": (lambda r: crlf(r / "PRIVACY.md"), "PRIVACY.md was changed"),
    "account_edited": (
        lambda r: edit_in_place(r, lambda p: p["account"].update(epsilon=0.1)),
        "all studies together cost",
    ),
    "account_words_edited": (
        lambda r: edit_in_place(r, lambda p: p["account"].update(in_words="No other study.")),
        "PRIVACY.md does not say 'No other study.'",
    ),
    "not_covered_shortened": (
        lambda r: edit_in_place(r, lambda p: p["not_covered"].pop(2)),
        "not_covered lacks: errors in",
    ),
    "endorsements_added": (
        lambda r: (r / "endorsements.jsonl").write_bytes(b"{}\n"),
        "endorsements.jsonl is not named",
    ),
}
"""What is done to a release by somebody who cannot sign, or signs with another key, and what verify must say."""

FORGERIES = [
    pytest.param(lambda p: p.update(epsilon_of_this_ledger=0.1), "unknown part 'epsilon_of_this_ledger'", id="part"),
    pytest.param(lambda p: p["account"].update(note="x"), "account has an unknown part 'note'", id="account_part"),
    pytest.param(lambda p: p["build"].update(note="x"), "build has an unknown part 'note'", id="build_part"),
    pytest.param(lambda p: p["claim"]["epsilon_at"][0].update(note=1), "unknown part 'note'", id="row_part"),
    pytest.param(lambda p: p["accountants"].update(prv=0.01), "prv gives epsilon 0.01", id="accountant_low"),
    pytest.param(lambda p: p["accountants"].update(mine=0.01), "accountants names mine", id="accountant_more"),
    pytest.param(lambda p: p["accountants"].update(pld=9.0), "does not round up to", id="accountant_high"),
    pytest.param(lambda p: p["claim"].update(declared_patients=0.001), "whole number", id="patients_in_parts"),
    pytest.param(lambda p: p["claim"].update(declared_patients=0), "whole number", id="no_patients"),
    pytest.param(lambda p: p["public_inputs"].append("epsilon = 0.1"), "promise or a control", id="second_promise"),
    pytest.param(lambda p: p["dataset"].update(description="x\n(0.1, 0)-DP"), "promise or a control", id="in_a_text"),
    pytest.param(
        lambda p: p["audits"].append({"audit": "step", "subject": "x", "verdict": "fail"}),
        "that refuses a release",
        id="red_audit",
    ),
    pytest.param(lambda p: p["implementation"].update(numpy="1\n2"), "implementation names", id="version"),
    pytest.param(lambda p: p["claim"].update(epsilon=0.5), "the certificate claims 0.5", id="epsilon"),
    pytest.param(lambda p: p["claim"].update(delta=1e-3), "above 1/(10 N)", id="delta"),
    pytest.param(lambda p: p["claim"].update(delta=2e-4), "was reserved for delta 0.0001", id="pitfall_18_delta"),
    pytest.param(lambda p: p["claim"].update(budget=20.0), "was reserved for epsilon 8.0", id="pitfall_18_budget"),
    pytest.param(lambda p: p["claim"].update(unit="image"), "unit is 'image'", id="pitfall_01_unit"),
    pytest.param(lambda p: p["claim"].update(relation="replace_one"), "relation is", id="relation"),
    pytest.param(lambda p: p["claim"].update(accountant="none"), "accountant is", id="accountant"),
    pytest.param(lambda p: event_of(p).update(noise_multiplier=9.0), "not those of the ledger", id="sigma"),
    pytest.param(lambda p: event_of(p).update(count=1), "not those of the ledger", id="steps"),
    pytest.param(lambda p: event_of(p).update(sampling_rate=0.01), "not those of the ledger", id="rate"),
    pytest.param(lambda p: p["mechanisms"].pop(), "not those of the ledger", id="mechanism_dropped"),
    pytest.param(
        lambda p: p["claim"]["membership"][0].update(true_positive_rate_at_most=0.001),
        "which is below what was spent",
        id="membership",
    ),
    pytest.param(lambda p: p["claim"]["epsilon_at"][1].update(epsilon=0.1), "claims 0.1", id="other_delta"),
    pytest.param(lambda p: p["ledger"].update(head="0" * 64), "its head is not", id="head"),
    pytest.param(lambda p: p["ancestry"].pop(), "the parent is not in the ancestry", id="ancestor_dropped"),
    pytest.param(
        lambda p: node_of(p, "generator").update(ledger_entries=[]),
        "without a mechanism in the ledger",
        id="spend_forgotten",
    ),
    pytest.param(lambda p: p["ancestry"][0].update(sensitivity="internal"), "is internal", id="internal"),
    pytest.param(
        lambda p: p["ancestry"].append({**p["ancestry"][0], "folder": "report", "stage": "evaluate"}),
        "which no release may descend from",
        id="pitfall_13_a_report_shapes_the_pairs",
    ),
    pytest.param(lambda p: p.pop("claim"), "claim: cannot be checked", id="no_claim"),
    pytest.param(lambda p: p["claim"].update(epsilon="small"), "cannot be checked", id="text_for_number"),
    pytest.param(lambda p: p.update(ancestry="none"), "ancestry: cannot be checked", id="text_for_list"),
    pytest.param(lambda p: p["claim"]["membership"].clear(), "are not those for", id="membership_left_out"),
    pytest.param(lambda p: p["claim"]["epsilon_at"].pop(), "must state delta, delta/10", id="other_delta_left_out"),
    pytest.param(lambda p: p["claim"].update(note="x"), "unknown part 'note'", id="claim_field"),
    pytest.param(lambda p: p["claim"].pop("linkage"), "lacks 'linkage'", id="claim_without_linkage"),
    pytest.param(lambda p: p["claim"].update(epsilon=True), "must be numbers", id="truth_for_number"),
    pytest.param(lambda p: p["claim"].update(epsilon=7.9), "one of the two was changed", id="epsilon_raised"),
    pytest.param(lambda p: p["not_covered"].pop(), "not_covered lacks", id="not_covered_shortened"),
    pytest.param(lambda p: p["not_covered"].append("nothing"), "unknown line: nothing", id="not_covered_more"),
    pytest.param(lambda p: p["account"].update(epsilon=0.1), "all studies together cost", id="account_lowered"),
    pytest.param(lambda p: p["account"].update(in_words="None."), "do not say what its numbers", id="account_words"),
    pytest.param(lambda p: p["ledger"].update(entries=1), "its head is not", id="entries"),
    pytest.param(lambda p: p["build"].update(pairs=99), "DATASET_CARD.md does not say '99 pairs", id="pairs"),
    pytest.param(
        lambda p: node_of(p, "cohort").update(sensitivity="public"),
        "which stage 'ingest' never writes",
        id="cohort_public",
    ),
    pytest.param(
        lambda p: node_of(p, "generator").update(sensitivity="public"), "calls itself public", id="generator_public"
    ),
    pytest.param(
        lambda p: node_of(p, "generator")["parents"].pop("cohort"), "the ancestry says nothing", id="edge_dropped"
    ),
    pytest.param(
        lambda p: node_of(p, "generator").update(config_digest="0" * 64), "another configuration", id="node_config"
    ),
    pytest.param(
        lambda p: p["mechanisms"][-1]["sensitivity"]["clip_norms"].update(denoiser=0.5),
        "differs in sensitivity",
        id="clip",
    ),
]
"""False predicates that an attacker signs with his own key, and what contradicts them."""
