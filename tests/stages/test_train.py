"""Stage train: patients move the denoiser through one bounded, noisy sum a step, and never more often than was paid."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from medsynth import config, store
from medsynth.config import Labelling, Study
from medsynth.diffusion import fitting
from medsynth.diffusion.generator import APPEARANCE, WEIGHTS, Generator, load_generator
from medsynth.diffusion.objective import row_loss
from medsynth.errors import BudgetError, ConfigError, PrivacyError, StoreError
from medsynth.imaging.cohort import Patient, load_patients
from medsynth.models.segmenter import Segmenter, save_segmenter
from medsynth.privacy.entropy import ChaChaEntropy
from medsynth.privacy.gradients_unit import UnitBackend
from medsynth.privacy.ledger import Ledger
from medsynth.privacy.mechanism import DpSgd
from medsynth.stages import labellers, private_training, train
from medsynth.stages.inputs import HISTORY
from medsynth.stages.masks import load_masks
from medsynth.stages.training_job import Job
from medsynth.tracking import Tracker

Before = Callable[..., dict[str, Path]]
T = 12


class Killed(BaseException):
    """Stands for a signal."""


@pytest.fixture
def study(tiny_settings: dict[str, Any]) -> Study:
    return changed(tiny_settings)


def without_privacy(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "name": "tiny-nonprivate", "privacy": {**settings["privacy"], "epsilon": "inf"}}


def changed(settings: dict[str, Any], **values: Any) -> Study:
    return config.parse({**settings, "train": {**settings["train"], "steps": T, "trainable": "bias_norm", **values}})


@pytest.fixture(autouse=True)
def _no_curve(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the epsilon series, eight compositions of which are most of a tiny training, but in 3D."""
    if "tiny_study_3d" not in request.fixturenames:
        monkeypatch.setattr(private_training, "_epsilon_curve", lambda *_: {})


def steps_taken(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[int]:
    """Count the noisy updates; raise inside the one after ``stop_after``."""
    taken: list[int] = []
    original = DpSgd.noisy_mean

    def noisy_mean(self: DpSgd, clipped_sum: Sequence[torch.Tensor], entropy: Any) -> list[torch.Tensor]:
        if stop_after is not None and len(taken) == stop_after:
            raise Killed
        taken.append(1)
        return original(self, clipped_sum, entropy)

    monkeypatch.setattr(DpSgd, "noisy_mean", noisy_mean)
    return taken


def test_the_losses_on_phantoms_are_kept(
    tiny_settings: dict[str, Any], tmp_path: Path, before_training: Before
) -> None:
    study = changed(tiny_settings, pretrain_steps=40, steps=0, appearance={"enabled": False, "coefficients": [2, 2]})
    inputs = before_training(study, tmp_path)
    train.run(study, inputs, inputs["generator"], Tracker())
    history = json.loads((inputs["generator"] / HISTORY).read_text())
    assert list(history) == ["pretrain_loss"] and len(history["pretrain_loss"]) == 2
    assert all(0 < loss < 10 for loss in history["pretrain_loss"])


def test_a_killed_training_without_privacy_goes_on_where_it_was_and_keeps_its_losses(
    tiny_settings: dict[str, Any], tmp_path: Path, before_training: Before, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the pre-training and in the training: no step is taken twice, and the weights are the same."""
    study = changed(without_privacy(tiny_settings), pretrain_steps=45, steps=45, trainable="all")
    monkeypatch.setattr("medsynth.models.fitting._KEEP_EVERY_S", 0.0)
    whole, killed = (before_training(study, tmp_path / name) for name in ("whole", "killed"))
    train.run(study, whole, whole["generator"], Tracker())
    for steps in (30, 40):
        with monkeypatch.context() as patch:
            patch.setattr(fitting, "row_loss", stopped_after(steps))
            with pytest.raises(Killed):
                train.run(study, killed, killed["generator"], Tracker())
    (store.partial(killed["generator"]) / ".pretraining.pt.partial").write_bytes(b"half written")
    monkeypatch.setattr(fitting, "row_loss", stopped_after(90 - 30 - 40))
    train.run(study, killed, killed["generator"], Tracker())
    one, other = (load_file(inputs["generator"] / WEIGHTS) for inputs in (whole, killed))
    assert all(torch.equal(one[name], other[name]) for name in one)
    losses, again = (json.loads((inputs["generator"] / HISTORY).read_text()) for inputs in (whole, killed))
    assert again == {name: pytest.approx(series, rel=1e-6) for name, series in losses.items()}
    assert {name: len(series) for name, series in again.items()} == {"pretrain_loss": 2, "loss": 2}
    assert [e["mechanisms"] for e in Ledger(killed["ledger"]).entries()] == [
        e["mechanisms"] for e in Ledger(whole["ledger"]).entries()
    ]
    assert {path.name for path in killed["generator"].iterdir()} == {path.name for path in whole["generator"].iterdir()}


def test_a_training_without_privacy_killed_after_it_was_completed_ends_with_other_digits_too(
    tiny_settings: dict[str, Any], tmp_path: Path, before_training: Before, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = changed(without_privacy(tiny_settings), trainable="all")
    inputs = before_training(study, tmp_path)
    kill_before_it_is_finished(study, inputs, monkeypatch)
    monkeypatch.setattr(fitting, "row_loss", lambda *arguments: 1.001 * row_loss(*arguments))
    manifest = train.run(study, inputs, inputs["generator"], Tracker())
    assert manifest.sensitivity == "internal"
    entries = Ledger(inputs["ledger"]).entries()
    assert all(entry["status"] == "complete" for entry in entries)
    assert [entry["mechanisms"] for entry in entries].count(entries[-1]["mechanisms"]) == 2, "the training's, twice"


def stopped_after(steps: int) -> Callable[..., torch.Tensor]:
    taken: list[int] = []

    def loss(*arguments: Any) -> torch.Tensor:
        if len(taken) == steps:
            raise Killed
        taken.append(1)
        return row_loss(*arguments)

    return loss


def reservations(inputs: dict[str, Path]) -> list[dict[str, Any]]:
    return [e for e in Ledger(inputs["ledger"]).entries() if e["mechanisms"] == ["dp_sgd:denoiser"]]


def kill_at(
    study: Study, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, stopped: Any
) -> None:
    """Train with ``stopped``, which kills, in the place of a function."""
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stopped)
        with pytest.raises(Killed):
            train.run(study, inputs, inputs["generator"], Tracker())


def kill_before_it_is_finished(study: Study, inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    rename = os.replace

    def stopped(source: Path, *rest: Any) -> None:
        if Path(source) == store.partial(inputs["generator"]):  # after the ledger's last line
            raise Killed
        rename(source, *rest)

    kill_at(study, inputs, monkeypatch, os, "replace", stopped)


def kill(study: Study, inputs: dict[str, Path], after: int, monkeypatch: pytest.MonkeyPatch) -> int:
    with monkeypatch.context() as patch:
        taken = steps_taken(patch, after)
        with pytest.raises(Killed):
            train.run(study, inputs, inputs["generator"], Tracker())
    assert not store.is_done(inputs["generator"])
    return len(taken)


@pytest.mark.parametrize("trainable", ["all", "bias_norm", "lora"])
def test_it_writes_a_generator_and_nothing_else(
    trainable: str, tiny_settings: dict[str, Any], tmp_path: Path, before_training: Before
) -> None:
    study = changed(tiny_settings, trainable=trainable)
    inputs = before_training(study, tmp_path)
    manifest = train.run(study, inputs, inputs["generator"], Tracker())
    assert manifest.sensitivity == "released"
    assert set(manifest.files) == {WEIGHTS, "generator.json", APPEARANCE}
    entries = {entry["id"]: entry for entry in Ledger(inputs["ledger"]).entries()}
    assert [entries[name]["mechanisms"] for name in manifest.ledger_entries] == [
        ["gaussian_sum:appearance", "gaussian_sum:appearance_again"],
        ["dp_sgd:denoiser"],
    ]
    assert all(entry["status"] == "complete" for entry in entries.values())
    assert Ledger(inputs["ledger"]).spent(study.privacy.delta) <= study.privacy.epsilon
    load_generator(inputs["generator"], inputs["autoencoder"])


def test_a_study_of_drafts_releases_statistics_alone(
    tiny_settings: dict[str, Any], tmp_path: Path, before_training: Before
) -> None:
    quick = {"train": {**tiny_settings["train"], "pretrain_steps": 0, "steps": 0}, "synthesise": {"start": 0}}
    study = config.parse({**tiny_settings, **quick})
    inputs = before_training(study, tmp_path)
    manifest = train.run(study, inputs, inputs["generator"], Tracker())
    assert set(manifest.files) == {WEIGHTS, "generator.json", APPEARANCE} and manifest.sensitivity == "released"
    (reserved,) = [entry for entry in Ledger(inputs["ledger"]).entries() if entry["id"] in manifest.ledger_entries]
    assert (
        reserved["mechanisms"] == ["gaussian_sum:appearance", "gaussian_sum:appearance_again"]
        and reserved["status"] == "complete"
    )
    assert load_generator(inputs["generator"], inputs["autoencoder"]).dresser is not None
    with pytest.raises(ConfigError, match="never uses"):
        config.parse({**tiny_settings, **quick, "synthesise": {"start": 1}})


def test_it_runs_in_3d_and_with_opacus(tiny_study_3d: Study, tmp_path: Path, before_training: Before) -> None:
    study = tiny_study_3d.model_copy(
        update={"train": tiny_study_3d.train.model_copy(update={"backend": "opacus", "trainable": "all"})}
    )
    inputs = before_training(study, tmp_path)
    assert train.run(study, inputs, inputs["generator"], Tracker()).releasable


def test_pitfall_01_a_patient_of_many_slices_is_one_unit_with_one_clip(
    tiny_settings: dict[str, Any], tmp_path: Path, before_training: Before, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = changed(tiny_settings, max_records=3, draws=2, sampling_rate=1.0, clip_norm=0.05)
    inputs = before_training(study, tmp_path, range(4), records=5)
    seen: list[tuple[list[int], float]] = []
    original = UnitBackend.clipped_sum

    def clipped_sum(self: UnitBackend, batches: Sequence[Any]) -> Any:
        total = original(self, batches)
        size = sum(float(part.double().square().sum()) for part in total.tensors) ** 0.5
        seen.append(([len(batch["steps"]) for batch in batches], size))
        return total

    monkeypatch.setattr(private_training, "_public_gradient_norm", lambda *_: pytest.fail("the clip norm is given"))
    monkeypatch.setattr(UnitBackend, "clipped_sum", clipped_sum)
    train.run(study, inputs, inputs["generator"], Tracker())
    patients = seen[-T:]
    assert all(rows == [6, 6, 6, 6] for rows, _ in patients), "four patients, 3 slices x 2 draws each"
    assert all(size <= 4 * 0.05 * (1 + 1e-6) for _, size in patients)


def rows_of(study: Study, inputs: dict[str, Path], folder: Path, person: str) -> dict[str, torch.Tensor]:
    folder.mkdir()
    job = Job(study, inputs, folder, "0" * 64, torch.device("cpu"), Tracker())
    torch.manual_seed(job.seed("weights"))
    built = train.build_generator(study.grid, study.train, train.load_codec(inputs["autoencoder"]))
    encoded = {name: rows for name, *rows in job.encoded_patients(built)}
    return private_training.unit_batch(job, built.denoiser.preconditioning, person, *encoded[person], step=3)


def test_a_patients_rows_depend_on_that_patient_alone(
    tiny_settings: dict[str, Any], tmp_path: Path, before_training: Before
) -> None:
    study = changed(tiny_settings, max_records=2)
    whole = before_training(study, tmp_path / "whole", range(5), records=3)
    less = before_training(study, tmp_path / "less", [0, 3], records=3)
    first = rows_of(study, whole, tmp_path / "a", "patient-003")
    second = rows_of(study, less, tmp_path / "b", "patient-003")
    assert len(first["steps"]) == 2 * study.train.draws
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = rows_of(study, whole, tmp_path / "c", "patient-000")
    assert not torch.equal(first["noisy"], other["noisy"])


def test_pitfall_03_rate_noise_and_denominator_do_not_know_the_number_of_patients(
    study: Study, tmp_path: Path, before_training: Before
) -> None:
    entries = []
    for count in (6, 7):
        inputs = before_training(study, tmp_path / str(count), range(count))
        train.run(study, inputs, inputs["generator"], Tracker())
        entries.append([e for e in Ledger(inputs["ledger"]).entries() if e["stage"] == "train"])
    keys = ("events", "denominators", "sampling")
    assert [[e[key] for key in keys] for e in entries[0]] == [[e[key] for key in keys] for e in entries[1]]


def test_pitfall_05_an_empty_draw_is_a_step_of_noise(
    study: Study, tmp_path: Path, before_training: Before, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = before_training(study, tmp_path)
    monkeypatch.setattr(DpSgd, "draw", lambda *_: [])
    taken = steps_taken(monkeypatch)
    silent = torch.zeros(1)
    updates: list[float] = []
    original = torch.optim.Adam.step

    def step(self: torch.optim.Adam, *args: Any) -> Any:
        updates.append(max(float(p.grad.abs().max()) for group in self.param_groups for p in group["params"]))
        return original(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    train.run(study, inputs, inputs["generator"], Tracker())
    assert len(taken) == T and min(updates[-T:]) > float(silent)


@pytest.mark.parametrize("after", [0, 3, 5, 11])
def test_pitfall_16_a_resumed_run_takes_at_most_t_steps_on_one_reservation(
    after: int, study: Study, tmp_path: Path, before_training: Before, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = before_training(study, tmp_path)
    first = kill(study, inputs, after, monkeypatch)
    pretrained = (store.partial(inputs["generator"]) / "pretrained.safetensors").read_bytes()
    kept = store.partial(inputs["generator"]) / "checkpoint.pt"
    assert kept.exists() == (first >= 5)
    monkeypatch.setattr(train, "fit", lambda *_: pytest.fail("pre-training again"))
    keys: list[bytes] = []
    original = ChaChaEntropy._open
    monkeypatch.setattr(ChaChaEntropy, "_open", staticmethod(lambda key: keys.append(key) or original(key)))
    second = steps_taken(monkeypatch)
    manifest = train.run(study, inputs, inputs["generator"], Tracker())
    assert len(pretrained) and first + len(second) <= T
    assert len(second) == T - 5 * ((first // 5) + 1) if first < 10 else len(second) == 0
    assert len(reservations(inputs)) == 1 and reservations(inputs)[0]["status"] == "complete"
    assert reservations(inputs)[0]["id"] in manifest.ledger_entries


@pytest.mark.parametrize("what", ["noise_multiplier", "clip_norm"])
def test_an_interrupted_run_goes_on_with_what_it_reserved_or_not_at_all(
    what: str, study: Study, tmp_path: Path, before_training: Before, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = before_training(study, tmp_path)
    kill(study, inputs, 7, monkeypatch)
    monkeypatch.setattr("medsynth.privacy.mechanism.DpSgd", lambda **plan: DpSgd(**{**plan, what: 0.5 * plan[what]}))
    taken = steps_taken(monkeypatch)
    with pytest.raises(PrivacyError, match="reserved with another noise"):
        train.run(study, inputs, inputs["generator"], Tracker())
    assert taken == []


def test_a_run_killed_as_it_was_reserved_goes_on_with_that_reservation(
    study: Study, tmp_path: Path, before_training: Before, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = before_training(study, tmp_path)

    def stopped(*_: Any) -> None:
        raise Killed

    kill_at(study, inputs, monkeypatch, private_training, "_require_reserved", stopped)
    train.run(study, inputs, inputs["generator"], Tracker())
    assert len(reservations(inputs)) == 1


def test_a_run_killed_before_its_state_names_the_reservation_does_not_pay_twice(
    study: Study, tmp_path: Path, before_training: Before, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = before_training(study, tmp_path)
    save = Job.save

    def stopped(job: Job, state: dict[str, Any]) -> None:
        if "training" in state["entries"]:
            raise Killed
        save(job, state)

    kill_at(study, inputs, monkeypatch, Job, "save", stopped)
    assert [entry["status"] for entry in reservations(inputs)] == ["reserved"]
    taken = steps_taken(monkeypatch)
    train.run(study, inputs, inputs["generator"], Tracker())
    assert len(taken) == T and [entry["status"] for entry in reservations(inputs)] == ["complete"]


def test_a_run_killed_after_its_last_step_ends_with_the_same_weights(
    study: Study, tmp_path: Path, before_training: Before, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = before_training(study, tmp_path)
    kill_before_it_is_finished(study, inputs, monkeypatch)
    before = load_file(store.partial(inputs["generator"]) / WEIGHTS)
    assert reservations(inputs)[0]["status"] == "complete"
    train.run(study, inputs, inputs["generator"], Tracker())
    after = load_file(inputs["generator"] / WEIGHTS)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(reservations(inputs)) == 1


@pytest.mark.parametrize("last", ["checkpoint.pt", "steps.jsonl", "state.json"])
def test_a_run_killed_while_its_scratch_goes_is_finished_and_not_paid_twice(
    last: str, study: Study, tmp_path: Path, before_training: Before, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = before_training(study, tmp_path)
    unlink = Path.unlink

    def stopped(path: Path, missing_ok: bool = False) -> None:
        if path.name == last and (path.parent / "manifest.json").exists():
            raise Killed
        unlink(path, missing_ok)

    kill_at(study, inputs, monkeypatch, Path, "unlink", stopped)
    assert not store.is_done(inputs["generator"])
    store.settle(inputs["generator"])  # as every stage is begun
    manifest = store.read_manifest(inputs["generator"])
    assert dict(manifest.files) == store.digest_tree(inputs["generator"])
    assert [entry["status"] for entry in reservations(inputs)] == ["complete"]


@pytest.mark.parametrize("how", ["deleted", "other settings", "no state", "no journal"])
def test_pitfall_14_a_restart_without_its_journal_is_charged_however_often_it_is_tried(
    how: str, tiny_settings: dict[str, Any], tmp_path: Path, before_training: Before, monkeypatch: pytest.MonkeyPatch
) -> None:
    # without appearance statistics, whose own second release would be refused before
    study = changed(tiny_settings, pretrain_steps=0, appearance={"enabled": False, "coefficients": [2, 2]})
    inputs = before_training(study, tmp_path)
    kill(study, inputs, 7, monkeypatch)
    partial = store.partial(inputs["generator"])
    if how == "deleted":
        for path in partial.iterdir():
            path.unlink()
    elif how == "no journal":
        (partial / "steps.jsonl").unlink()
    elif how == "no state":
        (partial / "state.json").unlink()
    else:
        (partial / "state.json").write_text(json.dumps({"digest": "other", "parents": {}, "entries": {}}))
    taken = steps_taken(monkeypatch)
    for _ in range(3):
        with pytest.raises(BudgetError):
            train.run(study, inputs, inputs["generator"], Tracker())
    assert taken == [] and len(reservations(inputs)) == 1


def test_what_another_configuration_left_is_thrown_away(
    tiny_settings: dict[str, Any],
    study: Study,
    tmp_path: Path,
    before_training: Before,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = before_training(study, tmp_path)
    kill(study, inputs, 6, monkeypatch)
    partial = store.partial(inputs["generator"])
    old = (partial / "pretrained.safetensors").read_bytes()
    (partial / "left-behind").write_text("from the other run")
    other = changed(tiny_settings, pretrain_steps=3, steps=0, appearance={"enabled": False, "coefficients": [2, 2]})
    manifest = train.run(other, inputs, inputs["generator"], Tracker())
    assert set(manifest.files) == {WEIGHTS, "generator.json"} and old
    assert manifest.ledger_entries == ()


def test_without_privacy_it_is_internal_and_the_ledger_says_so(
    tiny_settings: dict[str, Any], tmp_path: Path, before_training: Before
) -> None:
    study = config.parse(without_privacy(tiny_settings))
    inputs = before_training(study, tmp_path)
    manifest = train.run(study, inputs, inputs["generator"], Tracker())
    assert manifest.sensitivity == "internal"
    kinds = {event["kind"] for entry in Ledger(inputs["ledger"]).entries() for event in entry["events"]}
    assert kinds == {"nonprivate"} and Ledger(inputs["ledger"]).taints()


def test_what_patients_show_beside_their_distributions_is_taken_without_privacy_and_the_ledger_says_so(
    tiny_settings: dict[str, Any], tmp_path: Path, before_training: Before
) -> None:
    mixed = {"coefficients": [2, 2], "mixed_patients": 3}
    drafts = without_privacy(tiny_settings) | {"synthesise": {"start": 0}}
    study = changed(drafts, pretrain_steps=0, steps=0, appearance=mixed)
    inputs = before_training(study, tmp_path, numbers=range(6), records=2)
    manifest = train.run(study, inputs, inputs["generator"], Tracker())
    assert manifest.sensitivity == "internal"
    (reserved,) = [entry for entry in Ledger(inputs["ledger"]).entries() if entry["id"] in manifest.ledger_entries]
    # Beside the sums, which are plans without noise: what a patient shows is kept.
    assert reserved["mechanisms"][-1] == "nonprivate" and reserved["status"] == "complete"
    dresser = load_generator(inputs["generator"], inputs["autoencoder"]).dresser
    assert dresser is not None
    label, images = load_masks(inputs["masks"]).draw(0), []
    for seed in (1, 1, 2):
        images.append(dresser.draft(label, np.random.default_rng(seed)))
    assert np.array_equal(images[0], images[1]) and not np.array_equal(images[0], images[2])
    assert len(dresser.statistics.score_beside) == 12, "2 records of 6 patients"


def test_a_private_budget_does_not_pay_for_mixed_patients_even_where_the_configuration_was_not_checked(
    study: Study, tmp_path: Path, before_training: Before, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = before_training(study, tmp_path)
    appearance = study.train.appearance.model_copy(update={"mixed_patients": 3})
    slipped = study.model_copy(update={"train": study.train.model_copy(update={"appearance": appearance})})
    monkeypatch.setattr(Job, "patients", lambda job: pytest.fail("a patient was read"))
    with pytest.raises(BudgetError):
        train.run(slipped, inputs, inputs["generator"], Tracker())


def told_before_each_read(inputs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Collect at each reading of patients whether the ledger had been told of the training."""
    told: list[bool] = []
    original = Job.patients

    def patients(job: Job) -> list[Patient]:
        told.append(any(entry["mechanisms"] == ["nonprivate"] for entry in Ledger(inputs["ledger"]).entries()))
        return original(job)

    monkeypatch.setattr(Job, "patients", patients)
    return told


def test_without_privacy_patients_are_met_mirrored_and_their_spreads_are_the_denoisers(
    tiny_settings: dict[str, Any], tmp_path: Path, before_training: Before, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = {"pretrain_steps": 0, "trainable": "all", "appearance": {"enabled": False, "coefficients": [2, 2]}}
    found = {}
    for name, mirror in (("plain", False), ("mirrored", True)):
        study = changed(without_privacy(tiny_settings), **alone, mirrored=mirror)
        inputs = before_training(study, tmp_path / name)
        told = told_before_each_read(inputs, monkeypatch)
        train.run(study, inputs, inputs["generator"], Tracker())
        assert told == [True, True]
        found[name] = load_generator(inputs["generator"], inputs["autoencoder"])
        images = torch.cat([one.images for one in load_patients(inputs["cohort"], study.grid, "train")])
        spread = found[name].codec.encode(images).std(dim=(0, 2, 3))
        assert torch.allclose(found[name].denoiser.preconditioning.spread.flatten(), spread)
        assert not torch.allclose(found[name].codec.spread, spread, rtol=0.05), "phantoms differ"
    weights = [list(one.denoiser.network.parameters()) for one in found.values()]
    assert any(not torch.equal(one, other) for one, other in zip(*weights, strict=True))


LABELLING = {"networks": 2, "channels": [4, 8], "steps": 3, "batch_size": 2}


def labelled(settings: dict[str, Any], **values: Any) -> Study:
    return changed(without_privacy(settings), labelling=LABELLING, **values)


@pytest.mark.parametrize("steps", [0, T])
def test_networks_that_label_pairs_learn_without_privacy_and_the_ledger_says_so(
    steps: int, tiny_settings: dict[str, Any], tmp_path: Path, before_training: Before
) -> None:
    study = labelled(tiny_settings, steps=steps)
    inputs = before_training(study, tmp_path)
    manifest = train.run(study, inputs, inputs["generator"], Tracker())
    networks = {f"labeller-{number}.safetensors" for number in (0, 1)}
    assert manifest.sensitivity == "internal" and manifest.details["labellers"] == 2
    assert networks < set(manifest.files) and len({manifest.files[name] for name in networks}) == 2, "two seeds"
    (reserved,) = [entry for entry in Ledger(inputs["ledger"]).entries() if entry["mechanisms"] == ["nonprivate"]]
    assert reserved["id"] in manifest.ledger_entries and reserved["status"] == "complete"
    assert reserved["outputs"] == {name: manifest.files[name] for name in (WEIGHTS, *sorted(networks))}
    labeller = load_generator(inputs["generator"], inputs["autoencoder"]).labeller
    assert labeller is not None and len(labeller.networks) == 2


def test_a_network_that_labels_pairs_is_not_trained_twice_and_a_kill_leaves_no_patient_behind(
    tiny_settings: dict[str, Any], tmp_path: Path, before_training: Before, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = labelled(tiny_settings)
    whole, killed = (before_training(study, tmp_path / name) for name in ("whole", "killed"))
    files = train.run(study, whole, whole["generator"], Tracker()).files
    trained: list[str] = []

    def save(model: Segmenter, path: Path) -> None:
        if len(trained) == 1:
            (path.parent / ".pools-left").mkdir()
            (path.parent / ".pools-left" / "patients.safetensors").write_bytes(b"a kill -9 leaves it")
            trained.append("killed")
            raise Killed
        trained.append(path.stem)
        save_segmenter(model, path)

    monkeypatch.setattr(labellers, "save_segmenter", save)
    with pytest.raises(Killed):
        train.run(study, killed, killed["generator"], Tracker())
    build = train.build_generator

    def built(*arguments: Any) -> Generator:
        assert not list(store.partial(killed["generator"]).glob(".pools-*")), "first of all"
        return build(*arguments)

    monkeypatch.setattr(train, "build_generator", built)
    manifest = train.run(study, killed, killed["generator"], Tracker())
    assert trained == ["labeller-0", "killed", "labeller-1"]
    assert manifest.files == files and not list(killed["generator"].glob(".pools-*"))


def test_a_private_budget_does_not_pay_for_networks_that_label_even_where_the_configuration_was_not_checked(
    study: Study, tmp_path: Path, before_training: Before, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = before_training(study, tmp_path)
    quick = {"steps": 0, "pretrain_steps": 0, "labelling": Labelling.model_validate(LABELLING)}
    slipped = study.model_copy(update={"train": study.train.model_copy(update=quick)})
    monkeypatch.setattr(labellers, "write_patients", lambda *_: pytest.fail("patients were handed on"))
    with pytest.raises(BudgetError):
        train.run(slipped, inputs, inputs["generator"], Tracker())
    job = Job(slipped, inputs, tmp_path, "", torch.device("cpu"), Tracker())
    with pytest.raises(PrivacyError, match=r"train\.labelling\.networks"):
        labellers.train_labellers(job)


def test_a_generator_from_internal_masks_is_internal_even_if_no_patient_trains_it(
    tiny_settings: dict[str, Any], tmp_path: Path, before_training: Before
) -> None:
    public = {"enabled": False, "coefficients": [2, 2]}
    study = changed(without_privacy(tiny_settings), steps=0, appearance=public)
    inputs = before_training(study, tmp_path)
    assert train.run(study, inputs, inputs["generator"], Tracker()).sensitivity == "internal"


def test_it_needs_what_comes_before(study: Study, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="autoencoder"):
        train.run(study, {"cohort": tmp_path}, tmp_path / "generator", Tracker())
