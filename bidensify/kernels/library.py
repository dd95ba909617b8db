"""The shared library of kernels: found, loaded, and told which threads to use."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from functools import lru_cache
from pathlib import Path

from bidensify.kernels.structures import PackedArguments, PartArguments, SumArguments

__all__ = ["LIBRARY_VARIABLE", "call", "library", "training_library"]

LIBRARY_VARIABLE = "BIDENSIFY_LIBRARY"
_ABI = 3
_P, _I, _L = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_HOW = (
    "reinstall bidensify where a C++17 compiler (g++ or clang++) is on the PATH: pip install --force-reinstall --no-deps "
    "--no-binary bidensify bidensify, or pip install . in a checkout"
)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """The library, or None where it was not built (one warning says what that costs and how to get it)."""
    named = os.environ.get(LIBRARY_VARIABLE)
    path = Path(named) if named else _find()
    if path is None:
        _warn("its kernels were not built")
        return None
    try:
        found = ctypes.CDLL(str(path))
    except OSError as error:
        _warn(f"{path.name} cannot be loaded ({error})")
        return None
    found.bd_abi_version.restype = _I
    if found.bd_abi_version() != _ABI:
        _warn(f"{path.name} is of interface {found.bd_abi_version()}, this package needs {_ABI}")
        return None
    _declare(found)
    _share_threads(found)
    return found


@lru_cache(maxsize=1)
def training_library() -> ctypes.CDLL | None:
    """The library, where it was built with the kernels of training and of latent evaluation."""
    found = library()
    return found if found is not None and hasattr(found, "bdt_instruction_set") else None


def _warn(reason: str) -> None:
    warnings.warn(
        f"bidensify runs packed layers on its slow reference path and trains about a third slower: {reason}. To get the "
        f"kernels, {_HOW}",
        RuntimeWarning,
        stacklevel=3,
    )


def _find() -> Path | None:
    """The library beside this file, or beside any other place that the package is made of (an editable install)."""
    name = f"libbidensify_kernels{'.dylib' if sys.platform == 'darwin' else '.so'}"
    folders = [Path(__file__).parent, *(Path(place) / "kernels" for place in sys.modules["bidensify"].__path__)]
    # An editable install leaves what it compiled in site-packages, and the Python files where they are.
    folders += [Path(place) / "bidensify" / "kernels" for place in sys.path if place]
    return next((folder / name for folder in folders if (folder / name).is_file()), None)


def _declare(found: ctypes.CDLL) -> None:
    found.bd_tiers.restype = ctypes.c_uint32
    found.bd_packed_conv2d.argtypes = [ctypes.POINTER(PackedArguments)]
    found.bd_packed_conv2d_parts.argtypes = [ctypes.POINTER(PackedArguments), ctypes.POINTER(PartArguments), _I]
    found.bd_sum.argtypes = [ctypes.POINTER(SumArguments)]
    found.bd_weight_tiles.argtypes = [ctypes.POINTER(PackedArguments), _P, ctypes.POINTER(_L), _P]
    found.bd_tensor_new.argtypes, found.bd_tensor_new.restype = [ctypes.POINTER(_L), _I, _I], _P
    found.bd_tensor_free.argtypes, found.bd_tensor_free.restype = [_P], None
    found.bd_memory_release.argtypes, found.bd_memory_release.restype = [], None
    found.bd_memory_count.argtypes, found.bd_memory_count.restype = [ctypes.POINTER(_L)] * 2, None
    if not hasattr(found, "bdt_instruction_set"):
        return
    found.bdt_instruction_set.restype = ctypes.c_char_p
    found.bdt_moments.argtypes = [_P, _P, _P, _P]
    found.bdt_weight_forward.argtypes = [_L, _L, _I, _P, _I, _P, _P]
    found.bdt_eval_signs.argtypes = [_L, _L, _I, _P, _P, _P]
    found.bdt_weight_backward.argtypes = [_L, _L, _I, _P, _P, _P, _P]


def _share_threads(found: ctypes.CDLL) -> None:
    """Hands torch's own OpenMP threads to the packed kernels (Linux): one team serves both, and none waits for a busy core.

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
            entry = ctypes.cast(ctypes.CDLL(path).GOMP_parallel, _P)
        except (OSError, AttributeError):
            continue
        found.bd_set_parallel.argtypes, found.bd_set_parallel.restype = [_P], None
        found.bd_set_parallel(entry)
        return


def call(name: str, *arguments: object) -> None:
    """Runs a kernel of the training step or of evaluation.

    Raises:
        RuntimeError: the kernel refused its arguments or found no memory.
    """
    found = library()
    assert found is not None
    status = getattr(found, name)(*arguments)
    if status:
        raise RuntimeError(f"kernel {name} failed: {'no memory' if status == 2 else f'status {status}'}")
