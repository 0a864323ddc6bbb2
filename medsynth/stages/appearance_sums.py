"""The noisy sums behind the statistics of appearance, and how they are read back.

The first is of patients' vectors; the second, where the layout allows it, of the same vectors measured around what the
first released. They are shorter, so that a smaller clip norm, and with it less noise, loses no more of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medsynth import logs
from medsynth.config import Study
from medsynth.models.appearance import AppearanceSpace
from medsynth.models.drafting import Drafting, TwiceMeasured
from medsynth.models.pose import Array

if TYPE_CHECKING:
    from medsynth.imaging.cohort import Patient
    from medsynth.privacy.accounting import Event
    from medsynth.privacy.entropy import Entropy
    from medsynth.privacy.mechanism import GaussianSum

_LATER_CLIP = 0.6  # of the first clip norm: patients differ from their mean by less than from nothing


@dataclass(frozen=True)
class AppearanceSums:
    """The mechanisms and the public layout of their vectors; holds no data.

    Attributes:
        space: from a patient to a vector, and from released means to statistics.
        mechanisms: the first sum and, where there is one, the second.
    """

    space: Drafting
    mechanisms: tuple[GaussianSum, ...]

    def measure(self, patients: Sequence[Patient], entropy: Entropy) -> Any:
        """Release the sums and return the statistics that they say (arguments of :meth:`release`)."""
        statistics = self.space.statistics(*self.release(patients, entropy))
        mixing = self._mixing()
        return statistics if mixing is None else mixing.with_scores(statistics, _records(patients))

    @property
    def plans(self) -> list[GaussianSum | Event]:
        """Everything that reads patients: the mechanisms and, where images are kept beside them, that."""
        from medsynth.privacy.accounting import Event

        return [*self.mechanisms, *([Event("nonprivate")] if self._mixing() else [])]

    def _mixing(self) -> AppearanceSpace | None:
        """Return the layout if drafts mix what patients show, which no mechanism releases."""
        return self.space if isinstance(self.space, AppearanceSpace) and self.space.mixed else None

    def release(self, patients: Sequence[Patient], entropy: Entropy) -> tuple[Array, float]:
        """Return the mean of the patients' vectors that the sums release, and the noise in each of its entries.

        Args:
            patients: whose images and labels are measured.
            entropy: where the noise comes from.
        """
        vectors, first = list(self._vectors(patients)), self.mechanisms[0]
        mean, sd = first.release(vectors, entropy), first.noise_sd
        if len(self.mechanisms) == 1:
            return mean, sd
        space, second = self.space, self.mechanisms[1]
        assert isinstance(space, TwiceMeasured)  # as planned
        centre = space.centre(mean, sd)
        again = second.release((space.around(vector, centre) for vector in vectors), entropy)
        return space.joined((mean, again), centre, (sd, second.noise_sd))

    def _vectors(self, patients: Sequence[Patient]) -> Iterator[Array]:
        """Yield one vector a patient, the mean over the patient's records."""
        for patient in logs.progress(patients, "measuring images", len(patients)):
            records = zip(patient.images.numpy(), patient.labels.numpy(), strict=True)
            yield np.mean([self.space.vector(image, label) for image, label in records], axis=0)


def _records(patients: Sequence[Patient]) -> Iterator[tuple[NDArray[np.float32], NDArray[np.uint8], int]]:
    """Yield image, label map and number of the patient of each record."""
    for number, patient in enumerate(logs.progress(patients, "reading what drafts mix WITHOUT privacy", len(patients))):
        for image, label in zip(patient.images.numpy(), patient.labels.numpy(), strict=True):
            yield image, label, number


def plan_sums(config: Study, space: Drafting, noise_multiplier: float) -> AppearanceSums:
    """Return the mechanisms, from public constants.

    Args:
        config: sections ``privacy``, ``ingest``, ``train``.
        space: the layout.
        noise_multiplier: of each of them.
    """
    from medsynth.privacy.budget import appearance_sums
    from medsynth.privacy.mechanism import NO_CLIP, GaussianSum

    clip = config.train.appearance.clip_norm if config.privacy.private else NO_CLIP
    names = {"appearance": clip, "appearance_again": _LATER_CLIP * clip}
    count = appearance_sums(config.privacy, config.train)
    return AppearanceSums(
        space,
        tuple(
            GaussianSum(name, space.size, norm, noise_multiplier, config.declared_in_training)
            for name, norm in list(names.items())[:count]
        ),
    )
