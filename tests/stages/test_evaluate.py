"""Stage evaluate: the report is complete, honest at its edges, and shows no patient outside its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_segment import folders, reserve_masks, study  # the same tiny cohort

from medsynth import store
from medsynth.config import Study
from medsynth.errors import InputError, StoreError
from medsynth.imaging.cohort import DRAWN, Pair, load_pairs, read_pairs, write_pair
from medsynth.models.autoencoder import build_codec, save_codec
from medsynth.stages import evaluate, report_page, segment
from medsynth.stages.synthesise import LABELLERS
from medsynth.tracking import Tracker

EVALUATE = {"bootstrap": 50, "montage": 2, "agreement_pairs": 3}


class Recorder(Tracker):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.figures: set[str] = set()

    def metrics(self, values: Any, step: int | None = None) -> None:
        self.values.update(values)

    def figure(self, path: Path, name: str) -> None:
        self.figures.add(name)


def _inputs(small: Study, root: Path, **counts: int) -> dict[str, Path]:
    inputs = folders(small, root, **counts)
    segment.run(small, inputs, root / "segmenter", Tracker())
    with store.create(root / "autoencoder", "encode", "0" * 64) as folder:
        save_codec(build_codec(small.grid, small.encode), small.grid, small.encode, folder.path)
        folder.finish("public")
    reserve_masks(small, root)
    names = ("segmenter", "autoencoder")
    return {**inputs, **{name: root / name for name in names}, "ledger": root / "ledger.jsonl"}


@pytest.fixture(scope="module", params=[2, 3])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recorder, Study]:
    """An evaluated tiny study."""
    root = tmp_path_factory.mktemp("run")
    small = study(request.param, evaluate=EVALUATE, segment={"channels": [4, 8], "steps": 60, "batch_size": 4})
    recorder = Recorder()
    manifest = evaluate.run(small, _inputs(small, root, train=6, test=3, pairs=5), root / "report", recorder)
    assert manifest.sensitivity == "internal"
    return root / "report", recorder, small


def test_the_report_holds_what_was_promised(finished: tuple[Path, Recorder, Study]) -> None:
    report = json.loads((finished[0] / "report.json").read_text())
    assert set(report["dice"]) == {"real_only", "synthetic_only", "mixed"} and report["unit"] == "patient"
    for block in [*report["dice"].values(), report["floor"]]:
        assert block["ci95"][0] <= block["mean"] <= block["ci95"][1] and block["n_patients"] == 3
        assert set(block["per_label"]) == {"organ"} and block["per_label"]["organ"]["mean"] == block["mean"]
    assert report["dice"]["real_only"]["seeds"]["0"] == pytest.approx(report["dice"]["real_only"]["mean"])
    assert report["n_empty"] == 0 and "label maps are empty" not in (finished[0] / "report.html").read_text()
    assert 0 < report["epsilon"] < 8 and report["delta"] == 1e-4
    assert report["agreement"]["n_pairs"] == 3 and report["reconstruction"]["psnr_db"] > 60
    real = report["dice"]["real_only"]["mean"]
    expected = report["dice"]["synthetic_only"]["mean"] / real
    assert report["relative_to_real"]["synthetic_only"] == pytest.approx(expected)


def test_label_maps_and_codec_are_measured_beside_real_ones(finished: tuple[Path, Recorder, Study]) -> None:
    report = json.loads((finished[0] / "report.json").read_text())
    volume = report["label_maps"]["labels"]["organ"]["measures"]["volume"]
    assert volume["real"]["p50"] > 0 and volume["wasserstein"] >= 0 and report["label_maps"]["plausible"]["train"] >= 0
    codec = report["reconstruction"]
    assert codec["ssim"] > 0.99 and codec["dice"]["reconstructions"] == pytest.approx(codec["dice"]["originals"])
    assert (finished[0] / "label_maps.png").stat().st_size > 5_000


def test_the_page_is_self_contained_and_names_no_patient(finished: tuple[Path, Recorder, Study]) -> None:
    page = (finished[0] / "report.html").read_text()
    assert any(f"Median {size} of organ" in page for size in ("area (mm²)", "volume (mm³)"))
    assert "INTERNAL" in page and page.count("data:image/png;base64,") == 5
    for text in [page, (finished[0] / "report.json").read_text()]:
        assert "http" not in text and "patient-" not in text and "case-" not in text and str(finished[0]) not in text


def test_no_picture_of_a_patient_reaches_the_tracker(finished: tuple[Path, Recorder, Study]) -> None:
    _, recorder, _ = finished
    names = {"dice", "synthetic", "memorisation", "label_maps", "losses"}
    assert recorder.figures == {f"evaluate/{name}.png" for name in names}
    assert {"dice/real_only", "dice/mixed/organ", "floor", "agreement", "epsilon"} <= set(recorder.values)


def test_a_study_without_privacy_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def with_two_empty(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = load_pairs(*arguments)
        labels[:2] = 0
        return images, labels

    monkeypatch.setattr(evaluate, "load_pairs", with_two_empty)
    sections = {"name": "tiny-nonprivate", "privacy": {"epsilon": "inf", "declared_patients": 16}}
    tiny = {"channels": [4, 8], "steps": 1, "batch_size": 1, "regimes": ["synthetic_only"]}
    small = study(2, evaluate=EVALUATE, segment=tiny, **sections)
    evaluate.run(small, _inputs(small, tmp_path), tmp_path / "report", Tracker())
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert report["epsilon"] == "inf" and report["agreement"] is None and report["relative_to_real"] == {}
    page = (tmp_path / "report" / "report.html").read_text()
    assert f"2 of the {report['n_pairs']} synthetic label maps are empty" in page
    assert "not private" in page and "only the regime real_only tells" in page and "does not beat it" not in page


def test_a_cohort_without_test_patients_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    small = study(2, evaluate=EVALUATE, segment={"channels": [4, 8], "steps": 1, "batch_size": 1})
    with pytest.raises(InputError, match="no test patient"):
        evaluate.run(small, _inputs(small, tmp_path, test=0), tmp_path / "report", Tracker())
    assert not list(tmp_path.glob("*report*"))


def _report(synthetic: dict[str, float | None], real: dict[str, float | None], agreement: float) -> dict[str, Any]:
    block: dict[str, Any] = {"ci95": [0.6, 0.7], "n_patients": 3}
    return {
        "dice": {
            "synthetic_only": {**block, **synthetic},
            "real_only": {**block, **real},
            "mixed": {**block, "mean": 0.65},
        },
        "floor": {"mean": 0.68},
        "relative_to_real": {"synthetic_only": 0.8},
        "agreement": {"mean": agreement},
        "label_maps": {"plausible": {"synthetic": 0.25, "train": 0.8}},
        "memorisation": {"median_ratio": 0.3, "nearer_than_held_out_p5": 0.9},
        "epsilon": "inf",
    }


def test_a_dice_at_the_floor_is_called_what_it_is() -> None:
    report = _report({"mean": 0.69, "skill": 0.03}, {"mean": 0.86, "skill": 1.0}, agreement=0.2)
    text = " ".join(report_page.reading(report))
    assert "next to nothing was learnt" in text and "do not obey" in text and "look at the pictures" in text
    assert "25% of the synthetic label maps" in text and "80%" in text
    attack = {"false_positive_rate": 0.1, "true_positive_rate_at_most": 0.9}
    report |= {"epsilon": 7.9921, "delta": 1e-4, "attack": attack}
    shown = " ".join([*report_page.reading(report), *report_page._cards(report)])
    assert shown.count("7.993") == 2, "rounded up, as in the certificate"


def test_a_model_too_weak_to_judge_pairs_says_nothing_of_their_images_either() -> None:
    weak = _report({"mean": 0.5, "skill": None}, {"mean": 0.6, "skill": None}, agreement=0.59)
    text = " ".join(report_page.reading(weak))
    assert "too weak to judge" in text and "says nothing of the images" in text and "obey" not in text
    assert "Adding synthetic pairs" not in text
    sound = _report({"mean": 0.75, "skill": 0.4}, {"mean": 0.86, "skill": 1.0}, agreement=0.84)
    text = " ".join(report_page.reading(sound))
    assert "images obey their label maps" in text and "Adding synthetic pairs" in text


def test_where_networks_labelled_the_pairs_the_page_says_what_images_are_held_against() -> None:
    sound = _report({"mean": 0.75, "skill": 0.4}, {"mean": 0.86, "skill": 1.0}, agreement=0.84)
    text = " ".join(report_page.reading({**sound, "labellers": 3}))
    assert "see in the images (3 of them together), not what the images were drawn for" in text
    assert "finds the label maps that the synthetic images were drawn for with a Dice of 0.840" in text
    plain = " ".join(report_page.reading({**sound, "labellers": 0}))
    assert "finds the label maps in the synthetic images with a Dice of 0.840" in plain and "together" not in plain


def test_images_are_held_against_what_they_were_drawn_for_whatever_label_maps_the_pairs_have(
    finished: tuple[Path, Recorder, Study], tmp_path: Path
) -> None:
    """Label maps that networks see are what networks find, whatever the generator drew."""
    run, _, small = finished

    def agreement(folder: Path) -> float:
        read = {name: run.parent / name for name in ("cohort", "autoencoder", "segmenter")} | {"synthetic": folder}
        found = evaluate._agreement(small, evaluate._load(small, read))
        assert found is not None
        return float(found["mean"])

    relabelled, plain = tmp_path / "synthetic", run.parent / "synthetic"
    with store.create(relabelled, "synthesise", "0" * 64) as folder:
        for pair in read_pairs(plain):
            write_pair(folder.path, Pair(pair.name, pair.image, np.zeros_like(pair.label), pair.label), small.grid)
        folder.finish("internal", details={LABELLERS: 3})
    assert 0 < agreement(plain) == agreement(relabelled)
    shutil.rmtree(relabelled / DRAWN)
    with pytest.raises(StoreError, match="run the stage synthesise again"):
        agreement(relabelled)


def test_what_an_audit_shows_is_said_once_for_all_that_it_looked_at() -> None:
    finding = {"audit": "replay", "shows": "One thing.", "subject": "masks", "measures": "a change", "detail": ""}
    finding |= {"value": 1.0, "low": 1.0, "high": 1.0, "allowed": 1.0, "controls": [], "verdict": "pass"}
    page = report_page._audits([finding, {**finding, "subject": "denoiser"}, {**finding, "shows": "Another."}])
    assert "<li><b>replay</b> of masks, denoiser: One thing.</li>" in page
    assert "<li><b>replay</b> of masks: Another.</li>" in page


def test_numbers_that_json_cannot_hold_are_translated() -> None:
    assert evaluate._plain({"a": float("inf"), "b": [float("nan"), 1.0]}) == {"a": "inf", "b": [None, 1.0]}
    assert torch.isfinite(torch.tensor(evaluate._plain(1.5)))
