"""Per-patient clipped sums: both backends equal the naive loop, and the preflight finds those that do not."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from small_networks import awake, small_denoiser
from torch import Tensor, nn

from medsynth.errors import PrivacyError
from medsynth.privacy.gradients import Backend, Batch, ClippedSum, open_backend
from medsynth.privacy.gradients_opacus import MAX_ROWS, OpacusBackend
from medsynth.privacy.gradients_unit import UnitBackend
from medsynth.privacy.preflight import preflight, refuse_modules

# Importing MONAI warns about its own dependencies.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
BACKENDS = ("bookkeeping", "unit", "opacus")


def _denoiser(dims: int) -> nn.Module:
    torch.manual_seed(0)
    return awake(small_denoiser(dims))


def _diffusion_loss(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["x"], batch["t"]) - batch["target"]).square().flatten(1).mean(1)


def _patient(dims: int, rows: int, seed: int) -> Batch:
    g = torch.Generator().manual_seed(seed)
    shape = (4,) * dims
    return {
        "x": torch.randn(rows, 3, *shape, generator=g),
        "t": torch.randint(0, 1000, (rows,), generator=g),
        "target": torch.randn(rows, 2, *shape, generator=g),
    }


def _naive(model: nn.Module, batches: Sequence[Batch], bound: float) -> tuple[list[Tensor], list[float]]:
    """A third implementation: row by row, in float64, with the mean taken last."""
    model = copy.deepcopy(model).double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    sums, norms = [torch.zeros_like(p) for p in parameters], []
    for batch in batches:
        double = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
        rows = len(double["x"])
        mean = [torch.zeros_like(p) for p in parameters]
        for row in range(rows):
            model.zero_grad()
            _diffusion_loss(model, {k: v[row : row + 1] for k, v in double.items()}).sum().backward()
            for total, parameter in zip(mean, parameters, strict=True):
                if parameter.grad is not None:
                    total.add_(parameter.grad / rows)
        norm = math.sqrt(sum(float((m**2).sum()) for m in mean))
        norms.append(norm)
        for total, part in zip(sums, mean, strict=True):
            total.add_(part * min(1.0, bound / norm))
    return sums, norms


def _distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float((a.double() - b).square().sum()) for a, b in zip(one, other, strict=True)))


def _length(sums: ClippedSum) -> float:
    return math.sqrt(sum(float(t.square().sum()) for t in sums.tensors))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("frozen", [False, True])
def test_backends_equal_a_naive_loop(dims: int, name: str, frozen: bool) -> None:
    model = _denoiser(dims)
    if frozen:
        for key, parameter in model.named_parameters():
            parameter.requires_grad = "bias" in key or "norm" in key
    batches = [_patient(dims, rows, seed) for seed, rows in enumerate((1, 3, 2))]
    _, norms = _naive(model, batches, 1.0)
    bound = sorted(norms)[1]  # one patient below the clip, one above
    wanted, _ = _naive(model, batches, bound)
    found = open_backend(name, model, _diffusion_loss, bound).clipped_sum(batches)
    assert found.norms == pytest.approx(norms, rel=1e-4)
    assert _distance(found.tensors, wanted) < 1e-4 * bound
    assert len(found.tensors) == sum(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", BACKENDS)
def test_pitfall_01_rows_of_a_patient_are_averaged_then_clipped_once(name: str) -> None:
    backend = open_backend(name, _denoiser(2), _diffusion_loss, 1e-3)
    patient = _patient(2, 2, 0)
    many = {key: torch.cat([value] * 40) for key, value in patient.items()}  # more rows than one chunk
    assert MAX_ROWS < 2 * 40
    once, often = backend.clipped_sum([patient]), backend.clipped_sum([many])
    assert _distance(once.tensors, often.tensors) < 1e-7
    assert often.norms == pytest.approx(once.norms, rel=1e-4)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_clipped_norm_is_at_most_the_bound(name: str) -> None:
    for bound in (1e-6, 1e-2, 1.0):
        backend = open_backend(name, _denoiser(2), _diffusion_loss, bound)
        for seed in range(3):
            assert _length(backend.clipped_sum([_patient(2, 2, seed)])) <= bound * (1 + 1e-6)


@pytest.mark.parametrize("name", BACKENDS)
def test_pitfall_05_nobody_drawn_gives_zeros(name: str) -> None:
    model = _denoiser(2)
    found = open_backend(name, model, _diffusion_loss, 1.0).clipped_sum([])
    assert [t.shape for t in found.tensors] == [p.shape for p in model.parameters()]
    assert _length(found) == 0 and found.norms == []


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_pitfall_07_a_patient_that_is_not_finite_adds_nothing(name: str, poison: float) -> None:
    backend = open_backend(name, _denoiser(2), _diffusion_loss, 1.0)
    good, bad = _patient(2, 2, 0), _patient(2, 2, 1)
    bad["target"][1, 0, 0, 0] = poison
    alone, both = backend.clipped_sum([good]), backend.clipped_sum([bad, good])
    assert all(t.isfinite().all() for t in both.tensors)
    assert _distance(alone.tensors, both.tensors) < 1e-6
    assert both.norms[0] == 0


@pytest.mark.parametrize("name", BACKENDS)
def test_pitfall_23_sums_are_never_in_half_precision(name: str) -> None:
    backend = open_backend(name, _denoiser(2), _diffusion_loss, 1.0)
    for patients in ([], [_patient(2, 1, 0)], [_patient(2, 1, 0), _patient(2, 2, 1)]):
        assert {t.dtype for t in backend.clipped_sum(patients).tensors} <= {torch.float32, torch.float64}


@pytest.mark.parametrize("name", BACKENDS)
def test_pitfall_22_shards_and_chunks_add_up_even_empty_ones(name: str) -> None:
    # Noise is added once, to the total: a shard's sum is exact and carries none.
    backend = open_backend(name, _denoiser(2), _diffusion_loss, 0.1)
    patients = [_patient(2, rows, rows) for rows in (1, 2, 3)]
    shards = [backend.clipped_sum(shard) for shard in (patients[:2], [], patients[2:])]
    total = [torch.stack(column).sum(0) for column in zip(*(s.tensors for s in shards), strict=True)]
    assert _distance(backend.clipped_sum(patients).tensors, total) < 1e-6


@pytest.mark.parametrize("name", BACKENDS)
def test_the_model_is_left_as_it_was(name: str) -> None:
    model = _denoiser(2)
    state = copy.deepcopy(model.state_dict())
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    open_backend(name, model, _diffusion_loss, 1.0).clipped_sum([_patient(2, 2, 0)])
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert torch.equal(first.grad, torch.ones_like(first))
    assert not any(m._forward_hooks or m._backward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(hasattr(p, "grad_sample") for p in model.parameters())


@dataclass(frozen=True)
class _Broken:
    """A backend that does one thing wrong."""

    inner: UnitBackend
    fault: str
    name: str = "broken"

    @property
    def clip_norm(self) -> float:
        return self.inner.clip_norm

    def at(self, clip_norm: float) -> _Broken:
        return replace(self, inner=self.inner.at(clip_norm))

    def clipped_sum(self, batches: Sequence[Batch]) -> ClippedSum:
        if self.fault == "rows as units":
            rows = [{k: v[i : i + 1] for k, v in b.items()} for b in batches for i in range(len(b["x"]))]
            return ClippedSum(self.inner.clipped_sum(rows).tensors, self.inner.clipped_sum(batches).norms)
        if self.fault == "no clip":
            return self.inner.at(1e9).clipped_sum(batches)
        right = self.inner.clipped_sum(batches)
        if self.fault == "norm":
            return ClippedSum([1.26 * t for t in right.tensors], [n / 1.26 for n in right.norms])
        if self.fault == "forgets a layer":
            return ClippedSum([torch.zeros_like(right.tensors[0]), *right.tensors[1:]], right.norms)
        return right


@pytest.mark.parametrize("name", BACKENDS)
def test_preflight_passes_right_backends_and_gives_evidence(name: str) -> None:
    model = _denoiser(2)
    batches = [_patient(2, rows, rows) for rows in (1, 3)]
    backend = open_backend(name, model, _diffusion_loss, 1.0)
    evidence = preflight(backend, model, _diffusion_loss, batches, 1.0)
    assert evidence.passed and evidence.backend == name and evidence.max_clipped_norm <= 1 + 1e-6
    assert evidence.to_json()["batches"] == 2


@pytest.mark.parametrize("fault", ["rows as units", "no clip", "norm", "forgets a layer"])
def test_pitfall_08_preflight_refuses_broken_backends(fault: str) -> None:
    model = _denoiser(2)
    batches = [_patient(2, rows, rows) for rows in (1, 3)]
    right: Backend = UnitBackend(model, _diffusion_loss, 1.0)
    preflight(right, model, _diffusion_loss, batches, 1.0)
    broken = _Broken(UnitBackend(model, _diffusion_loss, 1.0), fault)
    with pytest.raises(PrivacyError, match="preflight"):
        preflight(broken, model, _diffusion_loss, batches, 1.0)


def test_pitfall_08_a_missing_clip_is_found_even_if_no_public_gradient_reaches_it() -> None:
    model = _denoiser(2)
    broken = _Broken(UnitBackend(model, _diffusion_loss, 1e3), "no clip")
    with pytest.raises(PrivacyError, match="preflight"):
        preflight(broken, model, _diffusion_loss, [_patient(2, rows, rows) for rows in (1, 3)], 1e3)


class _Permuting(nn.Module):
    """Feeds a Conv2d with an image whose channels lie last in memory, as attention blocks and one-hot masks do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(3, 6)
        self.conv = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.conv(self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def test_pitfall_08_opacus_is_wrong_on_channels_last_and_the_preflight_catches_it() -> None:
    model = _Permuting()
    batches = [_patient(2, rows, rows) for rows in (2, 3)]
    raw = OpacusBackend(model, _diffusion_loss, 1.0, contiguous=False)
    with pytest.raises(PrivacyError, match="norm error"):
        preflight(raw, model, _diffusion_loss, batches, 1.0)
    assert preflight(replace(raw, contiguous=True), model, _diffusion_loss, batches, 1.0).passed


def test_opacus_is_right_on_inputs_that_are_permuted_outside_of_the_model() -> None:
    model = _denoiser(2)
    batches = [_patient(2, rows, rows) for rows in (2, 3)]
    permuted = [{**b, "x": b["x"].contiguous(memory_format=torch.channels_last)} for b in batches]
    one, other = (open_backend("opacus", model, _diffusion_loss, 0.1).clipped_sum(b) for b in (batches, permuted))
    assert _distance(one.tensors, other.tensors) < 1e-6


def test_opacus_refuses_what_it_would_leave_out() -> None:
    model = _denoiser(2).eval()
    with pytest.raises(PrivacyError, match="unit"):
        open_backend("opacus", model, _diffusion_loss, 1.0).clipped_sum([_patient(2, 1, 0)])
    assert not any(m._forward_hooks for m in model.modules())


class _Remembers(nn.Module):
    """Keeps a running statistic without saying so in its name."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen = 0.9 * self.seen + 0.1 * x.mean()
        return self.conv(x)


class EMAQuantizer(nn.Module):
    """Stands for MONAI's codebook, which updates itself from the batch."""


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(3),
        nn.BatchNorm3d(3),
        nn.SyncBatchNorm(3),
        nn.LazyBatchNorm2d(),
        nn.InstanceNorm3d(3, track_running_stats=True),
        EMAQuantizer(),
    ],
)
def test_pitfall_09_layers_that_mix_patients_are_refused_by_name(layer: nn.Module) -> None:
    with pytest.raises(PrivacyError, match=type(layer).__name__):
        refuse_modules(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(layer)))


def test_pitfall_09_monai_codebooks_are_refused_and_plain_norms_are_not() -> None:
    from monai.networks.layers.vector_quantizer import EMAQuantizer as MonaiQuantizer

    with pytest.raises(PrivacyError, match="codebook"):
        refuse_modules(nn.Sequential(MonaiQuantizer(2, num_embeddings=4, embedding_dim=2)))
    refuse_modules(nn.Sequential(nn.GroupNorm(1, 3), nn.LayerNorm(3), nn.InstanceNorm2d(3), _denoiser(2)))


def test_pitfall_09_hidden_statistics_are_found_by_running_the_model() -> None:
    model = _Remembers()
    backend = open_backend("unit", model, _diffusion_loss, 1.0)
    with pytest.raises(PrivacyError, match="buffers"):
        preflight(backend, model, _diffusion_loss, [_patient(2, 1, 0), _patient(2, 1, 1)], 1.0)


def test_losses_over_the_batch_are_refused() -> None:
    def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
        return _diffusion_loss(model, batch).mean()

    for name in BACKENDS:
        with pytest.raises(PrivacyError, match="one loss a row"):
            open_backend(name, _denoiser(2), mean_loss, 1.0).clipped_sum([_patient(2, 2, 0)])


def test_nothing_to_train_and_unknown_backends_are_refused() -> None:
    model = _denoiser(2)
    with pytest.raises(PrivacyError, match="bookkeeping, unit or opacus"):
        open_backend("ghost", model, _diffusion_loss, 1.0)
    with pytest.raises(PrivacyError, match="no trainable"):
        open_backend("unit", model.requires_grad_(False), _diffusion_loss, 1.0)
