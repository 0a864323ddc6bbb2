"""The mutants: each takes one guard out, in memory, and names the tests that must turn red.

A mutant is a function from the guard as it is to what stands in its place. ``run.py`` puts it there and runs the tests.
Pitfalls are numbered as in docs/explanation/what-epsilon-covers.md. Nothing heavy is imported here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

Without = Callable[[Any], Any]


@dataclass(frozen=True)
class Mutant:
    """One guard taken out.

    Attributes:
        name: what happens without the guard.
        guard: dotted path below ``medsynth`` of what is replaced.
        pitfalls: which pitfalls the guard stands before; empty where it guards something else.
        tests: node ids below ``tests/``; each must turn red.
        without: from the guard to its replacement.
    """

    name: str
    guard: str
    pitfalls: tuple[int, ...]
    tests: tuple[str, ...]
    without: Without


MUTANTS: list[Mutant] = []


def takes_out(guard: str, pitfalls: tuple[int, ...] | int, *tests: str) -> Callable[[Without], Without]:
    """Register the decorated function as a mutant; its name is the mutant's."""

    def register(without: Without) -> Without:
        numbers = (pitfalls,) if isinstance(pitfalls, int) else pitfalls
        MUTANTS.append(Mutant(without.__name__, guard, numbers, tests, without))
        return without

    return register


def module(name: str) -> Any:
    """Return a module of the package that the run has imported."""
    return sys.modules[f"medsynth.{name}"]


GATE = "release/test_gate.py::test_refused_with_its_name"
VERIFY = "release/test_verify.py::test_mutation_is_named"
SIGNED_ANEW = "release/test_verify.py::test_false_statement_fails_even_when_signed_anew"

# ------------------------------------------------------------------------------------------- 1: the unit is the patient


@takes_out(
    "privacy.gradients_unit.UnitBackend.clipped_sum",
    1,
    "privacy/test_gradients.py::test_pitfall_01_rows_of_a_patient_are_averaged_then_clipped_once",
)
def each_row_is_a_unit(original: Any) -> Any:
    def clipped_sum(self: Any, batches: Any) -> Any:
        return original(self, [{k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(_rows(b))])

    def _rows(batch: Any) -> int:
        return len(next(iter(batch.values())))

    return clipped_sum


@takes_out(
    "privacy.engine.bookkeeping.BookkeepingBackend.clipped_sum",
    1,
    "privacy/test_gradients.py::test_pitfall_01_rows_of_a_patient_are_averaged_then_clipped_once",
    "stages/test_train.py::test_pitfall_01_a_patient_of_many_slices_is_one_unit_with_one_clip",
)
def each_row_is_a_unit_of_the_engine(original: Any) -> Any:
    return each_row_is_a_unit(original)


@takes_out(
    "stages.mask_sums.MaskSums.first_vectors", 1, "stages/test_masks.py::test_pitfall_01_many_slices_are_one_vector"
)
def each_slice_is_a_vector(original: Any) -> Any:
    return lambda sums, labels: original(sums, [row[None] for rows in labels for row in rows])


@takes_out(
    "stages.mask_sums.MaskSums.second_vectors", 1, "stages/test_masks.py::test_pitfall_01_many_slices_are_one_vector"
)
def each_slice_is_a_vector_of_the_second_sum(original: Any) -> Any:
    return lambda sums, labels, *around: original(sums, [row[None] for rows in labels for row in rows], *around)


AROUND_A_RELEASE = "test_the_second_vector_of_a_patient_depends_on_releases_and_himself_alone"


@takes_out("stages.mask_sums.MaskSums.second_vectors", (), f"stages/test_mask_sums.py::{AROUND_A_RELEASE}")
def label_maps_are_measured_again_around_the_patients(original: Any) -> Any:
    def without(sums: Any, labels: Any, *_: Any) -> Any:
        first = list(sums.first_vectors(labels))
        return original(sums, labels, *sums._early(sum(first) / len(first)))

    return without


@takes_out("stages.appearance_sums.AppearanceSums.release", (), f"stages/test_appearance_sums.py::{AROUND_A_RELEASE}")
def appearance_is_measured_again_around_the_patients(original: Any) -> Any:
    def without(sums: Any, patients: Any, entropy: Any) -> Any:
        vectors, space = list(sums._vectors(patients)), copy(sums.space)
        space.centre = lambda *_: (sum(vectors) / len(vectors))[1:]
        return original(replace(sums, space=space), patients, entropy)

    return without


@takes_out(
    "release.statement.claim_of", 1, "release/test_gate.py::test_pitfall_01_the_unit_of_every_claim_is_the_patient"
)
def the_claim_is_per_image(original: Any) -> Any:
    return lambda *given, **more: replace(original(*given, **more), unit="image")


@takes_out("release.checks.claim", 1, f"{SIGNED_ANEW}[pitfall_01_unit]", f"{SIGNED_ANEW}[relation]")
def verify_takes_any_claim(original: Any) -> Any:
    return lambda *_: []


# ------------------------------------------------------------------------------------------ 2: one person under two ids


@takes_out(
    "stages.ingest._read_one",
    2,
    "stages/test_ingest.py::test_pitfall_02_the_same_pixels_under_another_name_are_refused",
    "stages/test_ingest.py::test_broken_nifti_is_quarantined_with_its_reason",
)
def nobody_looks_for_equal_pixels(original: Any) -> Any:
    return lambda config, case, place, out, names, owner_of: original(config, case, place, out, names, {})


@takes_out(
    "imaging.loading.Loaded.content",
    2,
    "stages/test_ingest.py::test_pitfall_02_the_same_pixels_under_another_name_are_refused",
)
def content_depends_on_orientation(original: Any) -> Any:
    import hashlib

    return property(lambda self: hashlib.sha256(self.image.numpy().tobytes()).hexdigest())


@takes_out(
    "release.statement.linkage_rule", 2, "release/test_certify_export.py::test_pitfall_02_the_linkage_rule_is_stated"
)
def the_linkage_rule_is_not_stated(original: Any) -> Any:
    return lambda config: ""


@takes_out(
    "privacy.accounts.Accounts.holders",
    (2, 14),
    "privacy/test_account.py::test_runs_on_the_same_patients_share_an_account_whatever_their_folders",
    "privacy/test_account.py::test_a_cohort_in_two_accounts_joins_them",
    "privacy/test_account.py::test_the_limit_is_for_all_runs_together",
)
def nobody_is_recognised_in_another_run(original: Any) -> Any:
    return lambda self, references: set()


# -------------------------------------------------------------------- 3: nothing is derived from the number of patients


@takes_out(
    "privacy.budget._training_noise",
    3,
    "privacy/test_budget.py::test_pitfall_03_plans_do_not_know_the_number_of_patients",
)
def noise_depends_on_the_number_of_patients(original: Any) -> Any:
    return lambda fixed, privacy, train: original(fixed, privacy, train) * (1 + privacy.declared_patients / 1e6)


@takes_out(
    "stages.private_training.train_privately",
    3,
    "stages/test_train.py::test_pitfall_03_rate_noise_and_denominator_do_not_know_the_number_of_patients",
)
def training_counts_the_patients(original: Any) -> Any:
    def counting(job: Any, built: Any, state: Any) -> None:
        privacy = job.config.privacy.model_copy(update={"declared_patients": len(job.patients())})
        original(replace(job, config=job.config.model_copy(update={"privacy": privacy})), built, state)

    return counting


@takes_out("stages.masks._release", 3, "stages/test_masks.py::test_pitfall_03_plans_are_the_same_for_one_patient_more")
def masks_count_the_patients(original: Any) -> Any:
    def counting(config: Any, inputs: Any, *more: Any) -> Any:
        count = len(module("imaging.cohort").load_patients(inputs["cohort"], config.grid, "train"))
        privacy = config.privacy.model_copy(update={"declared_patients": count})
        return original(config.model_copy(update={"privacy": privacy}), inputs, *more)

    return counting


# ------------------------------------------------------------------------------------- 4, 5, 6: Poisson sampling, means


@takes_out(
    "privacy.mechanism.DpSgd.draw", 4, "privacy/test_mechanism.py::test_pitfall_04_every_patient_has_its_own_coin"
)
def a_fixed_number_is_drawn(original: Any) -> Any:
    import random

    return lambda self, n, entropy: sorted(random.sample(range(n), round(n * self.sampling_rate)))


@takes_out(
    "privacy.entropy.ChaChaEntropy.bernoulli",
    4,
    "privacy/test_mechanism.py::test_pitfall_04_every_patient_has_its_own_coin",
    "privacy/test_mechanism.py::test_coins_have_their_rate",
)
def one_coin_for_all(original: Any) -> Any:
    return lambda self, rate, n: original(self, rate, 1).repeat(n)


@takes_out(
    "privacy.mechanism.DpSgd.noisy_mean",
    5,
    "privacy/test_mechanism.py::test_pitfall_05_empty_draw_is_a_noise_only_step",
    "stages/test_train.py::test_pitfall_05_an_empty_draw_is_a_step_of_noise",
)
def an_empty_draw_adds_no_noise(original: Any) -> Any:
    def noisy_mean(self: Any, clipped_sum: Any, entropy: Any) -> Any:
        if not any(part.any() for part in clipped_sum):
            return [part.float() for part in clipped_sum]
        return original(self, clipped_sum, entropy)

    return noisy_mean


@takes_out("privacy.gradients.zero_sums", 5, "privacy/test_gradients.py::test_pitfall_05_nobody_drawn_gives_zeros")
def an_empty_draw_has_no_sums(original: Any) -> Any:
    return lambda parameters: [total[:0] for total in original(parameters)]


@takes_out(
    "privacy.mechanism.GaussianSum.release",
    6,
    "privacy/test_mechanism.py::test_pitfall_06_the_denominator_is_the_public_constant",
)
def the_mean_is_over_those_who_came(original: Any) -> Any:
    def release(self: Any, units: Any, entropy: Any) -> Any:
        units = list(units)
        return original(self, units, entropy) * self.denominator / max(1, len(units))

    return release


@takes_out(
    "privacy.mechanism.DpSgd.noisy_mean",
    6,
    "privacy/test_mechanism.py::test_pitfall_06_the_denominator_is_the_public_constant",
)
def gradients_are_not_divided_by_the_constant(original: Any) -> Any:
    return lambda self, total, entropy: [part * self.denominator for part in original(self, total, entropy)]


# -------------------------------------------------------------------------------------------- 7, 8: what enters the sum


@takes_out(
    "privacy.mechanism.clip_vector",
    7,
    "privacy/test_mechanism.py::test_pitfall_07_a_patient_that_is_not_finite_counts_as_zero",
    "privacy/test_mechanism.py::test_no_vector_is_longer_than_the_clip_norm",
)
def a_vector_may_be_nan(original: Any) -> Any:
    def clip_vector(vector: Any, clip_norm: float) -> Any:
        norm = float((vector**2).sum() ** 0.5)
        return vector * (1.0 if norm <= clip_norm else clip_norm / norm)

    return clip_vector


@takes_out(
    "privacy.mechanism.clip_factor",
    7,
    "privacy/test_gradients.py::test_pitfall_07_a_patient_that_is_not_finite_adds_nothing",
)
def a_gradient_may_be_nan(original: Any) -> Any:
    return lambda norm, clip_norm: 1.0 if norm <= clip_norm else clip_norm / norm


@takes_out(
    "privacy.mechanism.clip_vector",
    8,
    "privacy/test_mechanism.py::test_no_vector_is_longer_than_the_clip_norm",
    "privacy/test_mechanism.py::test_one_patient_moves_the_sum_by_at_most_the_clip_norm",
    "stages/test_masks.py::test_pitfall_12_statistics_move_by_at_most_the_clip_norm_when_a_patient_leaves",
)
def vectors_are_not_clipped(original: Any) -> Any:
    return lambda vector, clip_norm: vector


@takes_out(
    "privacy.gradients.add_clipped",
    8,
    "privacy/test_gradients.py::test_every_clipped_norm_is_at_most_the_bound",
)
def gradients_are_not_clipped(original: Any) -> Any:
    return lambda sums, gradient, clip_norm: original(sums, gradient, 1e12)


@takes_out(
    "privacy.gradients_opacus._contiguous_inputs",
    8,
    "privacy/test_gradients.py::test_pitfall_08_opacus_is_wrong_on_channels_last_and_the_preflight_catches_it",
)
def opacus_gets_inputs_as_they_are(original: Any) -> Any:
    return lambda layer, inputs: inputs


@takes_out(
    "privacy.preflight._compare",
    8,
    "privacy/test_gradients.py::test_pitfall_08_preflight_refuses_broken_backends",
    "privacy/test_gradients.py::test_pitfall_08_a_missing_clip_is_found_even_if_no_public_gradient_reaches_it",
    "privacy/test_gradients.py::test_pitfall_08_opacus_is_wrong_on_channels_last_and_the_preflight_catches_it",
)
def the_preflight_finds_no_difference(original: Any) -> Any:
    return lambda *_: (0.0, 0.0, 0.0)


@takes_out("privacy.ledger._require_preflight", 8, "privacy/test_ledger.py::test_pitfall_08_no_preflight_no_training")
def training_is_reserved_without_a_preflight(original: Any) -> Any:
    return lambda *_: None


@takes_out(
    "privacy.engine.bookkeeping._Books.close",
    8,
    "privacy/test_gradients.py::test_every_clipped_norm_is_at_most_the_bound",
)
def the_engine_does_not_clip(original: Any) -> Any:
    return lambda self, norms, clip_norm, parameters: original(self, norms, 1e12, parameters)


@takes_out(
    "privacy.engine.bookkeeping._Books.norms",
    (7, 8),
    "privacy/test_gradients.py::test_pitfall_07_a_patient_that_is_not_finite_adds_nothing",
    "privacy/test_gradients.py::test_backends_equal_a_naive_loop",
)
def the_engine_takes_every_norm_for_one_half(original: Any) -> Any:
    def norms(self: Any) -> Any:
        found = original(self)
        self._finite = found.isfinite() | True
        return found * 0 + 0.5

    return norms


# ---------------------------------------------------------------------------------------- 9: operations across patients


@takes_out(
    "privacy.preflight.refuse_modules",
    9,
    "privacy/test_gradients.py::test_pitfall_09_layers_that_mix_patients_are_refused_by_name",
    "privacy/test_gradients.py::test_pitfall_09_monai_codebooks_are_refused_and_plain_norms_are_not",
)
def batch_norm_is_welcome(original: Any) -> Any:
    return lambda model: None


@takes_out(
    "privacy.preflight.preflight",
    9,
    "privacy/test_gradients.py::test_pitfall_09_hidden_statistics_are_found_by_running_the_model",
)
def layers_may_remember_patients(original: Any) -> Any:
    def preflight(*given: Any) -> Any:
        here = module("privacy.preflight")
        real = here.torch
        here.torch = SimpleNamespace(equal=lambda *_: True, zeros=real.zeros, zeros_like=real.zeros_like)
        try:
            return original(*given)
        finally:
            here.torch = real

    return preflight


@takes_out("privacy.gradients.check_losses", 9, "privacy/test_gradients.py::test_losses_over_the_batch_are_refused")
def a_loss_over_the_batch_is_welcome(original: Any) -> Any:
    return lambda losses, rows: losses


# ---------------------------------------------------------------------------------- 10, 11, 12: codec, constants, masks


def _silent_about(*words: str) -> Without:
    """Return a mutant of a function that yields reasons: those with one of the words are left out."""

    def without(original: Any) -> Any:
        return lambda *given: [reason for reason in original(*given) if not any(word in reason for word in words)]

    return without


@takes_out(
    "release.gate._judge",
    (10, 12),
    f"{GATE}[pitfall_10_codec_trained_on_patients]",
    f"{GATE}[pitfall_12_real_mask_conditions_a_sample]",
    "release/test_gate.py::test_pitfall_12_a_cohort_mask_cannot_reach_a_sampler_through_an_unledgered_folder",
    f"{GATE}[spend_forgotten]",
)
def the_gate_lets_unledgered_folders_pass(original: Any) -> Any:
    return _silent_about("latent codec", "mask or image", "names no ledger entry")(original)


def _reads_patients(original: Any) -> Any:
    def run(config: Any, inputs: Any, out: Any, tracker: Any) -> Any:
        folder = inputs.get("cohort", out.parent / "cohort")
        module("imaging.cohort").load_patients(folder, config.grid, "train")
        return original(config, inputs, out, tracker)

    return run


@takes_out("stages.encode.run", 10, "stages/test_encode.py::test_pitfall_10_the_codec_never_reads_the_cohort")
def the_codec_reads_patients(original: Any) -> Any:
    return _reads_patients(original)


@takes_out(
    "stages.encode.run", 11, "stages/test_encode.py::test_pitfall_11_latent_constants_do_not_move_with_the_cohort"
)
def the_codec_is_calibrated_on_patients(original: Any) -> Any:
    def run(config: Any, inputs: Any, out: Any, tracker: Any) -> Any:
        import torch

        patients = module("imaging.cohort").load_patients(inputs["cohort"], config.grid, "train")
        images, codec = torch.cat([patient.images for patient in patients]), module("models.autoencoder").Codec
        calibrate = codec.calibrate
        codec.calibrate = lambda self, phantoms: calibrate(self, images)
        try:
            return original(config, inputs, out, tracker)
        finally:
            codec.calibrate = calibrate

    return run


@takes_out(
    "imaging.transforms._scale", 11, "stages/test_ingest.py::test_pitfall_11_a_patients_voxels_do_not_depend_on_others"
)
def intensities_are_scaled_by_the_cohort(original: Any) -> Any:
    seen = []

    def _scale(image: Any, grid: Any) -> Any:
        seen.append(float(image.max()))
        return (image.float() / max(seen) * 2 - 1).clamp(-1, 1)

    return _scale


@takes_out("stages.synthesise.run", 12, "stages/test_synthesise.py::test_pitfall_12_the_cohort_is_not_read")
def the_sampler_reads_patients(original: Any) -> Any:
    return _reads_patients(original)


@takes_out(
    "release.ancestry.broken_edges",
    12,
    f"{SIGNED_ANEW}[spend_forgotten]",
    f"{SIGNED_ANEW}[ancestor_dropped]",
    f"{SIGNED_ANEW}[internal]",
)
def verify_takes_any_ancestry(original: Any) -> Any:
    return lambda *_: []


LABELLERS = (
    "stages/test_train.py::"
    "test_a_private_budget_does_not_pay_for_networks_that_label_even_where_the_configuration_was_not_checked"
)


@takes_out("stages.train._reserve_openly", (), LABELLERS)
def the_ledger_is_not_told_of_training_without_privacy(original: Any) -> Any:
    return lambda *_: None


@takes_out("stages.labellers.train_labellers", (), LABELLERS)
def networks_that_label_pairs_learn_from_patients_of_a_private_study(original: Any) -> Any:
    def without(job: Any) -> None:
        open_budget = job.config.privacy.model_copy(update={"epsilon": float("inf")})
        original(replace(job, config=job.config.model_copy(update={"privacy": open_budget})))

    return without


# ------------------------------------------------------------------ 13: what was measured on patients shapes no release


@takes_out(
    "release.ancestry.LINEAGE",
    13,
    f"{GATE}[pitfall_13_a_report_shapes_the_pairs]",
    f"{SIGNED_ANEW}[pitfall_13_a_report_shapes_the_pairs]",
)
def any_stage_may_be_an_ancestor(original: Any) -> Any:
    return frozenset({*original, "segment", "evaluate", "audit"})


@takes_out(
    "study.STAGES",
    13,
    "contracts/test_pitfalls.py::test_pitfall_13_what_is_measured_on_patients_is_no_input_of_what_leaves",
)
def the_sampler_is_given_the_report(original: Any) -> Any:
    return tuple(replace(s, reads=(*s.reads, "report")) if s.verb == "synthesise" else s for s in original)


@takes_out(
    "stages.synthesise.render", 13, "stages/test_synthesise.py::test_pitfall_13_every_pair_of_the_plan_is_released"
)
def pairs_are_rejected_after_rendering(original: Any) -> Any:
    return lambda *given: original(*given)[1:]


@takes_out(
    "privacy.audit.finding.refusals",
    13,
    "release/test_audits.py::test_a_bound_above_the_claim_refuses",
    "release/test_audits.py::test_an_audit_that_missed_its_control_refuses",
)
def a_red_audit_stops_nothing(original: Any) -> Any:
    return lambda findings: []


@takes_out(
    "release.audits.unaudited", 13, "release/test_audits.py::test_no_certificate_without_an_audit_of_the_mechanisms"
)
def a_study_without_audits_is_certified(original: Any) -> Any:
    return lambda folder: []


@takes_out(
    "metrics.membership.area_surely",
    13,
    "stages/test_audit_stage.py::test_a_study_that_gives_every_patient_away_is_stopped",
    "stages/test_audit_stage.py::test_pairs_that_copy_their_patients_are_red_and_fresh_pairs_are_not",
)
def no_attack_on_membership_is_ever_sure(original: Any) -> Any:
    return lambda *_: 0.0


# ---------------------------------------------------------------------------- 14: restarts, sweeps, choices are charged


@takes_out(
    "privacy.ledger._check_budget",
    14,
    "privacy/test_ledger.py::test_the_budget_is_for_all_stages_together",
    "privacy/test_ledger.py::test_a_crash_refunds_nothing",
    "stages/test_masks.py::test_pitfall_14_a_release_that_was_thrown_away_is_charged_again",
    "stages/test_train.py::test_pitfall_14_a_restart_without_its_journal_is_charged_however_often_it_is_tried",
)
def no_reservation_is_refused(original: Any) -> Any:
    return lambda *_, **__: None


@takes_out(
    "privacy.ledger._interrupted",
    14,
    "privacy/test_ledger.py::test_resume_goes_on_within_the_reservation",
)
def any_open_reservation_can_be_gone_on_with(original: Any) -> Any:
    def _interrupted(records: Any, wanted: Any) -> Any:
        return next((record["id"] for record in reversed(records) if record["type"] == "reserve"), None)

    return _interrupted


@takes_out("privacy.ledger.Ledger.completed", 14, "stages/test_masks.py::test_pitfall_14_no_kill_buys_a_second_release")
def a_killed_release_is_made_a_second_time(original: Any) -> Any:
    return lambda *_: None


@takes_out("release.gate._over_budget", 14, f"{GATE}[over_budget]", f"{GATE}[pitfall_14_restarts_are_charged]")
def the_gate_does_not_compose(original: Any) -> Any:
    return lambda *_, **__: []


@takes_out("release.spending.events", 14, f"{GATE}[pitfall_14_restarts_are_charged]")
def abandoned_runs_are_forgotten(original: Any) -> Any:
    return lambda entries: original([entry for entry in entries if entry["status"] == "complete"])


@takes_out("privacy.account._check_limits", 14, "privacy/test_account.py::test_the_limit_is_for_all_runs_together")
def an_account_has_no_limit(original: Any) -> Any:
    return lambda *_: None


@takes_out(
    "privacy.account._check_sweep",
    14,
    "privacy/test_account.py::test_pitfall_14_a_sweep_has_no_more_studies_than_it_declared",
)
def a_sweep_has_no_end(original: Any) -> Any:
    return lambda *_: None


@takes_out(
    "privacy.ledger.trials_of", 14, "privacy/test_account.py::test_pitfall_14_a_declared_sweep_is_charged_as_a_whole"
)
def a_sweep_is_charged_as_one_study(original: Any) -> Any:
    return lambda record: 1


# -------------------------------------------------------------------------------------------------- 15: internal values


@takes_out(
    "privacy.ledger._refuse_private",
    15,
    "privacy/test_ledger.py::test_pitfall_15_and_16_counts_losses_seeds_and_paths_are_refused",
)
def the_ledger_takes_counts_and_losses(original: Any) -> Any:
    return lambda value: None


@takes_out(
    "release.gate._judge",
    (15, 19),
    f"{GATE}[pitfall_15_internal_values]",
    f"{GATE}[internal_generator]",
    f"{GATE}[pitfall_19_segmenter_exported]",
)
def the_gate_lets_internal_folders_pass(original: Any) -> Any:
    return _silent_about("is internal")(original)


@takes_out(
    "release.payload.write_payload",
    15,
    "release/test_certify_export.py::test_pitfall_15_nothing_but_the_payload_leaves",
)
def a_preview_is_packed(original: Any) -> Any:
    def write_payload(folder: Any, *given: Any, **more: Any) -> Any:
        (folder / "preview.png").write_bytes(b"a loss curve")
        return original(folder, *given, **more)

    return write_payload


@takes_out("release.checks.files", 15, f"{VERIFY}[file_added]", f"{VERIFY}[file_dropped]", f"{VERIFY}[image_byte]")
def verify_does_not_look_at_files(original: Any) -> Any:
    return lambda *_: []


@takes_out(
    "accidents.describe",
    15,
    "test_accidents.py::test_an_unforeseen_error_names_no_value_and_keeps_its_traceback_inside",
    "test_accidents.py::test_a_verb_without_a_run_folder_keeps_quiet_too",
)
def an_unforeseen_error_is_printed_as_it_is(original: Any) -> Any:
    return lambda error: f"{original(error)}: {error}"


# -------------------------------------------------------------------------------------------- 16: randomness and resume


@takes_out(
    "privacy.entropy.ChaChaEntropy._open",
    16,
    "privacy/test_mechanism.py::test_pitfall_16_noise_is_never_seeded_stored_or_repeated",
    "privacy/test_mechanism.py::test_pitfall_16_a_forked_process_draws_other_noise",
)
def noise_is_seeded(original: Any) -> Any:
    return staticmethod(lambda key: original.__func__(bytes(32)))


@takes_out(
    "privacy.entropy.ChaChaEntropy._bytes",
    16,
    "privacy/test_mechanism.py::test_pitfall_16_a_forked_process_draws_other_noise",
)
def a_fork_repeats_the_noise(original: Any) -> Any:
    import os

    def _bytes(self: Any, needed: int, buffer: bytearray) -> bytearray:
        self._process = os.getpid()
        return original(self, needed, buffer)

    return _bytes


@takes_out(
    "privacy.entropy.ChaChaEntropy.__reduce__",
    16,
    "privacy/test_mechanism.py::test_pitfall_16_noise_is_never_seeded_stored_or_repeated",
)
def a_source_of_noise_can_be_copied(original: Any) -> Any:
    return lambda self: (module("privacy.entropy").open_entropy, (self.kind,))


@takes_out(
    "privacy.journal.StepJournal.__init__",
    16,
    "privacy/test_ledger.py::test_pitfall_16_after_a_kill_claimed_steps_are_lost_and_not_repeated",
    "stages/test_train.py::test_pitfall_16_a_resumed_run_takes_at_most_t_steps_on_one_reservation[3]",
)
def a_resume_takes_claimed_steps_again(original: Any) -> Any:
    def init(self: Any, path: Any, steps: int) -> None:
        path.unlink(missing_ok=True)
        original(self, path, steps)

    return init


@takes_out(
    "privacy.ledger.taints_of",
    16,
    f"{GATE}[pitfall_16_repeatable_noise]",
    f"{GATE}[nonprivate_step]",
    "release/test_verify.py::test_tainted_ledger_fails",
    "privacy/test_ledger.py::test_nonprivate_and_test_only_taint",
)
def nothing_taints(original: Any) -> Any:
    return lambda records: []


# -------------------------------------------------------------------------------- 17, 18: plans, execution, certificate


@takes_out(
    "privacy.mechanism.DpSgd.__setattr__",
    17,
    "privacy/test_mechanism.py::test_pitfall_17_a_plan_cannot_change_while_it_runs",
)
def a_plan_can_change(original: Any) -> Any:
    return object.__setattr__


@takes_out("privacy.ledger.events_of", 17, "privacy/test_ledger.py::test_pitfall_17_a_schedule_is_one_event_a_segment")
def only_the_first_segment_is_charged(original: Any) -> Any:
    return lambda records: original([{**r, "events": r["events"][:1]} for r in records if r["type"] == "reserve"])


@takes_out("privacy.ledger._within", 18, "privacy/test_ledger.py::test_pitfall_18_the_ledger_says_what_was_executed")
def more_may_run_than_was_reserved(original: Any) -> Any:
    return lambda *_: True


@takes_out("privacy.ledger._joined", 18, "privacy/test_ledger.py::test_pitfall_18_the_ledger_says_what_was_executed")
def a_stage_may_contradict_its_plan(original: Any) -> Any:
    return lambda own, more: {**own, **(more or {})}


@takes_out(
    "release.statement.claim_of",
    18,
    "release/test_gate.py::test_pitfall_18_claim_is_written_from_the_ledger_not_from_the_configuration",
)
def the_claim_is_what_the_configuration_hopes(original: Any) -> Any:
    def claim_of(events: Any, config: Any, *more: Any, **named: Any) -> Any:
        return replace(original(events, config, *more, **named), epsilon=config.privacy.epsilon)

    return claim_of


@takes_out("release.gate._judge_entry", 18, f"{GATE}[pitfall_18_charged_other_config]", f"{GATE}[unfinished_spend]")
def the_gate_does_not_compare_with_the_ledger(original: Any) -> Any:
    return lambda *_: iter(())


@takes_out(
    "release.checks.ledger", 18, f"{SIGNED_ANEW}[sigma]", f"{SIGNED_ANEW}[head]", f"{VERIFY}[ledger_end_dropped]"
)
def verify_does_not_compare_with_the_ledger(original: Any) -> Any:
    return lambda *_: []


@takes_out(
    "stages.certify._other_settings",
    18,
    "release/test_certify_export.py::test_pitfall_18_a_certificate_describes_the_run_and_no_other_study",
)
def a_certificate_may_describe_another_study(original: Any) -> Any:
    return lambda *_: []


@takes_out("release.checks._other_budget", 18, f"{SIGNED_ANEW}[pitfall_18_delta]", f"{SIGNED_ANEW}[pitfall_18_budget]")
def verify_does_not_ask_what_was_reserved(original: Any) -> Any:
    return lambda *_: []


@takes_out("release.checks.epsilon", 18, f"{SIGNED_ANEW}[epsilon]", f"{SIGNED_ANEW}[other_delta]")
def verify_does_not_compute_epsilon(original: Any) -> Any:
    return lambda *_: []


@takes_out("release.checks.membership", 18, f"{SIGNED_ANEW}[membership]")
def verify_does_not_compute_the_bounds_on_attacks(original: Any) -> Any:
    return lambda *_: []


@takes_out("release.checks.accountants", 18, f"{SIGNED_ANEW}[accountant_low]", f"{SIGNED_ANEW}[accountant_high]")
def verify_takes_the_other_accountants_at_their_word(original: Any) -> Any:
    return lambda *_: []


@takes_out("release.checks.account", 18, f"{SIGNED_ANEW}[account_lowered]", f"{SIGNED_ANEW}[account_words]")
def verify_does_not_compute_what_all_studies_cost(original: Any) -> Any:
    return lambda *_: []


@takes_out("release.checks.limits", 18, f"{SIGNED_ANEW}[not_covered_shortened]", f"{SIGNED_ANEW}[not_covered_more]")
def verify_does_not_ask_for_what_is_not_covered(original: Any) -> Any:
    return lambda *_: []


@takes_out("release.contents.contents", 18, f"{SIGNED_ANEW}[part]", f"{SIGNED_ANEW}[second_promise]")
def verify_takes_parts_that_nothing_checks(original: Any) -> Any:
    return lambda *_: []


@takes_out("release.checks.words", 18, f"{VERIFY}[words_edited]")
def verify_does_not_read_the_words(original: Any) -> Any:
    return lambda *_: []


@takes_out("release.checks.origin", 18, f"{VERIFY}[manifest_stage]", f"{VERIFY}[manifest_sensitivity]")
def verify_takes_any_manifest(original: Any) -> Any:
    return lambda *_: []


@takes_out(
    "release.signing.check_signature",
    18,
    f"{VERIFY}[epsilon_edited]",
    "release/test_verify.py::test_swapped_key_fails_when_the_hospitals_key_is_given",
    "release/test_signing.py::test_changed_payload_or_other_key_fails",
)
def any_signature_is_good(original: Any) -> Any:
    return lambda *_: None


@takes_out("release.checks.uncertified", 18, f"{VERIFY}[uncertified]")
def verify_overlooks_the_mark(original: Any) -> Any:
    return lambda *_: []


@takes_out(
    "privacy.chain.parse_chain",
    18,
    "privacy/test_ledger.py::test_an_edited_line_is_found",
    "privacy/test_ledger.py::test_a_missing_or_moved_line_is_found",
    f"{VERIFY}[ledger_line_edited]",
)
def the_chain_is_not_checked(original: Any) -> Any:
    import json

    return lambda raw, *_: [json.loads(line) for line in raw.splitlines()]


@takes_out(
    "release.ancestry._check_files",
    18,
    "release/test_gate.py::test_changed_file_of_an_ancestor_is_refused",
    "release/test_gate.py::test_file_added_to_an_ancestor_is_refused",
)
def ancestors_may_change(original: Any) -> Any:
    return lambda *_: None


@takes_out(
    "stages.certify.agreeing_accountants",
    18,
    "release/test_certify_export.py::test_disagreeing_accountants_stop_everything",
)
def accountants_may_disagree(original: Any) -> Any:
    return lambda events, delta: {"pld": 1.0}


@takes_out("release.keys._read_private", 18, "release/test_keys.py::test_a_key_that_others_may_read_is_refused")
def others_may_read_the_signing_key(original: Any) -> Any:
    return lambda path: path.read_bytes()


# ------------------------------------------------------------------------------ 19, 20, 21: segmenter, headers, sources


@takes_out(
    "store.StageFolder.finish", 19, "stages/test_segment.py::test_pitfall_19_a_network_of_real_patients_is_internal"
)
def every_folder_calls_itself_released(original: Any) -> Any:
    return lambda self, sensitivity, **more: original(self, "released", **more)


@takes_out(
    "release.payload._save_nifti", 20, "release/test_certify_export.py::test_pitfall_20_headers_are_public_constants"
)
def a_header_names_a_patient(original: Any) -> Any:
    def _save_nifti(path: Any, array: Any, spacing_mm: Any) -> None:
        import nibabel

        picture = nibabel.Nifti1Image(array, None)
        picture.header["descrip"] = b"DOE^JANE"
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(picture, path)

    return _save_nifti


@takes_out("release.payload._write_nifti", 20, "release/test_payload.py::test_pitfall_20_names_of_pairs_do_not_leave")
def pairs_keep_their_names(original: Any) -> Any:
    return lambda folder, name, pair, grid: original(folder, pair.name, pair, grid)


@takes_out("release.gate._judge_cohort", 20, f"{GATE}[cohort_digest_without_salt]", f"{GATE}[private_payload]")
def the_cohorts_digest_needs_no_salt(original: Any) -> Any:
    return lambda *_: iter(())


@takes_out(
    "stages.encode.run", 21, "stages/test_encode.py::test_pitfall_21_no_file_from_elsewhere_is_read_by_pre_training"
)
def the_codec_reads_a_file_from_elsewhere(original: Any) -> Any:
    def run(config: Any, inputs: Any, out: Any, tracker: Any) -> Any:
        (out.parent / "images-from-elsewhere.npy").read_bytes()
        return original(config, inputs, out, tracker)

    return run


@takes_out(
    "stages.certify._other_sources",
    21,
    "release/test_certify_export.py::test_pitfall_21_a_codec_that_this_study_did_not_make_is_refused",
    "release/test_certify_export.py::test_pitfall_21_statistics_from_elsewhere_are_no_public_shapes",
)
def any_codec_may_be_put_in_place(original: Any) -> Any:
    return lambda *_: []


# ----------------------------------------------------------------------------------------- 22, 23: shards, chunks, sums


@takes_out(
    "privacy.gradients_unit.UnitBackend.clipped_sum",
    22,
    "privacy/test_gradients.py::test_pitfall_22_shards_and_chunks_add_up_even_empty_ones",
)
def each_shard_adds_its_noise(original: Any) -> Any:
    def clipped_sum(self: Any, batches: Any) -> Any:
        found = original(self, batches)
        noisy = [total + total.new_tensor(1.0).normal_() * 0.01 for total in found.tensors]
        return replace(found, tensors=noisy)

    return clipped_sum


@takes_out(
    "privacy.distributed.Ranks.noisy_mean",
    22,
    "privacy/test_distributed.py::test_pitfall_22_ranks_hand_in_their_sums_without_noise",
    "privacy/test_distributed.py::test_pitfall_22_each_coordinate_has_the_noise_of_its_owner_alone",
)
def each_rank_adds_its_noise(original: Any) -> Any:
    def noisy_mean(self: Any, mechanism: Any, found: Any, entropy: Any) -> Any:
        whole = replace(mechanism, denominator=1.0)
        return original(self, mechanism, replace(found, tensors=whole.noisy_mean(found.tensors, entropy)), entropy)

    return noisy_mean


@takes_out(
    "privacy.distributed.Ranks._own_sum",
    22,
    "privacy/test_distributed.py::test_pitfall_22_ranks_hand_in_their_sums_without_noise",
)
def each_rank_learns_the_whole_sum(original: Any) -> Any:
    def own_sum(self: Any, flat: Any) -> Any:
        from torch import distributed

        original(self, flat)
        whole = [flat.clone() for _ in range(self.size)]
        for rank, part in enumerate(whole):
            distributed.broadcast(part, src=rank, async_op=True).wait()
        return sum(whole).chunk(self.size)[self.rank].contiguous()

    return own_sum


@takes_out(
    "privacy.distributed.Ranks.open_entropy",
    22,
    "privacy/test_distributed.py::test_pitfall_22_no_two_ranks_have_the_same_noise",
)
def all_ranks_draw_the_same_noise(original: Any) -> Any:
    return lambda self, kind: original(replace(self, rank=0), kind)


@takes_out(
    "privacy.mechanism.GaussianSum.release",
    (22, 23),
    "privacy/test_mechanism.py::test_the_noise_has_the_planned_size_and_is_drawn_once",
)
def noise_is_drawn_for_each_patient(original: Any) -> Any:
    def release(self: Any, units: Any, entropy: Any) -> Any:
        quiet = replace(self, noise_multiplier=self.noise_multiplier)
        return sum(original(quiet, [unit], entropy) for unit in units)

    return release


@takes_out(
    "privacy.gradients.zero_sums", 23, "privacy/test_gradients.py::test_pitfall_23_sums_are_never_in_half_precision"
)
def sums_are_kept_in_half_precision(original: Any) -> Any:
    return lambda parameters: [total.half() for total in original(parameters)]


# --------------------------------------------------------------- no pitfall: input that would not fit into the memory


@takes_out(
    "imaging.loading._refuse_too_large",
    (),
    "stages/test_ingest.py::test_what_is_too_large_is_refused_by_its_header_alone",
    "stages/test_ingest.py::test_a_volume_at_the_limit_comes_in_and_one_above_is_quarantined",
)
def files_of_any_size_are_unfolded(original: Any) -> Any:
    return lambda announced, max_voxels: None


@takes_out(
    "imaging.dicom_series._voxels",
    (),
    "stages/test_ingest.py::test_what_is_too_large_is_refused_by_its_header_alone",
    "stages/test_ingest.py::test_a_volume_at_the_limit_comes_in_and_one_above_is_quarantined",
)
def series_of_any_size_are_unfolded(original: Any) -> Any:
    return lambda header: 0


@takes_out(
    "imaging.dicom_labels._segments",
    (),
    "stages/test_ingest.py::test_a_segmentation_of_frames_that_lie_far_apart_is_too_large",
)
def segmentations_of_any_size_are_unfolded(original: Any) -> Any:
    return lambda dataset, shape, affine, grid, max_voxels: original(dataset, shape, affine, grid, sys.maxsize)
