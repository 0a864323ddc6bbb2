"""The three mechanisms that may touch patients, as frozen plans of public values.

A plan couples sensitivity, sampling, noise and accounting: the event that is charged and the noise that is drawn come
from the same object. Patients are only ever arguments; nothing of them is kept, logged or used to set a constant.

Floating point (docs/explanation/mechanisms.md): noise is :data:`ROUNDING_SLACK` larger than its plan, which pays for
the rounding of clips and sums, and what is released lies on a public grid (:func:`noise_grid`), which hides low bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from medsynth.errors import PrivacyError
from medsynth.privacy.accounting import Event
from medsynth.privacy.entropy import Entropy

if TYPE_CHECKING:
    from torch import Tensor

NO_CLIP = 1e12
"""Clip norm that bounds nothing: of a study without privacy, and of the broken mechanisms that audits must catch."""

_BLOCK = 2**15  # values that get their noise at a time

ROUNDING_SLACK = 2.0**-18
"""Rounding of clip and sum may raise the sensitivity by this share; the noise is that much larger than charged.

Adding n vectors of norm C in double precision, in any order, is wrong by at most n^2 2^-53 C in L2 to first order
(Higham 2002, section 4.2). Two such sums differ by at most C + 2 n^2 2^-53 C, less than C (1 + 2^-20) for n <= 65536;
a norm that is 1e-6 too small at the clip (preflight.CLIP_TOLERANCE) leaves the total below the slack.
"""
_GRID_BITS = 20


@dataclass(frozen=True)
class GaussianSum:
    """A noisy mean of one vector a patient (Dwork, Roth 2014, section 3.5.3).

    *Guarantees*: adding or removing one patient moves the clipped sum by at most ``clip_norm`` in L2, whatever the
    patient's values, NaN and infinity included; the release is the Gaussian mechanism with ``noise_multiplier``.

    Attributes:
        name: what is released, e.g. ``"pose"``.
        dimensions: length of every patient's vector.
        clip_norm: L2 bound on one patient's vector.
        noise_multiplier: standard deviation of the noise / ``clip_norm``; 0 only for a non-private study.
        denominator: public constant that the sum is divided by (declared, never counted).
    """

    kind: ClassVar[str] = "gaussian_sum"
    scheme: ClassVar[str] = "every patient once"

    name: str
    dimensions: int
    clip_norm: float
    noise_multiplier: float
    denominator: float

    def __post_init__(self) -> None:
        _require_whole(self.name, dimensions=self.dimensions)
        _require_positive(self.name, clip_norm=self.clip_norm, denominator=self.denominator)
        _require_noise(self.name, self.noise_multiplier)

    @property
    def noise_sd(self) -> float:
        """Standard deviation of the noise in each entry of what :meth:`release` returns."""
        return self.noise_multiplier * self.clip_norm / self.denominator

    def event(self) -> Event:
        """Return what one release costs."""
        return Event("gaussian", self.noise_multiplier) if self.noise_multiplier else Event("nonprivate")

    def release(self, units: Iterable[NDArray[np.floating]], entropy: Entropy) -> NDArray[np.float64]:
        """Return ``(sum of clipped units + noise) / denominator``; the noise is drawn once.

        Args:
            units: one vector of length ``dimensions`` a patient; their order and number do not matter.
            entropy: source of the noise.

        Raises:
            PrivacyError: a vector of another length (which a shape fixed by the public grid cannot produce).
        """
        total = np.zeros(self.dimensions, dtype=np.float64)
        for unit in units:
            total += clip_vector(self._check(unit), self.clip_norm)
        scale = self.noise_multiplier * self.clip_norm
        if not scale:
            return total / self.denominator
        noisy = total + entropy.normal(self.dimensions) * (scale * (1 + ROUNDING_SLACK))
        grid = noise_grid(scale)
        return np.rint(noisy / grid) * grid / self.denominator

    def _check(self, unit: NDArray[np.floating]) -> NDArray[np.float64]:
        vector = np.asarray(unit, dtype=np.float64).reshape(-1)
        if vector.size != self.dimensions:
            raise PrivacyError(f"'{self.name}' sums vectors of length {self.dimensions}, got one of {vector.size}")
        return vector


@dataclass(frozen=True)
class GaussianHistogram:
    """A noisy mean of one normalised histogram a patient, over public bin edges.

    *Guarantees*: a patient's histogram is divided by his number of values, so its L2 norm is at most 1 however many he
    has; adding or removing him moves the sum by at most 1 (Dwork, Roth 2014, section 3.5.3). A patient with no value,
    or with any that is not finite, counts as zero. The release is the Gaussian mechanism with ``noise_multiplier``.

    Attributes:
        name: what is released, e.g. ``"intensities"``.
        edges: public edges of the bins, rising; values outside go to the first and the last bin.
        noise_multiplier: standard deviation of the noise of a bin; 0 only for a non-private study.
        denominator: public constant that the sum is divided by (declared, never counted).
    """

    kind: ClassVar[str] = "gaussian_histogram"
    scheme: ClassVar[str] = "every patient once"
    clip_norm: ClassVar[float] = 1.0

    name: str
    edges: tuple[float, ...]
    noise_multiplier: float
    denominator: float

    def __post_init__(self) -> None:
        pairs = zip(self.edges, self.edges[1:], strict=False)
        if len(self.edges) < 2 or not all(map(math.isfinite, self.edges)) or not all(a < b for a, b in pairs):
            raise PrivacyError(
                f"'{self.name}' needs at least two finite bin edges in rising order, as public constants"
            )
        # The plan of the sum says what is wrong with the other fields.
        self._sum()

    def event(self) -> Event:
        """Return what one release costs."""
        return self._sum().event()

    def release(self, patients: Iterable[NDArray[np.floating]], entropy: Entropy) -> NDArray[np.float64]:
        """Return ``(sum of normalised histograms + noise) / denominator``, one number a bin; may be below 0.

        Args:
            patients: all values of one patient (any shape, any number) each.
            entropy: source of the noise.
        """
        return self._sum().release((self._histogram(values) for values in patients), entropy)

    def _histogram(self, values: NDArray[np.floating]) -> NDArray[np.float64]:
        flat = np.asarray(values, dtype=np.float64).reshape(-1)
        if flat.size == 0 or not np.isfinite(flat).all():
            return np.zeros(len(self.edges) - 1)
        counts = np.histogram(np.clip(flat, self.edges[0], self.edges[-1]), bins=np.array(self.edges))[0]
        return np.asarray(counts / flat.size, dtype=np.float64)

    def _sum(self) -> GaussianSum:
        return GaussianSum(self.name, len(self.edges) - 1, self.clip_norm, self.noise_multiplier, self.denominator)


@dataclass(frozen=True)
class DpSgd:
    """Patient-level DP-SGD (Abadi et al. 2016, algorithm 1) with Bernoulli sampling of patients.

    *Guarantees*: ``steps`` releases of the subsampled Gaussian mechanism, each with sensitivity ``clip_norm``, under
    addition or removal of one patient, if the summed gradients were clipped per patient to ``clip_norm`` and only
    patients of :meth:`draw` were summed.

    Attributes:
        name: what is trained, e.g. ``"denoiser"``.
        sampling_rate: probability of each patient's coin, in (0, 1].
        steps: number of updates, empty draws included.
        noise_multiplier: standard deviation of the noise / ``clip_norm``; 0 only for a non-private study.
        clip_norm: L2 bound on one patient's gradient over all trainable parameters together.
        denominator: public constant that the sum is divided by (sampling rate x declared patients; never counted).
    """

    kind: ClassVar[str] = "dp_sgd"
    scheme: ClassVar[str] = "bernoulli over patients"

    name: str
    sampling_rate: float
    steps: int
    noise_multiplier: float
    clip_norm: float
    denominator: float

    def __post_init__(self) -> None:
        _require_whole(self.name, steps=self.steps)
        _require_positive(
            self.name, sampling_rate=self.sampling_rate, clip_norm=self.clip_norm, denominator=self.denominator
        )
        _require_noise(self.name, self.noise_multiplier)
        if self.sampling_rate > 1:
            raise PrivacyError(
                f"'{self.name}' cannot sample at a rate of {self.sampling_rate}: it is the probability of a patient's "
                "coin, in (0, 1]; 1 takes every patient in every step"
            )

    def event(self) -> Event:
        """Return what all steps together cost."""
        if not self.noise_multiplier:
            return Event("nonprivate")
        return Event("subsampled_gaussian", self.noise_multiplier, self.sampling_rate, self.steps)

    def draw(self, n_units: int, entropy: Entropy) -> list[int]:
        """Return the indices of the patients of one step: one coin each, possibly none, never a fixed number.

        Args:
            n_units: number of patients (private: the result must not be logged).
            entropy: source of the coins.
        """
        return [int(index) for index in np.flatnonzero(entropy.bernoulli(self.sampling_rate, n_units))]

    def noisy_mean(self, clipped_sum: Sequence[Tensor], entropy: Entropy) -> list[Tensor]:
        """Return ``(clipped sum + noise) / denominator`` in single precision; call it once a step, empty or not.

        Over several ranks each calls it for its slice of the coordinates
        (:meth:`medsynth.privacy.distributed.Ranks.noisy_mean`).

        Args:
            clipped_sum: one tensor a trainable parameter, the WHOLE step's sum (after accumulation and reduction).
                Handed over: in single precision and on the CPU, the result takes its place, so that no second copy is
                needed and no sum without noise is left.
            entropy: source of the noise.
        """
        import torch

        # On the CPU, where the entropy is. One result a parameter: together they would not fit into a used heap.
        sums = [part.detach().cpu().contiguous() for part in clipped_sum]
        results = [
            part if part.dtype == torch.float32 else torch.empty_like(part, dtype=torch.float32) for part in sums
        ]
        scale = self.noise_multiplier * self.clip_norm
        grid = noise_grid(scale) if scale else 1.0
        buffer = torch.empty(_BLOCK, dtype=torch.float64)
        # In double precision whatever the sum's: the grid is a power of two, so that dividing by it is exact.
        for parts, outs in zip(_blocks(sums, _BLOCK), _blocks(results, _BLOCK), strict=True):
            cells = buffer[: sum(part.numel() for part in parts)]
            pieces = cells.split([part.numel() for part in parts])
            torch._foreach_copy_(pieces, parts)
            if scale:
                entropy.add_normal(cells.mul_(1 / grid), scale * (1 + ROUNDING_SLACK) / grid)
                cells.round_()
            cells.mul_(grid / self.denominator)
            torch._foreach_copy_(outs, pieces)
        return [result.to(part.device) for result, part in zip(results, clipped_sum, strict=True)]


def _blocks(tensors: Sequence[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Yield the concatenation of tensors in blocks of ``size`` numbers, each as a list of flat pieces (views)."""
    block: list[Tensor] = []
    room = size
    for tensor in tensors:
        rest = tensor.reshape(-1)
        while rest.numel() >= room:
            block.append(rest[:room])
            yield block
            rest, block, room = rest[room:], [], size
        if rest.numel():
            block.append(rest)
            room -= rest.numel()
    if block:
        yield block


def clip_vector(vector: NDArray[np.float64], clip_norm: float) -> NDArray[np.float64]:
    """Return ``vector`` scaled to an L2 norm of at most ``clip_norm``; zero where anything is not finite."""
    norm = float(np.linalg.norm(vector))
    if not math.isfinite(norm):
        return np.zeros_like(vector)
    return vector * clip_factor(norm, clip_norm)


def clip_factor(norm: float, clip_norm: float) -> float:
    """Return ``min(1, clip_norm / norm)``, and 0 for a norm that is not finite."""
    if not math.isfinite(norm):
        return 0.0
    return 1.0 if norm <= clip_norm else clip_norm / norm


def noise_grid(scale: float) -> float:
    """Return the spacing, a power of two, of the grid that noisy sums are rounded to: ``scale`` 2^-20 or just below.

    It depends on public values only and is coarser than the last bit of any sum that matters, so that a released
    value does not tell which doubles were added (Mironov 2012; Haney et al. 2022). Rounding is post-processing.

    Args:
        scale: standard deviation of the noise, > 0.
    """
    return 2.0 ** (math.floor(math.log2(scale)) - _GRID_BITS)


def _require_positive(name: str, **values: float) -> None:
    for key, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise PrivacyError(f"'{name}' needs a finite {key} > 0, got {value}: it is a public constant of the study")


def _require_whole(name: str, **values: int) -> None:
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise PrivacyError(f"'{name}' needs a whole number of {key} >= 1, got {value}")


def _require_noise(name: str, noise_multiplier: float) -> None:
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise PrivacyError(
            f"'{name}' needs a finite noise_multiplier > 0, got {noise_multiplier} (0, for a study without privacy, "
            "is charged as nonprivate and never certified)"
        )
