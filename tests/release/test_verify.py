"""A release verifies, and no change to it goes unnoticed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tampering import (
    FORGERIES,
    IMAGE,
    MUTATIONS,
    append_reservation,
    empty_ledger,
    failed,
    lines,
    predicate_of,
    sign_again,
)

from medsynth.errors import VerificationError
from medsynth.privacy.ledger import Ledger
from medsynth.release import keys, signing
from medsynth.release.verify import Report, verify


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


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_named(release: Path, hospital_key: Path, name: str) -> None:
    mutate, message = MUTATIONS[name]
    mutate(release)
    assert message in failed(release)
    assert not verify(release, hospital_key).ok


def test_there_are_many_mutations() -> None:
    assert len(MUTATIONS) >= 30


@pytest.mark.parametrize(("edit", "message"), FORGERIES)
def test_false_statement_fails_even_when_signed_anew(
    release: Path, tmp_path: Path, hospital_key: Path, edit: Callable[[dict[str, Any]], object], message: str
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


def test_a_release_that_hides_its_cohort_and_every_spend_fails(release: Path) -> None:
    empty_ledger(release)
    text = failed(release)
    assert {check.name for check in verify(release).checks if not check.ok} == {"ancestry"}
    assert "'generator' names no folder of stage 'ingest', which stage 'train' always reads" in text
    assert "'generator' was learnt from patients, and names no spend in the ledger" in text


@pytest.mark.parametrize("name", ["PRIVACY.md", "DATASET_CARD.md"])
def test_a_page_with_a_second_promise_fails_whoever_signed_it(release: Path, tmp_path: Path, name: str) -> None:
    more = "**epsilon = 0.1, delta = 1e-09** for each patient"
    (release / name).write_text((release / name).read_text() + more + "\n")
    sign_again(release, tmp_path / "attacker", refresh=True)
    report = verify(release)
    assert [check.name for check in report.checks if not check.ok] == ["words"]
    assert f"{name} says what the certificate does not: '{more}'" in "\n".join(report.failures)


def test_tainted_ledger_fails(release: Path, tmp_path: Path) -> None:
    ledger = append_reservation(release, "test_only")
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
    assert predicate["account"]["scope"] == "ledger"
    assert "unknown to this ledger" in (release / "PRIVACY.md").read_text()


def test_it_is_said_when_no_audit_of_the_mechanisms_was_run(release: Path, tmp_path: Path) -> None:
    def audit(predicate: dict[str, Any]) -> None:
        predicate["audits"].append({"audit": "distributional step", "subject": "denoiser", "verdict": "pass"})

    for known in (False, True):
        report = verify(release)
        assert report.ok, report.failures
        assert any("NO AUDIT OF THE MECHANISMS" in line for line in report.lines()) is not known
        sign_again(release, tmp_path / "attacker", audit, pages=True, refresh=True)


def test_all_failures_are_listed_at_once(release: Path) -> None:
    (release / IMAGE).unlink()
    (release / "UNCERTIFIED").write_text("")
    lines(release / "ledger.jsonl", lambda lines: lines[1:])
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
