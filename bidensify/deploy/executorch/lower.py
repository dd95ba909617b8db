"""From a network to a .pte: copy, prepare, ``torch.export``, read in parts, lower (XNNPACK for what stays in float)."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from bidensify.deploy.executorch import program as program_module
from bidensify.deploy.executorch.build import executorch_folder, find_runtime
from bidensify.deploy.executorch.passes import layout_pass, read_in_parts
from bidensify.deploy.layers import PackedLayer
from bidensify.errors import CheckError, ConfigError, MissingExtraError, PlanError
from bidensify.nn import BinaryLayer

__all__ = ["AXES", "Sizes", "flat", "lower", "prepared", "run_again", "shapes_of", "with_int8_rest"]

# name -> (least, most, step): "height", "width", "batch".
Sizes = Mapping[str, tuple[int, int, int]]
AXES = {"batch": 0, "height": 2, "width": 3}


def prepared(model: nn.Module) -> nn.Module:
    """A copy in evaluation mode as ExecuTorch takes it: it enters in channels_last and holds no bits twice.

    Raises:
        ConfigError: the network is latent.
    """
    latent = [path for path, module in model.named_modules() if isinstance(module, BinaryLayer)]
    if latent:
        raise ConfigError(
            f"export to ExecuTorch: {latent[0]!r} and {len(latent) - 1} more layers are latent; give bidensify.pack(model)"
        )
    made = copy.deepcopy(model).eval().cpu()
    for module in made.modules():
        if isinstance(module, PackedLayer):
            # Kernels read the words; the stored bits would be in the file a second time.
            del module.bits
    for tensor in (*made.parameters(), *made.buffers()):
        # XNNPACK's passes want weights as torch makes them.
        tensor.requires_grad_(False)
        tensor.data = tensor.data.contiguous()

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map(_last, args), tree_map(_last, kwargs)

    made.register_forward_pre_hook(enter, with_kwargs=True)
    return made


def _last(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.dim() != 4 or not value.is_floating_point():
        return value
    # One pixel lies in both orders, and XNNPACK refuses a copy that is none.
    return value if value.shape[2:] == (1, 1) else value.to(memory_format=torch.channels_last)


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
def _quiet() -> Iterator[None]:
    """What ExecuTorch says while it lowers is of its own business."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stderr(io.StringIO()),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _imports() -> Iterator[None]:
    """Around imports of ExecuTorch's, which are loud: a MissingExtraError where one fails."""
    try:
        with _quiet():
            yield
    except ImportError as error:
        raise MissingExtraError(
            f"executorch cannot be imported ({error}): pip install 'bidensify[executorch]'"
        ) from error


def lower(program: torch.export.ExportedProgram, constants: Mapping[str, Sequence[float]] | None = None) -> bytes:
    """The .pte of a captured program, with ``constants`` as methods of their own.

    Raises:
        PlanError: ExecuTorch does not take it.
    """
    executorch_folder()
    with _imports():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower
    read_in_parts(program.graph)
    program.graph_module.recompile()
    try:
        with _quiet():
            edge = to_edge_transform_and_lower(
                program,
                transform_passes=[layout_pass()],
                partitioner=[XnnpackPartitioner()],
                constant_methods={name: [float(v) for v in values] for name, values in (constants or {}).items()},
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            return bytes(edge.to_executorch().buffer)
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
        ConfigError: no images.
        MissingExtraError: ExecuTorch's quantizer cannot be imported.
    """
    if not len(images):
        raise ConfigError("int8_rest needs example inputs to calibrate with, at least one; give some of your images")
    with _imports():
        from executorch.backends.xnnpack.quantizer import xnnpack_quantizer
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    config = xnnpack_quantizer.get_symmetric_quantization_config(is_per_channel=True)
    quantizer = xnnpack_quantizer.XNNPACKQuantizer()
    aten = torch.ops.aten
    for operator in (aten.conv2d.default, aten.conv_transpose2d.input, aten.linear.default):
        quantizer.set_operator_type(operator, config)
    with _quiet():
        module = prepare_pt2e(program.module(), quantizer)
        for image in images:
            if isinstance(image, Mapping):
                module(**image)
            else:
                module(*(image if isinstance(image, list | tuple) else (image,)))
        return again(convert_pt2e(module))


def run_again(path: Path, runs: Sequence[Sequence[Tensor]]) -> list[list[Tensor]] | str:
    """Outputs of the file in a process without torch; or why it was not run.

    Raises:
        CheckError: the runtime refuses or does not survive it.
    """
    try:
        library = find_runtime()
    except (MissingExtraError, ConfigError) as error:
        return str(error)
    with tempfile.TemporaryDirectory() as place:
        given, results = Path(place) / "given.npz", Path(place) / "results.npz"
        arrays = {
            f"{run}_{i}": (value.float() if value.dtype == torch.bfloat16 else value).contiguous().numpy()
            for run, values in enumerate(runs)
            for i, value in enumerate(values)
        }
        np.savez(given, **arrays)  # type: ignore[arg-type]
        command = [sys.executable, "-I", program_module.__file__, str(library), str(path), str(given), str(results)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CheckError(f"the .pte does not run (exit {done.returncode}): {(done.stdout + done.stderr)[-1500:]}")
        with np.load(results, allow_pickle=False) as file:
            count = {run: sum(name.startswith(f"{run}_") for name in file.files) for run in range(len(runs))}
            return [[torch.from_numpy(file[f"{run}_{i}"]) for i in range(count[run])] for run in count]


def flat(args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors among a call's inputs or outputs, in the order of the program's."""
    return [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
