"""Every threshold of ``medsynth doctor``, each with the reason that is printed beside a finding.

They judge, they promise nothing: no certificate rests on them. Figures named here were measured on the shipped studies
(docs/log.md), so that a better recipe may move them.
"""

from __future__ import annotations

from dataclasses import dataclass

from medsynth.privacy.scale_law import MEASURED


@dataclass(frozen=True)
class Threshold:
    """A limit and why it lies there.

    Attributes:
        value: the limit.
        reason: one sentence for the person who reads the table.
    """

    value: float
    reason: str


JUDGE_MARGIN = Threshold(
    0.05,
    "skill divides by this margin; below 0.05 the 0.01 of Dice that another seed makes is a fifth of the scale",
)
AUDITS = Threshold(0, "an audit that fails, or misses its positive control, refuses the release")
COPY_RATIO = Threshold(0.7, "strangers lie at 1; well below, synthetic images follow single training images")
COPY_SHARE = Threshold(0.25, "5 % of strangers are so near; five times as many is no chance")
FAMILIAR = Threshold(
    0.8,
    "whoever generalises errs alike on training and held-out patients (0.95 to 1.01 in private runs; 0.40 where "
    "patients were learnt by heart)",
)
PSNR_DB = Threshold(
    30, "there the error (0.06 in images of [-1, 1]) reaches the finest texture that is modelled (0.05)"
)
SSIM = Threshold(0.95, "below it fine structure is gone that no denoiser in these latents can bring back")
CODEC_DICE = Threshold(0.02, "the whole way from real to synthetic should not cost more than 0.02 of Dice")
LATENT_SCALE = Threshold(
    1.4, "a factor of 1.4 moves the signal-to-noise ratio of every diffusion step by 3 dB from what it is built for"
)
STILL_FALLING = Threshold(0.05, "a training that is done falls by 2 % in its last quarter, one cut short by 12 %")
DENOISER_ERROR = Threshold(
    0.75, "1 is a linear filter that knows no anatomy; 0.45 goes with images that obey their masks, 0.8 with noise"
)
AGREEMENT = Threshold(0.7, "of the Dice on real images; below it a third of every mask contradicts its image")
ALIKE = Threshold(0.15, "of SSIM between different images, above that of real ones: the generator repeats itself")
STATISTIC_NOISE = Threshold(
    0.5,
    "half as long as the signal; label agreement once fell from 0.7 to 0.3 as that of appearance rose from 0.3 to 0.9",
)
NOISY_DETAIL = 0.5
"""Of the threshold on a statistic's noise: from here on more detail would only be more noise."""
UNUSED = Threshold(0, "parameters that no pair depends on are worth no budget")
TRAINING_GAIN = Threshold(
    MEASURED.error, "of skill: what the law of scale is good to, measured on phantom cohorts; less may be nothing"
)
PLAUSIBLE = Threshold(0.5, "of the share among real training patients: fewer, and the maps show another anatomy")
RELATIONS = Threshold(0.9, "nearly every real map shows the relation; annotators break it in one of twenty at most")
HOURS = Threshold(0.75, "the shipped 3D study takes a quarter of an hour on a core")
MEMORY = Threshold(0.8, "beyond, a larger batch or a second process ends the run")
