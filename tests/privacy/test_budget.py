"""The plan of noise: within the promise, near it, from public constants only."""

from __future__ import annotations

import math

import pytest

from medsynth.config import Appearance, Grid, Masks, Privacy, Shares, Study, Train
from medsynth.errors import BudgetError, PrivacyError
from medsynth.privacy.accounting import Event, epsilon
from medsynth.privacy.budget import (
    MASK_SUMS,
    BudgetPlan,
    gaussian_epsilon,
    gaussian_mu,
    most_steps,
    plan_at_noise,
    plan_budget,
    plan_features,
)
from medsynth.privacy.pld import gaussian_delta

TRAIN = Train(steps=100)


def _privacy(eps: float = 8.0, n: int = 200, **kwargs: object) -> Privacy:
    return Privacy(epsilon=eps, declared_patients=n, **kwargs)  # type: ignore[arg-type]


def all_events(plan: BudgetPlan) -> list[Event]:
    return [event for events in plan.events.values() for event in events]


@pytest.mark.parametrize("promise", [1.0, 3.0, 8.0])
def test_the_plan_stays_below_the_promise_and_uses_it(promise: float) -> None:
    plan = plan_budget(_privacy(promise), TRAIN, Masks())
    assert 0.99 * promise <= plan.epsilon <= promise
    assert plan.epsilon == epsilon(all_events(plan), plan.delta)


def test_shares_of_mu_squared_are_kept() -> None:
    shares = Shares(masks=2, appearance=1, training=1)
    plan = plan_budget(_privacy(shares=shares), TRAIN, Masks())
    assert MASK_SUMS / plan.masks_noise_multiplier**2 == pytest.approx(plan.mu**2 / 2)
    assert 2 / plan.appearance_noise_multiplier**2 == pytest.approx(plan.mu**2 / 4)


def test_without_training_the_statistics_spend_everything() -> None:
    shares, nothing = Shares(masks=2, appearance=3, training=5), Train(steps=0)
    plan = plan_budget(_privacy(shares=shares), nothing, Masks())
    assert MASK_SUMS / plan.masks_noise_multiplier**2 == pytest.approx(plan.mu**2 * 2 / 5, rel=2e-3)
    assert 2 / plan.appearance_noise_multiplier**2 == pytest.approx(plan.mu**2 * 3 / 5, rel=2e-3)
    alone = plan_budget(_privacy(shares=shares), nothing, Masks(source="public_shapes"))
    assert math.sqrt(2) / alone.appearance_noise_multiplier == pytest.approx(alone.mu, rel=1e-3)
    for one in (plan, alone):
        assert 0.99 * 8 <= one.epsilon <= 8


def test_steps_are_planned_alike_for_a_study_without_any() -> None:
    none, some = (most_steps(_privacy(), Train(steps=steps), Masks(), 4.0) for steps in (0, 100))
    assert none == some > 1


def test_pitfall_03_plans_do_not_know_the_number_of_patients() -> None:
    one, other = (plan_budget(_privacy(n=n), TRAIN, Masks()) for n in (256, 257))
    assert one == other


def test_a_mechanism_that_does_not_run_has_no_event() -> None:
    plan = plan_budget(
        _privacy(), Train(steps=100, appearance=Appearance(enabled=False)), Masks(source="public_shapes")
    )
    assert set(plan.events) == {"training"}
    assert plan.masks_noise_multiplier == plan.appearance_noise_multiplier == 0
    assert plan.epsilon <= 8
    statistics = plan_budget(_privacy(), Train(steps=0), Masks())
    assert set(statistics.events) == {"masks", "appearance"} and statistics.training_noise_multiplier == 0


def _features(privacy: Privacy, appearance: Appearance | None = None) -> tuple[int, ...]:
    grid = Grid(shape=(48, 64, 48), spacing_mm=(1, 1, 1), labels={0: "background", 1: "organ"})
    name = "planned" if privacy.private else "planned-nonprivate"
    train = Train(steps=0, appearance=appearance or Appearance())
    return plan_features(Study(name=name, grid=grid, privacy=privacy, train=train)).train.appearance.cosines


def test_fewer_patients_and_less_epsilon_get_fewer_features() -> None:
    sizes = [sum(_features(_privacy(eps, n))) for eps, n in ((0.5, 50), (1, 200), (3, 200), (5, 200), (8, 900))]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    assert _features(_privacy(math.inf)) == _features(_privacy(8, 900)) == (6, 8, 6)
    assert min(_features(_privacy(0.1, 2, delta=0.01))) >= 2


def test_a_public_template_pays_for_more_features_where_noise_is_high() -> None:
    plain, guided = (_features(_privacy(1), Appearance(template_centre_mm=centre)) for centre in (None, (0, 0, 0)))
    assert plain == (3, 4, 3) and guided == (4, 5, 4)


def test_features_that_a_study_names_are_kept() -> None:
    assert _features(_privacy(0.5), Appearance(coefficients=(9, 9, 9))) == (9, 9, 9)
    with pytest.raises(ValueError, match="not planned"):
        _ = Appearance().cosines


def test_more_steps_need_more_noise() -> None:
    few, many = (plan_budget(_privacy(), Train(steps=steps), Masks()) for steps in (50, 400))
    assert many.training_noise_multiplier > few.training_noise_multiplier


def test_infinite_epsilon_plans_nonprivate_events() -> None:
    plan = plan_budget(_privacy(math.inf), TRAIN, Masks())
    assert plan.epsilon == math.inf
    assert {event.kind for event in all_events(plan)} == {"nonprivate"}
    assert plan.training_noise_multiplier == 0


def test_a_training_share_of_nothing_is_refused() -> None:
    with pytest.raises(BudgetError, match="shares"):
        plan_budget(_privacy(0.5, shares=Shares(masks=1e6, appearance=1e6, training=1e-9)), TRAIN, Masks())


def test_pitfall_14_the_noise_of_a_sweep_lets_all_trials_fit_together() -> None:
    alone, sweep = plan_budget(_privacy(3.0), TRAIN, Masks()), plan_budget(_privacy(3.0, trials=4), TRAIN, Masks())
    assert sweep.masks_noise_multiplier == pytest.approx(2 * alone.masks_noise_multiplier)
    assert sweep.training_noise_multiplier > alone.training_noise_multiplier
    assert 0.99 * 3 <= sweep.epsilon <= 3
    assert sweep.epsilon == epsilon(all_events(sweep) * 4, sweep.delta) > epsilon(all_events(sweep), sweep.delta)


def test_noise_epsilon_and_steps_lead_to_each_other() -> None:
    privacy = _privacy(2.0)
    plan = plan_budget(privacy, TRAIN, Masks())
    assert plan_at_noise(privacy, TRAIN, Masks(), plan.training_noise_multiplier) == plan
    assert most_steps(privacy, TRAIN, Masks(), plan.training_noise_multiplier) == pytest.approx(TRAIN.steps, abs=2)
    assert plan_at_noise(privacy, TRAIN, Masks(), plan.training_noise_multiplier / 2).epsilon > 2
    with pytest.raises(BudgetError, match="one step"):
        most_steps(privacy, TRAIN, Masks(), 0.3)


@pytest.mark.parametrize("mu", [0.01, 0.3, 2.0, 40.0])
def test_mu_and_epsilon_lead_to_each_other(mu: float) -> None:
    epsilon_of_it = gaussian_epsilon(mu, 1e-4)
    assert gaussian_mu(epsilon_of_it, 1e-4) == pytest.approx(mu, rel=1e-6)
    assert gaussian_delta(epsilon_of_it, mu) <= 1e-4


@pytest.mark.parametrize(("eps", "delta"), [(0, 1e-4), (-1, 1e-4), (math.nan, 1e-4), (math.inf, 1e-4), (1, 0), (1, 1)])
def test_what_is_no_budget_has_no_mu(eps: float, delta: float) -> None:
    with pytest.raises(PrivacyError, match="a budget needs"):
        gaussian_mu(eps, delta)


def test_a_large_epsilon_is_planned() -> None:
    plan = plan_budget(_privacy(200.0), TRAIN, Masks())
    assert 0.99 * 200 <= plan.epsilon <= 200
