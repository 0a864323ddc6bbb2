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
from numpy.typing import NDArray

from medsynth.errors import PrivacyError
from medsynth.privacy.accounting import Event, merge

Array = NDArray[np.float64]
Side = Literal["upper", "lower"]

_ULP = float(np.finfo(np.float64).eps)
# Share of delta that losses beyond the grid may take, and share (of a Chernoff bound on delta) of wrap-around.
_TAIL_SHARE = 1e-7
_WRAP_SHARE = 1e-10
# Share of delta that the lower bound gives up for the corrections of merged cells.
_CORRECTION_SHARE = 1e-3
# Discretisation may add this much to epsilon (and about as much is taken off the lower bound) at a spread of 1.
_TOLERANCE = 1e-3
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
    """Return (1 - Phi(z)) / phi(z) for z >= 25 by its continued fraction (Laplace), right to a unit in the last place."""
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
    return _bisect(lambda value: gaussian_delta(value, mu), delta, mu * mu / 2 + mu * 40, side)


def _bisect(delta_of: Callable[[float], float], delta: float, high: float, side: Side) -> float:
    """Return where a falling curve crosses ``delta``: the end of the last interval that keeps the bound true."""
    low = 0.0
    while high - low > 1e-9 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (low, middle) if delta_of(middle) <= delta else (middle, high)
    return high if side == "upper" else low


def _epsilon(events: Sequence[Event], delta: float, side: Side) -> float:
    if not 0 < delta < 1:
        raise PrivacyError(f"delta must lie strictly between 0 and 1, got {delta}: use 1/(10 N) for N declared patients")
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


@dataclass(frozen=True)
class _Access:
    """``count`` accesses with noise ``sigma`` at rate ``rate``."""

    rate: float
    sigma: float
    count: int


@dataclass(frozen=True)
class _Cells:
    """Masses of the cells of one direction: cell j spans the losses ``(first + j) width`` to ``(first + j + 1) width``.

    The errors bound what rounding did to each mass; ``below`` and ``above`` are P's masses outside.
    """

    first: int
    width: float
    p: Array
    q: Array
    p_error: Array
    q_error: Array
    below: float
    above: float


@dataclass(frozen=True)
class _Steps:
    """Loss of one access on the grid: ``mass[j]`` at ``(first + j) width``; ``correction[j]`` of merged cells."""

    first: int
    mass: Array
    infinite: float
    count: int
    correction: Array | None = None


def _sums(gaussian: float, sampled: Sequence[Event], delta: float, side: Side) -> list[_Sum] | None:
    """Return the composition in both directions, or None where a loss exceeds :data:`_LARGEST_LOSS`."""
    accesses = [_Access(e.sampling_rate, e.noise_multiplier, e.count) for e in sampled]
    if gaussian:
        accesses.append(_Access(1.0, 1 / gaussian, 1))
    total = sum(access.count for access in accesses)
    reach = math.sqrt(2 * math.log(total / (_TAIL_SHARE * delta)))
    ranges = [_loss_range(access, reach) for access in accesses]
    if max(max(-low, high) for low, high in ranges) > _LARGEST_LOSS:
        return None
    spread = math.sqrt(sum(_variance(access) * access.count for access in accesses))
    width = _width(spread, total, delta)
    while True:
        cells = [_cells(access, *ends, width) for access, ends in zip(accesses, ranges, strict=True)]
        sums = [_compose([c[way] for c in cells], accesses, width, spread, delta, side) for way in (0, 1)]
        done = [one for one in sums if one is not None]
        if len(done) == len(sums):
            return done
        width *= 2


def _width(spread: float, total: int, delta: float) -> float:
    """Return the width of a cell for which connecting the dots adds some :data:`_TOLERANCE` to epsilon.

    A split adds at most width^2 / 4 to the variance of a loss, and variance v raises epsilon by v (1/2 + theta).
    """
    theta = math.sqrt(2 * math.log(1 / delta)) / spread
    variance = _TOLERANCE * min(1.0, spread) / (0.5 + theta)
    return min(math.sqrt(4 * variance / total), spread / 50)


def _log_ratio(access: _Access, x: Array) -> Array:
    """Return log(M / N_0) at ``x``: M is the noisy output with the patient, N_0 without (Abadi et al. 2016, eq. 3)."""
    exponent = (2 * x - 1) / (2 * access.sigma**2)
    if access.rate == 1:
        return exponent
    return np.logaddexp(math.log1p(-access.rate), math.log(access.rate) + exponent)


def _loss_range(access: _Access, reach: float) -> tuple[float, float]:
    ends = np.array([-reach * access.sigma, 1 + reach * access.sigma])
    low, high = _log_ratio(access, ends)
    return float(low), float(high)


def _variance(access: _Access) -> float:
    z = np.linspace(-9, 9, 721)
    weight = np.exp(-z * z / 2)
    weight /= weight.sum()
    parts = [(1 - access.rate, _log_ratio(access, z * access.sigma)), (access.rate, _log_ratio(access, 1 + z * access.sigma))]
    mean = sum(share * float(weight @ loss) for share, loss in parts)
    return sum(share * float(weight @ (loss - mean) ** 2) for share, loss in parts)


def _cells(access: _Access, low: float, high: float, width: float) -> tuple[_Cells, _Cells]:
    """Return the cells of the pair (M, N_0), a patient removed, and of (N_0, M), a patient added."""
    first, last = math.floor(low / width), math.ceil(high / width)
    edges = _edges(access, width * np.arange(first, last + 1))
    n0, n0_error, n0_out = _masses(edges / access.sigma)
    n1, n1_error, n1_out = _masses((edges - 1) / access.sigma)
    mixed = [(1 - access.rate) * without + access.rate * with_ for without, with_ in zip(n0_out, n1_out, strict=True)]
    m, m_error = (1 - access.rate) * n0 + access.rate * n1, (1 - access.rate) * n0_error + access.rate * n1_error
    removed = _Cells(first, width, m, n0, m_error + _ULP * m, n0_error, *mixed)
    swapped = (part[::-1] for part in (n0, m, n0_error, m_error + _ULP * m))
    return removed, _Cells(-last, width, *swapped, n0_out[1], n0_out[0])


def _edges(access: _Access, losses: Array) -> Array:
    """Return the outputs ``x`` at which log(M / N_0) takes the given values (minus infinity below its infimum)."""
    if access.rate == 1:
        return losses * access.sigma**2 + 0.5
    inner = access.rate - (1 - access.rate) * np.expm1(-losses)
    positive = inner > 0
    safe = np.where(positive, inner / access.rate, 1.0)
    return np.where(positive, access.sigma**2 * (losses + np.log(safe)) + 0.5, -np.inf)


def _masses(z: Array) -> tuple[Array, Array, tuple[float, float]]:
    """Return the standard normal mass between neighbours of ``z``, a bound on its rounding, and both outer tails."""
    tail = np.fromiter(map(math.erfc, (np.abs(z) / math.sqrt(2)).tolist()), dtype=np.float64, count=z.size) / 2
    left, right = tail[:-1], tail[1:]
    mass = np.where(z[:-1] >= 0, left - right, np.where(z[1:] <= 0, right - left, 1 - left - right))
    below = float(tail[0] if z[0] <= 0 else 1 - tail[0])
    above = float(tail[-1] if z[-1] >= 0 else 1 - tail[-1])
    return np.maximum(mass, 0.0), 4 * _ULP * np.maximum(left, right), (below, above)


def _split_cells(cells: _Cells, count: int, negligible: float) -> _Steps:
    """Return the losses of a pair that dominates: each cell's masses sit on its two ends (connect the dots)."""
    step = math.exp(-cells.width)
    growth = np.exp(cells.width * (cells.first + np.arange(cells.p.size)))
    to_lower = (cells.q * growth - step * cells.p) / (1 - step)
    # Rounding may only move mass up.
    to_lower -= (cells.q_error * growth + cells.p_error) / (1 - step)
    to_lower = np.clip(to_lower, 0.0, cells.p)
    mass = np.append(to_lower, 0.0)
    mass[1:] += cells.p - to_lower
    mass[0] += cells.below
    return _Steps(cells.first, mass, cells.above, count)


def _merge_cells(cells: _Cells, count: int, negligible: float) -> _Steps:
    """Return the losses of a dominated pair: a cell is one outcome, its loss the cell's middle and a correction.

    What lies below the grid, and cells of up to ``negligible`` mass in all, are left out (a loss of minus infinity);
    what lies above takes the last edge's loss.
    """
    middles = cells.width * (cells.first + 0.5 + np.arange(cells.p.size))
    with np.errstate(divide="ignore", invalid="ignore"):
        certain = np.log((cells.p - cells.p_error) / (cells.q + cells.q_error)) - middles
    half = cells.width / 2
    correction = np.clip(np.nan_to_num(certain, nan=-half, neginf=-half), -half, half)
    kept = cells.p - cells.p_error > negligible / cells.p.size
    mass = np.append(np.where(kept, cells.p - cells.p_error, 0.0), cells.above)
    return _Steps(cells.first, mass, 0.0, count, np.append(correction, -half))


@dataclass(frozen=True)
class _Sum:
    """The composed loss, tilted: ``weight[j]`` at ``losses[j]`` is P's mass times ``exp(theta loss - log_moment)``.

    ``error`` bounds the l1 error of ``weight`` and its mass outside the window; ``infinite`` is P's mass beyond all
    grids; ``shift`` is what merged cells and edges may have moved the loss, with a chance of ``chance``.
    """

    losses: Array
    weight: Array
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
        untilt = np.exp(np.minimum(self.log_moment - self.theta * losses, 700.0))
        found = float(np.sum(self.weight[start:] * untilt * -np.expm1(at - losses)))
        slack = self.error * math.exp(min(self.log_moment - self.theta * at, 700.0))
        if upper:
            return min(1.0, found + slack + self.infinite)
        return max(0.0, found - slack - self.chance)

    def epsilon(self, delta: float) -> float:
        """Return a bound on epsilon at ``delta``; infinite where the upper bound never falls so low."""
        if self.delta(0.0) <= delta:
            return 0.0
        high = float(self.losses[-1]) + 2 * abs(self.shift) + 1
        while self.delta(high) > delta:
            high *= 2
            if high > 1e6:
                return math.inf
        return _bisect(self.delta, delta, high, self.side)


def _compose(
    cells: Sequence[_Cells], accesses: Sequence[_Access], width: float, spread: float, delta: float, side: Side
) -> _Sum | None:
    """Return the composition of one direction, or None if its window needs more than :data:`_LONGEST` points."""
    read = _split_cells if side == "upper" else _merge_cells
    total = sum(access.count for access in accesses)
    negligible = _CORRECTION_SHARE * delta / total
    steps = [read(one, access.count, negligible) for one, access in zip(cells, accesses, strict=True)]
    offset = 0.0 if side == "upper" else width / 2 * total
    thetas, moments = _log_moments(steps, width, spread)
    chosen = _tilt(thetas, moments, delta)
    theta = float(thetas[chosen])
    low, high = _window(thetas, moments, chosen)
    first, length = math.floor(low / width), math.ceil((high - low) / width) + 2
    if length > _LONGEST:
        return None
    size = 1 << max(8, (length - 1).bit_length())
    weight, log_moment, error = _powers(steps, width, theta, size)
    # Sums are known modulo the window: put each at its place in it.
    weight = np.roll(weight, -(first % size))
    losses = width * (first + np.arange(size)) + offset
    shift, chance = (0.0, 0.0) if side == "upper" else _correction(steps, delta)
    return _Sum(
        losses,
        weight,
        theta,
        log_moment + theta * offset,
        error + 2 * _WRAP_SHARE,
        sum(step.count * step.infinite for step in steps),
        shift + _EDGE_ERROR * total * (1 + abs(theta)),
        chance,
        side,
    )


def _log_moments(steps: Sequence[_Steps], width: float, spread: float) -> tuple[Array, Array]:
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


def _tilt(thetas: Array, moments: Array, delta: float) -> int:
    """Return the index of the theta of the smallest Chernoff bound on epsilon."""
    with np.errstate(divide="ignore", invalid="ignore"):
        bounds = np.where((thetas > 0) & np.isfinite(moments), (moments - math.log(delta)) / thetas, np.inf)
    # The window needs moments beyond it, up to twice theta at least.
    return min(int(np.argmin(bounds)), int(np.flatnonzero(np.isfinite(moments))[-1]) - 2)


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


def _powers(steps: Sequence[_Steps], width: float, theta: float, size: int) -> tuple[Array, float, float]:
    """Return the tilted sum modulo ``size`` cells, the log of its normaliser, and a bound on its l1 error."""
    # Error of one coefficient of a transform of a distribution, with room (Higham 2002, theorem 24.2).
    rounding = 8 * _ULP * math.log2(size)
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
        with np.errstate(divide="ignore"):
            exponent += step.count * np.log(coefficients)
        magnitude += step.count * np.log(sizes)
        slope += (step.count + 2) / sizes
    composed = np.exp(exponent)
    # |x^T - y^T| <= T max^(T-1) |x - y|; an l1 norm is at most the l2 norm of the transform.
    spectrum = rounding * (1 + slope) * np.exp(magnitude)
    error = math.sqrt(2 * float(np.sum(spectrum**2)))
    return np.fft.irfft(composed, size), log_moment, error


def _correction(steps: Sequence[_Steps], delta: float) -> tuple[float, float]:
    """Return by how much merged cells overstate the summed loss, except with a small chance (Chernoff)."""
    chance = _CORRECTION_SHARE * delta
    parts = [(step.count, step.mass, step.correction) for step in steps if step.correction is not None]
    variance = sum(count * float(mass @ correction**2) for count, mass, correction in parts)
    if variance == 0:
        return 0.0, 0.0
    best = math.inf
    for power in range(-12, 3):
        scale = 2.0**power * math.sqrt(-2 * math.log(chance) / variance)
        with np.errstate(over="ignore"):
            moment = sum(count * math.log(float(mass @ np.exp(-scale * c))) for count, mass, c in parts)
        best = min(best, (moment - math.log(chance)) / scale)
    return best, chance
