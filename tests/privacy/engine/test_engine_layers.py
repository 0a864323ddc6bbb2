"""Every layer rule equals the naive loop, on random shapes, whichever rule is forced."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from medsynth.errors import PrivacyError
from medsynth.privacy.engine import choice
from medsynth.privacy.engine.bookkeeping import KEEP_BYTES, BookkeepingBackend
from medsynth.privacy.engine.choice import Chooser
from medsynth.privacy.engine.convolution import ConvolutionWeight, Geometry
from medsynth.privacy.engine.linear import LinearWeight
from medsynth.privacy.gradients import Batch, open_backend

# torch warns that it copies the input where an even kernel needs uneven padding; so do we.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")
KINDS = (None, "keep", "discard", "gram")


def row_loss(model: nn.Module, batch: Batch) -> Tensor:
    output: Tensor = model(batch["x"])
    # A fixed weight a value, so that gradients neither vanish nor are alike.
    weights = torch.sin(torch.arange(output[0].numel(), dtype=output.dtype, device=output.device)).view_as(output[0])
    return (output * weights).flatten(1).sum(1) + output.square().flatten(1).mean(1)


def patients(shape: Sequence[int], rows: Sequence[int], seed: int = 0) -> list[Batch]:
    g = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(n, *shape, generator=g)} for n in rows]


@st.composite
def convolutions(draw: Callable[..., Any]) -> tuple[nn.Module, tuple[int, ...]]:
    dims = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2]))
    ins, outs = (groups * draw(st.integers(1, 4)) for _ in range(2))
    kernel, stride, dilation = (tuple(draw(st.integers(1, high)) for _ in range(dims)) for high in (3, 2, 2))
    size = tuple(dilation[a] * (kernel[a] - 1) + draw(st.integers(1, 4)) for a in range(dims))
    transposed = draw(st.booleans())
    bias = draw(st.booleans())
    kinds: tuple[Any, ...]
    layer: nn.Module
    padding: Any
    if transposed:
        kinds = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
        padding = tuple(min(1, dilation[a] * (kernel[a] - 1)) for a in range(dims))
        extra = tuple(min(draw(st.integers(0, 1)), max(stride[a], dilation[a]) - 1) for a in range(dims))
        layer = kinds[dims - 1](ins, outs, kernel, stride, padding, extra, groups, bias, dilation)
    else:
        kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
        mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
        same = draw(st.booleans()) and all(s == 1 for s in stride)
        padding = "same" if same else tuple(draw(st.integers(0, min(1, size[a] - 1))) for a in range(dims))
        if mode != "zeros" and same and any(dilation[a] * (kernel[a] - 1) // 2 + 1 >= size[a] for a in range(dims)):
            mode = "zeros"
        layer = kinds[dims - 1](ins, outs, kernel, stride, padding, dilation, groups, bias, mode)
    return layer, (ins, *size)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions(), st.sampled_from(KINDS), st.integers(1, 3), st.integers(0, 99))
def test_convolutions_equal_the_naive_loop(
    assert_exact: Any, case: Any, kind: str | None, rows: int, seed: int
) -> None:
    torch.manual_seed(seed)
    layer, shape = case
    assert_exact(layer, patients(shape, [rows, rows, rows], seed), kind=kind)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(convolutions(), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_every_way_to_treat_a_convolution_gives_the_same(case: Any, units: int, rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    layer, shape = case
    seen: dict[str, Any] = {}
    x = torch.randn(units * rows, *shape)
    from medsynth.privacy.engine.layers import trained_layers

    (treated,) = trained_layers(layer)
    value, geometry = treated.family.prepare(treated, x)
    output, _ = treated.family.run(treated, value, geometry)
    assert torch.allclose(output, layer(x), atol=1e-5)
    part = ConvolutionWeight(value.double(), torch.randn_like(output).double(), units, geometry, layer.weight.shape)
    for method in {*part.methods(), "unfold", "single", "grouped"}:
        seen[method] = part.samples(0, units, method)
    if all(g == 1 for g in (geometry.groups, *geometry.stride)) and not geometry.transposed:
        axes = part._roles()[2]
        if all(a.padding <= a.dilation * (a.kernel - 1) for a in axes):
            seen["swapped"] = part.samples(0, units, "swapped")
    wanted = seen.pop("single")
    for method, found in seen.items():
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-9), method
    squares = wanted.flatten(1).square().sum(1)
    for method in {*part.grams(), "box"}:
        assert torch.allclose(part.squares(method), squares, rtol=1e-5, atol=1e-9), method
    factors = torch.rand(units, dtype=torch.float64)
    for method in ("native", "taps") if geometry.groups == 1 else ("native",):
        total = part.contract(factors, part.held, method)
        assert torch.allclose(total, torch.einsum("n,n...->...", factors, wanted), rtol=1e-8, atol=1e-8), method


@pytest.mark.parametrize(
    ("layer", "size", "ways"),
    [
        (nn.Conv3d(3, 5, 3, padding=1), (2, 2, 2), ("native", "taps")),
        (nn.Conv2d(3, 5, 3, padding=1), (1, 1), ("native", "taps")),  # eight of nine offsets meet padding alone
        (nn.ConvTranspose3d(3, 5, 3, padding=1), (2, 2, 2), ("native", "taps")),
        (nn.Conv3d(3, 5, 3, padding=2, dilation=2, stride=2), (3, 2, 3), ("native", "taps")),
        (nn.Conv2d(3, 5, 3, padding=1), (4, 4), ("native",)),
        (nn.Conv3d(4, 6, 3, padding=1, groups=2), (2, 2, 2), ("native",)),
        (nn.Conv3d(3, 5, 1), (2, 2, 2), ("native",)),
    ],
)
def test_sums_on_maps_smaller_than_the_kernel_are_tried_tap_by_tap(
    layer: Any, size: tuple[int, ...], ways: tuple[str, ...]
) -> None:
    from medsynth.privacy.engine.layers import trained_layers

    (treated,) = trained_layers(layer)
    x = torch.randn(6, layer.in_channels, *size)
    value, geometry = treated.family.prepare(treated, x)
    part = ConvolutionWeight(value, torch.randn_like(layer(x)), 3, geometry, layer.weight.shape)
    factors = torch.tensor([0.5, 0.0, 1.0])
    wanted = torch.einsum("n,n...->...", factors, part.samples(0, 3, "single"))

    assert part.contractions() == ways
    for way in ways:
        found = part.contract(factors, part.held, way)
        assert found.is_contiguous() and found.shape == layer.weight.shape
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5), way


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(1, 4), max_size=2), st.integers(1, 5), st.integers(1, 5), st.booleans(), st.sampled_from(KINDS)
)
def test_linear_layers_equal_the_naive_loop(
    assert_exact: Any, positions: list[int], ins: int, outs: int, bias: bool, kind: str | None
) -> None:
    torch.manual_seed(1)
    assert_exact(nn.Linear(ins, outs, bias), patients((*positions, ins), [2, 2, 1]), kind=kind)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 3), st.sampled_from(["group", "instance", "layer"]), st.integers(1, 3))
def test_norms_equal_the_naive_loop(assert_exact: Any, dims: int, name: str, rows: int) -> None:
    torch.manual_seed(2)
    shape = (4, *(3,) * dims)
    instance: tuple[Any, ...] = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
    layer: nn.Module = {
        "group": nn.GroupNorm(2, 4),
        "instance": instance[dims - 1](4, affine=True),
        "layer": nn.LayerNorm(shape[-2:]),
    }[name]
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    assert_exact(nn.Sequential(layer, nn.Tanh()), patients(shape, [rows] * 3))


class _Looked(nn.Module):
    def __init__(self, padding: int | None) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3, padding_idx=padding)

    def forward(self, x: Tensor) -> Tensor:
        return self.table(x).tanh()


@pytest.mark.parametrize("padding", [None, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("positions", [(), (6,)])
def test_embeddings_equal_the_naive_loop(
    assert_exact: Any, padding: int | None, kind: str | None, positions: tuple[int, ...]
) -> None:
    torch.manual_seed(3)
    batches = [{"x": torch.randint(0, 5, (2, *positions))} for _ in range(3)]
    batches[0]["x"][:] = 1
    assert_exact(_Looked(padding), batches, kind=kind)


class _Twice(nn.Module):
    """Every layer is used twice, at different sizes; the gradients of the two calls are far from orthogonal."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(3, 3, 3, padding=1), nn.GroupNorm(1, 3), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        once = self.linear(self.norm(self.conv(x)))
        return self.linear(functional.avg_pool2d(self.norm(self.conv(once)), (2, 1)))


@pytest.mark.parametrize("rows", [1, 2])
def test_modules_used_twice_have_the_norm_of_the_sum(assert_exact: Any, rows: int) -> None:
    torch.manual_seed(4)
    assert_exact(_Twice(), patients((3, 4, 4), [rows] * 3))


class _Branch(nn.Module):
    """Leaves one layer out, and calls another whose output does not count."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.ignored = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + 0 * self.ignored(x).detach()


def test_parameters_that_a_step_does_not_use_get_zeros(assert_exact: Any) -> None:
    found = assert_exact(_Branch(), patients((3,), [1, 2, 2]))
    assert all(not t.any() for t in found.tensors[2:]) and found.tensors[0].any()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted"])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_layout_does_not_matter(assert_exact: Any, layout: str, kind: str | None) -> None:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Conv2d(8, 4, 3, stride=2))
    batches = patients((4, 6, 6), [2, 2, 2])
    if layout == "channels_last":
        batches = [{"x": b["x"].contiguous(memory_format=torch.channels_last)} for b in batches]
    if layout == "permuted":
        batches = [{"x": b["x"].permute(0, 3, 2, 1)[:, :4]} for b in [{"x": torch.randn(2, 6, 6, 6)} for _ in range(3)]]
    assert_exact(model, batches, kind=kind)


@pytest.mark.parametrize("kind", ["keep", "discard"])
@pytest.mark.parametrize("units", [1, 2, 5])
def test_gradients_instantiated_in_pieces_give_the_same(
    assert_exact: Any, kind: str, units: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_PIECE", 1)  # two units at a time
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Flatten(2), nn.Linear(16, 3))
    assert_exact(model, patients((3, 4, 4), [2] * units), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_patient_that_is_not_finite_adds_nothing_and_spares_the_others(
    kind: str | None, poison: float, length: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "_PIECE", 1)
    torch.manual_seed(6)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Flatten(2), nn.Linear(16, 3))
    good, bad, other = patients((3, 4, 4), [2, 2, 2])
    bad["x"][1, 0, 0, 0] = poison
    backend = BookkeepingBackend(model, row_loss, 0.5, chooser=Chooser(KEEP_BYTES, kind))
    without, together = backend.clipped_sum([good, other]), backend.clipped_sum([good, bad, other])
    assert together.norms[1] == 0 and together.norms[::2] == pytest.approx(without.norms, rel=1e-5)
    assert length([a - b for a, b in zip(without.tensors, together.tensors, strict=True)]) < 1e-6
    assert not any(t.any() for t in backend.clipped_sum([bad]).tensors)


def test_gram_norms_of_gradients_that_cancel_over_positions_are_never_too_small() -> None:
    # Inputs alike at all positions, output gradients that nearly sum to zero: terms far larger than their sum.
    torch.manual_seed(7)
    for _ in range(20):
        x = 1 + 1e-3 * torch.randn(16, 8, 6, 6)
        g = torch.randn(16, 4, 6, 6)
        g -= g.mean((2, 3), keepdim=True)
        geometry = Geometry((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
        part = ConvolutionWeight(x, g, 16, geometry, torch.Size((4, 8, 1, 1)))
        exact = torch.bmm(g.double().flatten(2), x.double().flatten(2).mT).square().sum((1, 2))
        found = part.squares("box").double()
        assert (found >= exact * (1 - 1e-6)).all()
        terms = torch.linalg.vector_norm(x.flatten(1), dim=1) ** 2 * torch.linalg.vector_norm(g.flatten(1), dim=1) ** 2
        assert (found - exact <= 1e-6 * terms).all()


def test_a_zero_gradient_stays_zero() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))

    def nothing(model: nn.Module, batch: Batch) -> Tensor:
        return 0 * model(batch["x"]).sum(1)

    found = open_backend("bookkeeping", model, nothing, 1.0).clipped_sum(patients((3, 4, 4), [1, 2]))
    assert not any(t.any() for t in found.tensors) and found.norms == [0.0, 0.0]


class _Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.linear(x), self.linear.weight)


class _OwnParameter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class _Doubling(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def _tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (nn.Sequential(nn.Linear(3, 3), _OwnParameter()), "1.scale"),
        (nn.Sequential(_Doubling(3, 3)), "0.weight"),
        (nn.Sequential(nn.BatchNorm1d(3)), "0.weight"),
        (nn.Sequential(nn.InstanceNorm1d(3, affine=True, track_running_stats=True)), "running statistics"),
        (nn.Sequential(nn.PReLU()), "0.weight"),
        (nn.MultiheadAttention(4, 2), "in_proj_weight"),
        (nn.Embedding(3, 3, max_norm=1.0), "max_norm"),
        (nn.Embedding(3, 3, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (nn.Embedding(3, 3, sparse=True), "sparse"),
        (nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), "original0"),
        (_tied(), "1.weight"),
    ],
)
def test_what_has_no_rule_is_refused_by_name_when_opened(model: nn.Module, name: str) -> None:
    with pytest.raises(PrivacyError, match=name):
        open_backend("bookkeeping", model, row_loss, 1.0)


def test_parameters_used_outside_of_their_layer_are_refused_by_name() -> None:
    model = _Functional()
    with pytest.raises(PrivacyError, match=r"linear\.weight"):
        open_backend("bookkeeping", model, row_loss, 1.0).clipped_sum(patients((3,), [1, 1]))
    assert model.linear.weight.grad is None and "forward" not in model.linear.__dict__


def test_layers_that_do_not_see_rows_first_are_refused_by_name() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.position = nn.Embedding(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.position(torch.arange(3)[:1])

    with pytest.raises(PrivacyError, match="position"):
        open_backend("bookkeeping", Shared(), row_loss, 1.0).clipped_sum(patients((3,), [1, 1]))


def test_layers_that_run_again_in_the_backward_are_refused_or_exact(assert_exact: Any) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.linear, checkpoint(self.linear, x, use_reentrant=False), use_reentrant=False)

    assert_exact(Checkpointed(), patients((3,), [1, 2]))


def test_long_patients_and_small_physical_batches_change_nothing(length: Any) -> None:
    torch.manual_seed(8)
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.SiLU(), nn.Conv2d(4, 2, 3))
    batches = patients((3, 5, 5), [2, 7, 2, 1, 2, 2])
    whole = BookkeepingBackend(model, row_loss, 0.5)
    for max_rows in (1, 3, 4):
        small = replace(whole, max_rows=max_rows).clipped_sum(batches)
        assert {t.dtype for t in small.tensors} == {torch.float64}  # several products are added in double precision
        wanted = whole.clipped_sum(batches)
        assert small.norms == pytest.approx(wanted.norms, rel=1e-5)
        assert length([a - b for a, b in zip(small.tensors, wanted.tensors, strict=True)]) < 1e-5


def test_layers_frozen_or_thawed_after_opening_are_seen(naive: Any, length: Any) -> None:
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    backend = open_backend("bookkeeping", model, row_loss, 1e3)
    batches = patients((3,), [1, 1])
    assert len(backend.clipped_sum(batches).tensors) == 4
    model[0].requires_grad_(False)
    model[1].weight = nn.Parameter(torch.randn(2, 3))
    wanted, _ = naive(model, batches, 1e3, row_loss)
    found = backend.clipped_sum(batches)
    assert length([a - b for a, b in zip(found.tensors, wanted, strict=True)]) < 1e-5 * length(wanted)


def test_autocast_gives_sums_in_single_precision_close_to_the_right_ones(length: Any) -> None:
    torch.manual_seed(10)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU(), nn.Flatten(2), nn.LayerNorm(16), nn.Linear(16, 4)
    )
    batches = patients((3, 4, 4), [2, 2, 2])

    def half(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return row_loss(model, batch).float()

    for kind in KINDS:
        exact = BookkeepingBackend(model, row_loss, 0.3).clipped_sum(batches)
        backend = BookkeepingBackend(model, half, 0.3, chooser=Chooser(KEEP_BYTES, kind))
        found = backend.clipped_sum(batches)
        assert {t.dtype for t in found.tensors} == {torch.float32}
        distance = length([a - b for a, b in zip(found.tensors, exact.tensors, strict=True)])
        assert distance < 0.03 * length(exact.tensors)
        assert max(length(backend.clipped_sum([b]).tensors) for b in batches) <= 0.3 * (1 + 1e-6)


def test_kept_gradients_stay_within_the_memory_budget() -> None:
    part = ConvolutionWeight(
        torch.randn(4, 64, 2, 2), torch.randn(4, 64, 2, 2), 4, Geometry((1, 1), (1, 1), (1, 1), False, (0, 0), 1),
        torch.Size((64, 64, 3, 3)),
    )  # fmt: skip
    # 4 units of 64 x 64 x 3 x 3 floats are some 590,000 bytes
    rule, taken = Chooser(2**19).choose(part, 2**19)
    assert rule.kind != "keep" and taken == 0
    rule, taken = Chooser(2**30, "keep").choose(part, 2**30)
    assert rule.kind == "keep" and taken > 2**19


def test_rules_are_timed_once_for_draws_of_about_the_same_size() -> None:
    chooser = Chooser(2**25)
    for rows in (1, 2):
        for units in (6, 7, 8, 9, 10, 11):
            value, grad = torch.randn(units * rows, 3, 4), torch.randn(units * rows, 3, 2)
            chooser.choose(LinearWeight(value, grad, units), 2**25)
        assert len(chooser.cache) == rows  # another number of rows a unit is another layer
    chooser.choose(LinearWeight(torch.randn(24, 3, 4), torch.randn(24, 3, 2), 24), 2**25)
    assert len(chooser.cache) == 3
