"""A network that reads a noisy mean shape: the posterior mean under public phantoms.

Voxel by voxel little can be told from noise; that an organ has one smooth surface, and its labels a place in it, can be
learnt. Each public cohort is one phantom, deformed, and its mean shape the mean of a few patients who differ from it by
smooth deformations. The network sees such means with the noise that the mechanisms will add, and never a patient, so
that what it makes of a released mean is post-processing and costs no privacy.

Source: Robbins (1956) for the posterior mean, Karras et al. (2022, section 5) for the preconditioning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from jaxtyping import Float
from monai.networks.nets.unet import UNet
from scipy import fft
from torch import Tensor, nn
from torch.nn import functional

from medsynth import logs
from medsynth.models.fitting import Recipe, fit
from medsynth.models.mask_generator import ShapeSpace
from medsynth.models.pose import Array

_CHANNELS = (24, 48, 96)
_COHORTS = 4000
_MEMBERS = 4  # patients of a public cohort
_BLOCK = 16  # cohorts made at a time
_PHANTOM_KNOTS, _PHANTOM_MOVES = 6, (0.0, 1.5)  # canonical voxels between knots; deviation of the displacement
_MEMBER_KNOTS, _MEMBER_MOVES = 5, (0.5, 1.5)
_BATCH = 16
_LEARNING_RATE = 4e-3


class ShapeReader(nn.Module):
    """Posterior mean of a mean shape that was measured with normal noise of one known deviation in each entry.

    Args:
        space: geometry of the shapes.
        mean: (plane, \\*canonical) mean occupancy over public cohorts.
        spread: standard deviation of a voxel around it.
    """

    mean: Tensor

    def __init__(self, space: ShapeSpace, mean: Tensor, spread: float) -> None:
        super().__init__()
        frame = space.frame
        self.coefficients = frame.coefficients
        self.voxels = int(np.prod(frame.shape))
        self.spread = spread
        self.register_buffer("mean", mean)
        for axis, (size, kept) in enumerate(zip(frame.shape, frame.coefficients, strict=True)):
            cosines = fft.dct(np.eye(size), norm="ortho", axis=0)[:kept]
            self.register_buffer(f"cosines_{axis}", torch.tensor(cosines, dtype=torch.float32))
        halvings = len(_CHANNELS) - 1
        # (before, after) of each axis, the last axis first, up to what halves so often
        gaps = [-size % 2**halvings for size in frame.shape]
        self._room = [part for gap in reversed(gaps) for part in (gap // 2, gap - gap // 2)]
        starts = [gap // 2 for gap in gaps]
        inside = [slice(start, start + size) for start, size in zip(starts, frame.shape, strict=True)]
        self._inside = (slice(None), slice(None), *inside)
        self.network = UNet(
            spatial_dims=len(frame.shape),
            in_channels=space.planes + 1,
            out_channels=space.planes,
            channels=_CHANNELS,
            strides=(2,) * halvings,
            num_res_units=2,
            norm=("group", {"num_groups": space.planes}),
            act="leakyrelu",
        )

    def forward(
        self, noisy: Float[Tensor, "batch plane *coefficient"], noise_sd: Float[Tensor, " batch"]
    ) -> Float[Tensor, "batch plane *canonical"]:
        """Return the occupancies that noisy coefficients stand for."""
        given = noise_sd.view(-1, *(1,) * (noisy.ndim - 1))
        skip, output, total = self._scales(given)
        volumes = self.expand(noisy) - self.mean
        level = torch.log(given).expand(-1, 1, *volumes.shape[2:])
        seen = functional.pad(torch.cat([volumes / total, level], dim=1), self._room, mode="replicate")
        found: Tensor = volumes * skip + output * self.network(seen)[self._inside] + self.mean
        return found

    def error_scale(self, noise_sd: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the standard deviation of a voxel that a linear reader leaves, by which errors are measured."""
        return self._scales(noise_sd)[1]

    def expand(
        self, coefficients: Float[Tensor, "batch plane *coefficient"]
    ) -> Float[Tensor, "batch plane *canonical"]:
        """Return the volumes of coefficients (see :meth:`PoseFrame.expand`)."""
        for axis in range(len(self.coefficients)):
            cosines = cast(Tensor, getattr(self, f"cosines_{axis}"))
            coefficients = torch.movedim(torch.tensordot(coefficients, cosines, dims=([2 + axis], [0])), -1, 2 + axis)
        return coefficients

    def compress(self, volumes: Float[Tensor, "batch plane *canonical"]) -> Float[Tensor, "batch plane *coefficient"]:
        """Return the kept coefficients of volumes (see :meth:`PoseFrame.compress`)."""
        for axis in range(len(self.coefficients)):
            cosines = cast(Tensor, getattr(self, f"cosines_{axis}"))
            volumes = torch.movedim(torch.tensordot(volumes, cosines, dims=([2 + axis], [1])), -1, 2 + axis)
        return volumes

    @torch.no_grad()
    def read(self, space: ShapeSpace, shape: Array, noise_sd: float) -> Array:
        """Return the shape vector that a noisy one is read as.

        Args:
            space: geometry of the shapes.
            shape: (plane * coefficient,) noisy shape vector.
            noise_sd: standard deviation of the noise in each entry.
        """
        parts = torch.tensor(space.coefficients_of(shape), dtype=torch.float32)[None]
        found = self(parts, torch.tensor([noise_sd], dtype=torch.float32))[0]
        return space.shape_of(found.double().numpy())

    def _scales(self, noise_sd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the factors of the skip and of the network's output, and the deviation of a noisy voxel."""
        noise = noise_sd * np.sqrt(np.prod(self.coefficients) / self.voxels)  # cosines are orthonormal
        total = (noise**2 + self.spread**2).sqrt()
        return (self.spread / total) ** 2, noise * self.spread / total, total


def fit_reader(
    space: ShapeSpace, shapes: Array, noise_range: tuple[float, float], steps: int, seed: int
) -> ShapeReader:
    """Return a reader that was fitted to cohorts around public phantoms.

    Args:
        space: geometry of the shapes.
        shapes: (phantom, plane * coefficient) shape vectors of public phantoms.
        noise_range: least and largest standard deviation of the noise in an entry that it will meet.
        steps: of Adam.
        seed: of weights, cohorts and noise; public.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        cohorts = _cohorts(space, shapes, random)
        reader = ShapeReader(space, cohorts.mean(0), float(cohorts.std(0).square().mean().sqrt()))
    clean = reader.compress(cohorts)
    low, high = np.log(noise_range)

    def loss_of(stream: torch.Generator) -> Tensor:
        rows = torch.randint(0, len(clean), (_BATCH,), generator=stream)
        truth = _reflected(clean[rows], stream)
        noise_sd = torch.exp(low + (high - low) * torch.rand(_BATCH, generator=stream))
        noise = noise_sd.view(-1, *(1,) * (truth.ndim - 1)) * torch.randn(truth.shape, generator=stream)
        error = reader.compress(reader(truth + noise, noise_sd)) - truth
        return (error.square().flatten(1).sum(1) / reader.error_scale(noise_sd) ** 2).mean() / cohorts[0].numel()

    recipe, what = Recipe(steps, _LEARNING_RATE), "learning to read mean shapes from phantoms"
    last: list[float] = []

    def report(losses: Sequence[float]) -> None:
        last[:] = losses[-1:]

    fit(reader, loss_of, what, recipe, random, report)
    logs.say("mean shapes are read by a network that phantoms taught", loss=round(last[0], 3))
    return reader.eval()


def _cohorts(space: ShapeSpace, shapes: Array, random: torch.Generator) -> Float[Tensor, "cohort plane *canonical"]:
    """Return mean occupancies of cohorts around phantoms."""
    phantoms = torch.tensor(np.stack([space.volumes(shape) for shape in shapes]), dtype=torch.float32)
    means = []
    for _ in range(0, _COHORTS, _BLOCK):
        rows = torch.randint(0, len(phantoms), (_BLOCK,), generator=random)
        moved = _deformed(phantoms[rows], _PHANTOM_KNOTS, _uniform(_PHANTOM_MOVES, random), random)
        moves = _uniform(_MEMBER_MOVES, random).repeat_interleave(_MEMBERS)
        members = _deformed(moved.repeat_interleave(_MEMBERS, 0), _MEMBER_KNOTS, moves, random)
        means.append(members.unflatten(0, (_BLOCK, _MEMBERS)).mean(1))
    return torch.cat(means)


def _uniform(bounds: tuple[float, float], random: torch.Generator) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(_BLOCK, generator=random)


def _deformed(volumes: Tensor, between: int, moves: Tensor, random: torch.Generator) -> Tensor:
    """Return volumes (batch, plane, \\*canonical) displaced smoothly by ``moves`` (batch,) voxels (deviation)."""
    shape, axes = volumes.shape[2:], volumes.ndim - 2
    knots = [max(3, size // between) for size in shape]
    coarse = torch.randn((len(volumes), axes, *knots), generator=random)
    field = functional.interpolate(coarse, size=shape, mode=("bilinear", "trilinear")[axes - 2], align_corners=True)
    field = field * (moves / field.flatten(1).std(1)).view(-1, *(1,) * (axes + 1))
    # (batch, *canonical, axis) in half volumes, the last axis first, as grid_sample wants it
    moved = torch.stack([field[:, axis] * 2 / shape[axis] for axis in reversed(range(axes))], dim=-1)
    still = functional.affine_grid(torch.eye(axes, axes + 1).expand(len(volumes), -1, -1), list(volumes.shape), False)
    return functional.grid_sample(volumes, still + moved, padding_mode="border", align_corners=False)


def _reflected(coefficients: Tensor, random: torch.Generator) -> Tensor:
    """Return coefficients (batch, plane, \\*coefficient) of volumes that are reflected along axes at random."""
    for axis in range(2, coefficients.ndim):
        odd = torch.arange(coefficients.shape[axis]) % 2
        flip = torch.randint(0, 2, (len(coefficients), 1), generator=random)
        sign = (1 - 2 * flip * odd).to(coefficients)
        shape = [1] * coefficients.ndim
        shape[0], shape[axis] = sign.shape
        coefficients = coefficients * sign.view(shape)
    return coefficients
