"""The C structures of ``csrc/packed/bidensify_kernels.h`` and ``csrc/train/train.h``."""

from __future__ import annotations

import ctypes

__all__ = [
    "Codes",
    "Dab",
    "DabGrad",
    "Finish",
    "PackedArguments",
    "PartArguments",
    "Post",
    "PostGrad",
    "Shape",
    "SumArguments",
]

_P, _I, _L = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64


def _pointers(names: str) -> list[tuple[str, type]]:
    return [(name, _P) for name in names.split()]


class Shape(ctypes.Structure):
    """``bdt_shape``."""

    _fields_ = [("n", _L), ("c", _L), ("s", _L), ("last", _I), ("half", _I), ("threads", _I)]


class Dab(ctypes.Structure):
    """``bdt_dab``."""

    _fields_ = [("scale", _I), ("groups", _L), *_pointers("x k b a mean beta distance alpha y fused")]


class DabGrad(ctypes.Structure):
    """``bdt_dab_grad``."""

    _fields_ = [
        ("scale", _I),
        ("groups", _L),
        *_pointers("x grad grad_fused mean beta distance alpha grad_x grad_k grad_b grad_a"),
    ]


class Post(ctypes.Structure):
    """``bdt_post``."""

    _fields_ = [
        ("eps", ctypes.c_double),
        *_pointers("x bypass mean variance weight bias bias_in slope bias_out y"),
    ]


class PostGrad(ctypes.Structure):
    """``bdt_post_grad``."""

    _fields_ = [
        ("forward", Post),
        *_pointers("grad grad_x grad_bypass grad_weight grad_bias grad_bias_in grad_slope grad_bias_out"),
    ]


class Codes(ctypes.Structure):
    """``bdt_codes``."""

    _fields_ = [("planes", _I), *_pointers("x k b a beta alpha y")]


class Finish(ctypes.Structure):
    """``bdt_finish``."""

    _fields_ = _pointers("dot half extra scale bias slope post y")


class PackedArguments(ctypes.Structure):
    """``bd_conv_args``."""

    _fields_ = [
        *((name, _L) for name in ("n", "h", "w", "cin", "oh", "ow", "cout")),
        *(
            (name, _I)
            for name in (
                *("kh", "kw", "sh", "sw", "dh", "dw", "pad_top", "pad_left", "groups", "transposed", "depthwise"),
                *("planes", "dtype", "bypass", "bypass_pad_h", "bypass_pad_w", "bypass_last", "tier", "threads"),
            )
        ),
        *_pointers("x y residual tiles"),
        ("tiles_length", _L),
        *_pointers("k b a levels"),
        ("per_sample_levels", _I),
        *_pointers("thresholds scale bias offset rise slope clamp post rows cols dots"),
    ]


class PartArguments(ctypes.Structure):
    """``bd_part``."""

    _fields_ = [("x", _P), ("channels", _L), ("up_h", _I), ("up_w", _I)]


class SumArguments(ctypes.Structure):
    """``bd_sum_args``."""

    _fields_ = [
        *((name, _L) for name in ("n", "h", "w", "c")),
        ("threads", _I),
        ("count", _I),
        ("parts", ctypes.POINTER(PartArguments)),
        *_pointers("bias_in slope bias_out y"),
    ]
