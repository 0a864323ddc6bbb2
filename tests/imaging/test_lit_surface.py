"""Public scenes: domes are spheres over discs, lit from the camera; any label map gives one."""

from __future__ import annotations

import numpy as np
import pytest

from medsynth.imaging.lit_surface import _bulge, _Scene, lit_surface, pigment


def disc(size: int = 64, radius: float = 20.0) -> np.ndarray:
    rows, columns = np.indices((size, size)) - (size - 1) / 2
    return (np.hypot(rows, columns) < radius).astype(np.uint8)


def test_a_disc_bulges_as_a_sphere() -> None:
    mask = disc() > 0
    rows, columns = np.indices(mask.shape) - (mask.shape[0] - 1) / 2
    sphere = np.sqrt(np.maximum(20.0**2 - rows**2 - columns**2, 0))
    height = 2 * np.sqrt(_bulge(mask, 16))
    assert np.abs(height - sphere)[rows**2 + columns**2 < 15**2].max() < 1
    assert not height[~mask].any()


def test_a_foreground_at_the_edge_of_the_image_goes_on_beyond_it() -> None:
    mask = np.zeros((32, 32), bool)
    mask[:, :16] = True
    height = _bulge(mask, 16)
    assert height[16, 0] > height[16, 8] > height[16, 15] > 0


def test_foregrounds_are_bright_in_their_middle_and_dark_at_their_rim() -> None:
    label = disc()
    inner, rim = disc(radius=10) > 0, (label > 0) & (disc(radius=17) == 0)
    contrast = [
        scene[inner].mean() - scene[rim].mean()
        for scene in (lit_surface(label, np.random.default_rng(seed)) for seed in range(30))
    ]
    assert np.mean(contrast) > 0.3
    assert np.std(contrast) > 0.1, "scenes differ"


def test_half_of_the_domes_are_nearly_flat() -> None:
    """A network must not find a foreground by its bulge alone: patients have flat ones, too."""
    mask = disc() > 0
    bulge = _bulge(mask, 16)
    heights = [_Scene(mask, 1.0, np.random.default_rng(seed)).dome(bulge).max() for seed in range(200)]
    assert 0.3 < np.mean(np.array(heights) < 0.25 * 20) < 0.7, "20 is the radius"
    assert max(heights) > 0.7 * 20


@pytest.mark.parametrize("shape", [(8, 8), (24, 40), (128, 128)])
def test_pigment_follows_its_seed_and_has_unit_variance(shape: tuple[int, int]) -> None:
    first, again, other = (pigment(shape, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert first.shape == shape and abs(first.mean()) < 1e-9 and abs(first.std() - 1) < 1e-9


def test_pigment_has_outlines_where_noise_of_its_fineness_has_none() -> None:
    """Steps are rare and large: changes between neighbours have heavier tails than a normal field's."""
    steps = [np.diff(pigment((128, 128), np.random.default_rng(seed)), axis=0).ravel() for seed in range(20)]
    tails = [np.mean(step**4) / np.mean(step**2) ** 2 for step in steps]
    assert np.median(tails) > 6, "3 for normal numbers"


def test_scenes_without_a_foreground_have_no_such_place() -> None:
    inner, rim = disc(radius=10) > 0, (disc() > 0) & (disc(radius=17) == 0)
    empty = np.zeros((64, 64), np.uint8)
    scenes = [lit_surface(empty, np.random.default_rng(seed)) for seed in range(30)]
    assert abs(np.mean([scene[inner].mean() - scene[rim].mean() for scene in scenes])) < 0.3


@pytest.mark.parametrize("shape", [(24, 24), (16, 96), (128, 128)])
@pytest.mark.parametrize("kind", ["none", "all", "one pixel", "two parts", "at the edge"])
def test_any_label_map_gives_a_scene(shape: tuple[int, int], kind: str) -> None:
    label = np.zeros(shape, np.uint8)
    if kind == "all":
        label[:] = 1
    elif kind == "one pixel":
        label[3, 5] = 1
    elif kind == "two parts":
        label[2:9, 2:9], label[12:20, 12:22] = 1, 2
    elif kind == "at the edge":
        label[:9, :12] = 1
    for seed in range(6):
        scene = lit_surface(label, np.random.default_rng(seed))
        assert scene.shape == shape and np.isfinite(scene).all()
        assert scene.std() == pytest.approx(1) and scene.mean() == pytest.approx(0, abs=1e-9)


def test_domes_at_the_edge_are_as_high_on_larger_images() -> None:
    shares = []
    for size in (64, 256):
        mask = np.zeros((size, size), bool)
        mask[:, : size // 2] = True
        height = np.sqrt(_bulge(mask, round(16 * size / 128)))
        shares.append(height[size // 2, [0, size // 4]] / size)
    assert shares[0] == pytest.approx(shares[1], rel=0.05)


def test_a_scene_follows_its_seed() -> None:
    first, again, other = (lit_surface(disc(), np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.allclose(first, other)
