"""From a captured program to a .pte: read in parts, lower (XNNPACK for what stays in float)."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bidensify.deploy.executorch.absorb import absorb_sums
from bidensify.deploy.executorch.constants import drop_unread
from bidensify.deploy.executorch.memory import pointers_in_workspace, tight
from bidensify.deploy.executorch.passes import copies_pass, kernels_pass, layout_pass, turns_pass
from bidensify.deploy.executorch.simpler import for_xnnpack
from bidensify.deploy.executorch.views import planning
from bidensify.deploy.runtimes.build import EXECUTORCH
from bidensify.deploy.runtimes.prepare import read_in_parts
from bidensify.deploy.runtimes.quiet import quiet
from bidensify.deploy.runtimes.tokens import read_tokens
from bidensify.errors import ConfigError, MissingExtraError, PlanError

__all__ = ["AXES", "Sizes", "lower", "seal", "shapes_of", "with_int8_rest"]

# name -> (least, most, step): "height", "width", "batch".
Sizes = Mapping[str, tuple[int, int, int]]
AXES = {"batch": 0, "height": 2, "width": 3}


def shapes_of(sizes: Sizes | None, args: tuple[Any, ...], kwargs: Mapping[str, Any], names: Sequence[str]) -> Any:
    """What ``torch.export`` takes as dynamic shapes: the same for all images among the inputs.

    Raises:
        ConfigError: a size that is none.
    """
    if not sizes:
        return None
    dims: dict[int, Any] = {}
    for name, (least, most, step) in sizes.items():
        if name not in AXES or not 1 <= least <= most or step < 1 or least % step or most % step:
            raise ConfigError(
                f"dynamic={{{name!r}: {(least, most, step)}}} must be {list(AXES)} with (least, most, step), multiples of step"
            )
        if least < most:
            # ExecuTorch plans memory for the largest; a range of one value is no range.
            low = max(least // step, 1)
            dim: Any = torch.export.Dim(name, min=low, max=most // step)
            dims[AXES[name]] = dim * step if step > 1 else dim

    def one(value: Any) -> Any:
        return dict(dims) if isinstance(value, Tensor) and value.dim() == 4 else None

    given = [tree_map(one, value) for value in args]
    return {**dict(zip(names, given)), **{key: tree_map(one, value) for key, value in kwargs.items()}}


@contextlib.contextmanager
def _imports() -> Iterator[None]:
    """Around imports of ExecuTorch's, which are loud: a MissingExtraError where one fails."""
    try:
        with quiet():
            yield
    except ImportError as error:
        raise MissingExtraError(
            f"executorch cannot be imported ({error}): pip install 'bidensify[executorch]'"
        ) from error


def seal(data: bytes) -> bytes:
    """The program with its SHA-256 behind it, where ExecuTorch does not look: ExecuTorch may crash on a damaged program, and our
    runner refuses it before (cpp/digest.h).
    """
    return data + b"bidensify sha256" + hashlib.sha256(data).digest()


def lower(program: torch.export.ExportedProgram, constants: Mapping[str, Sequence[float]] | None = None) -> bytes:
    """The .pte of a captured program, with ``constants`` as methods of their own, and sealed.

    Raises:
        PlanError: ExecuTorch does not take it.
    """
    EXECUTORCH.folder()
    with _imports():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.memory_planning import greedy
    read_in_parts(program.graph)
    absorb_sums(program)
    read_tokens(program.graph)
    for_xnnpack(program)
    drop_unread(program)
    try:
        with quiet(), pointers_in_workspace():
            edge = to_edge_transform_and_lower(
                program,
                transform_passes=[copies_pass(), layout_pass()],
                partitioner=[XnnpackPartitioner()],
                constant_methods={name: [float(v) for v in values] for name, values in (constants or {}).items()},
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            config = ExecutorchBackendConfig(
                passes=[kernels_pass(), turns_pass()],
                memory_planning_pass=planning(greedy, tight),
            )
            return seal(bytes(edge.to_executorch(config).buffer))
    except Exception as error:
        raise PlanError(f"ExecuTorch does not take this network: {type(error).__name__}: {str(error)[:600]}") from error


def with_int8_rest(
    program: torch.export.ExportedProgram,
    images: Sequence[Any],
    again: Callable[[nn.Module], torch.export.ExportedProgram],
) -> torch.export.ExportedProgram:
    """The program with its float convolutions and linear layers in XNNPACK's int8 (per channel), calibrated on ``images``.

    Additions and concatenations stay in float: packed layers read and write it, so that int8 there would be conversions alone.

    Args:
        images: example inputs, each as ``example_inputs`` of ``bidensify.export``.
        again: captures a network as ``program`` was.

    Raises:
        MissingExtraError: ExecuTorch's quantizer cannot be imported.
    """
    with _imports():
        from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    config = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True)
    quantizer = xnnpack_quantizer.XNNPACKQuantizer()
    aten = torch.ops.aten
    for operator in (aten.conv2d.default, aten.conv_transpose2d.input, aten.linear.default):
        quantizer.set_operator_type(operator, config)
    with quiet():
        module = prepare_pt2e(program.module(), quantizer)
        for image in images:
            if isinstance(image, Mapping):
                module(**image)
            else:
                module(*(image if isinstance(image, list | tuple) else (image,)))
        return again(convert_pt2e(module))
