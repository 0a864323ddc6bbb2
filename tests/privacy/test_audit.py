"""Every audit of a mechanism is green on the real one and red on broken ones."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medsynth.errors import PrivacyError
from medsynth.privacy.audit import one_run, step
from medsynth.privacy.audit.bounds import epsilon_lower_bound, one_run_ceiling, one_run_lower_bound
from medsynth.privacy.audit.finding import Control, Finding, refusals
from medsynth.privacy.audit.one_run import audit_training, enough_canaries, run_canaries
from medsynth.privacy.audit.per_unit import audit_gradients
from medsynth.privacy.audit.replay import Wrap, audit_steps, audit_sums, replay_step
from medsynth.privacy.entropy import open_entropy
from medsynth.privacy.gradients import Backend, Batch, ClippedSum, open_backend
from medsynth.privacy.gradients_opacus import OpacusBackend
from medsynth.privacy.mechanism import DpSgd, GaussianSum

SGD = DpSgd("toy", sampling_rate=0.25, steps=30, noise_multiplier=1.0, clip_norm=0.7, denominator=10.0)
SUM = GaussianSum("sum", dimensions=6, clip_norm=2.0, noise_multiplier=5.0, denominator=10.0)
REPEATS = 10_000


def finding(**changes: object) -> Finding:
    values = {
        "audit": "step",
        "subject": "toy",
        "measures": "epsilon",
        "value": 1.0,
        "low": 1.0,
        "high": math.inf,
        "allowed": 2.0,
        "outcome": "pass",
        "blocks": True,
        "controls": (Control("half the noise", 3.0, True),),
        "shows": "x",
        "reads_patients": False,
    }
    return Finding(**{**values, **changes})  # type: ignore[arg-type]  # a table of any fields


def test_a_finding_survives_json_and_only_blocking_or_broken_ones_refuse() -> None:
    for one in (finding(), finding(outcome="fail", value=math.inf)):
        assert Finding.from_json(json.loads(json.dumps(one.to_json(), allow_nan=False))) == one
    assert refusals([finding(), finding(outcome="cannot say"), finding(outcome="fail", blocks=False)]) == []
    assert "at least 3" in refusals([finding(outcome="fail", low=3.0)])[0]
    inside = refusals([finding(outcome="fail", low=3.0, reads_patients=True)])[0]
    assert "above what is allowed" in inside and "3" not in inside
    for controls in ((), (Control("half the noise", 1.0, False),)):
        broken = finding(controls=controls)
        assert broken.verdict == "broken" and "broken" in refusals([broken])[0]


# ------------------------------------------------------------------------------------------------------------- step


def test_the_code_of_a_step_passes_and_three_broken_ones_are_caught() -> None:
    found = step.audit_sgd(SGD, open_entropy("test_only"), repeats=2 * REPEATS)
    assert found.verdict == "pass" and found.value > 0.3 * found.allowed  # teeth: a bound of 0 would pass anything
    assert len(found.controls) == 3 and all(control.caught for control in found.controls)


def test_the_code_of_a_sum_passes_and_three_broken_ones_are_caught() -> None:
    found = step.audit_sum(SUM, open_entropy("test_only"), repeats=2 * REPEATS)
    assert found.verdict == "pass" and found.value > 0.5 * found.allowed
    assert len(found.controls) == 3 and all(control.caught for control in found.controls)


def test_a_step_with_too_little_noise_is_red() -> None:
    plan = replace(SGD, noise_multiplier=0.5, steps=1)
    weak = step.sgd_call(replace(plan, noise_multiplier=0.3), open_entropy("test_only"))
    assert step.audit_step(plan, weak, {"itself": weak}, repeats=REPEATS).verdict == "fail"


def test_the_bound_is_below_the_truth_of_randomised_response() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.random(20_000) < 0.75, rng.random(20_000) < 0.25
    bound = epsilon_lower_bound(inside.astype(float), outside.astype(float), delta=0.0, confidence=0.99)
    assert 0.9 * np.log(3) < bound <= np.log(3)
    same = rng.standard_normal((2, 5000))
    assert epsilon_lower_bound(same[0], same[1], delta=0.0, confidence=0.999) < 0.1
    with pytest.raises(PrivacyError):
        epsilon_lower_bound(same[0][:50], same[1][:50], delta=0.0, confidence=0.99)


# ---------------------------------------------------------------------------------------------------------- one run


def test_the_bound_of_one_run_is_below_the_truth_of_randomised_response() -> None:
    # Theorem 5.2 at delta 0 is the binomial tail: 750 of 1000 right is what epsilon log 3 gives.
    assert 0.85 * math.log(3) < one_run_lower_bound(1000, 1000, 750, delta=0.0, confidence=0.95) < math.log(3)
    assert one_run_lower_bound(1000, 1000, 510, delta=0.0, confidence=0.95) == 0.0
    assert one_run_lower_bound(1000, 200, 199, delta=1e-3, confidence=0.95) < one_run_lower_bound(
        1000, 200, 199, delta=0.0, confidence=0.95
    )
    assert 4.0 < one_run_ceiling(200, delta=0.0, confidence=0.95) < 4.5
    with pytest.raises(PrivacyError):
        one_run_lower_bound(10, 5, 6, delta=0.0, confidence=0.95)


def test_a_training_passes_and_a_tenth_of_its_noise_is_caught() -> None:
    for plan in (replace(SGD, noise_multiplier=3.0), replace(SGD, steps=5, sampling_rate=1.0, noise_multiplier=4.0)):
        found = audit_training(plan, open_entropy("test_only"), canaries=1000)
        assert found.verdict == "pass" and found.controls[0].caught and found.value < found.allowed


@pytest.mark.parametrize(
    ("rate", "steps", "noise", "canaries"),
    [(0.1, 20, 1.5, 200), (0.02, 100, 0.8, 800), (0.25, 3, 1.3, 800), (0.05, 60, 1.0, 800), (0.01, 50, 0.6, 2000)],
)
def test_a_training_that_draws_few_canaries_is_not_called_broken(
    rate: float, steps: int, noise: float, canaries: int
) -> None:
    plan = replace(SGD, sampling_rate=rate, steps=steps, noise_multiplier=noise)
    found = audit_training(plan, open_entropy("test_only"), canaries=canaries)
    assert found.verdict in ("pass", "cannot say") and found.value < found.allowed
    assert (found.verdict == "pass") == (found.controls[0].value > found.allowed)


def test_an_attack_that_looks_away_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    looks_away = lambda plan, included, entropy: entropy.normal(len(included))  # noqa: E731  # one line, used once
    monkeypatch.setattr(one_run, "run_canaries", looks_away)
    found = audit_training(replace(SGD, noise_multiplier=3.0), open_entropy("test_only"), canaries=1000)
    assert found.verdict == "broken"


def test_a_training_with_less_noise_than_claimed_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = DpSgd.noisy_mean

    def quiet(self: DpSgd, sums: Sequence[Tensor], entropy: object) -> list[Tensor]:
        return honest(replace(self, noise_multiplier=self.noise_multiplier / 8), sums, entropy)  # type: ignore[arg-type]

    monkeypatch.setattr(DpSgd, "noisy_mean", quiet)
    plan = replace(SGD, sampling_rate=1.0, steps=4, noise_multiplier=3.0)
    found = audit_training(plan, open_entropy("test_only"), canaries=1000)
    assert found.verdict == "fail" and refusals([found])


def test_a_claim_above_the_ceiling_is_no_pass() -> None:
    found = audit_training(replace(SGD, noise_multiplier=0.4), open_entropy("test_only"), canaries=20)
    assert found.verdict == "cannot say"
    assert enough_canaries(SGD, 500) == 500 and enough_canaries(replace(SGD, noise_multiplier=50.0), 500) == 200


def test_canaries_are_clipped() -> None:
    silent = replace(SGD, noise_multiplier=0.0, sampling_rate=1.0)
    scores = run_canaries(silent, np.array([True, False, True]), open_entropy("test_only"))
    assert scores == pytest.approx(np.array([1, 0, 1]) * SGD.steps * SGD.clip_norm / SGD.denominator)


# ----------------------------------------------------------------------------------------------------------- replay


def flow_of(cohort: list[np.ndarray], adaptive: bool = True) -> object:
    def flow(missing: int | None, wrap: Wrap) -> None:
        left = [vector for number, vector in enumerate(cohort) if number != missing]
        first = wrap(SUM).release(left, open_entropy("os"))
        shift = first if adaptive else 0.0
        wrap(replace(SUM, name="spread")).release([(v - shift) ** 2 for v in left], open_entropy("os"))

    return flow


def vectors(count: int = 6) -> list[np.ndarray]:
    cohort = list(np.random.default_rng(0).normal(0, 3, (count, SUM.dimensions)))
    return [*cohort, np.full(SUM.dimensions, np.nan), np.full(SUM.dimensions, 1e30)]


def test_neighbouring_cohorts_move_a_chain_of_sums_by_at_most_the_clip_norm() -> None:
    found = audit_sums(flow_of(vectors()), [0, 3, 6, 7], "masks")  # type: ignore[arg-type]
    assert found.verdict == "pass" and 0.9 < found.value <= 1 + 1e-6
    assert [control.name for control in found.controls] == ["no clip", "a clip 1.26 times too wide"]


def test_a_stage_that_scales_by_the_number_of_patients_is_red() -> None:
    def leaky(missing: int | None, wrap: Wrap) -> None:
        left = [np.eye(SUM.dimensions)[0] / 2 for number in range(6) if number != missing]
        wrap(SUM).release([vector * len(left) / 2 for vector in left], open_entropy("os"))

    assert audit_sums(leaky, [0, 1], "masks").verdict == "fail"


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def row_loss(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["x"]) - 1).square().flatten(1).mean(1)


def toy() -> tuple[nn.Module, list[Batch]]:
    torch.manual_seed(0)
    stream = torch.Generator().manual_seed(0)
    batches = [{"x": torch.randn(1 + n % 3, 1, 8, 8, generator=stream)} for n in range(5)]
    hostile = [{"x": torch.full((2, 1, 8, 8), value)} for value in (float("nan"), 1e6, 3.0)]
    return Toy(), [*batches, *hostile]


@pytest.mark.parametrize("backend", ["unit", "opacus"])
def test_neighbouring_cohorts_move_a_step_by_at_most_the_clip_norm(backend: str) -> None:
    model, batches = toy()
    opened = open_backend(backend, model, row_loss, 0.1)
    found = audit_steps(SGD_AT, opened, lambda n: batches[n], len(batches), [0, 1, 5, 6, 7])
    assert found.verdict == "pass" and 0.9 < found.value <= 1 + 1e-6
    assert {control.name for control in found.controls} == {"no clip", "mean over the real batch"}


SGD_AT = replace(SGD, clip_norm=0.1)


@dataclass(frozen=True)
class Unclipped:
    """A backend whose clip went missing."""

    inner: Backend
    name: str = "unclipped"

    @property
    def clip_norm(self) -> float:
        return self.inner.clip_norm

    def at(self, clip_norm: float) -> Backend:
        return self.inner.at(clip_norm)

    def clipped_sum(self, batches: Sequence[Batch]) -> ClippedSum:
        return self.inner.at(1e12).clipped_sum(batches)


def test_a_backend_without_clip_is_red() -> None:
    model, batches = toy()
    broken = Unclipped(open_backend("unit", model, row_loss, 0.1))
    assert audit_steps(SGD_AT, broken, lambda n: batches[n], len(batches), [0, 6]).verdict == "fail"
    assert replay_step(SGD_AT, broken, lambda n: batches[n], len(batches), 6) > 50


# --------------------------------------------------------------------------------------------------------- per unit


@pytest.mark.parametrize("backend", ["unit", "opacus"])
def test_right_gradients_pass_and_scaled_ones_are_caught(backend: str) -> None:
    model, batches = toy()
    found = audit_gradients(backend, model, row_loss, batches[:4], 0.1)
    assert found.verdict == "pass" and found.value < 1e-3 and found.controls[0].caught


def test_the_known_error_of_opacus_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = toy()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    last = [{"x": batch["x"].repeat(1, 1, 1, 1).to(memory_format=torch.channels_last)} for batch in batches[:4]]

    def opened(name: str, module: nn.Module, loss: object, clip_norm: float) -> Backend:
        return OpacusBackend(module, loss, clip_norm, contiguous=False)  # type: ignore[arg-type]

    monkeypatch.setattr("medsynth.privacy.audit.per_unit.open_backend", opened)
    assert audit_gradients("opacus", model, row_loss, last, 0.1).verdict == "fail"
