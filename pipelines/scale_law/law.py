"""The law: what DP-SGD adds to a public generator, by how far the patients reach above the noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medsynth.privacy.scale_law import reach as of_plan

Floats = NDArray[np.float64]
Row = Mapping[str, Any]
_SPARE = 2  # cells beyond as many as the law has numbers
_TEN_THOUSAND = 1e4


@dataclass(frozen=True)
class Fit:
    """A fitted form with its errors.

    Attributes:
        form: its name in :data:`FORMS`.
        values: by name.
        error: root mean square of what it misses, in skill.
        left_out: the same for cells that it was not fitted on, one after another.
        cells: that it was fitted on.
    """

    form: str
    values: dict[str, float]
    error: float
    left_out: float
    cells: int


@dataclass(frozen=True)
class _Form:
    """A function of (numbers, reach, parameters) with the names of its numbers and where the search begins."""

    function: Callable[[Floats, Floats, Floats], Floats]
    names: tuple[str, ...]
    start: tuple[float, ...]


def _hill(share_of: float | None) -> Callable[[Floats, Floats, Floats], Floats]:
    """Return the form in reach / parameters^q; q is fitted where ``share_of`` is None."""

    def law(n: Floats, reach: Floats, d: Floats) -> Floats:
        q = n[5] if share_of is None else share_of
        with np.errstate(over="ignore"):
            share = 1 / (1 + np.exp(-np.exp(n[3]) * (np.log(reach) - q * np.log(d) - n[2])))
        return np.asarray((n[0] + n[4] * np.log10(d / _TEN_THOUSAND)) * share - n[1] * (1 - share))

    return law


_NAMES = ("gain_at_10k", "loss", "log_half", "log_power", "gain_a_decade")
FORMS = {
    "reach": _Form(_hill(0.0), _NAMES, (0.4, 0.05, 6.0, 0.0, 0.2)),
    "reach / sqrt(d)": _Form(_hill(0.5), _NAMES, (0.4, 0.05, 1.5, 0.0, 0.2)),
    "reach / d^q": _Form(_hill(None), (*_NAMES, "q"), (0.4, 0.05, 4.0, 0.0, 0.2, 0.25)),
}
"""Each goes from ``-loss`` (all noise) to the gain without noise, which grows with the logarithm of the parameters."""


def reach(row: Row) -> float:
    """Return the reach of a cell (see :func:`medsynth.privacy.scale_law.reach`)."""
    return of_plan(row["noise_multiplier"], row["sampling_rate"] * row["patients"], row["steps"])


def gains(rows: Sequence[Row]) -> list[tuple[Row, float]]:
    """Return each private cell with what it adds to the skill of the public generator."""
    public = [row["skill"] for row in rows if not row["patients"]]
    return [(row, row["skill"] - float(np.mean(public))) for row in rows if row["patients"]] if public else []


def fit(rows: Sequence[Row], form: str) -> Fit | None:
    """Return a form fitted by least squares to all cells, those without noise too; None with too few of them."""
    pairs, shape = gains(rows), FORMS[form]
    if len(pairs) < len(shape.names) + _SPARE:
        return None
    x, d = np.array([reach(row) for row, _ in pairs]), np.array([float(row["parameters"]) for row, _ in pairs])
    gain = np.array([gain for _, gain in pairs])
    numbers = _numbers(shape, x, d, gain)
    kept = [np.arange(len(x)) != left for left in range(len(x))]
    apart = [float((shape.function(_numbers(shape, x[k], d[k], gain[k]), x[~k], d[~k]) - gain[~k])[0]) for k in kept]
    values = dict(zip(shape.names, map(float, numbers), strict=True))
    return Fit(form, values, _length(shape.function(numbers, x, d) - gain), _length(apart), len(pairs))


def best(fits: Sequence[Fit]) -> Fit:
    """Return the fit that misses cells it was not fitted on by least."""
    return min(fits, key=lambda found: found.left_out)


def predicted(found: Fit, reaches: Floats, parameters: Floats) -> Floats:
    """Return the gain that a fit expects."""
    return FORMS[found.form].function(np.array(list(found.values.values())), reaches, parameters)


def _numbers(form: _Form, x: Floats, d: Floats, gain: Floats) -> Floats:
    from scipy.optimize import least_squares

    return np.asarray(least_squares(lambda numbers: form.function(numbers, x, d) - gain, form.start).x)


def _length(values: Sequence[float] | Floats) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
