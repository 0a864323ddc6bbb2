"""The step audit is green on the real mechanism and red on broken ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from torch import Tensor

from medsynth.errors import PrivacyError
from medsynth.privacy.audit import audit_dp_sgd, epsilon_lower_bound
from medsynth.privacy.entropy import open_entropy
from medsynth.privacy.mechanism import DpSgd

PLAN = DpSgd("toy", sampling_rate=1.0, steps=10, noise_multiplier=1.0, clip_norm=1.0, denominator=10.0)
REPEATS = 3000


def test_the_mechanism_passes() -> None:
    audit = audit_dp_sgd(PLAN, open_entropy("test_only"), repeats=REPEATS)
    assert audit.passed
    assert audit.epsilon_lower > 0.3  # the audit has teeth: a bound of 0 would pass anything


def test_subsampling_passes() -> None:
    assert audit_dp_sgd(replace(PLAN, sampling_rate=0.5), open_entropy("test_only"), repeats=REPEATS).passed


def test_half_the_noise_is_caught() -> None:
    broken = replace(PLAN, noise_multiplier=0.5)
    assert not audit_dp_sgd(PLAN, open_entropy("test_only"), repeats=REPEATS, executed=broken).passed


def test_a_higher_sampling_rate_than_claimed_is_caught() -> None:
    claimed = replace(PLAN, sampling_rate=0.2)
    assert not audit_dp_sgd(claimed, open_entropy("test_only"), repeats=REPEATS, executed=PLAN).passed


def test_a_missing_clip_is_caught() -> None:
    def unclipped(sums: Sequence[Tensor], gradient: Sequence[Tensor | None], clip_norm: float) -> float:
        for total, part in zip(sums, gradient, strict=True):
            if part is not None:
                total.add_(part)
        return 0.0

    assert not audit_dp_sgd(PLAN, open_entropy("test_only"), repeats=REPEATS, add=unclipped).passed


def test_the_bound_is_below_the_truth_of_randomised_response() -> None:
    rng = np.random.default_rng(0)
    inside, outside = rng.random(20_000) < 0.75, rng.random(20_000) < 0.25
    bound = epsilon_lower_bound(inside.astype(float), outside.astype(float), delta=0.0, confidence=0.99)
    assert 0.9 * np.log(3) < bound <= np.log(3)
    same = rng.standard_normal((2, 5000))
    assert epsilon_lower_bound(same[0], same[1], delta=0.0, confidence=0.999) < 0.1
    with pytest.raises(PrivacyError):
        epsilon_lower_bound(same[0][:50], same[1][:50], delta=0.0, confidence=0.99)
