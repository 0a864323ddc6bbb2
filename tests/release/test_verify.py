"""A release verifies, and no change to it goes unnoticed."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from medsynth import store
from medsynth.errors import VerificationError
from medsynth.privacy.ledger import Ledger
from medsynth.release import card, keys, signing
from medsynth.release.manifests import release_manifest
from medsynth.release.verify import Report, verify

IMAGE = "nifti/imagesTr/synthetic_0001.nii.gz"


def failed(release: Path, key: Path | None = None) -> str:
    report = verify(release, key)
    assert not report.ok
    return "\n".join(report.lines())


def predicate_of(release: Path) -> dict[str, Any]:
    envelope = json.loads((release / "certificate.dsse.json").read_text())
    return json.loads(base64.b64decode(envelope["payload"]))


def sign_again(
    release: Path, folder: Path, edit: Callable[[dict[str, Any]], None] = lambda predicate: None, refresh: bool = False
) -> None:
    """Edit the statement and sign it as an attacker who puts his key in the place of the hospital's everywhere.

    Args:
        refresh: take the digests of all files anew too.
    """
    statement = predicate_of(release)
    edit(statement["predicate"])
    key = keys.open_key(folder)
    page, ours = release / "PRIVACY.md", signing.key_id(signing.public_pem(key))
    page.write_text(re.sub(r"(?m)^Key \(SHA-256\):.*$", card.signer_line(ours), page.read_text()))
    for entry in statement["subject"]:
        if refresh or entry["name"] == page.name:
            entry["digest"]["sha256"] = store.digest_file(release / entry["name"])
    envelope = signing.sign(store.canonical_json(statement), key)
    (release / "certificate.dsse.json").write_bytes(signing.envelope_text(envelope))
    (release / "public.pem").write_bytes(signing.public_pem(key))
    close_again(release, statement)


def close_again(release: Path, statement: dict[str, Any]) -> None:
    """Write the manifest that follows from a statement, as the attacker may do too; none where it lacks a part."""
    digests = [store.digest_file(release / name) for name in ("certificate.dsse.json", "public.pem")]
    try:
        manifest = release_manifest(statement, *digests)
    except (KeyError, TypeError):
        return
    (release / "manifest.json").write_bytes(store.manifest_text(asdict(manifest)))


def edit_manifest(release: Path, **values: Any) -> None:
    manifest = json.loads((release / "manifest.json").read_text())
    (release / "manifest.json").write_bytes(store.manifest_text({**manifest, **values}))


def edit_in_place(release: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit the statement, keep the signature."""
    envelope = json.loads((release / "certificate.dsse.json").read_text())
    statement = json.loads(base64.b64decode(envelope["payload"]))
    edit(statement["predicate"])
    envelope["payload"] = base64.b64encode(store.canonical_json(statement)).decode()
    (release / "certificate.dsse.json").write_bytes(signing.envelope_text(envelope))


def node_of(predicate: dict[str, Any], folder: str) -> dict[str, Any]:
    return next(node for node in predicate["ancestry"] if node["folder"] == folder)


def event_of(predicate: dict[str, Any]) -> dict[str, Any]:
    return predicate["mechanisms"][-1]["events"][0]


def test_a_good_release_verifies(release: Path, hospital_key: Path) -> None:
    report = verify(release, hospital_key)
    assert report.ok, report.failures
    assert report.claim["unit"] == "patient"
    assert report.signer_known
    report.require()
    assert any("cannot show" in line for line in report.lines())


def test_without_a_key_it_says_that_the_signer_was_not_checked(release: Path) -> None:
    report = verify(release)
    assert report.ok
    assert not report.signer_known
    assert any("WHO SIGNED WAS NOT CHECKED" in line for line in report.lines())


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(bytes(raw))


def _lines(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))


def _ancestry_edge(release: Path) -> None:
    nodes = json.loads((release / "ancestry.json").read_text())
    next(node for node in nodes if node["folder"] == "generator")["parents"]["cohort"] = "0" * 64
    (release / "ancestry.json").write_text(json.dumps(nodes))


MUTATIONS: dict[str, tuple[Callable[[Path], object], str]] = {
    "image_byte": (lambda r: _flip(r / IMAGE), f"{IMAGE} was changed"),
    "image_truncated": (lambda r: _truncate(r / IMAGE), f"{IMAGE} was changed"),
    "label_byte": (lambda r: _flip(r / IMAGE.replace("images", "labels")), "was changed"),
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
        lambda r: _lines(r / "ledger.jsonl", lambda x: [x[0].replace("8.0", "9.0"), *x[1:]]),
        "ledger line 1 was changed",
    ),
    "ledger_line_dropped": (lambda r: _lines(r / "ledger.jsonl", lambda x: x[1:]), "ledger line 1 does not follow"),
    "ledger_end_dropped": (lambda r: _lines(r / "ledger.jsonl", lambda x: x[:-1]), "its head is not"),
    "ledger_reordered": (lambda r: _lines(r / "ledger.jsonl", lambda x: x[::-1]), "does not follow"),
    "ledger_gone": (lambda r: (r / "ledger.jsonl").unlink(), "ledger.jsonl is missing"),
    "ancestry_edge": (_ancestry_edge, "ancestry.json is not what the certificate says"),
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
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_named(release: Path, name: str) -> None:
    mutate, message = MUTATIONS[name]
    mutate(release)
    assert message in failed(release)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        pytest.param(lambda p: p["claim"].update(epsilon=0.5), "the certificate claims 0.5", id="epsilon"),
        pytest.param(lambda p: p["claim"].update(delta=1e-3), "above 1/(10 N)", id="delta"),
        pytest.param(lambda p: p["claim"].update(unit="image"), "unit is 'image'", id="pitfall_01_unit"),
        pytest.param(lambda p: p["claim"].update(relation="replace_one"), "relation is", id="relation"),
        pytest.param(lambda p: p["claim"].update(accountant="none"), "accountant is", id="accountant"),
        pytest.param(lambda p: event_of(p).update(noise_multiplier=9.0), "not those of the ledger", id="sigma"),
        pytest.param(lambda p: event_of(p).update(count=1), "not those of the ledger", id="steps"),
        pytest.param(lambda p: event_of(p).update(sampling_rate=0.01), "not those of the ledger", id="rate"),
        pytest.param(lambda p: p["mechanisms"].pop(), "not those of the ledger", id="mechanism_dropped"),
        pytest.param(
            lambda p: p["claim"]["membership"][0].update(true_positive_rate_at_most=0.001),
            "membership",
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
    ],
)
def test_false_statement_fails_even_when_signed_anew(
    release: Path, tmp_path: Path, hospital_key: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    sign_again(release, tmp_path / "attacker", edit)
    assert message in failed(release)
    assert "not signed by" in failed(release, hospital_key)


def test_swapped_key_fails_when_the_hospitals_key_is_given(release: Path, tmp_path: Path, hospital_key: Path) -> None:
    sign_again(release, tmp_path / "attacker")
    assert verify(release).ok  # nothing contradicts itself: only a key from elsewhere can tell
    text = failed(release, hospital_key)
    assert "not signed by" in text


def test_only_public_key_swapped(release: Path, tmp_path: Path, hospital_key: Path) -> None:
    (release / "public.pem").write_bytes(signing.public_pem(keys.open_key(tmp_path / "attacker")))
    assert "not signed by" in failed(release)
    assert "is not the key that was given" in failed(release, hospital_key)


def test_forged_ledger_with_less_spending_fails_against_the_hospitals_key(
    release: Path, tmp_path: Path, hospital_key: Path
) -> None:
    (release / "ledger.jsonl").unlink()
    assert Ledger(release / "ledger.jsonl").entries() == []
    (release / "ledger.jsonl").write_text("")
    sign_again(release, tmp_path / "attacker", lambda p: p["claim"].update(epsilon=0.0), refresh=True)
    assert "its head is not" in failed(release)
    assert "not signed by" in failed(release, hospital_key)


def test_tainted_ledger_fails(release: Path, tmp_path: Path) -> None:
    ledger = Ledger(release / "ledger.jsonl")
    first = ledger.entries()[0]
    from medsynth.privacy.accounting import Event

    ledger.reserve(
        "masks",
        [Event("gaussian", 50.0)],
        epsilon=8,
        delta=1e-4,
        noise_source="test_only",
        config_digest="c",
        parents=first["parents"],
    )
    sign_again(release, tmp_path / "attacker", lambda p: p["ledger"].update(head=ledger.head), refresh=True)
    assert "repeatable noise" in failed(release)


def test_changing_one_byte_of_any_file_fails_and_names_the_file(release: Path, hospital_key: Path) -> None:
    files = sorted(path for path in release.rglob("*") if path.is_file())
    assert len(files) >= 12
    for path in files:
        good = path.read_bytes()
        for place in (0, len(good) // 3, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
            name = path.relative_to(release).as_posix()
            assert name in failed(release, hospital_key), f"byte {place} of {name}"
        path.write_bytes(good)
    assert verify(release, hospital_key).ok


@pytest.mark.parametrize("name", ["manifest.json", "public.pem", "certificate.dsse.json"])
def test_no_byte_of_the_unsigned_files_can_change(release: Path, name: str) -> None:
    path = release / name
    good = path.read_bytes()
    blanks = [place for place, byte in enumerate(good) if byte in b" \n"][:40]
    for place in {*blanks, *range(0, len(good), len(good) // 40)}:
        other = b"\t" if good[place : place + 1].isspace() else b"A" if good[place] != 65 else b"B"
        path.write_bytes(good[:place] + other + good[place + 1 :])
        assert not verify(release).ok, f"byte {place} of {name}"


def test_the_release_carries_the_key_even_when_another_copy_is_given(release: Path, hospital_key: Path) -> None:
    (release / "public.pem").unlink()
    assert "public.pem is missing" in failed(release, hospital_key)


def test_another_key_in_the_release_is_refused(release: Path, hospital_key: Path, tmp_path: Path) -> None:
    other = signing.public_pem(keys.open_key(tmp_path / "other"))
    (release / "public.pem").write_bytes(other)
    assert "public.pem in the release is not the key that was given" in failed(release, hospital_key)


def test_a_copy_of_the_key_may_have_other_line_ends(release: Path, hospital_key: Path, tmp_path: Path) -> None:
    (tmp_path / "mailed.pem").write_bytes(hospital_key.read_bytes().replace(b"\n", b"\r\n"))
    assert verify(release, tmp_path / "mailed.pem").ok


def test_without_an_account_the_statement_speaks_for_its_own_ledger_only(release: Path) -> None:
    predicate = predicate_of(release)["predicate"]
    assert predicate["epsilon_of_this_ledger"] == predicate["claim"]["epsilon"]
    assert predicate["account"]["scope"] == "ledger"
    assert "unknown to this ledger" in (release / "PRIVACY.md").read_text()


def test_all_failures_are_listed_at_once(release: Path) -> None:
    (release / IMAGE).unlink()
    (release / "UNCERTIFIED").write_text("")
    _lines(release / "ledger.jsonl", lambda lines: lines[1:])
    report = verify(release)
    assert {check.name for check in report.checks if not check.ok} >= {"certified", "files", "ledger"}
    with pytest.raises(VerificationError) as raised:
        report.require()
    assert raised.value.exit_code == 8
    assert str(raised.value).count("\n") == len(report.failures)


def test_what_is_no_release_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="no release"):
        verify(tmp_path / "absent")
    assert not verify(tmp_path).ok


def test_unreadable_key_given_is_refused(release: Path, tmp_path: Path) -> None:
    with pytest.raises(VerificationError, match="cannot be read"):
        verify(release, tmp_path / "absent.pem")


def test_an_empty_report_is_not_ok() -> None:
    assert not Report(()).ok


def test_verifying_imports_no_torch(release: Path) -> None:
    heavy = ("torch", "monai", "diffusers", "opacus", "mlflow", "highdicom", "matplotlib")
    program = (
        "import sys; from pathlib import Path; from medsynth.release.verify import verify\n"
        "assert verify(Path(sys.argv[1])).ok\n"
        f"loaded = [name for name in {heavy} if name in sys.modules]\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(release)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
