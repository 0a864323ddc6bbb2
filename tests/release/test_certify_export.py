"""The two stages: what they write, what they refuse, and what leaves."""

from __future__ import annotations

import base64
import gzip
import json
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest

from medsynth import config, store
from medsynth.config import Study
from medsynth.errors import CertificationError, StoreError, VerificationError
from medsynth.privacy.accounting import Event, epsilon
from medsynth.release import statement
from medsynth.release.ancestry import walk
from medsynth.release.manifests import certificate_manifest, release_manifest
from medsynth.release.verify import verify
from medsynth.stages import certify, export
from medsynth.stages.inputs import config_digest
from medsynth.tracking import Tracker

Run = Callable[..., Path]
Make = Callable[..., Study]


def inputs_of(run: Path) -> dict[str, Path]:
    return {"synthetic": run / "synthetic", "ledger": run / "ledger.jsonl", "keys": run / "keys"}


def _pld_three_times(events: list[Event], delta: float) -> dict[str, float]:
    return dict.fromkeys(("pld", "prv", "rdp"), epsilon(events, delta))


@pytest.fixture
def one_accountant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the second opinion of Opacus, which takes seconds to import."""
    monkeypatch.setattr(certify, "agreeing_accountants", _pld_three_times)


def test_certificate_and_release_hold_what_they_should(certified_run: Path) -> None:
    certificate, release = store.read_manifest(certified_run / "certificate"), certified_run / "release"
    assert certificate.sensitivity == "released" and set(certificate.parents) == {"synthetic"}
    assert store.read_manifest(release).sensitivity == "released"
    top = {path.name for path in release.iterdir()}
    assert top == {
        "nifti", "dicom", "DATASET_CARD.md", "PRIVACY.md", "certificate.dsse.json", "public.pem", "ledger.jsonl",
        "ancestry.json", "manifest.json",
    }  # fmt: skip
    assert stat.S_IMODE((certified_run / "keys" / "private.pem").stat().st_mode) == 0o600


def test_pitfall_15_nothing_but_the_payload_leaves(certified_run: Path) -> None:
    names = {path.name for path in (certified_run / "release").rglob("*")}
    assert "preview.png" not in names and "cases.csv" not in names and "pairs.csv" not in names


def test_nothing_of_the_cohort_but_its_salted_digest_leaves(certified_run: Path) -> None:
    cohort = store.read_manifest(certified_run / "cohort")
    text = "".join(p.read_text() for p in (certified_run / "release").glob("*.*"))
    assert not any(digest in text for digest in cohort.files.values())
    assert cohort.details["salt"] not in text
    assert cohort.digest in text


def test_pitfall_02_the_linkage_rule_is_stated(certified_run: Path) -> None:
    claim = verify(certified_run / "release").claim
    assert "one patient" in claim["linkage"] and "two identifiers counts as two patients" in claim["linkage"]
    assert claim["linkage"] in (certified_run / "release" / "PRIVACY.md").read_text()


@pytest.mark.parametrize(
    ("other", "folders"),
    [
        ({"privacy": {"delta": 5e-4}}, ["masks", "generator"]),
        ({"privacy": {"declared_patients": 100}}, ["masks", "generator"]),
        ({"ingest": {"patient_id_pattern": "^(patient[0-9]+)"}}, ["cohort", "masks", "generator"]),
        ({"train": {"pretrain_phantoms": 5}}, ["generator"]),
        ({"synthesise": {"pairs": 5}}, ["synthetic"]),
    ],
)
def test_pitfall_18_a_certificate_describes_the_run_and_no_other_study(
    other: dict[str, dict[str, Any]], folders: list[str], fake_run: Run, fake_study: Make, one_accountant: None
) -> None:
    """Linkage rule, delta, declared patients and public inputs are told by the configuration: it must be the run's."""
    run = fake_run()
    with pytest.raises(CertificationError) as error:
        certify.run(fake_study(**other), inputs_of(run), run / "certificate", Tracker())
    refused = re.findall(r"'(\w+)' was made with other settings", str(error.value))
    assert sorted(refused) == sorted(folders)
    certify.run(fake_study(export={"formats": ["nifti"]}), inputs_of(run), run / "certificate", Tracker())


def test_words_that_export_would_refuse_are_refused_before_they_are_signed(
    fake_run: Run, fake_study: Make, one_accountant: None
) -> None:
    run = fake_run()
    study = config.parse({**fake_study().model_dump(mode="json"), "description": "Phantoms, trained at epsilon 8"})
    with pytest.raises(CertificationError, match=r"dataset.description holds a promise .* say it in other words"):
        certify.run(study, inputs_of(run), run / "certificate", Tracker())
    assert not (run / "certificate").exists()


def test_pitfall_21_a_codec_that_this_study_did_not_make_is_refused(
    fake_run: Run, fake_study: Make, one_accountant: None
) -> None:
    run, other = fake_run(), fake_study(encode={"phantoms": {"count": 7}})
    with pytest.raises(CertificationError, match="'autoencoder' calls itself public"):
        certify.run(other, inputs_of(run), run / "certificate", Tracker())


@pytest.mark.parametrize(("file", "refused"), [("masks.json", False), ("statistics.npz", True)])
def test_pitfall_21_statistics_from_elsewhere_are_no_public_shapes(
    file: str, refused: bool, fake_run: Run, fake_study: Make, tmp_path: Path
) -> None:
    run = fake_run()
    with store.create(tmp_path / "shapes", "masks", config_digest(fake_study(), "masks")) as folder:
        (folder.path / file).write_text("{}")
        folder.finish("public")
    parents = {"generator": run / "generator", "shapes": tmp_path / "shapes"}
    with store.create(tmp_path / "synthetic", "synthesise", "any", parents) as folder:
        folder.finish("released")
    ancestry = walk(tmp_path / "synthetic", {path.name: path for path in run.iterdir()})
    assert (
        any("'shapes' calls itself public" in why for why in certify._other_sources(fake_study(), ancestry)) == refused
    )


def test_msd_layout_is_valid_and_faithful(certified_run: Path, fake_study: Make) -> None:
    from medsynth.imaging.cohort import read_pairs

    nifti = certified_run / "release" / "nifti"
    dataset = json.loads((nifti / "dataset.json").read_text())
    assert dataset["labels"] == {"0": "background", "1": "front", "2": "back"}
    assert dataset["numTraining"] == len(dataset["training"]) == 3 and dataset["numTest"] == 0 and dataset["test"] == []
    assert dataset["tensorImageSize"] == "3D" and dataset["modality"] == {"0": "MRI"}
    assert "synthetic" in dataset["description"].lower() and dataset["licence"] == "CC-BY-4.0"
    for row, pair in zip(dataset["training"], read_pairs(certified_run / "synthetic"), strict=True):
        image, label = nibabel.load(nifti / row["image"]), nibabel.load(nifti / row["label"])
        assert image.get_data_dtype() == np.int16 and label.get_data_dtype() == np.uint8
        np.testing.assert_allclose(image.affine, label.affine)
        assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
        np.testing.assert_allclose(image.header.get_zooms(), (1, 1.5, 2))
        np.testing.assert_array_equal(np.asarray(label.dataobj), pair.label)
        np.testing.assert_allclose(np.asarray(image.dataobj) / 500 - 1, pair.image[0], atol=1.1e-3)


def test_pitfall_20_headers_are_public_constants(certified_run: Path) -> None:
    for path in (certified_run / "release" / "nifti").rglob("*.nii.gz"):
        assert path.read_bytes()[4:8] == b"\0\0\0\0"  # RFC 1952: no time stamp
        header = nibabel.Nifti1Image.from_bytes(gzip.decompress(path.read_bytes())).header
        assert header["descrip"].item() == b"synthetic (medsynth)"
        assert header["intent_name"].item() == header["aux_file"].item() == header["db_name"].item() == b""
        assert not header.extensions


def test_dicom_is_marked_synthetic(certified_run: Path) -> None:
    import pydicom

    files = sorted((certified_run / "release" / "dicom").rglob("*.dcm"))
    datasets = [pydicom.dcmread(path) for path in files]
    assert {d.Modality for d in datasets} == {"MR", "SEG"}
    assert {d.PatientID for d in datasets} == {"synthetic_0001"}
    for dataset in datasets:
        assert dataset[0x0008, 0x001C].value == "YES"
        assert dataset.Modality == "SEG" or "SourceImageSequence" not in dataset
    own = {str(d.SOPInstanceUID) for d in datasets}
    pointed_at = {str(e.value) for d in datasets for e in d.iterall() if e.keyword == "ReferencedSOPInstanceUID"}
    assert pointed_at and pointed_at <= own  # a segmentation points at its synthetic image, and at nothing else
    assert len({d.SOPInstanceUID for d in datasets}) == len(datasets)


def test_words_carry_the_claim(certified_run: Path) -> None:
    claim = verify(certified_run / "release").claim
    for name in ("DATASET_CARD.md", "PRIVACY.md"):
        text = (certified_run / "release" / name).read_text()
        assert f"epsilon = {claim['epsilon']:g}, delta = {claim['delta']:g}" in text
        assert "patient" in text


def test_two_accountants_agree(certified_run: Path) -> None:
    events = [Event("gaussian", 8.0), Event("subsampled_gaussian", 3.0, 0.25, 20)]
    values = certify.agreeing_accountants(events, 1e-4)
    assert abs(values["pld"] - values["prv"]) <= 0.02 and values["rdp"] > values["pld"]


def test_disagreeing_accountants_stop_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"pld": 2.0, "prv": 2.1, "rdp": 2.2}
    monkeypatch.setattr(certify, "epsilon", lambda events, delta, accountant: answers[accountant])
    with pytest.raises(CertificationError, match="disagree"):
        certify.agreeing_accountants([], 1e-4)


@pytest.mark.parametrize(
    ("pld", "prv", "agree"),
    [
        (0.5, 0.519, True),
        (0.5, 0.521, False),
        (8.0, 8.0106, True),
        (8.0, 8.021, False),
        (50.0, 50.09, True),
        (50.0, 50.11, False),
    ],
)
def test_accountants_agree_absolutely_up_to_epsilon_ten(
    monkeypatch: pytest.MonkeyPatch, pld: float, prv: float, agree: bool
) -> None:
    answers = {"pld": pld, "prv": prv, "rdp": 2 * pld}
    monkeypatch.setattr(certify, "epsilon", lambda events, delta, accountant: answers[accountant])
    if agree:
        assert certify.agreeing_accountants([], 1e-4) == answers
    else:
        with pytest.raises(CertificationError, match="disagree"):
            certify.agreeing_accountants([], 1e-4)


def test_uncertifiable_run_is_refused_and_leaves_no_folder(fake_run: Run, fake_study: Make) -> None:
    run = fake_run(nonprivate=True)
    with pytest.raises(CertificationError, match=r"export\.uncertified: true"):
        certify.run(fake_study(), inputs_of(run), run / "certificate", Tracker())
    assert not (run / "certificate").exists() and not (run / ".certificate.partial").exists()


@pytest.mark.parametrize(
    "wrong", [{"nonprivate": True, "generator_sensitivity": "internal"}, {"noise_source": "test_only"}]
)
def test_uncertified_release_says_so_and_never_verifies(fake_run: Run, fake_study: Make, wrong: dict[str, Any]) -> None:
    run, study = fake_run(**wrong), fake_study(export={"uncertified": True, "formats": ["nifti", "dicom"]})
    manifest = certify.run(study, inputs_of(run), run / "certificate", Tracker())
    assert manifest.sensitivity == "internal"
    assert not (run / "certificate" / "certificate.dsse.json").exists()
    assert export.run(study, {"certificate": run / "certificate"}, run / "release", Tracker()).sensitivity == "internal"
    assert "no privacy promise" in (run / "release" / "UNCERTIFIED").read_text()
    assert "no certificate" in (run / "release" / "DATASET_CARD.md").read_text()
    assert "epsilon = " not in (run / "release" / "PRIVACY.md").read_text()
    _promises_nothing(run / "release")
    report = verify(run / "release")
    assert not report.ok and any("UNCERTIFIED" in failure for failure in report.failures)


def _promises_nothing(release: Path) -> None:
    import pydicom

    card, dataset = (release / "DATASET_CARD.md").read_text(), (release / "nifti" / "dataset.json").read_text()
    assert "Images may resemble patients of the cohort; see `UNCERTIFIED`" in card
    for text in (card, dataset):
        assert "resemble patients" in text and "image shows a patient" not in text
    assert "conditioned a pair" not in card  # nobody vouches for it
    files = list((release / "dicom").rglob("*.dcm"))
    methods = {str(pydicom.dcmread(path).DeidentificationMethod) for path in files}
    assert methods == {"Synthetic data without privacy promise: may resemble patients"}


def test_certified_release_says_that_no_image_shows_a_patient(certified_run: Path) -> None:
    release = certified_run / "release"
    assert "No image shows a patient." in (release / "DATASET_CARD.md").read_text()
    assert "no image shows a patient" in (release / "nifti" / "dataset.json").read_text()


def test_card_claims_no_folder_that_may_be_absent(certified_run: Path) -> None:
    card = (certified_run / "release" / "DATASET_CARD.md").read_text()
    for name in ("nifti", "dicom", "png"):
        assert f"- `{name}/` (if present) " in card


def test_card_sends_nobody_to_a_registry_for_medsynth_itself(certified_run: Path) -> None:
    card = (certified_run / "release" / "DATASET_CARD.md").read_text()
    installed = re.findall(r"pip install (.+)", card)
    assert installed == ["-r pipelines/verify/requirements.txt", "--no-deps ."]
    assert "repository of its authors" in " ".join(card.split()) and "loads no PyTorch" in card


PRETRAINING: list[tuple[dict[str, Any], dict[str, Any], str | None]] = [
    ({}, {}, "phantoms drawn from the released mask and appearance statistics (charged above)"),
    ({}, {"appearance": {"enabled": False}}, "phantoms drawn from the released mask statistics (charged above)"),
    ({"source": "public_shapes"}, {}, "intensities from the released appearance statistics (charged above)"),
    ({"source": "public_shapes"}, {"appearance": {"enabled": False}}, "procedural phantoms"),
    ({}, {"pretrain_steps": 0, "appearance": {"enabled": False}}, None),
]


@pytest.mark.parametrize(("masks", "train", "words"), PRETRAINING)
def test_public_inputs_tell_what_pretraining_was_made_of(
    fake_study: Make, masks: dict[str, Any], train: dict[str, Any], words: str | None
) -> None:
    lines = [line for line in statement.public_inputs(fake_study(masks=masks, train=train)) if "pre-training" in line]
    if words is None:
        assert not lines
    else:
        (line,) = lines
        assert line.endswith(words) and ("charged above" in line or "procedural" in line)


def test_public_inputs_tell_that_sampling_began_from_drafts(fake_study: Make) -> None:
    drafted = [
        line
        for start in (1.0, 0.4)
        for line in statement.public_inputs(fake_study(synthesise={"start": start}))
        if "drafts" in line
    ]
    assert len(drafted) == 1 and drafted[0].endswith("(charged above)")


def with_appearance(study: Study, **values: Any) -> Study:
    """Return a study with other settings of appearance, whether or not its grid has images for them."""
    appearance = study.train.appearance.model_copy(update=values)
    return study.model_copy(update={"train": study.train.model_copy(update={"appearance": appearance})})


def test_public_inputs_tell_of_procedural_scenes(fake_study: Make) -> None:
    plain, lit = fake_study(), with_appearance(fake_study(), factors=2, texture="lit_surface")
    told = [[line for line in statement.public_inputs(one) if "scenes" in line] for one in (plain, lit)]
    assert told[0] == [] and len(told[1]) == 1 and "from no image" in told[1][0]


def test_public_inputs_name_the_template_and_whose_image_it_is(fake_study: Make) -> None:
    guided = with_appearance(fake_study(), template_centre_mm=(0.0, 0.0, 0.0))
    told = [[line for line in statement.public_inputs(one) if "MNI152" in line] for one in (fake_study(), guided)]
    assert told[0] == [] and len(told[1]) == 1 and "152 volunteers" in told[1][0] and "nilearn" in told[1][0]
    assert "nilearn" in statement.implementation()


def test_certificate_of_another_version_is_not_exported(
    fake_run: Run, fake_study: Make, one_accountant: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, study = fake_run(), fake_study(export={"formats": ["nifti"]})
    certify.run(study, inputs_of(run), run / "certificate", Tracker())
    monkeypatch.setattr(export, "__version__", "99")
    with pytest.raises(CertificationError, match="certify again"):
        export.run(study, {"certificate": run / "certificate"}, run / "release", Tracker())
    assert not (run / "release").exists()


def test_manifests_follow_from_the_statement(certified_run: Path) -> None:
    certificate = certified_run / "certificate"
    envelope = json.loads((certificate / "certificate.dsse.json").read_text())
    signed = json.loads(base64.b64decode(envelope["payload"]))
    digests = [store.digest_file(certificate / name) for name in ("certificate.dsse.json", "public.pem")]
    for folder, manifest in (("certificate", certificate_manifest), ("release", release_manifest)):
        assert manifest(signed, *digests).digest == store.read_manifest(certified_run / folder).digest


def test_uncertified_certificate_is_not_exported_by_another_config(fake_run: Run, fake_study: Make) -> None:
    run, study = fake_run(nonprivate=True), fake_study(export={"uncertified": True, "formats": ["nifti"]})
    certify.run(study, inputs_of(run), run / "certificate", Tracker())
    with pytest.raises(CertificationError, match=r"export\.uncertified"):
        export.run(fake_study(), {"certificate": run / "certificate"}, run / "release", Tracker())
    assert not (run / "release").exists()


def test_uncertified_does_not_excuse_changed_files(fake_run: Run, fake_study: Make) -> None:
    run = fake_run(nonprivate=True)
    (run / "synthetic" / "pairs.csv").write_text("changed")
    with pytest.raises(CertificationError, match=r"pairs\.csv"):
        certify.run(fake_study(export={"uncertified": True}), inputs_of(run), run / "certificate", Tracker())


def test_a_sound_run_is_certified_even_where_uncertified_is_allowed(
    fake_run: Run, fake_study: Make, one_accountant: None
) -> None:
    run, study = fake_run(), fake_study(export={"uncertified": True, "formats": ["nifti"]})
    assert certify.run(study, inputs_of(run), run / "certificate", Tracker()).sensitivity == "released"
    export.run(study, {"certificate": run / "certificate"}, run / "release", Tracker())
    assert verify(run / "release", run / "keys" / "public.pem").ok


def test_export_checks_itself_before_the_folder_appears(fake_run: Run, fake_study: Make, one_accountant: None) -> None:
    run, study = fake_run(), fake_study(export={"formats": ["nifti"]})
    certify.run(study, inputs_of(run), run / "certificate", Tracker())
    (run / "certificate" / "payload" / "nifti" / "dataset.json").write_text("{}")
    with pytest.raises(VerificationError, match=r"dataset\.json was changed"):
        export.run(study, {"certificate": run / "certificate"}, run / "release", Tracker())
    assert not (run / "release").exists()


def test_missing_input_is_named(fake_study: Make, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="synthetic"):
        certify.run(fake_study(), {}, tmp_path / "certificate", Tracker())
    with pytest.raises(StoreError, match="certificate"):
        export.run(fake_study(), {}, tmp_path / "release", Tracker())
