"""A device that only pretends to be elsewhere, so that code for a GPU is tried where there is none.

Its tensors say that they are on a GPU, hold their values in the main memory, and refuse what a GPU's
tensors refuse: to be mixed with tensors of the CPU in one operation, and to become numpy arrays.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

DEVICE = torch.device("cuda", 0)
_NAME = "pretended"
_aten = torch.ops.aten
# A GPU, too, takes these from the CPU: values to copy, and indices.
_MIXING = {_aten.copy_.default, _aten._to_copy.default, _aten.index.Tensor, _aten.index_put_.default}
_MIXING |= {_aten.index_put.default, _aten._index_put_impl_.default}


class _Elsewhere(Tensor):
    """A tensor of the pretended device; ``here`` holds its values."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> _Elsewhere:
        made = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]  # torch's way to make one
            cls,
            here.size(),
            strides=here.stride(),
            storage_offset=here.storage_offset(),
            dtype=here.dtype,
            device=f"{_NAME}:0",
        )
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    def __setitem__(self, index: Any, value: Any) -> None:
        # torch would make the number a tensor of its device, by a way of its own.
        super().__setitem__(index, value if isinstance(value, Tensor) else _Elsewhere(torch.tensor(value)))

    def tolist(self) -> Any:
        return self.here.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("a tensor that is elsewhere becomes no numpy array: copy it to the CPU first")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.here.__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"elsewhere({self.here!r})"


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_counted = [0]


def count_elsewhere() -> int:
    """Return how many operations were asked of the pretended device."""
    return _counted[0]


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    given = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
    elsewhere = any(isinstance(t, _Elsewhere) for t in given)
    _counted[0] += elsewhere
    asked = kwargs.get("device")
    if elsewhere and func not in _MIXING:
        strangers = [t for t in given if not isinstance(t, _Elsewhere) and t.dim() > 0]
        if strangers:
            raise RuntimeError(f"{func}: expected all tensors to be on the same device, but found two")
    out = elsewhere if asked is None else torch.device(asked).type in ("cuda", _NAME)
    if asked is not None and out:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    here = tree_map_only(_Elsewhere, lambda t: t.here, (args, kwargs))
    found = func(*here[0], **here[1])
    if not out:
        return found
    wrapped = tree_map_only(Tensor, lambda t: t if isinstance(t, _Elsewhere) else _Elsewhere(t), found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if elsewhere and asked is None else wrapped


class _Module(_DummyBackendModule):
    def get_rng_state(self, _: Any) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, _: Any) -> None:
        torch.set_rng_state(state)


def _made(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return ``torch.tensor`` or ``torch.as_tensor``, which ask no mode, for the pretended device as well."""

    def made(*args: Any, device: Any = None, **kwargs: Any) -> Tensor:
        found = make(*args, **kwargs)
        return found if device is None else found.to(device)

    return made


def _loaded(load: Callable[..., Any]) -> Callable[..., Any]:
    def loaded(*args: Any, map_location: Any = None, **kwargs: Any) -> Any:
        found = load(*args, map_location="cpu", **kwargs)
        elsewhere = map_location is not None and torch.device(map_location).type == DEVICE.type
        return tree_map_only(Tensor, lambda t: t.to(DEVICE), found) if elsewhere else found

    return loaded


@functools.cache
def _setup() -> None:
    _setup_privateuseone_for_python_backend(_NAME, backend_module=_Module())


@contextlib.contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """Give the pretended device for the time of the block."""
    _setup()
    with pytest.MonkeyPatch.context() as patch, _Mode():
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        patch.setattr(torch.cuda, "get_rng_state", lambda *_: torch.get_rng_state())
        patch.setattr(torch.cuda, "set_rng_state", lambda state, *_: torch.set_rng_state(state))
        patch.setattr(torch, "load", _loaded(torch.load))
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, _made(getattr(torch, name)))
        yield DEVICE
