"""The second and third accountant, from Opacus (imports torch): they check the claim, they do not make it."""

from __future__ import annotations

import warnings
from typing import Literal

from opacus.accountants import PRVAccountant, RDPAccountant

from medsynth.privacy.accounting import Event

_PRV_ERROR = 0.01  # width of PRV's own error bar on epsilon; its upper end is returned


def epsilon(events: tuple[Event, ...], delta: float, accountant: Literal["prv", "rdp"]) -> float:
    """Return Opacus' epsilon of ``events``, not rounded.

    Gopi, Lee, Wutschitz 2021 (PRV); Mironov 2017 and Mironov, Talwar, Zhang 2019 (RDP).

    Args:
        events: merged events, none of them ``nonprivate``.
        delta: in (0, 1).
        accountant: which of the two.
    """
    history = [(event.noise_multiplier, event.sampling_rate, event.count) for event in events]
    with warnings.catch_warnings():
        # RDP warns when the best order is the largest one: its epsilon is then looser, still an upper bound.
        warnings.simplefilter("ignore")
        if accountant == "rdp":
            rdp = RDPAccountant()
            rdp.history = history
            return float(rdp.get_epsilon(delta=delta))
        prv = PRVAccountant()
        prv.history = history
        return float(prv.get_epsilon(delta=delta, eps_error=_PRV_ERROR))
