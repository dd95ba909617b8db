"""What runs packed layers: backends by name, a registry.

A backend is one way to compute ``bidensify.exact`` from bits: the reference in plain PyTorch on any device, and a kernel of the
native library for each instruction set. Another one (a GPU's, say) is registered with ``register_backend``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from torch import Tensor

from bidensify._util.names import near
from bidensify.deploy.run import run
from bidensify.errors import ConfigError
from bidensify.kernels.library import library

__all__ = [
    "KERNEL_VARIABLE",
    "Backend",
    "available_kernels",
    "check_kernel",
    "choose_backend",
    "kernel_names",
    "register_backend",
]

KERNEL_VARIABLE = "BIDENSIFY_KERNEL"


@dataclass(frozen=True)
class Backend:
    """One way to run packed layers.

    Attributes:
        name: what ``kernel=`` calls it.
        device: type of the device whose tensors it takes, "cpu" or another; "" for any.
        available: whether it runs on this machine.
        run: (x, tiles, side, spec, thresholds, levels, residual, parts) -> y, see ``packed_reference``; None: the reference.
        dtypes: of inputs that it takes.
        tier: of the native library, None where it is not of it.
    """

    name: str
    device: str
    available: Callable[[], bool]
    run: Callable[..., Tensor] | None
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    tier: int | None = None


# In order of preference: the first that is available is what "auto" means on its device.
_BACKENDS: dict[str, Backend] = {"reference": Backend("reference", "", lambda: True, None)}


def register_backend(made: Backend) -> Backend:
    """Makes a backend known, before those of its device that are known already; one of the same name gives way.

    Raises:
        ConfigError: a name that means something else.
    """
    if made.name in ("auto", "reference") or not made.name.isidentifier():
        raise ConfigError(f"register_backend: {made.name!r} cannot be a backend's name; use another identifier")
    known = {name: each for name, each in _BACKENDS.items() if name != made.name}
    _BACKENDS.clear()
    _BACKENDS.update({made.name: made, **known})
    _choose.cache_clear()
    return made


def kernel_names() -> tuple[str, ...]:
    """What ``kernel=`` may be, available here or not."""
    return ("auto", *_BACKENDS)


def check_kernel(kernel: str) -> str:
    """Returns ``kernel``.

    Raises:
        ConfigError: there is no kernel of this name.
    """
    if kernel not in kernel_names():
        raise ConfigError(f"kernel={kernel!r} is no kernel{near(kernel, kernel_names())}")
    return kernel


def available_kernels(device: str = "cpu") -> tuple[str, ...]:
    """The kernels that this machine runs on a type of device, fastest first, "reference" last."""
    return tuple(name for name, each in _BACKENDS.items() if each.device in ("", device) and each.available())


def choose_backend(kernel: str, device: str = "cpu") -> Backend:
    """The backend that runs for ``kernel``: with "auto", what BIDENSIFY_KERNEL names, else the fastest.

    Raises:
        ConfigError: this machine does not run the kernel that was asked for, or BIDENSIFY_KERNEL names none.
    """
    return _choose(kernel, os.environ.get(KERNEL_VARIABLE, "") if kernel == "auto" else "", device)


@lru_cache(maxsize=64)
def _choose(kernel: str, variable: str, device: str) -> Backend:
    wanted = variable or kernel
    available = available_kernels(device)
    if wanted == "auto":
        return _BACKENDS[available[0]]
    if wanted not in available:
        source = f"{KERNEL_VARIABLE}={variable!r}" if variable else f"kernel={kernel!r}"
        raise ConfigError(f"{source} does not run on this machine; it has {list(available)}")
    return _BACKENDS[wanted]


def _built(tier: int) -> Callable[[], bool]:
    return lambda: (found := library()) is not None and bool(int(found.bd_tiers()) >> tier & 1)


# Numbers of ``bd_tier``; the last one that is registered is preferred.
for _name, _tier in (("portable", 0), ("neon", 3), ("avx2", 1), ("avx512", 2)):
    register_backend(Backend(_name, "cpu", _built(_tier), partial(run, _tier), tier=_tier))
