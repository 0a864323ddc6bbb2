"""Each rule speaks of a run that was spoilt for it, and of a good run none does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from healthy_run import audit, mean_of, reserve, steps, write_audits, write_run

from medsynth import config, store
from medsynth.config import Appearance, Grid, Study
from medsynth.doctor import thresholds
from medsynth.doctor.evidence import gather
from medsynth.doctor.examination import RULES, doctor, examine
from medsynth.doctor.finding import Finding
from medsynth.doctor.privacy_rules import noisy_statistics
from medsynth.doctor.thresholds import Threshold
from medsynth.errors import StoreError
from medsynth.privacy.accounting import Event
from medsynth.release.audits import SCORES
from medsynth.stages.inputs import HISTORY
from medsynth.stages.masks import STATISTICS
from medsynth.store import digest_tree
from medsynth.study import RESOURCES, STUDY

Spoil = Callable[[Path], None]


@pytest.fixture(scope="module")
def template(tiny_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("healthy") / "run"
    write_run(run, tiny_settings)
    return run


@pytest.fixture
def healthy(template: Path, tmp_path: Path) -> Path:
    """A copy of a run in which nothing limits quality."""
    return shutil.copytree(template, tmp_path / "run")


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def reported(*path: str, value: Any) -> Spoil:
    """Return what writes one value of the report."""

    def change(report: Any) -> None:
        for name in path[:-1]:
            report = report[name]
        report[path[-1]] = value

    return lambda run: edit(run / "report" / "report.json", change)


def study_of(run: Path) -> Study:
    return config.load(run / STUDY)


def reserved(mechanism: Any) -> Spoil:
    return lambda run: reserve(run, study_of(run), mechanism)


def history(**series: list[float]) -> Spoil:
    return lambda run: edit(run / "generator" / HISTORY, lambda kept: kept.update(series))


def scores(members: float, strangers: float) -> Spoil:
    return lambda run: np.savez(
        run / "audit" / SCORES, generator_members=np.full(9, members), generator_strangers=np.full(9, strangers)
    )


def used(verb: str, **values: float) -> Spoil:
    return lambda run: edit(run / RESOURCES, lambda kept: kept[verb].update(values))


def noisy_masks(at: int) -> Spoil:
    """Return what drowns place, mean shape or variety of the label maps (0, 1, 2) in noise."""

    def spoil(run: Path) -> None:
        path = run / "masks" / STATISTICS
        with np.load(path) as arrays:
            kept = dict(arrays)
        kept["noise"][at] = 0.9
        np.savez(path, **kept)

    return spoil


NO_PAIRS: dict[str, Any] = {"touching": {}, "apart": {}, "nested": {}}
SPOILT: list[tuple[str, Spoil]] = [
    ("audits", lambda run: write_audits(run / "audit", audit("fail"))),
    ("audits", lambda run: write_audits(run / "audit", audit("pass", caught=False))),
    ("weak-judge", reported("dice", "real_only", "mean", value=0.5)),
    ("copies", reported("memorisation", "median_ratio", value=0.3)),
    ("copies", reported("memorisation", "nearer_than_held_out_p5", value=0.6)),
    ("familiar", scores(1.2, 0.6)),
    ("lossy-codec", reported("reconstruction", "psnr_db", value=22.0)),
    ("lossy-codec", reported("reconstruction", "ssim", value=0.8)),
    ("lossy-codec", reported("reconstruction", "dice", "reconstructions", value=0.7)),
    ("lossy-codec", reported("dice", "reconstructed", value={"mean": 0.7})),
    ("latent-scale", reported("reconstruction", "latents", "std", value=3.0)),
    ("latent-scale", reported("reconstruction", "latents", "std", value=0.3)),
    ("still-learning", history(pretrain_loss=[1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])),
    ("still-learning", history(loss=[1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])),
    ("weak-denoiser", scores(0.05, 0.05)),
    ("disobeyed-masks", reported("agreement", "mean", value=0.2)),
    ("alike", reported("fidelity", "ssim_within_synthetic", value=0.9)),
    ("implausible-label-maps", reported("label_maps", "plausible", "synthetic", value=0.0)),
    ("lost-relations", reported("label_maps", "relations", value={**NO_PAIRS, "nested": {"a": 0.5}, "worst": 0.5})),
    ("noise-pose", noisy_masks(0)),
    ("noise-shape", noisy_masks(1)),
    ("noise-spread", noisy_masks(2)),
    ("noise-appearance", reserved(mean_of("appearance", 4.0, patients=60))),
    ("noise-training", reserved(steps(2.0, patients=30))),
    ("few-patients", reserved(mean_of("appearance", 4.0, patients=60))),
    ("time", used("segment", elapsed_s=9000.0)),
    ("memory", used("train", peak_memory_gib=7.5)),
]  # fmt: skip


def rules(run: Path) -> list[str]:
    return [finding.rule for finding in examine(gather(run))]


def test_of_a_good_run_there_is_nothing_to_say(healthy: Path) -> None:
    evidence = gather(healthy)
    assert examine(evidence) == [] and evidence.absent == ()
    assert set(evidence.noise) == {"pose", "shape", "spread", "appearance"}
    assert all(0 < ratio < 0.2 for ratio in evidence.noise.values())


@pytest.mark.parametrize(("rule", "spoil"), SPOILT, ids=[f"{n}-{rule}" for n, (rule, _) in enumerate(SPOILT)])
def test_a_spoilt_run_is_found_out(rule: str, spoil: Spoil, healthy: Path) -> None:
    spoil(healthy)
    found = examine(gather(healthy))
    assert rule in [finding.rule for finding in found]
    for finding in found:
        assert finding.off > 1 and finding.says and finding.figure and finding.threshold.reason and finding.source


def test_every_rule_is_spoilt_once() -> None:
    names = {rule for rule, _ in SPOILT}
    assert len(names) >= len(RULES)
    spoken = {"weak-judge", "copies", "familiar", "lossy-codec", "latent-scale", "still-learning", "weak-denoiser"}
    assert spoken < names


def test_every_change_names_a_key_of_the_configuration(healthy: Path) -> None:
    keys = set(config.flatten(study_of(healthy)))
    for _, spoil in SPOILT:
        spoil(healthy)
    found = examine(gather(healthy))
    assert len(found) > 10
    changed(healthy, synthesise={"start": 0})
    found += examine(gather(healthy))
    named = {change.key for finding in found for change in finding.changes}
    known = {key for key in keys if not key.startswith("grid.labels")}
    assert named <= known, named - known


def test_every_threshold_has_its_reason() -> None:
    found = {name: one for name, one in vars(thresholds).items() if isinstance(one, Threshold)}
    assert len(found) >= 17 and all(name.isupper() and len(one.reason) > 20 for name, one in found.items())


def test_what_stops_comes_first_then_what_is_farthest_off(healthy: Path) -> None:
    used("segment", elapsed_s=1e6)(healthy)
    reported("agreement", "mean", value=0.3)(healthy)
    reported("label_maps", "plausible", "synthetic", value=0.0)(healthy)
    reported("memorisation", "median_ratio", value=0.6)(healthy)
    assert rules(healthy) == ["copies", "implausible-label-maps", "disobeyed-masks", "time"]


def test_a_weak_judge_says_nothing_of_masks(healthy: Path) -> None:
    reported("dice", "real_only", "mean", value=0.5)(healthy)
    reported("agreement", "mean", value=0.01)(healthy)
    assert rules(healthy) == ["weak-judge"]


def test_volumes_that_were_asked_for_are_not_called_implausible(healthy: Path) -> None:
    reported("label_maps", "plausible", "synthetic", value=0.0)(healthy)
    edit(healthy / "synthetic" / "manifest.json", lambda m: m["details"].update(volume_factors={"organ": 2.0}))
    digest = store.read_manifest(healthy / "synthetic").digest
    edit(healthy / "report" / "manifest.json", lambda m: m["parents"].update(synthetic=digest))
    assert gather(healthy).report is not None and rules(healthy) == []


def make_drafts(run: Path) -> None:
    """Let the run's pairs be drafts, with no private step."""
    changed(run, synthesise={"start": 0})
    edit(run / "generator" / "manifest.json", lambda m: m["details"].update(trainable_parameters=0))


def changed(run: Path, **sections: dict[str, Any]) -> None:
    study = study_of(run).model_dump(mode="json")
    for name, values in sections.items():
        study[name] |= values
    (run / STUDY).write_text(json.dumps(study))


def test_neither_codec_nor_denoiser_limits_pairs_that_are_drafts(healthy: Path) -> None:
    for rule, spoil in SPOILT:
        if rule in ("weak-denoiser", "still-learning", "lossy-codec", "latent-scale", "noise-training"):
            spoil(healthy)
    assert len(rules(healthy)) == 6
    make_drafts(healthy)
    assert rules(healthy) == []


@pytest.mark.parametrize(
    ("rule", "left"),
    [
        ("disobeyed-masks", {"train.appearance.coefficients"}),
        ("alike", {"masks.spread_clip_norm"}),
        ("copies", {"privacy.epsilon"}),
    ],
)
def test_what_is_advised_for_drafts_alters_drafts(rule: str, left: set[str], healthy: Path) -> None:
    next(spoil for name, spoil in SPOILT if name == rule)(healthy)
    changed(healthy, synthesise={"guidance": 2.0})

    def advised() -> set[str]:
        (finding,) = [finding for finding in examine(gather(healthy)) if finding.rule == rule]
        return {change.key for change in finding.changes}

    assert left < advised()
    make_drafts(healthy)
    assert advised() == left


def test_copies_among_mixed_drafts_want_more_patients_mixed(healthy: Path) -> None:
    reported("memorisation", "median_ratio", value=0.3)(healthy)
    make_drafts(healthy)
    study = study_of(healthy).model_dump(mode="json")
    study["name"], study["privacy"]["epsilon"] = "tiny-nonprivate", "inf"
    study["train"]["appearance"]["mixed_patients"] = 2
    (healthy / STUDY).write_text(json.dumps(study))
    (finding,) = [finding for finding in examine(gather(healthy)) if finding.rule == "copies"]
    assert str(finding.changes[0]) == "raise train.appearance.mixed_patients"


def test_without_privacy_masks_that_are_not_obeyed_want_networks_that_label_pairs(healthy: Path) -> None:
    def advised() -> str:
        (finding,) = [finding for finding in examine(gather(healthy)) if finding.rule == "disobeyed-masks"]
        return str(finding.changes[0])

    reported("agreement", "mean", value=0.2)(healthy)
    assert "labelling" not in advised()
    study = study_of(healthy).model_dump(mode="json")
    study["name"], study["privacy"]["epsilon"] = "tiny-nonprivate", "inf"
    (healthy / STUDY).write_text(json.dumps(study))
    assert advised().startswith("set train.labelling.networks to 3")
    study["synthesise"]["start"] = 0  # as in hippocampus-3d-nonprivate
    (healthy / STUDY).write_text(json.dumps(study))
    assert advised().startswith("set train.labelling.networks to 3")
    reported("labellers", value=3)(healthy)
    assert "disobeyed-masks" not in rules(healthy)


def test_a_noisy_appearance_wants_more_budget_and_a_quiet_one_more_detail(healthy: Path) -> None:
    def advised() -> set[str]:
        (finding,) = [finding for finding in examine(gather(healthy)) if finding.rule == "disobeyed-masks"]
        return {change.key for change in finding.changes if "appearance" in change.key}

    reported("agreement", "mean", value=0.2)(healthy)
    assert advised() == {"train.appearance.coefficients"}
    reserved(mean_of("appearance", 4.0, patients=60))(healthy)
    assert advised() == {"privacy.shares.appearance"}
    changed(healthy, train={"appearance": study_of(healthy).train.appearance.model_dump() | {"enabled": False}})
    assert advised() == {"train.appearance.enabled"}


def test_a_public_template_is_advised_where_it_may_show_what_noise_hides(healthy: Path) -> None:
    evidence = replace(gather(healthy), noise={"appearance": 5.0})
    brain = Grid(shape=(16, 16, 16), spacing_mm=(1, 1, 1), labels={0: "none", 1: "organ"})
    others = Appearance(template_centre_mm=(0, 0, 0)), Appearance(factors=2)

    def advised(**sections: Any) -> bool:
        (finding,) = noisy_statistics(replace(evidence, study=evidence.study.model_copy(update=sections)))
        return "train.appearance.template_centre_mm" in {change.key for change in finding.changes}

    assert not advised() and advised(grid=brain)
    for other in others:
        assert not advised(grid=brain, train=evidence.study.train.model_copy(update={"appearance": other}))


def test_private_steps_of_a_denoiser_that_makes_no_pair_are_named(healthy: Path) -> None:
    changed(healthy, synthesise={"start": 0})
    assert rules(healthy) == ["unused-training"]
    changed(healthy, train={"steps": 0, "pretrain_steps": 0})
    assert rules(healthy) == []
    changed(healthy, train={"steps": 3, "pretrain_steps": 2}, synthesise={"start": 0.5})
    assert rules(healthy) == []


def test_training_knobs_still_help_against_time_and_leaks(healthy: Path) -> None:
    used("train", elapsed_s=9000.0)(healthy)
    scores(1.2, 0.6)(healthy)
    make_drafts(healthy)
    familiar, slow = examine(gather(healthy))
    assert [change.key for change in familiar.changes] == ["train.steps", "privacy.epsilon"]
    assert slow.changes[0].key == "train.pretrain_steps"


def test_figures_of_a_denoiser_that_is_not_trained_are_not_missed(healthy: Path) -> None:
    (healthy / "generator" / HISTORY).unlink()
    (healthy / "audit" / SCORES).unlink()
    assert len(gather(healthy).absent) == 2
    changed(healthy, train={"steps": 0, "pretrain_steps": 0}, synthesise={"start": 0})
    assert gather(healthy).absent == ()
    changed(healthy, train={"pretrain_steps": 100})
    assert [name for name in gather(healthy).absent if "audit" in name] == [], "an untaught one is not attacked"


def test_more_parameters_are_advised_only_where_they_would_gain(healthy: Path) -> None:
    def advised() -> list[str]:
        return [str(change) for finding in examine(gather(healthy)) for change in finding.changes]

    changed(healthy, train={"trainable": "bias_norm"})
    edit(healthy / "generator" / "manifest.json", lambda m: m["details"].update(trainable_parameters=2_000))
    reserved(steps(2.0, patients=400))(healthy)
    assert "set train.trainable to all" in advised()
    reserved(steps(2.0, patients=30))(healthy)
    assert advised() and "set train.trainable to all" not in advised()


def test_a_report_of_other_pairs_is_not_believed(healthy: Path) -> None:
    reported("agreement", "mean", value=0.1)(healthy)
    edit(healthy / "synthetic" / "manifest.json", lambda m: m["details"].update(pairs=7))
    evidence = gather(healthy)
    assert evidence.report is None and "evaluate" in " ".join(evidence.absent) and examine(evidence) == []


def test_half_a_run_is_read_as_far_as_it_came(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history(pretrain_loss=[1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])(healthy)
    (healthy / "generator").rename(store.partial(healthy / "generator"))
    (store.partial(healthy / "generator") / "manifest.json").unlink()
    for name in ("synthetic", "audit", "report"):
        shutil.rmtree(healthy / name)
    (healthy / RESOURCES).unlink()
    assert rules(healthy) == ["still-learning"]
    doctor(healthy)
    assert capsys.readouterr().out.count("not looked at") == 3
    for name in (".generator.partial", "masks", "autoencoder"):
        shutil.rmtree(healthy / name)
    (healthy / "ledger.jsonl").unlink()
    assert rules(healthy) == [] and len(gather(healthy).absent) == 5


def test_a_report_of_an_older_version_is_read_as_far_as_it_goes(healthy: Path) -> None:
    def older(report: Any) -> None:
        del report["label_maps"], report["agreement"], report["fidelity"]
        report["reconstruction"] = {"mae": 0.1, "psnr_db": 22.0}

    edit(healthy / "report" / "report.json", older)
    assert rules(healthy) == ["lossy-codec"]


def test_without_privacy_no_noise_is_looked_for(healthy: Path) -> None:
    study = study_of(healthy)
    privacy = study.privacy.model_copy(update={"epsilon": float("inf")})
    (healthy / STUDY).write_text(config.dump(study.model_copy(update={"name": "tiny-nonprivate", "privacy": privacy})))
    (healthy / "ledger.jsonl").unlink()
    reserve(healthy, study, Event("nonprivate"))
    assert rules(healthy) == [] and gather(healthy).noise == {} and gather(healthy).absent == ()


def test_it_says_that_it_is_internal_and_writes_nothing(healthy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reported("agreement", "mean", value=0.2)(healthy)
    before = digest_tree(healthy)
    doctor(healthy)
    text = capsys.readouterr().out
    assert text.startswith("INTERNAL") and "raise train.pretrain_steps" in text and "0.7" in text
    doctor(healthy, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["internal"] is True and found["not_measured"] == []
    (finding,) = found["findings"]
    assert finding["rule"] == "disobeyed-masks" and finding["rank"] == 1 and finding["threshold"]["value"] == 0.7
    assert finding["changes"][0] == {"key": "train.pretrain_steps", "direction": "raise", "to": ""}
    assert digest_tree(healthy) == before


def test_a_folder_that_is_no_run_is_refused_like_elsewhere(tmp_path: Path, healthy: Path) -> None:
    with pytest.raises(StoreError, match="this folder is no run"):
        doctor(tmp_path / "nothing")
    (healthy / "report" / "report.json").write_text("{")
    with pytest.raises(StoreError, match=r"report.json of the run cannot be read"):
        doctor(healthy)


def test_patients_and_epsilon_that_would_do_follow_the_noise(healthy: Path) -> None:
    def few() -> Finding:
        return next(finding for finding in examine(gather(healthy)) if finding.rule == "few-patients")

    reserved(mean_of("appearance", 4.0, patients=60))(healthy)
    once = few()
    reserved(mean_of("appearance", 4.0, patients=30))(healthy)
    assert few().value == pytest.approx(2 * once.value) and "patients are needed" in once.figure
