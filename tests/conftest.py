"""Fixtures of all tests: no telemetry, few threads, real cohorts if they are here, no network, tiny studies."""

from __future__ import annotations

import copy
import ipaddress
import os
import signal
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Set before any test imports a heavy library: the libraries read them when they are imported.
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import pytest

from medsynth import config
from medsynth.config import Study

ROOT = Path(__file__).resolve().parent.parent

# CI says the same of the same code; `pytest --hypothesis-profile explore` looks for new counterexamples.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
hypothesis.settings.register_profile("explore", deadline=None)
hypothesis.settings.load_profile("repeatable")

TINY: dict[str, Any] = {
    "name": "tiny",
    "grid": {"spatial_dims": 2, "shape": [16, 16], "spacing_mm": [2, 2], "labels": {0: "background", 1: "organ"}},
    "privacy": {"epsilon": 8, "delta": 1e-4, "declared_patients": 16, "entropy": "test_only"},
    "encode": {"codec": "wavelet", "levels": 1, "channels": [8, 8], "steps": 2, "phantoms": {"count": 4}},
    "masks": {"coefficients": [4, 4]},
    "train": {
        "channels": [8, 8],
        "norm_groups": 4,
        "head_channels": 4,
        "noise_steps": 20,
        "pretrain_steps": 2,
        "pretrain_phantoms": 4,
        "pretrain_batch_size": 2,
        "steps": 3,
        "draws": 2,
        "batch_size": 2,
        "sampling_rate": 0.5,
        "appearance": {"coefficients": [2, 2]},
    },
    "synthesise": {"pairs": 4, "steps": 2, "batch_size": 2},
    "segment": {"channels": [4, 8], "steps": 2, "batch_size": 2},
    "evaluate": {"bootstrap": 50, "montage": 2, "agreement_pairs": 2},
    "export": {"dicom_pairs": 1},
    "compute": {"device": "cpu", "threads": 1, "workers": 1},
}


@pytest.fixture(autouse=True)
def _signals_as_they_were() -> Iterator[None]:
    """Take back what the command line does with signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session", autouse=True)
def _site_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keys and accounts of shared fixtures go into a folder of this session, never into the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEDSYNTH_HOME", str(tmp_path_factory.mktemp("site")))
        yield


@pytest.fixture(autouse=True)
def _site_of_the_test(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test is a site of its own: no key and no account of another test is seen."""
    monkeypatch.setenv("MEDSYNTH_HOME", str(tmp_path_factory.getbasetemp() / f"site-{uuid.uuid4().hex}"))
    for name in ("MEDSYNTH_KEY_PASSPHRASE", "MEDSYNTH_KEY_PASSPHRASE_FILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def real_data() -> Path:
    """The folder of real cohorts, or a skip."""
    folder = Path(os.environ.get("MEDSYNTH_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real cohorts here: set MEDSYNTH_DATA to their folder")
    return folder


@pytest.fixture(scope="session")
def tiny_settings() -> dict[str, Any]:
    """The settings of `tiny_study`, to be changed by a copy."""
    return copy.deepcopy(TINY)


@pytest.fixture
def tiny_study() -> Study:
    """A 2D study of 16 x 16 pixels whose every stage takes a second or less."""
    return config.parse(TINY, "tiny")


@pytest.fixture
def tiny_study_3d() -> Study:
    """The same in 3D, 16 x 16 x 16 voxels."""
    grid = {**TINY["grid"], "spatial_dims": 3, "shape": [16, 16, 16], "spacing_mm": [2, 2, 2]}
    masks = {"coefficients": [4, 4, 4]}
    train = {**TINY["train"], "appearance": {"coefficients": [2, 2, 2]}}
    return config.parse({**TINY, "grid": grid, "masks": masks, "train": train}, "tiny-3d")


def _is_local(address: Any) -> bool:
    if not isinstance(address, tuple):  # AF_UNIX addresses are texts or bytes
        return True
    host = str(address[0])
    if host in ("localhost", ""):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


@pytest.fixture
def blocked_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Refuse every connection and name look-up beyond this machine; yields the list of what was tried."""
    tried: list[str] = []
    real_connect, real_connect_ex, real_lookup = socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo

    def refuse(address: Any) -> None:
        if not _is_local(address):
            tried.append(str(address))
            raise ConnectionRefusedError("the network is blocked in this test")

    def connect(self: socket.socket, address: Any) -> None:
        refuse(address)
        real_connect(self, address)

    def connect_ex(self: socket.socket, address: Any) -> int:
        refuse(address)
        return real_connect_ex(self, address)

    def lookup(host: Any, *args: Any, **kwargs: Any) -> Any:
        refuse((host.decode() if isinstance(host, bytes) else host or "",))
        return real_lookup(host, *args, **kwargs)

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket.socket, "connect_ex", connect_ex)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    yield tried


@pytest.fixture(autouse=True)
def _one_thread(request: pytest.FixtureRequest) -> None:
    """Keep torch to one thread in tests that have loaded it: the same numbers everywhere, no fight for cores."""
    import sys

    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)
