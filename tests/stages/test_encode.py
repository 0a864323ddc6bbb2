"""Stage encode: from public phantoms alone, whatever the cohort is."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from medsynth import config, store
from medsynth.config import Study
from medsynth.models.autoencoder import WEIGHTS, load_codec
from medsynth.stages import encode
from medsynth.tracking import Tracker


def kl(study: Study) -> Study:
    return study.model_copy(update={"encode": study.encode.model_copy(update={"codec": "kl", "latent_channels": 2})})


@pytest.mark.parametrize("codec", ["wavelet", "kl"])
@pytest.mark.parametrize("rank", [2, 3])
def test_it_writes_a_public_codec(
    rank: int, codec: str, tiny_study: Study, tiny_study_3d: Study, tmp_path: Path
) -> None:
    study = tiny_study if rank == 2 else tiny_study_3d
    study = kl(study) if codec == "kl" else study
    manifest = encode.run(study, {}, tmp_path / "autoencoder", Tracker())
    assert manifest.sensitivity == "public" and not manifest.parents and not manifest.ledger_entries
    quality = json.loads((tmp_path / "autoencoder" / "reconstruction.json").read_text())["phantoms"]
    assert quality["psnr_db"] > (100 if codec == "wavelet" else 0)
    images = torch.zeros(1, 1, *study.grid.shape)
    loaded = load_codec(tmp_path / "autoencoder")
    assert loaded.decode(loaded.encode(images)).shape == images.shape


@pytest.mark.parametrize("codec", ["wavelet", "kl"])
def test_pitfall_10_the_codec_never_reads_the_cohort(
    codec: str, tiny_study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: object, **__: object) -> None:
        raise AssertionError("patients were read")

    monkeypatch.setattr("medsynth.imaging.cohort.load_patients", read)
    monkeypatch.setattr("medsynth.imaging.cohort.read_cases", read)
    study = kl(tiny_study) if codec == "kl" else tiny_study
    missing = {"cohort": tmp_path / "no-such-cohort", "ledger": tmp_path / "no-such-ledger"}
    encode.run(study, missing, tmp_path / "autoencoder", Tracker())


def opened_files() -> Iterator[list[str]]:
    """Yield the names of the files that this process opens while the block runs, whatever library does it."""
    names: list[str] = []
    active = [True]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if active and event == "open" and isinstance(arguments[0], str):
            names.append(arguments[0])

    sys.addaudithook(hook)  # there is no way to take it off again
    yield names
    active.clear()


@pytest.mark.parametrize("codec", ["wavelet", "kl"])
def test_pitfall_21_no_file_from_elsewhere_is_read_by_pre_training(
    codec: str, tiny_study: Study, tmp_path: Path, root: Path
) -> None:
    study = kl(tiny_study) if codec == "kl" else tiny_study
    (tmp_path / "images-from-elsewhere.npy").write_bytes(b"")
    with contextlib.contextmanager(opened_files)() as names:
        encode.run(study, {}, tmp_path / "autoencoder", Tracker())
    folders = (tmp_path / name for name in (".autoencoder.partial", ".autoencoder.finished", "autoencoder"))
    own = tuple(map(str, (*folders, root, "/proc", "/dev", "/sys")))
    installed = tuple({sys.prefix, sys.base_prefix, *sys.path} - {""})
    assert names and [name for name in names if not os.path.abspath(name).startswith((*own, *installed))] == []


def test_pitfall_11_latent_constants_do_not_move_with_the_cohort(
    tiny_study: Study, tmp_path: Path, make_cohort: Callable[..., Path]
) -> None:
    found = []
    for name, numbers in (("one", range(3)), ("two", range(3, 9))):
        cohort = make_cohort(tiny_study, tmp_path / name / "cohort", numbers)
        encode.run(tiny_study, {"cohort": cohort}, tmp_path / name / "autoencoder", Tracker())
        found.append(load_file(tmp_path / name / "autoencoder" / WEIGHTS))
    assert {"mean", "scale", "spread"} <= set(found[0])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_it_is_repeatable(tiny_study: Study, tmp_path: Path) -> None:
    study = kl(tiny_study)
    one, two = (encode.run(study, {}, tmp_path / name, Tracker()) for name in ("one", "two"))
    assert one.files == two.files


def test_training_makes_the_autoencoder_better(tiny_settings: dict, tmp_path: Path) -> None:
    wanted = {"codec": "kl", "levels": 1, "channels": [8, 8], "latent_channels": 4, "phantoms": {"count": 16}}
    quality = []
    for steps in (2, 120):
        study = config.parse({**tiny_settings, "encode": {**wanted, "steps": steps, "learning_rate": 5e-3}})
        manifest = encode.run(study, {}, tmp_path / str(steps), Tracker())
        quality.append(manifest.details["reconstruction"]["psnr_db"])
    assert quality[1] > quality[0] + 3


def test_a_failure_leaves_no_folder(tiny_study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medsynth.models.autoencoder.save_codec", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encode.run(tiny_study, {}, tmp_path / "autoencoder", Tracker())
    assert list(tmp_path.iterdir()) == [] and not store.is_done(tmp_path / "autoencoder")


def test_a_killed_training_of_the_autoencoder_goes_on_to_the_same_weights(
    tiny_study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the second of its steps; another configuration does not go on from there."""
    study, loss, taken = kl(tiny_study), encode._loss, []
    study = study.model_copy(update={"encode": study.encode.model_copy(update={"steps": 5})})
    monkeypatch.setattr("medsynth.models.fitting._KEEP_EVERY_S", 0.0)

    def killed_after(steps: int) -> Callable[..., torch.Tensor]:
        def counted(*arguments: Any) -> torch.Tensor:
            if len(taken) == steps:
                raise KeyboardInterrupt
            taken.append(1)
            return loss(*arguments)

        return counted

    def weights(name: str, study: Study) -> dict[str, torch.Tensor]:
        encode.run(study, {}, tmp_path / name, Tracker())
        assert not list((tmp_path / name).glob("*.pt")) and not list((tmp_path / name).glob(".*"))
        return load_file(tmp_path / name / WEIGHTS)

    whole, steps = weights("whole", study), study.encode.steps
    for name in ("killed", "changed"):
        taken.clear()
        monkeypatch.setattr(encode, "_loss", killed_after(2))
        with pytest.raises(KeyboardInterrupt):
            encode.run(study, {}, tmp_path / name, Tracker())
        monkeypatch.setattr(encode, "_loss", killed_after(-1))
        taken.clear()
        other = study.encode.model_copy(update={"kl_weight": 2 * study.encode.kl_weight})
        found = weights(name, study if name == "killed" else study.model_copy(update={"encode": other}))
        assert len(taken) == (steps - 2 if name == "killed" else steps)
        assert all(torch.equal(whole[key], found[key]) for key in whole) == (name == "killed")
    one, other_run = (json.loads((tmp_path / name / "reconstruction.json").read_text()) for name in ("whole", "killed"))
    assert one == other_run
