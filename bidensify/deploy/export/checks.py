"""What is asked of an export's arguments before anything long begins."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bidensify.errors import ConfigError

__all__ = ["check_floats", "numbers"]

_HALVES = frozenset((torch.bfloat16, torch.float16))
_WHY = {
    ".pte": "ExecuTorch rounds otherwise or does not run, outside packed layers that take bfloat16",
    ".xml": "OpenVINO computes in float32 on most processors, so that the file would give other values",
    ".onnx": "runtimes of ONNX do not run",
}


def check_floats(model: nn.Module, inputs: Iterable[Tensor], name: str) -> None:
    """Whether the runtime of a file computes in the network's dtypes.

    Args:
        name: the file's.

    Raises:
        ConfigError: it does not; the message names the dtypes.
    """
    suffix = Path(name).suffix
    held = {tensor.dtype for tensor in (*model.parameters(), *model.buffers())}
    cast: set[Any] = {getattr(module, "_bidensify_float_dtype", None) for module in model.modules()}
    given = {x.dtype for x in inputs}
    refused = {
        ".pte": (held & _HALVES) | (cast & {torch.float16}),
        ".xml": (held | cast | given) & _HALVES,
        ".onnx": (held | given) & {torch.bfloat16},
    }[suffix]
    if refused:
        raise ConfigError(
            f"{name}: the network or its input is {', '.join(sorted(map(str, refused)))}, which {_WHY[suffix]}; give a float32 "
            "network"
        )


def numbers(constants: Mapping[str, Sequence[float]] | None) -> dict[str, list[float]]:
    """Numbers that are to stand beside a network.

    Raises:
        ConfigError: a name that a program cannot have or has already, or values that are no numbers.
    """
    found = {}
    for name, values in (constants or {}).items():
        own = name == "forward" or re.fullmatch(r"input\d+_least", str(name))
        if not isinstance(name, str) or not (name.isidentifier() and name.isascii()) or own:
            raise ConfigError(
                f"constants: the name {name!r} must be of letters, digits and _, and neither 'forward' nor 'input0_least', which "
                "a .pte has itself; give another name"
            )
        try:
            if isinstance(values, str | bytes | Mapping):
                raise TypeError
            found[name] = [float(value) for value in values]
        except (TypeError, ValueError):
            raise ConfigError(
                f"constants: {name}={str(values)[:80]!r} must be a sequence of numbers, as [0.485, 0.456, 0.406]"
            ) from None
    return found
