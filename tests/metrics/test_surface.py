"""Surfaces: known distances come out in mm, tolerance decides, and a missing label is punished and never infinite."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from medsynth.metrics.surface import patient_surfaces


def _block(start: int, rank: int = 3, value: int = 1) -> Tensor:
    label = torch.zeros(*[20] * rank, dtype=torch.uint8)
    label[(slice(start, start + 8), *[slice(6, 14)] * (rank - 1))] = value
    return label


@pytest.mark.parametrize("rank", [2, 3])
def test_a_shift_along_an_axis_is_measured_in_its_spacing(rank: int) -> None:
    spacing = [2.0, *[1.0] * (rank - 1)]
    moved, truth = [_block(7, rank)[None]], [_block(5, rank)[None]]
    found = patient_surfaces(moved, truth, 2, spacing, tolerance=1.0)
    assert found.hd95[0, 0] == pytest.approx(4.0) and 0 < found.dice[0, 0] < 1
    strict, loose = (patient_surfaces(moved, truth, 2, spacing, tolerance=mm).dice[0, 0] for mm in (3.0, 4.0))
    assert strict < 1.0 == loose
    same = patient_surfaces(truth, truth, 2, spacing, tolerance=0.0)
    assert same.dice[0, 0] == 1.0 and same.hd95[0, 0] == 0.0


@pytest.mark.parametrize("swap", [False, True])
def test_a_label_in_one_map_only_scores_nothing_and_the_diagonal(swap: bool) -> None:
    maps = [_block(5)[None]], [torch.zeros_like(_block(5))[None]]
    found = patient_surfaces(*(maps[::-1] if swap else maps), classes=2, spacing=[1.0, 1.0, 2.0], tolerance=1.0)
    assert found.dice[0, 0] == 0.0 and found.hd95[0, 0] == pytest.approx(math.sqrt(19**2 + 19**2 + 38**2))


def test_labels_that_nobody_has_are_unknown_and_records_are_averaged() -> None:
    truth = torch.stack([_block(5), _block(5), torch.zeros_like(_block(5))])
    got = torch.stack([_block(5), _block(7), torch.zeros_like(_block(5))])
    found = patient_surfaces([got], [truth], 3, [1.0] * 3, tolerance=1.0)
    assert found.hd95[0, 0] == pytest.approx(1.0) and np.isnan(found.hd95[0, 1]) and np.isnan(found.dice[0, 1])
    assert patient_surfaces([], [], 3, [1.0] * 3, 1.0).dice.shape == (0, 2)
