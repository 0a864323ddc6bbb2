"""Rules on images: who judges them, the codec, the denoiser, masks that are not obeyed, copies, sameness."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from medsynth.config import Study
from medsynth.doctor import thresholds as limits
from medsynth.doctor.evidence import INTERNAL, PUBLIC, Evidence
from medsynth.doctor.finding import Change, Finding, above, below, beyond

_LEAST_POINTS = 8  # of a loss curve, for a statement about its last quarter
_MIXED_MORE = (Change("train.appearance.mixed_patients", "raise"),)
_FITTED_LESS = (Change("train.steps", "lower"), Change("privacy.epsilon", "lower"))


def weak_judge(evidence: Evidence) -> list[Finding]:
    """Segmentation models that real patients trained and that hardly beat a mean shape: no judges of anything."""
    margin = _judge_margin(evidence)
    if margin is None:
        return []
    real, floor = evidence.number("dice", "real_only", "mean"), evidence.number("floor", "mean")
    return beyond(
        Finding(
            rule="weak-judge",
            kind="stop",
            says="The segmentation models are too weak to judge the pairs: trained on all real patients, they hardly "
            "beat one constant mean shape. Dice, skill and label agreement of this run say little.",
            figure=f"Dice {real:.3f}, mean shape {floor:.3f}",
            value=margin,
            threshold=limits.JUDGE_MARGIN,
            off=below(margin, limits.JUDGE_MARGIN),
            changes=(Change("segment.steps", "raise"), Change("segment.channels", "raise")),
            source=INTERNAL,
        )
    )


def copies(evidence: Evidence) -> list[Finding]:
    """Synthetic images that lie nearer to training images than strangers do."""
    ratio = evidence.number("memorisation", "median_ratio")
    share = evidence.number("memorisation", "nearer_than_held_out_p5")
    if ratio is None or share is None:
        return []
    by_ratio, by_share = below(ratio, limits.COPY_RATIO), above(share, limits.COPY_SHARE)
    return beyond(
        Finding(
            rule="copies",
            kind="stop",
            says="Synthetic images lie nearer to training images than other patients do: look for copies in the "
            "report's pictures before anything leaves.",
            figure=f"nearest training image {ratio:.2f} times as far as for strangers; {share:.0%} nearer than the "
            "nearest 5 % of strangers",
            value=ratio if by_ratio >= by_share else share,
            threshold=limits.COPY_RATIO if by_ratio >= by_share else limits.COPY_SHARE,
            off=max(by_ratio, by_share),
            changes=(*_MIXED_MORE, *_FITTED_LESS) if evidence.study.train.appearance.mixed_patients else _FITTED_LESS,
            source=INTERNAL,
        )
    )


def familiar(evidence: Evidence) -> list[Finding]:
    """A denoiser that removes the noise of its own patients far better than that of strangers."""
    if not {"members", "strangers"} <= evidence.errors.keys():
        return []
    known = evidence.errors["members"] / evidence.errors["strangers"]
    return beyond(
        Finding(
            rule="familiar",
            kind="stop",
            says="The denoiser knows its training patients by heart.",
            figure=f"its error on them is {known:.2f} of that on strangers",
            value=known,
            threshold=limits.FAMILIAR,
            off=below(known, limits.FAMILIAR),
            changes=_FITTED_LESS,
            source=INTERNAL,
        )
    )


def lossy_codec(evidence: Evidence) -> list[Finding]:
    """The ceiling of the autoencoder: what it loses, no denoiser brings back."""
    psnr, ssim = evidence.number("reconstruction", "psnr_db"), evidence.number("reconstruction", "ssim")
    if psnr is None:
        return []
    before = evidence.number("reconstruction", "dice", "originals")
    after = evidence.number("reconstruction", "dice", "reconstructions")
    # 10 dB are a factor of ten in error power, about three in error.
    candidates = [(10 ** ((limits.PSNR_DB.value - psnr) / 20), psnr, limits.PSNR_DB)]
    figure = f"held-out patients come back at {psnr:.1f} dB"
    if ssim is not None:
        candidates.append((above(1 - ssim, limits.Threshold(1 - limits.SSIM.value, "")), ssim, limits.SSIM))
        figure += f", SSIM {ssim:.3f}"
    if before is not None and after is not None:
        candidates.append((above(before - after, limits.CODEC_DICE), before - after, limits.CODEC_DICE))
        figure += f"; real-trained models reach Dice {after:.3f} on them, {before:.3f} on originals"
    real, again = evidence.number("dice", "real_only", "mean"), evidence.number("dice", "reconstructed", "mean")
    if real is not None and again is not None:
        candidates.append((above(real - again, limits.CODEC_DICE), real - again, limits.CODEC_DICE))
        figure += f"; models trained on reconstructions reach {again:.3f} on patients, {real:.3f} on originals"
    off, value, threshold = max(candidates, key=lambda one: one[0])
    falling = _fall(evidence.losses.get("autoencoder", ()))
    if falling is not None and falling > limits.STILL_FALLING.value:
        figure += f"; its loss fell by {falling:.0%} in the last quarter"
    return beyond(
        Finding(
            rule="lossy-codec",
            kind="quality",
            says="The autoencoder is the ceiling: real images lose this much before any denoiser touches them.",
            figure=figure,
            value=value,
            threshold=threshold,
            off=off,
            changes=(
                Change("encode.codec", "set", "to wavelet (exact, nothing to train)"),
                Change("encode.steps", "raise"),
                Change("encode.latent_channels", "raise"),
                Change("encode.levels", "lower"),
            ),
            source=INTERNAL,
        )
    )


def latent_scale(evidence: Evidence) -> list[Finding]:
    """Patients' latents much larger or smaller than what the noise schedule is built for."""
    scale = evidence.number("reconstruction", "latents", "std")
    study = evidence.study
    own = not study.privacy.private and study.train.steps and not study.train.pretrain_steps
    if scale is None or own:  # such a denoiser is built for patients' own spreads
        return []
    wide = scale > 1
    return beyond(
        Finding(
            rule="latent-scale",
            kind="quality",
            says=f"Patients' latents are {'larger' if wide else 'smaller'} than those that the codec was calibrated "
            f"on (public phantoms): the noise schedule starts too {'low' if wide else 'high'} for them.",
            figure=f"standard deviation {scale:.2f}, built for 1",
            value=scale,
            threshold=limits.LATENT_SCALE,
            off=max(scale, 1 / max(scale, 1e-6)) / limits.LATENT_SCALE.value,
            changes=(
                Change("grid.intensity_percentiles", "set", "so that patients fill [-1, 1] as phantoms do"),
                Change("encode.phantoms.count", "raise"),
            ),
            source=INTERNAL,
        )
    )


def still_learning(evidence: Evidence) -> list[Finding]:
    """A loss of the denoiser that was still falling when its training ended."""
    found: list[Finding] = []
    for name, key, who, source in (
        ("pretrain_loss", "train.pretrain_steps", "phantoms", PUBLIC),
        ("loss", "train.steps", "patients", INTERNAL),
    ):
        fall = _fall(evidence.losses.get(name, ()))
        if fall is None:
            continue
        found += beyond(
            Finding(
                rule="still-learning",
                kind="quality",
                says=f"The denoiser was still learning from {who} when its training ended.",
                figure=f"loss fell by {fall:.0%} from the third to the last quarter",
                value=fall,
                threshold=limits.STILL_FALLING,
                off=above(fall, limits.STILL_FALLING),
                changes=(Change(key, "raise"),),
                source=source,
            )
        )
    return found


def weak_denoiser(evidence: Evidence) -> list[Finding]:
    """A denoiser that knows real images hardly better than a linear filter."""
    error = evidence.errors.get("strangers")
    if error is None:
        return []
    return beyond(
        Finding(
            rule="weak-denoiser",
            kind="quality",
            says="The denoiser knows little of real images: it removes noise from held-out patients hardly better "
            "than a filter that has seen nothing.",
            figure=f"error {error:.2f} of the filter's",
            value=error,
            threshold=limits.DENOISER_ERROR,
            off=above(error, limits.DENOISER_ERROR),
            changes=(
                Change("train.pretrain_steps", "raise"),
                Change("train.pretrain_phantoms", "raise"),
                Change("train.channels", "raise"),
                *(
                    ()
                    if evidence.study.train.appearance.enabled
                    else (Change("train.appearance.enabled", "set", "on"),)
                ),
            ),
            source=INTERNAL,
        )
    )


def disobeyed_masks(evidence: Evidence) -> list[Finding]:
    """Images that do not show their label maps to models that real patients trained."""
    seen, real = evidence.number("agreement", "mean"), evidence.number("dice", "real_only", "mean")
    margin = _judge_margin(evidence)
    if seen is None or not real or margin is None or margin < limits.JUDGE_MARGIN.value:
        return []  # a weak judge finds no mask in anything
    if evidence.number("labellers"):
        return []  # pairs have the label maps that their images show
    share = seen / real
    study = evidence.study
    guided, drafts = study.train.mask_dropout > 0, study.train.appearance.enabled and study.synthesise.start == 1
    return beyond(
        Finding(
            rule="disobeyed-masks",
            kind="quality",
            says="Images do not obey their label maps: models trained on real patients do not find the masks there.",
            figure=f"label agreement {seen:.3f}, Dice on real images {real:.3f}",
            value=share,
            threshold=limits.AGREEMENT,
            off=below(share, limits.AGREEMENT),
            changes=(
                *_labelled_anew(study),
                Change("train.pretrain_steps", "raise"),
                *((Change("synthesise.start", "lower", "to begin from drafts"),) if drafts else ()),
                *((Change("synthesise.guidance", "raise", "to 1.5 to 3"),) if guided else ()),
                *_better_appearance(evidence),
                Change("synthesise.steps", "raise"),
            ),
            source=INTERNAL,
        )
    )


def alike(evidence: Evidence) -> list[Finding]:
    """Synthetic images that resemble each other more than patients do."""
    drawn = evidence.number("fidelity", "ssim_within_synthetic")
    real = evidence.number("fidelity", "ssim_within_real")
    if drawn is None or real is None:
        return []
    return beyond(
        Finding(
            rule="alike",
            kind="quality",
            says="Synthetic images are too much alike: there is less to learn from many of them.",
            figure=f"SSIM between different images {drawn:.2f}, {real:.2f} between patients",
            value=drawn - real,
            threshold=limits.ALIKE,
            off=above(drawn - real, limits.ALIKE),
            changes=(
                *((Change("synthesise.guidance", "lower", "to 1"),) if evidence.study.synthesise.guidance > 1 else ()),
                Change("train.pretrain_phantoms", "raise"),
                Change("masks.spread_clip_norm", "raise"),
            ),
            source=INTERNAL,
        )
    )


def _labelled_anew(study: Study) -> tuple[Change, ...]:
    labelling = study.train.labelling
    if study.privacy.private or labelling.networks:
        return ()
    return (Change("train.labelling.networks", "set", "to 3: label maps become what networks see in the images"),)


def _better_appearance(evidence: Evidence) -> tuple[Change, ...]:
    noise = evidence.noise.get("appearance", 0.0)
    if not evidence.study.train.appearance.enabled:
        return (Change("train.appearance.enabled", "set", "on"),)
    if noise > limits.NOISY_DETAIL * limits.STATISTIC_NOISE.value:
        return (Change("privacy.shares.appearance", "raise"),)
    return (Change("train.appearance.coefficients", "raise"),)


def _judge_margin(evidence: Evidence) -> float | None:
    real, floor = evidence.number("dice", "real_only", "mean"), evidence.number("floor", "mean")
    return None if real is None or floor is None else real - floor


def _fall(series: Sequence[float]) -> float | None:
    """Return by which share a series fell from its third to its last quarter, or None where it is too short."""
    if len(series) < _LEAST_POINTS:
        return None
    quarter = len(series) // 4
    before, last = float(np.mean(series[-2 * quarter : -quarter])), float(np.mean(series[-quarter:]))
    return (before - last) / max(abs(before), 1e-12)


IMAGE_RULES = (
    weak_judge,
    copies,
    familiar,
    lossy_codec,
    latent_scale,
    still_learning,
    weak_denoiser,
    disobeyed_masks,
    alike,
)
