"""The shared library of kernels: found, loaded and called through ctypes (plain C interface, no torch ABI)."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from bidensify.errors import ConfigError
from bidensify.runtime import outputs
from bidensify.runtime.deferred import Part
from bidensify.runtime.prepare import Arguments, PartArguments, prepare
from bidensify.runtime.spec import LayerSpec

__all__ = ["KERNEL_VARIABLE", "LIBRARY_VARIABLE", "available_kernels", "load", "run", "takes_parts", "tier"]

KERNEL_VARIABLE = "BIDENSIFY_KERNEL"
LIBRARY_VARIABLE = "BIDENSIFY_LIBRARY"
_ABI = 1
_TIERS = {"portable": 0, "avx2": 1, "avx512": 2, "neon": 3}
_PREFERENCE = ("avx512", "avx2", "neon", "portable")
_STATUS = {1: "the arguments do not fit together", 2: "out of memory", 3: "this processor lacks the kernel"}
_HOW = (
    "reinstall bidensify where a C++17 compiler (g++ or clang++) is on the PATH: pip install --force-reinstall --no-deps "
    "--no-binary bidensify bidensify, or pip install . in a checkout"
)


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """The library, or None where it was not built (one warning says how to get it)."""
    named = os.environ.get(LIBRARY_VARIABLE)
    path = Path(named) if named else _find()
    if path is None:
        warnings.warn(
            f"bidensify runs packed layers on its slow reference path: its kernels were not built. To get them, {_HOW}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        warnings.warn(
            f"bidensify runs packed layers on its slow reference path: {path.name} cannot be loaded ({error}); {_HOW}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    library.bd_abi_version.restype = ctypes.c_int32
    library.bd_tiers.restype = ctypes.c_uint32
    library.bd_packed_conv2d.restype = ctypes.c_int32
    library.bd_packed_conv2d.argtypes = [ctypes.POINTER(Arguments)]
    if takes_parts(library):
        library.bd_packed_conv2d_parts.restype = ctypes.c_int32
        library.bd_packed_conv2d_parts.argtypes = [
            ctypes.POINTER(Arguments),
            ctypes.POINTER(PartArguments),
            ctypes.c_int32,
        ]
    if library.bd_abi_version() != _ABI:
        warnings.warn(
            f"bidensify runs packed layers on its slow reference path: {path.name} is of interface "
            f"{library.bd_abi_version()}, this package needs {_ABI}; {_HOW}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    outputs.use(library)
    _share_threads(library)
    return library


def takes_parts(library: ctypes.CDLL | None) -> bool:
    """Whether the library reads inputs that lie in parts (one that was built earlier may not)."""
    return library is not None and hasattr(library, "bd_packed_conv2d_parts")


def _share_threads(library: ctypes.CDLL) -> None:
    """Hands torch's own OpenMP threads to the kernels (Linux): one team serves both, and none waits for a busy core.

    Elsewhere the library starts a pool of its own of the same size, whose threads sleep between layers.
    """
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return
    paths = dict.fromkeys(line.split(maxsplit=5)[-1] for line in maps.splitlines() if "omp" in line)
    torch_first = sorted(paths, key=lambda path: "/torch/" not in path)
    for path in torch_first:
        if not Path(path).name.startswith(("libgomp", "libiomp5", "libomp")):
            continue
        try:
            entry = ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
        library.bd_set_parallel.argtypes = [ctypes.c_void_p]
        library.bd_set_parallel.restype = None
        library.bd_set_parallel(entry)
        return


def _find() -> Path | None:
    """The library beside this file, or beside any other place that the package is made of (an editable install)."""
    import bidensify

    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    name = f"libbidensify_kernels{suffix}"
    folders = [Path(__file__).parent, *(Path(place) / "runtime" for place in bidensify.__path__)]
    # An editable install leaves what it compiled in site-packages, and the Python files where they are.
    folders += [Path(place) / "bidensify" / "runtime" for place in sys.path if place]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


@lru_cache(maxsize=1)
def available_kernels() -> tuple[str, ...]:
    """The kernels that this machine runs, fastest first, "reference" last."""
    library = load()
    found = 0 if library is None else int(library.bd_tiers())
    return (*(name for name in _PREFERENCE if found >> _TIERS[name] & 1), "reference")


def tier(kernel: str) -> int | None:
    """The number of the kernel tier that runs for ``kernel``, or None for the reference.

    Raises:
        ConfigError: this machine does not run the kernel that was asked for, or BIDENSIFY_KERNEL names none.
    """
    return _tier(kernel, os.environ.get(KERNEL_VARIABLE, "") if kernel == "auto" else "")


@lru_cache(maxsize=64)
def _tier(kernel: str, variable: str) -> int | None:
    wanted = variable or kernel
    if wanted == "reference":
        return None
    available = available_kernels()
    if wanted == "auto":
        return _TIERS.get(available[0])
    if wanted not in available:
        source = f"{KERNEL_VARIABLE}={variable!r}" if variable else f"kernel={kernel!r}"
        raise ConfigError(f"{source} does not run on this machine; it has {list(available)}")
    return _TIERS[wanted]


def run(
    tier: int,
    x: Tensor,
    tiles: Tensor,
    side: Tensor,
    spec: LayerSpec,
    thresholds: Tensor | None,
    levels: Tensor | None,
    residual: Tensor | None,
    *,
    parts: Sequence[Part] | None = None,
    dots: bool = False,
) -> Tensor:
    """Runs the native operator: see ``packed_reference`` for the arguments.

    Args:
        tier: from ``tier``.
        parts: what ``x`` consists of, which is then not read.
        dots: returns the integer dot products (N, C_out, H', W') int32 instead of y.
    """
    library = load()
    assert library is not None, "a tier exists only where the library is loaded"
    call = prepare(spec, x.shape, x.dtype, tier, dots)
    if not (side.is_contiguous() and tiles.is_contiguous()):
        side, tiles = side.contiguous(), tiles.contiguous()
    # The kernels read raw memory: nothing reaches them whose size was not looked at.
    call.check(x, tiles, side, thresholds, levels, residual)
    if parts is not None:
        call.check_parts(parts, x)
    else:
        x = outputs.channels_last(x)
    out = outputs.empty(call.out_shape, call.out_dtype)
    # What the pointers below point to must live until the call returns.
    keep = []
    arguments = call.arguments()
    arguments.threads = torch.get_num_threads()
    if parts is None:
        arguments.x = x.data_ptr()
    arguments.tiles = tiles.data_ptr()
    if dots:
        arguments.dots = out.data_ptr()
    else:
        arguments.y = out.data_ptr()
    base = side.data_ptr()
    for name, offset in call.side:
        setattr(arguments, name, base + offset)
    if residual is not None:
        keep.append(outputs.channels_last(residual.to(x.dtype)))
        arguments.residual = keep[-1].data_ptr()
    if thresholds is not None:
        keep.append(thresholds.contiguous())
        arguments.thresholds = keep[-1].data_ptr()
    if levels is not None:
        keep.append(levels.contiguous())
        arguments.levels, arguments.per_sample_levels = keep[-1].data_ptr(), 1
    if x.shape[0]:
        if parts is None:
            status = library.bd_packed_conv2d(ctypes.byref(arguments))
        else:
            records = [PartArguments(part.x.data_ptr(), part.x.shape[1], part.up, part.up) for part in parts]
            table = (PartArguments * len(records))(*records)
            status = library.bd_packed_conv2d_parts(ctypes.byref(arguments), table, len(records))
        if status:
            raise RuntimeError(
                f"the packed kernel failed: {_STATUS.get(status, status)} ({spec}, input {tuple(x.shape)})"
            )
    return out
