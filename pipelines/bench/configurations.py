"""The models and batches that are measured: MONAI's diffusion U-Net as the denoiser uses it, on random latents."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from medsynth.models.adapters import add_adapters, select_trainable
from medsynth.privacy.gradients import Batch

LATENT, MASK = 4, 2  # channels
LORA_RANK = 4
SMALL, WIDE = (32, 64, 128), (64, 128, 256)


@dataclass(frozen=True)
class Configuration:
    """One row of the benchmark.

    Attributes:
        name: its name on the command line and in the results.
        shape: voxels of the latent; its length is 2 or 3.
        patients: clip units of one step.
        draws: rows a patient.
        channels: widths of the U-Net; attention at the lowest level.
        lora: train adapters only.
        channels_last: latents as an image library gives them, channels last in memory.
    """

    name: str
    shape: tuple[int, ...]
    patients: int
    draws: int = 1
    channels: tuple[int, ...] = SMALL
    lora: bool = False
    channels_last: bool = False


CONFIGURATIONS = {
    c.name: c
    for c in (
        Configuration("2d-16-n16", (16, 16), 16),
        Configuration("2d-16-n64", (16, 16), 64),
        Configuration("2d-16-n256", (16, 16), 256),
        Configuration("2d-16-n16-k4", (16, 16), 16, draws=4),
        Configuration("2d-16-n64-lora", (16, 16), 64, lora=True),
        Configuration("2d-16-n16-channels-last", (16, 16), 16, channels_last=True),
        Configuration("2d-32-n16", (32, 32), 16),
        Configuration("2d-16-n16-wide", (16, 16), 16, channels=WIDE),
        Configuration("3d-8-n16", (8, 8, 8), 16),
        Configuration("3d-8-n64", (8, 8, 8), 64),
        Configuration("3d-12x16x12-n8", (12, 16, 12), 8),
    )
}
# For the test: seconds, not minutes.
TINY = Configuration("tiny", (4, 4), 3, channels=(4, 8))


@dataclass(frozen=True)
class Place:
    """Where steps run, and in which precision their forward pass multiplies.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``.
        bf16: autocast to bfloat16; norms and clipped sums are single precision all the same.
    """

    device: str = "cpu"
    bf16: bool = False

    @property
    def tolerance(self) -> float:
        """Relative error that norms and clipped sums may have: bfloat16 keeps 8 bits, and rounds a batch otherwise."""
        return 2.0**-5 if self.bf16 else 1e-5

    @property
    def name(self) -> str:
        """The device as reports name it."""
        return torch.cuda.get_device_name() if self.device == "cuda" else "cpu"

    @property
    def precision(self) -> str:
        """The precision as reports name it."""
        return "bf16" if self.bf16 else "float32"

    def seconds(self) -> float:
        """Return a clock's time: this process's CPU time, or on a GPU, once it has done its work, the wall's."""
        if self.device == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


CPU = Place()


@dataclass(frozen=True)
class Problem:
    """A model and the batch of one step, the same for every engine.

    Attributes:
        configuration: what it was made from.
        model: never stepped; engines take :meth:`copy`.
        batches: one a patient.
        clip_norm: the median of the patients' gradient norms once :func:`pipelines.bench.measuring.reference` has
            found them, so that half of them are clipped.
        place: where they lie.
    """

    configuration: Configuration
    model: nn.Module = field(repr=False)
    batches: list[Batch] = field(repr=False)
    clip_norm: float = 1.0
    place: Place = CPU

    @cached_property
    def whole(self) -> Batch:
        """All rows together, patient by patient."""
        return {key: torch.cat([batch[key] for batch in self.batches]) for key in self.batches[0]}

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def copy(self) -> nn.Module:
        """Return a model of one's own, with the same weights."""
        return copy.deepcopy(self.model)

    def row_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return each row's squared error, scaled so that gradient norms are far above the 1e-6 that Opacus adds."""
        with torch.autocast(self.place.device, torch.bfloat16, enabled=self.place.bf16):
            found = model(batch["x"], batch["t"])
        return (found.float() - batch["target"]).square().flatten(1).mean(1) * 100


def open_problem(configuration: Configuration, clip_norm: float = 1.0, place: Place = CPU) -> Problem:
    """Return the model and the batch of a configuration; the same ones at every call."""
    torch.manual_seed(0)
    model = _network(configuration)
    if configuration.lora:
        add_adapters(model, LORA_RANK)
        select_trainable(model, "lora")
    for parameter in model.parameters():
        if not parameter.any():  # zero-initialised layers would hide the gradients of those before them
            nn.init.normal_(parameter, std=0.02)
    rows = [_patient(configuration) for _ in range(configuration.patients)]
    batches = [{key: value.to(place.device) for key, value in batch.items()} for batch in rows]
    return Problem(configuration, model.train().to(place.device), batches, clip_norm, place)


def _network(configuration: Configuration) -> nn.Module:
    from monai.networks.nets.diffusion_model_unet import DiffusionModelUNet

    levels = len(configuration.channels)
    return DiffusionModelUNet(
        spatial_dims=len(configuration.shape),
        in_channels=LATENT + MASK,
        out_channels=LATENT,
        channels=configuration.channels,
        attention_levels=(False,) * (levels - 1) + (True,),
        num_res_blocks=1,
        norm_num_groups=min(16, configuration.channels[0]),
        num_head_channels=min(32, configuration.channels[-1]),
    )


def _patient(configuration: Configuration) -> Batch:
    rows, shape = configuration.draws, configuration.shape
    x = torch.randn(rows, LATENT + MASK, *shape)
    if configuration.channels_last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    return {"x": x, "t": torch.randint(0, 1000, (rows,)), "target": torch.randn(rows, LATENT, *shape)}
