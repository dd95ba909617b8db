"""The shared library of kernels: found, loaded and called through ctypes (plain C interface, no torch ABI)."""

from __future__ import annotations

import ctypes
import os
import sys
import warnings
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from bidensify.errors import ConfigError
from bidensify.runtime.reference import make_bypass
from bidensify.runtime.spec import LayerSpec

__all__ = ["KERNEL_VARIABLE", "LIBRARY_VARIABLE", "available_kernels", "load", "run", "tier"]

KERNEL_VARIABLE = "BIDENSIFY_KERNEL"
LIBRARY_VARIABLE = "BIDENSIFY_LIBRARY"
_ABI = 1
_TIERS = {"portable": 0, "avx2": 1, "avx512": 2, "neon": 3}
_PREFERENCE = ("avx512", "avx2", "neon", "portable")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}
_STATUS = {1: "the arguments do not fit together", 2: "out of memory", 3: "this processor lacks the kernel"}
_HOW = (
    "reinstall bidensify where a C++17 compiler (g++ or clang++) is on the PATH: pip install --force-reinstall --no-deps "
    "--no-binary bidensify bidensify, or pip install . in a checkout"
)


class _Arguments(ctypes.Structure):
    """bd_conv_args of bidensify_kernels.h."""

    _fields_ = (
        [(name, ctypes.c_int64) for name in ("n", "h", "w", "cin", "oh", "ow", "cout")]
        + [
            (name, ctypes.c_int32)
            for name in (
                *("kh", "kw", "sh", "sw", "dh", "dw", "pad_top", "pad_left", "groups", "transposed", "depthwise"),
                *("dtype", "bypass", "bypass_pad_h", "bypass_pad_w", "tier", "threads"),
            )
        ]
        + [(name, ctypes.c_void_p) for name in ("x", "y", "residual", "tiles")]
        + [("tiles_length", ctypes.c_int64)]
        + [(name, ctypes.c_void_p) for name in ("k", "b", "a", "levels")]
        + [("per_sample_levels", ctypes.c_int32)]
        + [(name, ctypes.c_void_p) for name in ("thresholds", "scale", "bias", "slope", "post", "rows", "cols", "dots")]
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
    library.bd_packed_conv2d.argtypes = [ctypes.POINTER(_Arguments)]
    if library.bd_abi_version() != _ABI:
        warnings.warn(
            f"bidensify runs packed layers on its slow reference path: {path.name} is of interface "
            f"{library.bd_abi_version()}, this package needs {_ABI}; {_HOW}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    _share_threads(library)
    return library


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


@lru_cache(maxsize=1024)
def _bypass(spec: LayerSpec, height: int, width: int) -> tuple[int, Tensor | None, Tensor | None]:
    """(mode, rows, columns) of the bypass: 1 = one source pixel per output pixel (None: the same), 2 = averages."""
    bypass = make_bypass(spec)
    size = spec.output_size(height, width)
    if size == (height, width):
        return 1, None, None
    if spec.kind != "conv_transpose" and max(spec.stride) > 1 and max(spec.dilation) == 1:
        (kh, kw), (sh, sw), (ph, pw) = spec.kernel, spec.stride, spec.bypass_padding
        pooled = ((height + 2 * ph - kh) // sh + 1, (width + 2 * pw - kw) // sw + 1)
        if pooled == size and 2 * ph <= kh and 2 * pw <= kw:
            return 2, None, None
    rows = bypass._space(torch.arange(height, dtype=torch.float64).view(1, 1, -1, 1).expand(1, 1, height, width), size)
    cols = bypass._space(torch.arange(width, dtype=torch.float64).view(1, 1, 1, -1).expand(1, 1, height, width), size)
    return 1, rows[0, 0, :, 0].to(torch.int32).contiguous(), cols[0, 0, 0, :].to(torch.int32).contiguous()


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
    dots: bool = False,
) -> Tensor:
    """Runs the native operator: see ``packed_reference`` for the arguments.

    Args:
        tier: from ``tier``.
        dots: returns the integer dot products (N, C_out, H', W') int32 instead of y.
    """
    library = load()
    assert library is not None, "a tier exists only where the library is loaded"
    _check(x, tiles, side, spec, thresholds, levels, residual)
    n, c, height, width = x.shape
    # Dense NHWC whatever the strides say of a dimension of size one.
    nhwc = x.permute(0, 2, 3, 1).contiguous()
    oh, ow = spec.output_size(height, width)
    dtype = torch.int32 if dots else x.dtype
    out = torch.empty((n, oh, ow, spec.out_channels), dtype=dtype)
    side, tiles = side.contiguous(), tiles.contiguous()
    base = side.data_ptr()
    part = {name: base + 4 * start for name, (start, _) in spec.layout.items()}
    top, left, _, _ = spec.pads(height, width)
    mode, rows, cols = _bypass(spec, height, width) if spec.bypass else (0, None, None)
    keep = [t if t is None else t.contiguous() for t in (thresholds, levels)]
    rest = None if residual is None else residual.to(x.dtype).permute(0, 2, 3, 1).contiguous()
    arguments = _Arguments(
        n, height, width, c, oh, ow, spec.out_channels,
        *spec.kernel, *spec.stride, *spec.dilation, top, left, spec.groups,
        spec.kind == "conv_transpose", spec.depthwise, _DTYPES[x.dtype], mode, *spec.bypass_padding,
        tier, torch.get_num_threads(),
        nhwc.data_ptr(), None if dots else out.data_ptr(), _pointer(rest), tiles.data_ptr(), tiles.numel(),
        part.get("k"), part.get("b"), part.get("a"),
        part.get("levels") if levels is None else _pointer(keep[1]), levels is not None,
        _pointer(keep[0]), part["scale"], part["bias"], part.get("slope"), part.get("post"),
        _pointer(rows), _pointer(cols), out.data_ptr() if dots else None,
    )  # fmt: skip
    if n:
        status = library.bd_packed_conv2d(ctypes.byref(arguments))
        if status:
            raise RuntimeError(
                f"the packed kernel failed: {_STATUS.get(status, status)} ({spec}, input {tuple(x.shape)})"
            )
    return out.permute(0, 3, 1, 2)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _check(
    x: Tensor,
    tiles: Tensor,
    side: Tensor,
    spec: LayerSpec,
    thresholds: Tensor | None,
    levels: Tensor | None,
    residual: Tensor | None,
) -> None:
    """The kernels read raw memory: nothing reaches them whose size was not looked at."""
    n, height, width = x.shape[0], *x.shape[2:]
    oh, ow = spec.output_size(height, width)
    wanted: list[tuple[str, Tensor | None, tuple[int, ...], torch.dtype]] = [
        ("tiles", tiles, spec.tiles_shape, torch.int32),
        ("side", side, (spec.side_length,), torch.float32),
        ("thresholds", thresholds, (n, spec.in_channels), torch.float32),
        ("levels", levels, (n, 2), torch.float32),
    ]
    if x.dim() != 4 or x.shape[1] != spec.in_channels:
        raise ConfigError(f"packed_conv2d: x of shape {tuple(x.shape)} must be (N, {spec.in_channels}, H, W)")
    if oh < 1 or ow < 1 or height < 1 or width < 1:
        raise ConfigError(
            f"packed_conv2d: an input of {height}x{width} gives an output of {oh}x{ow}; give a larger input"
        )
    for name, tensor, shape, dtype in wanted:
        if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != x.device):
            raise ConfigError(
                f"packed_conv2d: {name} of shape {tuple(tensor.shape)}, {tensor.dtype}, {tensor.device} must be {shape}, "
                f"{dtype}, {x.device}"
            )
    if residual is not None and tuple(residual.shape) != (n, spec.out_channels, oh, ow):
        raise ConfigError(
            f"packed_conv2d: residual of shape {tuple(residual.shape)} must be {(n, spec.out_channels, oh, ow)}"
        )
