"""The two mechanisms that may touch patients, as frozen plans of public values.

A plan couples sensitivity, sampling, noise and accounting: the event that is charged and the noise that is drawn come
from the same object. Patients are only ever arguments; nothing of them is kept, logged or used to set a constant.
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

_BLOCK = 2**14  # values that get their noise at a time


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
        _require_positive(self.name, dimensions=self.dimensions, clip_norm=self.clip_norm, denominator=self.denominator)
        _require_noise(self.name, self.noise_multiplier)

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
        noise = entropy.normal(self.dimensions) * (self.noise_multiplier * self.clip_norm)
        return (total + noise) / self.denominator

    def _check(self, unit: NDArray[np.floating]) -> NDArray[np.float64]:
        vector = np.asarray(unit, dtype=np.float64).reshape(-1)
        if vector.size != self.dimensions:
            raise PrivacyError(f"'{self.name}' sums vectors of length {self.dimensions}, got one of {vector.size}")
        return vector


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
        _require_positive(
            self.name,
            sampling_rate=self.sampling_rate,
            steps=self.steps,
            clip_norm=self.clip_norm,
            denominator=self.denominator,
        )
        _require_noise(self.name, self.noise_multiplier)
        if self.sampling_rate > 1:
            raise PrivacyError(f"'{self.name}' cannot sample at a rate of {self.sampling_rate}: expected (0, 1]")

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

        Args:
            clipped_sum: one tensor a trainable parameter, the WHOLE step's sum (after accumulation and reduction).
            entropy: source of the noise.
        """
        scale = self.noise_multiplier * self.clip_norm
        noisy: list[Tensor] = []
        for group in _groups(clipped_sum):
            noisy += self._noisy_group(group, scale, entropy)
        return noisy

    def _noisy_group(self, group: list[Tensor], scale: float, entropy: Entropy) -> list[Tensor]:
        """Return the noisy means of a few tensors, a cacheful at a time."""
        import torch

        whole = group[0].detach().reshape(-1) if len(group) == 1 else torch.cat([p.detach().reshape(-1) for p in group])
        result = torch.empty_like(whole, dtype=torch.float32)
        for part, out in zip(whole.split(_BLOCK), result.split(_BLOCK), strict=True):
            mean = part.double() / self.denominator
            if scale:
                noise = torch.from_numpy(entropy.normal(part.numel())).to(part.device)
                mean.add_(noise, alpha=scale / self.denominator)
            out.copy_(mean)
        pieces = result.split([part.numel() for part in group])
        return [piece.view(part.shape) for piece, part in zip(pieces, group, strict=True)]


def _groups(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the tensors in order, small ones together."""
    group: list[Tensor] = []
    for tensor in tensors:
        if group and (tensor.device != group[0].device or sum(p.numel() for p in group) + tensor.numel() > _BLOCK):
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


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


def _require_positive(name: str, **values: float) -> None:
    for key, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise PrivacyError(f"'{name}' needs {key} > 0, got {value}")


def _require_noise(name: str, noise_multiplier: float) -> None:
    if not (math.isfinite(noise_multiplier) and noise_multiplier >= 0):
        raise PrivacyError(f"'{name}' needs a finite noise_multiplier >= 0, got {noise_multiplier}")
