"""What may not be certified, pitfall by pitfall (numbers as in docs/explanation of the privacy pitfalls)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from medsynth import store
from medsynth.config import Study
from medsynth.errors import CertificationError
from medsynth.privacy.accounting import Event
from medsynth.privacy.ledger import Ledger
from medsynth.release import gate, statement
from medsynth.release.ancestry import walk

Run = Callable[..., Path]


def refusals(run: Path, study: Study) -> list[str]:
    return gate.refusals(walk(run / "synthetic", {}), Ledger(run / "ledger.jsonl"), study.privacy)


def test_a_sound_run_is_not_refused(fake_run: Run, fake_study: Callable[..., Study]) -> None:
    assert refusals(fake_run(), fake_study()) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        pytest.param({"codec_reads_patients": True}, "latent codec", id="pitfall_10_codec_trained_on_patients"),
        pytest.param(
            {"synthesis_reads_patients": True}, "mask or image", id="pitfall_12_real_mask_conditions_a_sample"
        ),
        pytest.param({"report_feeds_synthetic": True}, "may stop a release", id="pitfall_13_a_report_shapes_the_pairs"),
        pytest.param({"synthetic_sensitivity": "internal"}, "'synthetic' is internal", id="pitfall_15_internal_values"),
        pytest.param({"generator_sensitivity": "internal"}, "'generator' is internal", id="internal_generator"),
        pytest.param({"noise_source": "test_only"}, "repeatable noise", id="pitfall_16_repeatable_noise"),
        pytest.param({"charged_config": "other"}, "another configuration", id="pitfall_18_charged_other_config"),
        pytest.param(
            {"segmenter_feeds_synthetic": True}, "'segmenter' is internal", id="pitfall_19_segmenter_exported"
        ),
        pytest.param({"nonprivate": True}, "without a mechanism", id="nonprivate_step"),
        pytest.param({"generator_names_entry": False}, "names no ledger entry", id="spend_forgotten"),
        pytest.param({"generator_completes": False}, "never completed", id="unfinished_spend"),
        pytest.param({"noise": 0.75}, "the budget is 8", id="over_budget"),
        pytest.param({"abandoned": 3, "noise": 1.2}, "the budget is 8", id="pitfall_14_restarts_are_charged"),
        pytest.param({"salt": ""}, "salt", id="cohort_digest_without_salt"),
        pytest.param({"generator_sensitivity": "public"}, "calls itself public", id="patients_called_public"),
        pytest.param({"synthetic_sensitivity": "private"}, "'synthetic' is private", id="private_payload"),
    ],
)
def test_refused_with_its_name(fake_run: Run, fake_study: Callable[..., Study], wrong: dict, message: str) -> None:
    reasons = refusals(fake_run(**wrong), fake_study())
    assert any(message in reason for reason in reasons), reasons


def test_digests_of_the_same_cohort_differ_so_that_nobody_can_guess_one(tmp_path: Path) -> None:
    digests = set()
    for name in ("a", "b"):
        with store.create(tmp_path / name, "ingest", "config") as folder:
            (folder.path / "cases.csv").write_text("the same patients")
            digests.add(folder.finish("private").digest)
    assert len(digests) == 2


def test_pitfall_12_a_cohort_mask_cannot_reach_a_sampler_through_an_unledgered_folder(
    fake_run: Run, fake_study: Callable[..., Study]
) -> None:
    reasons = refusals(fake_run(synthesis_reads_patients=True), fake_study())
    assert len(reasons) == 1 and "'synthetic'" in reasons[0]


def test_study_without_privacy_is_refused_even_with_a_clean_ledger(
    fake_run: Run, fake_study: Callable[..., Study]
) -> None:
    privacy = fake_study().privacy.model_copy(update={"epsilon": float("inf")})
    run = fake_run()
    reasons = gate.refusals(walk(run / "synthetic", {}), Ledger(run / "ledger.jsonl"), privacy)
    assert any("infinite" in reason for reason in reasons)


@pytest.mark.parametrize("victim", ["generator/denoiser.safetensors", "masks/statistics.json", "synthetic/pairs.csv"])
def test_changed_file_of_an_ancestor_is_refused(fake_run: Run, victim: str) -> None:
    run = fake_run()
    (run / victim).write_bytes(b"changed")
    with pytest.raises(CertificationError, match=victim.split("/")[1]):
        walk(run / "synthetic", {})


def test_file_added_to_an_ancestor_is_refused(fake_run: Run) -> None:
    run = fake_run()
    (run / "generator" / "other.safetensors").write_bytes(b"swapped in")
    with pytest.raises(CertificationError, match="'generator'"):
        walk(run / "synthetic", {})


def test_absent_ancestor_is_refused(fake_run: Run) -> None:
    run = fake_run()
    (run / "masks").rename(run / "elsewhere")
    with pytest.raises(CertificationError, match="'masks'"):
        walk(run / "synthetic", {})
    assert walk(run / "synthetic", {"masks": run / "elsewhere"})["masks"].stage == "masks"


def test_ancestor_made_anew_is_refused(fake_run: Run) -> None:
    run = fake_run()
    manifest = run / "generator" / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**values, "config_digest": "0" * 64}))
    with pytest.raises(CertificationError, match="another digest"):
        walk(run / "synthetic", {})


def test_pitfall_18_claim_is_written_from_the_ledger_not_from_the_configuration(
    fake_study: Callable[..., Study],
) -> None:
    hoped = fake_study(train={"steps": 1}, privacy={"epsilon": 100})
    little = statement.claim_of([Event("gaussian", 10.0)], hoped)
    much = statement.claim_of([Event("gaussian", 10.0), Event("subsampled_gaussian", 2.0, 0.25, 20)], hoped)
    assert little.epsilon < 1 < much.epsilon


def test_pitfall_01_the_unit_of_every_claim_is_the_patient(fake_study: Callable[..., Study]) -> None:
    claim = statement.claim_of([Event("gaussian", 10.0)], fake_study())
    assert (claim.unit, claim.relation) == ("patient", "add_or_remove_one")


def test_claims_are_rounded_up_and_worth_less_at_smaller_delta(fake_study: Callable[..., Study]) -> None:
    from medsynth.privacy.accounting import epsilon

    events = [Event("gaussian", 3.3), Event("subsampled_gaussian", 2.0, 0.25, 20)]
    claim = statement.claim_of(events, fake_study())
    assert epsilon(events, 1e-4) <= claim.epsilon < epsilon(events, 1e-4) + 0.0011
    epsilons = [value for _, value in claim.epsilon_at]
    assert epsilons == sorted(epsilons)
    assert all(rate < bound < 1 for rate, bound in claim.membership)


def test_bound_on_membership_lies_above_the_best_attack_on_a_gaussian(fake_study: Callable[..., Study]) -> None:
    from scipy.special import ndtr, ndtri

    claim = statement.claim_of([Event("gaussian", 1.0)], fake_study())
    for rate, bound in claim.membership:
        best = float(ndtr(ndtri(rate) + 1.0))  # Neyman-Pearson test between N(0, 1) and N(1, 1)
        assert best <= bound <= 2.5 * best
