"""The whole generator: from label maps to images, the same after a trip to the disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medsynth.config import Study, Synthesise
from medsynth.diffusion.fitting import fit
from medsynth.diffusion.generator import APPEARANCE, Dresser, Generator, build_generator, load_generator, save_generator
from medsynth.errors import MedsynthError, StoreError
from medsynth.imaging.phantom import phantom_pairs
from medsynth.models import fitting
from medsynth.models.adapters import add_adapters
from medsynth.models.autoencoder import build_codec, save_codec
from medsynth.models.drafting import open_drafting

HOW = Synthesise(scheduler="ddim", steps=3, batch_size=2)


def generator(study: Study) -> Generator:
    torch.manual_seed(0)
    codec = build_codec(study.grid, study.encode)
    codec.calibrate(torch.from_numpy(phantom_pairs(study.grid, 4, 0)[0]))
    return build_generator(study.grid, study.train, codec)


def shaken(built: Generator) -> Generator:
    with torch.no_grad():
        for parameter in built.denoiser.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    built.denoiser.eval()
    return built


def labels(study: Study) -> torch.Tensor:
    return torch.from_numpy(phantom_pairs(study.grid, 2, 5)[1])


@pytest.mark.parametrize("rank", [2, 3])
def test_images_have_the_grid_and_the_range(rank: int, tiny_study: Study, tiny_study_3d: Study) -> None:
    study = tiny_study if rank == 2 else tiny_study_3d
    images = generator(study).render(labels(study), [1, 2], HOW)
    assert images.shape == (2, 1, *study.grid.shape)
    assert images.abs().max() <= 1


every_way = pytest.mark.parametrize("way", ["concat", "spade", "cross_attention"])


@every_way
@pytest.mark.parametrize("trainable", ["all", "lora"])
@pytest.mark.parametrize("rank", [2, 3])
def test_a_generator_survives_the_disk(
    rank: int, trainable: str, way: str, tiny_study: Study, tiny_study_3d: Study, tmp_path: Path
) -> None:
    tiny = tiny_study if rank == 2 else tiny_study_3d
    train = tiny.train.model_copy(update={"trainable": trainable, "conditioning": way})
    study = tiny.model_copy(update={"train": train})
    built = generator(study)
    if trainable == "lora":
        add_adapters(built.denoiser, train.lora_rank)
    shaken(built)
    save_codec(built.codec, study.grid, study.encode, tmp_path)
    save_generator(built, study.grid, tmp_path)
    again = load_generator(tmp_path, tmp_path)
    # What is loaded is frozen; on some processors torch takes another kernel, and rounds otherwise, where it is not.
    built.denoiser.requires_grad_(False)
    built.codec.requires_grad_(False)
    assert torch.equal(again.render(labels(study), [1, 2], HOW), built.render(labels(study), [1, 2], HOW))
    assert not any(p.requires_grad for p in again.denoiser.parameters()) and not again.denoiser.training


@every_way
def test_the_mask_reaches_the_image(tiny_study: Study, way: str) -> None:
    train = tiny_study.train.model_copy(update={"conditioning": way})
    built = shaken(generator(tiny_study.model_copy(update={"train": train})))
    here = labels(tiny_study)
    assert (built.render(here, [1, 2], HOW) - built.render(here * 0, [1, 2], HOW)).abs().max() > 1e-3


def test_a_folder_without_a_generator_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="medsynth train"):
        load_generator(tmp_path, tmp_path)


def test_fitting_learns_the_images_that_belong_to_the_masks(tiny_study: Study) -> None:
    built = generator(tiny_study)
    images, maps = phantom_pairs(tiny_study.grid, 4, 0)
    latents, masks = built.codec.encode(torch.from_numpy(images)), built.masks(torch.from_numpy(maps))
    losses: list[float] = []

    def draw(stream: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        rows = torch.randint(0, 4, (8,), generator=stream)
        return latents[rows], masks[rows]

    def report(seen: Sequence[float]) -> None:
        losses[:] = seen

    before = {name: value.clone() for name, value in built.denoiser.state_dict().items()}
    fit(built.denoiser, draw, "fitting", 80, 5e-3, tiny_study.train, torch.Generator().manual_seed(0), report)
    assert len(losses) == 80 and sum(losses[-20:]) < 0.9 * sum(losses[:20])
    assert any(not torch.equal(value, before[name]) for name, value in built.denoiser.state_dict().items())


def test_a_killed_fit_goes_on_and_ends_with_the_weights_that_it_would_have_had(
    tiny_study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, maps = phantom_pairs(tiny_study.grid, 4, 0)
    kept, seen = tmp_path / "training.pt", {}
    monkeypatch.setattr(fitting, "_KEEP_EVERY_S", 0.0)

    def weights(stop_before: int, keep: Path | None) -> list[torch.Tensor]:
        built, steps = generator(tiny_study), seen.setdefault(stop_before, [])
        latents, masks = built.codec.encode(torch.from_numpy(images)), built.masks(torch.from_numpy(maps))

        def draw(stream: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
            rows = torch.randint(0, 4, (4,), generator=stream)
            return latents[rows], masks[rows]

        def report(losses: Sequence[float]) -> None:
            steps.append(len(losses) - 1)
            if steps[-1] == stop_before:
                raise KeyboardInterrupt

        stream = torch.Generator().manual_seed(0)
        fit(built.denoiser, draw, "fitting", 12, 5e-3, tiny_study.train, stream, report, keep)
        return list(built.denoiser.state_dict().values())

    whole = weights(-1, None)
    with pytest.raises(KeyboardInterrupt):
        weights(7, kept)
    resumed = weights(-2, kept)
    assert seen[-2] == [7, 8, 9, 10, 11]
    assert all(torch.equal(one, other) for one, other in zip(whole, resumed, strict=True))
    other_version = {name: part for name, part in torch.load(kept, weights_only=True).items() if name != "streams"}
    for stop in (-3, -4):
        if stop == -3:
            kept.write_bytes(kept.read_bytes()[:1000])
        else:
            torch.save(other_version, kept)
        again = weights(stop, kept)
        assert seen[stop] == list(range(12)), "what cannot be read is begun again"
        assert all(torch.equal(one, other) for one, other in zip(whole, again, strict=True))


def dressed(study: Study, built: Generator) -> tuple[Generator, Dresser]:
    space = open_drafting(study.grid, study.train.appearance, list(labels(study).numpy()))
    mean = np.random.default_rng(0).normal(0, 0.1, space.size)
    dresser = Dresser(space, space.statistics(mean, 0.01))
    return replace(built, dresser=dresser), dresser


def test_the_pairs_may_be_the_drafts_or_begin_from_them(tiny_study: Study) -> None:
    built, dresser = dressed(tiny_study, shaken(generator(tiny_study)))
    here = labels(tiny_study)
    draft = torch.from_numpy(
        np.stack([dresser.draft(x, np.random.default_rng(seed)) for seed, x in enumerate(here.numpy())])
    )
    images = {start: built.render(here, [0, 1], HOW.model_copy(update={"start": start})) for start in (0.0, 0.4, 1.0)}
    assert torch.equal(images[0.0], draft)
    errors = [float((image - draft).square().mean()) for image in images.values()]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("factors", [0, 3])
def test_drafts_survive_the_disk(tiny_study: Study, tmp_path: Path, factors: int) -> None:
    appearance = tiny_study.train.appearance.model_copy(update={"factors": factors})
    tiny_study = tiny_study.model_copy(update={"train": tiny_study.train.model_copy(update={"appearance": appearance})})
    built, dresser = dressed(tiny_study, generator(tiny_study))
    save_codec(built.codec, tiny_study.grid, tiny_study.encode, tmp_path)
    save_generator(built, tiny_study.grid, tmp_path)
    how = HOW.model_copy(update={"start": 0.0})
    with pytest.raises(StoreError, match="start must be 1"):
        load_generator(tmp_path, tmp_path).render(labels(tiny_study), [1, 2], how)
    np.savez(tmp_path / APPEARANCE, **vars(dresser.statistics))
    again = load_generator(tmp_path, tmp_path)
    assert torch.equal(again.render(labels(tiny_study), [1, 2], how), built.render(labels(tiny_study), [1, 2], how))
    fewer = vars(dresser.statistics) | {"density": dresser.statistics.density[..., :-1]}
    for others in ({"weights": np.zeros(3)}, fewer):
        np.savez(tmp_path / APPEARANCE, **others)
        with pytest.raises(StoreError, match="another version"):
            load_generator(tmp_path, tmp_path)


@pytest.mark.parametrize(("precision", "wanted"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)])
def test_the_network_multiplies_in_the_precision_of_the_study_in_training_and_in_sampling(
    precision: str, wanted: torch.dtype, tiny_study: Study
) -> None:
    settings = tiny_study.train.model_copy(update={"precision": precision})
    images, maps = phantom_pairs(tiny_study.grid, 2, 0)
    built = replace(generator(tiny_study), settings=settings)
    latents, masks = built.codec.encode(torch.from_numpy(images)), built.masks(torch.from_numpy(maps))
    seen: set[torch.dtype] = set()
    for module in built.denoiser.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda _, __, output: seen.add(output.dtype))
    stream = torch.Generator().manual_seed(0)
    fit(built.denoiser, lambda _: (latents, masks), "fitting", 2, 1e-3, settings, stream, lambda _: None)
    assert seen == {wanted}, "training"
    assert all(value.dtype != torch.bfloat16 for value in built.denoiser.state_dict().values())
    seen.clear()
    rendered = built.render(torch.from_numpy(maps), [1, 2], HOW)
    assert seen == {wanted} and rendered.dtype == torch.float32 and rendered.isfinite().all()


def test_a_batch_whose_gradient_is_not_finite_teaches_nothing(tiny_study: Study) -> None:
    images, maps = phantom_pairs(tiny_study.grid, 2, 0)

    def weights(broken: int | None, steps: int) -> list[torch.Tensor]:
        built, drawn = generator(tiny_study), []
        latents, masks = built.codec.encode(torch.from_numpy(images)), built.masks(torch.from_numpy(maps))

        def draw(_: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
            drawn.append(1)
            return latents * (torch.nan if len(drawn) - 1 == broken else 1.0), masks

        stream = torch.Generator().manual_seed(0)
        fit(built.denoiser, draw, "fitting", steps, 1e-3, tiny_study.train, stream, lambda _: None)
        return [value.clone() for value in built.denoiser.state_dict().values()]

    untaught, whole, holed = weights(None, 0), weights(None, 4), weights(1, 4)
    assert all(value.isfinite().all() for value in holed)
    assert any(not torch.equal(one, other) for one, other in zip(untaught, holed, strict=True))
    assert any(not torch.equal(one, other) for one, other in zip(whole, holed, strict=True))


def test_a_training_without_finite_gradients_ends_with_a_word(tiny_study: Study) -> None:
    built = generator(tiny_study)
    images, maps = phantom_pairs(tiny_study.grid, 2, 0)
    latents, masks = built.codec.encode(torch.from_numpy(images)), built.masks(torch.from_numpy(maps))
    drawn: list[int] = []

    def draw(_: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        drawn.append(1)
        broken = len(drawn) > 10 and len(drawn) != 25  # 14 in a row, a sound one, and no end
        return latents * (torch.nan if broken else 1.0), masks

    stream = torch.Generator().manual_seed(0)
    with pytest.raises(MedsynthError, match=r"fitting: 20 steps in a row.*train\.precision to float32"):
        fit(built.denoiser, draw, "fitting", 200, 1e-3, tiny_study.train, stream, lambda _: None)
    assert len(drawn) == 45
