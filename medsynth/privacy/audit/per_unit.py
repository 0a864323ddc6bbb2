"""Per-unit gradient check: the preflight's comparison with a naive loop, on the model as it was trained."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from medsynth.errors import PrivacyError
from medsynth.privacy.audit.finding import Control, Finding
from medsynth.privacy.gradients import Batch, RowLoss, open_backend
from medsynth.privacy.preflight import NORM_TOLERANCE, Evidence, preflight

_WRONG = 1.26
_SHOWS = (
    "On public images of the study's shape, the norms and the clipped sum of every patient agree with a plain loop "
    "over patients, on the trained model. It cannot show it for inputs that were not tried."
)


def audit_gradients(
    backend: str, model: nn.Module, row_loss: RowLoss, batches: Sequence[Batch], clip_norm: float
) -> Finding:
    """Compare the study's gradient backend with a naive loop; nothing of patients is read.

    Args:
        backend: its name in the configuration.
        model: the denoiser, with ``requires_grad`` on what is trained.
        row_loss: the loss of the training.
        batches: PUBLIC batches of the real shape, at least two.
        clip_norm: the training's.
    """

    def wrong(module: nn.Module, batch: Batch) -> Tensor:
        return _WRONG * row_loss(module, batch)

    evidence = _evidence(backend, model, row_loss, row_loss, batches, clip_norm)
    control = _evidence(backend, model, wrong, row_loss, batches, clip_norm)
    value = evidence.max_norm_error if evidence else float("inf")
    return Finding(
        audit="per-unit gradients",
        subject="denoiser",
        measures=f"largest error of a patient's norm (backend {backend})",
        value=value,
        low=value,
        high=value,
        allowed=NORM_TOLERANCE,
        outcome="pass" if evidence else "fail",
        blocks=True,
        controls=(
            Control(f"norms {_WRONG} times too large", control.max_norm_error if control else _WRONG - 1, not control),
        ),
        shows=_SHOWS,
        reads_patients=False,
    )


def _evidence(
    name: str, model: nn.Module, executed: RowLoss, claimed: RowLoss, batches: Sequence[Batch], clip_norm: float
) -> Evidence | None:
    """Return the preflight's evidence for a backend that was opened with ``executed``, None where it was refused."""
    try:
        return preflight(open_backend(name, model, executed, clip_norm), model, claimed, batches, clip_norm)
    except PrivacyError:
        return None
