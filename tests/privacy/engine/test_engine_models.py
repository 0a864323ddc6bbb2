"""Every network that is trained or offered: norms and clipped sums equal the naive loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from small_networks import awake, small_denoiser
from torch import Tensor, nn

from medsynth.config import Train
from medsynth.diffusion.objective import noise_rows, training_schedule
from medsynth.diffusion.objective import row_loss as diffusion_loss
from medsynth.models.adapters import add_adapters, select_trainable
from medsynth.models.denoiser import Denoiser, Preconditioning
from medsynth.privacy.gradients import Batch, open_backend
from medsynth.privacy.preflight import preflight

# Importing MONAI and diffusers warns about their own dependencies.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")

Case = tuple[nn.Module, Callable[[int, int], Batch], Callable[[nn.Module, Batch], Tensor]]


def _batch(shape: tuple[int, ...], **more: Callable[[torch.Generator, int], Tensor]) -> Callable[[int, int], Batch]:
    def make(rows: int, seed: int) -> Batch:
        g = torch.Generator().manual_seed(seed)
        batch = {"x": torch.randn(rows, *shape, generator=g), "t": torch.randint(0, 1000, (rows,), generator=g)}
        return {**batch, **{key: draw(g, rows) for key, draw in more.items()}}

    return make


def _loss(run: Callable[[nn.Module, Batch], Tensor]) -> Callable[[nn.Module, Batch], Tensor]:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        output = run(model, batch)
        target = torch.sin(torch.arange(output[0].numel(), dtype=output.dtype)).view_as(output[0])
        return (output - target).square().flatten(1).mean(1)

    return loss


def _unet(dims: int, kind: str) -> Case:
    more: dict[str, Any] = {}
    if kind == "context":
        more = {"with_conditioning": True, "cross_attention_dim": 5}
    if kind == "classes":
        more = {"num_class_embeds": 4}
    model = small_denoiser(dims, **more)
    shape = (3, *(4,) * dims)
    if kind == "context":
        make = _batch(shape, context=lambda g, n: torch.randn(n, 3, 5, generator=g))
        return model, make, _loss(lambda m, b: m(b["x"], b["t"], context=b["context"]))
    if kind == "classes":
        make = _batch(shape, label=lambda g, n: torch.randint(0, 4, (n,), generator=g))
        return model, make, _loss(lambda m, b: m(b["x"], b["t"], class_labels=b["label"]))
    return model, _batch(shape), _loss(lambda m, b: m(b["x"], b["t"]))


def _spade(dims: int) -> Case:
    from monai.networks.nets import SPADEDiffusionModelUNet

    model = SPADEDiffusionModelUNet(
        spatial_dims=dims,
        in_channels=2,
        out_channels=2,
        label_nc=3,
        channels=(4, 8),
        attention_levels=(False, True),
        num_res_blocks=1,
        norm_num_groups=4,
        num_head_channels=4,
        spade_intermediate_channels=4,
    )

    def masks(g: torch.Generator, n: int) -> Tensor:
        # Channels last in memory, as a one-hot map is.
        labels = torch.randint(0, 3, (n, *(4,) * dims), generator=g)
        return nn.functional.one_hot(labels, 3).movedim(-1, 1).float()

    return model, _batch((2, *(4,) * dims), seg=masks), _loss(lambda m, b: m(b["x"], b["t"], seg=b["seg"]))


def _controlnet(dims: int) -> Case:
    from monai.networks.nets.controlnet import ControlNet

    model = ControlNet(
        spatial_dims=dims,
        in_channels=2,
        channels=(4, 8),
        attention_levels=(False, True),
        num_res_blocks=1,
        norm_num_groups=4,
        num_head_channels=4,
        conditioning_embedding_in_channels=1,
        conditioning_embedding_num_channels=(4,),
    )

    def run(m: nn.Module, b: Batch) -> Tensor:
        downs, middle = m(x=b["x"], timesteps=b["t"], controlnet_cond=b["hint"])
        return torch.cat([part.flatten(1) for part in (*downs, middle)], 1)

    make = _batch((2, *(4,) * dims), hint=lambda g, n: torch.randn(n, 1, *(4,) * dims, generator=g))
    return model, make, _loss(run)


def _autoencoder(dims: int, attention: bool) -> Case:
    from monai.networks.nets.autoencoderkl import AutoencoderKL

    model = AutoencoderKL(
        spatial_dims=dims,
        in_channels=1,
        out_channels=1,
        channels=(4, 8),
        latent_channels=2,
        num_res_blocks=1,
        norm_num_groups=4,
        attention_levels=(False, attention),
        with_encoder_nonlocal_attn=attention,
        with_decoder_nonlocal_attn=attention,
    )

    def run(m: Any, b: Batch) -> Tensor:
        mean, sigma = m.encode(b["x"])
        return torch.cat([m.decode(mean + sigma * b["noise"]).flatten(1), mean.flatten(1)], 1)

    make = _batch((1, *(4,) * dims), noise=lambda g, n: torch.randn(n, 2, *(2,) * dims, generator=g))
    return model, make, _loss(run)


def _diffusers() -> Case:
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=8,
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    return model, _batch((2, 8, 8)), _loss(lambda m, b: m(b["x"], b["t"]).sample)


def _adapted(dims: int, choice: Any) -> Case:
    model, make, loss = _unet(dims, "plain")
    if choice == "lora":
        add_adapters(model, 2)
    select_trainable(model, choice)
    return model, make, loss


def _denoiser(dims: int, way: Any, choice: Any) -> Case:
    settings = Train(conditioning=way, channels=(8, 8), norm_groups=4, head_channels=4, noise_steps=50)
    signal = training_schedule(settings).alphas_cumprod.sqrt()
    model = Denoiser(Preconditioning(signal, (1.0, 0.5), dims), 2, 3, dims, settings)
    if choice == "lora":
        add_adapters(model, 2)
    select_trainable(model, choice)

    def make(rows: int, seed: int) -> Batch:
        g = torch.Generator().manual_seed(seed)
        latents, masks = (torch.randn(rows, n, *(4,) * dims, generator=g) for n in (2, 3))
        return noise_rows(latents, masks, model.preconditioning, 0.3, g)

    return model, make, diffusion_loss


CASES: dict[str, Callable[[], Case]] = {"diffusers-2d": _diffusers}
for _dims in (2, 3):
    for _kind in ("plain", "context", "classes"):
        CASES[f"unet-{_dims}d-{_kind}"] = partial(_unet, _dims, _kind)
    for _choice in ("lora", "bias_norm"):
        CASES[f"{_choice}-{_dims}d"] = partial(_adapted, _dims, _choice)
    for _attention in (False, True):
        CASES[f"autoencoder-{_dims}d-attention-{_attention}"] = partial(_autoencoder, _dims, _attention)
    for _way in ("concat", "spade", "cross_attention"):
        for _choice in ("all", "lora"):
            CASES[f"denoiser-{_dims}d-{_way}-{_choice}"] = partial(_denoiser, _dims, _way, _choice)
    CASES[f"spade-{_dims}d"] = partial(_spade, _dims)
    CASES[f"controlnet-{_dims}d"] = partial(_controlnet, _dims)


@pytest.mark.parametrize("name", CASES)
def test_the_engine_is_exact_on(name: str, assert_exact: Any) -> None:
    torch.manual_seed(0)
    model, make, loss = CASES[name]()
    assert_exact(awake(model), [make(rows, seed) for seed, rows in enumerate((2, 1, 2, 2))], loss)


@pytest.mark.parametrize("backend", ["bookkeeping", "unit", "opacus"])
@pytest.mark.parametrize("way", ["concat", "spade", "cross_attention"])
@pytest.mark.parametrize("dims", [2, 3])
def test_the_preflight_passes_however_the_label_map_reaches_the_network(dims: int, way: str, backend: str) -> None:
    # Biases alone: in single precision SPADE's round by 2e-5 of their norm, in a plain loop too, as the preflight's is.
    torch.manual_seed(0)
    model, make, loss = _denoiser(dims, way, "bias_norm")
    awake(model)
    batches = [make(rows, seed) for seed, rows in enumerate((1, 3))]
    assert preflight(open_backend(backend, model, loss, 0.1), model, loss, batches, 0.1).sum_error < 1e-5
