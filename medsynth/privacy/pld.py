"""A small accountant of our own: certified bounds on (epsilon, delta) by privacy-loss distributions, numpy only.

`medsynth verify` recomputes a claim with it where neither dp-accounting nor scipy is installed, and it checks
dp-accounting where that is installed. It shares no code with it.

One access is a pair (P, Q) of output distributions, with and without the patient; its privacy loss is
``log(dP/dQ)`` under P, and losses of a composition add up (Sommer, Meiser, Mohammadi 2019). For Gaussian noise under a
patient's own coin, the pair of one direction and the same pair swapped dominate every pair of neighbours (Zhu, Dong,
Wang 2022), so both directions are composed and the larger result counts. A direction takes four steps:

1. *Cells.* The loss axis is cut into cells of one width; a cell's masses under P and Q are exact (``erfc``).
2. *Two readings of a cell.* Upper: its mass is split between the two ends so that both masses are kept, "connect the
   dots" (Doroshenko et al. 2022), a pair that dominates the true one. Lower: the cell is merged into one outcome
   (data processing: a pair that is dominated), whose loss is the cell's middle plus a tiny correction; a Chernoff
   bound on the sum of the corrections turns the middles into a bound.
3. *Composition* by powers of the characteristic function (Koskela, Jälkö, Honkela 2020; Gopi, Lee, Wutschitz 2021) of
   the distribution tilted by ``exp(theta loss)``: the tilt puts the tail that delta measures into the middle of the
   window, so that wrap-around and rounding are relative to delta and not to 1.
4. *Every error is added to delta* (upper) or taken off it (lower): losses beyond the grid, wrap-around by Chernoff
   bounds, rounding of the transforms, cancellation in the cells.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np

from medsynth.errors import PrivacyError
from medsynth.privacy.accounting import Event, merge
from medsynth.privacy.loss_cells import (
    Access,
    Array,
    Cells,
    Losses,
    cells_of,
    correction_of,
    loss_range,
    merge_cells,
    split_cells,
    variance,
)

Side = Literal["upper", "lower"]

_ULP = float(np.finfo(np.float64).eps)
# Share of delta that losses beyond the grid may take, and share (of a Chernoff bound on delta) of wrap-around.
_TAIL_SHARE = 1e-7
_WRAP_SHARE = 1e-10
# Share of delta that the lower bound gives up for the corrections of merged cells.
_CORRECTION_SHARE = 1e-3
# Discretisation may add this much to epsilon (and about as much is taken off the lower bound) at a spread of 1.
_TOLERANCE = 2e-4
_MANY = 16
_LONGEST = 2**21
# exp of a loss must stay a double.
_LARGEST_LOSS = 600.0
# Edges of cells are right to a few units in the last place of losses below 10.
_EDGE_ERROR = 1e-15


def epsilon_bounds(events: Sequence[Event], delta: float) -> tuple[float, float]:
    """Return a lower and an upper bound on the true epsilon of all events together, not rounded.

    *Guarantees*: publishing the outputs of all events is (upper, delta)-differentially private for the addition or
    removal of one patient; and mechanisms with these events exist for which no epsilon below ``lower`` is.

    Args:
        events: what was executed; order does not matter.
        delta: in (0, 1).

    Returns:
        ``(lower, upper)``, both infinite after a ``nonprivate`` event.

    Raises:
        PrivacyError: delta out of range.
    """
    return epsilon_lower(events, delta), epsilon_upper(events, delta)


def epsilon_upper(events: Sequence[Event], delta: float) -> float:
    """Return the upper end of :func:`epsilon_bounds` alone, in half its time."""
    return _epsilon(events, delta, "upper")


def epsilon_lower(events: Sequence[Event], delta: float) -> float:
    """Return the lower end of :func:`epsilon_bounds` alone, in half its time."""
    return _epsilon(events, delta, "lower")


def delta_at(events: Sequence[Event], epsilon: float) -> float:
    """Return an upper bound on delta of all events together at ``epsilon`` >= 0.

    Args:
        events: what was executed.
        epsilon: privacy parameter, finite.

    Raises:
        PrivacyError: epsilon negative, NaN or infinite.
    """
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise PrivacyError(f"epsilon must be a finite number >= 0 to ask for its delta, got {epsilon}")
    gaussian, sampled = _split(events)
    if any(event.kind == "nonprivate" for event in events):
        return 1.0
    if not sampled:
        return gaussian_delta(epsilon, gaussian)
    # Two passes: the grid needs delta's size to know which tails are negligible.
    delta = 1e-10
    for _ in range(2):
        sums = _sums(gaussian, sampled, max(delta, 1e-300), "upper")
        if sums is None:
            return gaussian_delta(epsilon, _unsampled(gaussian, sampled))
        delta = max(one.delta(epsilon) for one in sums)
    return min(1.0, delta)


def gaussian_delta(epsilon: float, mu: float) -> float:
    """Return the exact delta of Gaussian noise at ``epsilon``, ``mu`` being sensitivity / standard deviation.

    Balle, Wang 2018, theorem 8. Gaussians compose into one whose ``mu^2`` is the sum (Dong, Roth, Su 2022).
    """
    if mu == 0:
        return 0.0
    first, second = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
    if second > -25:
        return max(0.0, _normal(first) - math.exp(epsilon) * _normal(second))
    # exp(epsilon) Phi(second) = phi(first) R(-second) with Mills' ratio R: neither overflow nor underflow.
    return max(0.0, _normal(first) - math.exp(-first * first / 2) / math.sqrt(2 * math.pi) * _mills(-second))


def _mills(z: float) -> float:
    """Return (1 - Phi(z)) / phi(z) for z >= 25 by its continued fraction (Laplace), right to 1e-15."""
    value = z
    for term in range(30, 0, -1):
        value = z + term / value
    return 1 / value


def _normal(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


@lru_cache(maxsize=256)
def _gaussian_epsilon(mu: float, delta: float, side: Side) -> float:
    if mu == 0 or gaussian_delta(0.0, mu) <= delta:
        return 0.0
    return _bisect(lambda value: gaussian_delta(value, mu), delta, 0.0, mu * mu / 2 + mu * 40, side)


def _bisect(delta_of: Callable[[float], float], delta: float, low: float, high: float, side: Side) -> float:
    """Return where a falling curve crosses ``delta``: the end of the last interval that keeps the bound true."""
    if delta_of(low) <= delta:
        return low
    while high - low > 1e-9 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (low, middle) if delta_of(middle) <= delta else (middle, high)
    return high if side == "upper" else low


def _epsilon(events: Sequence[Event], delta: float, side: Side) -> float:
    if not 0 < delta < 1:
        raise PrivacyError(
            f"delta must lie strictly between 0 and 1, got {delta}: use 1/(10 N) for N declared patients"
        )
    if any(event.kind == "nonprivate" for event in events):
        return math.inf
    gaussian, sampled = _split(events)
    return _epsilon_of(gaussian, sampled, delta, side)


@lru_cache(maxsize=256)
def _epsilon_of(gaussian: float, sampled: tuple[Event, ...], delta: float, side: Side) -> float:
    if not sampled:
        return _gaussian_epsilon(gaussian, delta, side)
    sums = _sums(gaussian, sampled, delta, side)
    if sums is None:
        # Losses beyond what a double can hold. Sampling only helps and every access costs: both ends stay true.
        return _gaussian_epsilon(_unsampled(gaussian, sampled) if side == "upper" else gaussian, delta, side)
    return max(one.epsilon(delta) for one in sums)


def _split(events: Sequence[Event]) -> tuple[float, tuple[Event, ...]]:
    """Return mu of all accesses to every patient together, and the subsampled events."""
    private = [event for event in merge(events) if event.kind != "nonprivate"]
    squares = math.fsum(e.count / e.noise_multiplier**2 for e in private if e.sampling_rate == 1)
    return math.sqrt(squares), tuple(e for e in private if e.sampling_rate < 1)


def _unsampled(gaussian: float, sampled: Sequence[Event]) -> float:
    return math.sqrt(gaussian**2 + math.fsum(e.count / e.noise_multiplier**2 for e in sampled))


def _sums(gaussian: float, sampled: Sequence[Event], delta: float, side: Side) -> list[_Sum] | None:
    """Return the composition in both directions, or None where a loss exceeds :data:`_LARGEST_LOSS`."""
    accesses = [Access(e.sampling_rate, e.noise_multiplier, e.count) for e in sampled]
    if gaussian:
        accesses.append(Access(1.0, 1 / gaussian, 1))
    total = sum(access.count for access in accesses)
    reach = math.sqrt(2 * math.log(total / (_TAIL_SHARE * delta)))
    ranges = [loss_range(access, reach) for access in accesses]
    if max(max(-low, high) for low, high in ranges) > _LARGEST_LOSS:
        return None
    spread = math.sqrt(sum(variance(access) * access.count for access in accesses))
    width = _width(spread, total, delta, len(accesses))
    while True:
        cells = [cells_of(access, *ends, width) for access, ends in zip(accesses, ranges, strict=True)]
        sums = [_compose([c[way] for c in cells], accesses, width, spread, delta, side) for way in (0, 1)]
        done = [one for one in sums if one is not None]
        if len(done) == len(sums):
            return done
        width *= 2


def _width(spread: float, total: int, delta: float, kinds: int) -> float:
    """Return the width of a cell for which connecting the dots adds some :data:`_TOLERANCE` to epsilon.

    A split adds at most width^2 / 4 to the variance of a loss, and variance v raises epsilon by v (1/2 + theta).
    """
    theta = math.sqrt(2 * math.log(1 / delta)) / spread
    # A schedule of many mechanisms was rounded by more than this already (see accounting.coarsen).
    added = _TOLERANCE * (10 if kinds > _MANY else 1) * min(1.0, spread) / (0.5 + theta)
    return min(math.sqrt(4 * added / total), spread / 200)


@dataclass(frozen=True)
class _Sum:
    """The composed loss: P has ``mass[j]`` at ``losses[j]``.

    ``error`` bounds the l1 error of the masses times ``exp(theta loss - log_moment)``, and those outside the window;
    ``infinite`` is P's mass beyond all grids; ``shift`` is what merged cells and edges may have moved the loss, with a
    chance of ``chance``.
    """

    losses: Array
    mass: Array
    theta: float
    log_moment: float
    error: float
    infinite: float
    shift: float
    chance: float
    side: Side

    def delta(self, epsilon: float) -> float:
        """Return a bound on delta at ``epsilon`` (from above or from below)."""
        upper = self.side == "upper"
        at = epsilon - self.shift if upper else epsilon + self.shift
        start = int(np.searchsorted(self.losses, at))
        losses = self.losses[start:]
        found = float(self.mass[start:] @ -np.expm1(at - losses))
        slack = self.error * math.exp(min(self.log_moment - self.theta * at, 700.0))
        if upper:
            return min(1.0, found + slack + self.infinite)
        return max(0.0, found - slack - self.chance)

    def epsilon(self, delta: float) -> float:
        """Return a bound on epsilon at ``delta``; infinite where the upper bound never falls so low."""
        high = max(0.0, float(self.losses[-1])) + 2 * self.shift + 1
        if self.side == "upper":
            return _bisect(self.delta, delta, 0.0, high, "upper") if self.delta(high) <= delta else math.inf
        # Taking the error off delta costs everything far below epsilon: look for the last place where it does not.
        places = np.linspace(0.0, high, 129)
        above = [index for index, place in enumerate(places) if self.delta(float(place)) > delta]
        if not above:
            return 0.0
        last = above[-1]
        return _bisect(self.delta, delta, float(places[last]), float(places[min(last + 1, 128)]), "lower")


def _compose(
    cells: Sequence[Cells], accesses: Sequence[Access], width: float, spread: float, delta: float, side: Side
) -> _Sum | None:
    """Return the composition of one direction, or None if its window needs more than :data:`_LONGEST` points."""
    read = split_cells if side == "upper" else merge_cells
    total = sum(access.count for access in accesses)
    negligible = _CORRECTION_SHARE * delta / total
    steps = [read(one, access.count, negligible) for one, access in zip(cells, accesses, strict=True)]
    offset = 0.0 if side == "upper" else width / 2 * total
    thetas, moments = _log_moments(steps, width, spread)
    chosen, low, high = _tilt(thetas, moments, delta)
    theta = float(thetas[chosen])
    first, length = math.floor(low / width), math.ceil((high - low) / width) + 2
    if length > _LONGEST:
        return None
    size = 1 << max(8, (length - 1).bit_length())
    weight, log_moment, error = _powers(steps, width, theta, size)
    # Sums are known modulo the window: put each at its place in it.
    weight = np.roll(weight, -(first % size))
    losses: Array = width * np.arange(first, first + size, dtype=np.float64) + offset
    log_moment += theta * offset
    kept = int(np.searchsorted(losses, 0.0))
    chance = 0.0 if side == "upper" else _CORRECTION_SHARE * delta
    shift = correction_of(steps, chance) if chance else 0.0
    return _Sum(
        losses[kept:],
        (weight * np.exp(np.minimum(log_moment - theta * losses, 700.0)))[kept:],
        theta,
        log_moment,
        error + 2 * _WRAP_SHARE,
        sum(step.count * step.infinite for step in steps),
        shift + _EDGE_ERROR * total * (1 + abs(theta)),
        chance,
        side,
    )


def _log_moments(steps: Sequence[Losses], width: float, spread: float) -> tuple[Array, Array]:
    """Return thetas in rising order, 0 among them, and the log of E[exp(theta loss)] of the composition."""
    doublings = max(8, math.ceil(math.log2(40 / spread / 0.02)))
    positive = np.concatenate([0.02 * root * 2.0 ** np.arange(doublings) for root in (1.0, math.sqrt(2))])
    order = np.argsort(positive)
    totals = np.zeros((3, positive.size))
    for step in steps:
        kept = step.mass > 0
        mass, losses = step.mass[kept], width * (step.first + np.flatnonzero(kept))
        totals[1] += step.count * math.log(mass.sum())
        for row, sign in ((2, 1.0), (0, -1.0)):
            found = []
            for root in (1.0, math.sqrt(2)):
                power = np.exp(sign * 0.02 * root * losses)
                for _ in range(doublings):
                    found.append(float(mass @ power))
                    with np.errstate(over="ignore"):
                        power = power * power
            with np.errstate(over="ignore", divide="ignore"):
                totals[row] += step.count * np.log(np.array(found))
    thetas = np.concatenate([-positive[order][::-1], [0.0], positive[order]])
    return thetas, np.concatenate([totals[0][order][::-1], totals[1][:1], totals[2][order]])


def _tilt(thetas: Array, moments: Array, delta: float) -> tuple[int, float, float]:
    """Return the index of a theta and its window (see :func:`_window`).

    The smallest Chernoff bound on epsilon makes the errors smallest, but rare large losses may make its window huge:
    of it and the thetas down to a quarter, the largest is taken whose window is at most twice the shortest.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        bounds = np.where((thetas > 0) & np.isfinite(moments), (moments - math.log(delta)) / thetas, np.inf)
    # The window needs a finite moment beyond theta.
    best = min(int(np.argmin(bounds)), int(np.flatnonzero(np.isfinite(moments))[-1]) - 1)
    lowest = int(np.flatnonzero(thetas > 0)[0])
    windows = [(index, *_window(thetas, moments, index)) for index in range(max(lowest, best - 4), best + 1)]
    shortest = min(high - low for _, low, high in windows)
    return [window for window in windows if window[2] - window[1] <= 2 * shortest][-1]


def _window(thetas: Array, moments: Array, chosen: int) -> tuple[float, float]:
    """Return losses beyond which the tilted sum has a mass of at most :data:`_WRAP_SHARE` on either side."""
    # Moments of the largest thetas come from repeated squaring and are right to 1e-8: half of the share covers it.
    cost = -math.log(_WRAP_SHARE / 2)
    finite = np.isfinite(moments)
    apart, change = thetas - thetas[chosen], moments - moments[chosen]
    above, below = finite & (apart > 0), finite & (apart < 0)
    high = float(np.min((change[above] + cost) / apart[above]))
    low = float(np.max((change[below] + cost) / apart[below]))
    return low, high


def _powers(steps: Sequence[Losses], width: float, theta: float, size: int) -> tuple[Array, float, float]:
    """Return the tilted sum modulo ``size`` cells, the log of its normaliser, and a bound on its l1 error."""
    # Error of one coefficient of a transform of a distribution, with room (Higham 2002, theorem 24.2).
    rounding = 3 * _ULP * math.log2(size)
    exponent = np.zeros(size // 2 + 1, dtype=np.complex128)
    magnitude, slope = np.zeros(size // 2 + 1), np.zeros(size // 2 + 1)
    log_moment = 0.0
    for step in steps:
        indices = step.first + np.arange(step.mass.size)
        with np.errstate(divide="ignore"):
            logs = np.log(step.mass) + theta * width * indices
        top = float(logs.max())
        tilted = np.exp(logs - top)
        scale = float(tilted.sum())
        log_moment += step.count * (top + math.log(scale))
        wrapped = np.bincount(indices % size, weights=tilted / scale, minlength=size)
        coefficients = np.fft.rfft(wrapped)
        sizes = np.abs(coefficients) + rounding
        # A coefficient of exactly zero has no logarithm; what stands for it is far below the rounding that is charged.
        exponent += step.count * np.log(np.where(coefficients == 0, 1e-300, coefficients))
        magnitude += step.count * np.log(sizes)
        slope += (step.count + 2) / sizes
    composed = np.exp(exponent)
    # |x^T - y^T| <= T max^(T-1) |x - y|; an l1 norm is at most the l2 norm of the transform.
    spectrum = rounding * (1 + slope) * np.exp(magnitude)
    error = math.sqrt(2 * float(np.sum(spectrum**2)))
    return np.fft.irfft(composed, size), log_moment, error
