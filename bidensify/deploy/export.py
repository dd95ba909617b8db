"""Export to ExecuTorch, which runs from bits without torch; to ONNX, for other runtimes; or to a ``torch.export`` program.

ONNX knows no XNOR-popcount, so a packed layer is written as what it computes: bits unpacked to -1 and +1 by a mask, a
convolution of signs, one scale and bias. The file holds the bits, but the runtime runs float convolutions: it gains neither
speed nor memory.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bidensify._util.files import atomic_write
from bidensify._util.modes import evaluation_flags
from bidensify.errors import CheckError, ConfigError, FormatError, MissingExtraError, PlanError
from bidensify.exact import any_order
from bidensify.rewrite.record.inputs import candidate_inputs, describe_inputs

__all__ = ["RUNTIMES", "Exported", "export"]

# For ExecuTorch, "height", "width" and "batch": (least, most, step).
Sizes = Mapping[str, tuple[int, int, int]]

RUNTIMES = {".pte": "executorch", ".onnx": "onnx", ".pt2": "torch_export"}
_NEEDS = "A network packed by bidensify: `import bidensify.deploy` before torch.export.load, which needs its operators."
_LARGEST_ONNX = 2_000_000_000
# A rounding difference may flip single signs, so that a few values differ a lot; a wrong graph differs everywhere.
_TOLERANCE = 1e-2
# A .pte runs the same kernels, and its float rest rounds a little otherwise.
_TOLERANCE_PTE, _TOLERANCE_INT8 = 1e-3, 0.5


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        path: the file.
        bytes: its size.
        runtime: what ran the file again for comparison ("executorch", "onnxruntime", "torch"), or None where nothing did.
        difference: mean |file - model| over mean |model|, over all outputs on the example input; None if nothing ran it.
        reason: why nothing ran it.
    """

    path: Path
    bytes: int
    runtime: str | None
    difference: float | None
    reason: str = ""


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    runtime: str | None = None,
    example_inputs: Any = None,
    dynamic: bool | Sizes | None = None,
    int8_rest: Sequence[Any] | None = None,
) -> Exported:
    """Writes a latent, packed or full-precision network in evaluation mode to one file and compares the file's outputs.

    Args:
        model: the network; it is left as it was.
        path: ``*.pte`` (ExecuTorch 1.5: a packed network runs from its bits, in a process without torch, from C++ or Python),
            ``*.onnx`` (opset 20, any runtime, float arithmetic: it gains neither speed nor memory) or ``*.pt2``
            (``torch.export``; a packed network's program calls the operator ``bidensify::packed_layer``: ``import
            bidensify.deploy`` before ``torch.export.load``).
        runtime: "executorch", "onnx" or "torch_export"; what the suffix says by default.
        example_inputs: a tensor, a tuple or a dict; derived from the model by default. Image tensors are (N, C, H, W).
        dynamic: batch and image size may differ from the example's where the network allows it (the default but for
            ExecuTorch, which plans its memory for the largest: there ``{"height": (128, 512, 32), "width": (128, 512, 32)}``,
            least, most and step, and "batch" likewise).
        int8_rest: for ExecuTorch, example inputs to calibrate with: what is not binary runs in int8 then. Its outputs differ
            from the network's more than rounding; ``difference`` says by how much.

    Raises:
        ConfigError: another suffix, or arguments that do not go with the runtime.
        MissingExtraError: the runtime's packages are not installed.
        PlanError: the network does not run on the inputs, or ``torch.export`` or the runtime cannot capture it.
        FormatError: the network is too large for one ONNX file.
        CheckError: what was written does not compute what the network computes.
    """
    target = Path(path)
    if target.suffix not in RUNTIMES:
        raise ConfigError(f"export to {target.name!r}: the suffix must be one of {list(RUNTIMES)}")
    found = RUNTIMES[target.suffix]
    if runtime not in (None, found):
        raise ConfigError(f"runtime={runtime!r} does not write {target.name!r}; the suffixes are {RUNTIMES}")
    if found == "executorch":
        return _export_pte(model, target, example_inputs, dynamic, int8_rest)
    if int8_rest is not None or not (dynamic is None or isinstance(dynamic, bool)):
        raise ConfigError(f"{target.name!r}: int8_rest and bounds in dynamic are ExecuTorch's (*.pte)")
    if target.suffix == ".onnx":
        _need_onnx()
    with evaluation_flags(model), torch.no_grad():
        args, kwargs, output = _run(model, example_inputs)
        given = _any_shapes(model, args, kwargs) if dynamic or dynamic is None else None
        program = _capture(model, args, kwargs, given)
        expected = _tensors(output)
        with atomic_write(target) as temporary:
            write = _write_program if target.suffix == ".pt2" else _write_onnx
            ran, outputs = write(program, temporary, args, kwargs)
            difference = None if outputs is None else _compare(expected, outputs, target.name)
    reason = "onnxruntime is not installed" if difference is None else ""
    return Exported(target, target.stat().st_size, ran, difference, reason)


def _export_pte(
    model: nn.Module, target: Path, example_inputs: Any, dynamic: bool | Sizes | None, int8_rest: Sequence[Any] | None
) -> Exported:
    from bidensify.deploy.executorch import lower
    from bidensify.deploy.executorch.build import executorch_folder

    if dynamic is True:
        raise ConfigError(
            "dynamic=True has no bound, and ExecuTorch plans memory for the largest image; give "
            "dynamic={'height': (128, 512, 32), 'width': (128, 512, 32)}: least, most, step"
        )
    executorch_folder()
    with evaluation_flags(model), torch.no_grad():
        args, kwargs, _ = _run(model, example_inputs)
        made = lower.prepared(model)
        shapes = lower.shapes_of(dynamic or None, args, kwargs, lambda: list(_names(model, list(args))))
        program = _capture(made, args, kwargs, shapes)
        if int8_rest is not None:
            program = lower.with_int8_rest(program, int8_rest, lambda exact: _capture(exact, args, kwargs, shapes))
        data = lower.lower(program)
        runs = [(args, kwargs), *(_like(args, kwargs, seed) for seed in (1, 2))]
        expected = [_tensors(made(*each, **named)) for each, named in runs]
        with atomic_write(target) as temporary:
            temporary.write_bytes(data)
            outputs = lower.run_again(temporary, [lower.flat(*each) for each in runs])
            if isinstance(outputs, str):
                difference = None
            else:
                limit = _TOLERANCE_PTE if int8_rest is None else _TOLERANCE_INT8
                difference = max(_compare(a, b, target.name, limit) for a, b in zip(expected, outputs, strict=True))
    size = target.stat().st_size
    if isinstance(outputs, str):
        return Exported(target, size, None, None, outputs)
    return Exported(target, size, "executorch", difference)


def _like(args: Any, kwargs: Any, seed: int) -> tuple[Any, Any]:
    """Other inputs of the same shapes."""
    generator = torch.Generator().manual_seed(seed)

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        noise = torch.randn(value.shape, generator=generator).to(value)
        return noise * (value.std() if value.numel() > 1 else 1) + value.mean()

    return torch.utils._pytree.tree_map(one, (args, kwargs))  # type: ignore[no-any-return]


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"export to ONNX needs the packages onnx and onnxscript ({error}): pip install 'bidensify[onnx]'"
        ) from None


def _run(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    failures = []
    for args, kwargs in candidate_inputs(model, example_inputs):
        try:
            return args, kwargs, model(*args, **kwargs)
        except Exception as error:
            failures.append(f"{describe_inputs(args, kwargs)}: {type(error).__name__}: {str(error)[:200]}")
    raise PlanError(
        f"{type(model).__name__} runs on none of the example inputs; give your own as example_inputs. Tried:\n  "
        + "\n  ".join(failures)
    )


def _dynamic(value: Any) -> Any:
    if isinstance(value, Tensor):
        sizes = (0, 2, 3) if value.dim() == 4 else (0,) if value.dim() else ()
        return {dim: torch.export.Dim.AUTO for dim in sizes if value.shape[dim] > 1}
    if isinstance(value, (list, tuple)):
        return type(value)(_dynamic(item) for item in value)
    if isinstance(value, dict):
        return {key: _dynamic(item) for key, item in value.items()}
    return None


def _any_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    shapes = ([_dynamic(value) for value in args], {key: _dynamic(value) for key, value in kwargs.items()})
    return tuple(shapes[0]) if not kwargs else shapes[1] if not args else {**_names(model, shapes[0]), **shapes[1]}


def _capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], given: Any
) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=given)
    except Exception as error:
        raise PlanError(
            f"torch.export cannot capture {type(model).__name__} on {describe_inputs(args, kwargs)}: "
            f"{type(error).__name__}: {str(error)[:500]}"
        ) from error


def _names(model: nn.Module, values: list[Any]) -> dict[str, Any]:
    import inspect

    return dict(zip(inspect.signature(model.forward).parameters, values))


def _write_program(
    program: torch.export.ExportedProgram, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str | None, list[Tensor] | None]:
    # Where each operation stands in the sources is of this machine alone, and nobody else's business.
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            node.meta.pop("stack_trace", None)
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={"README.txt": _NEEDS})
    path.write_bytes(buffer.getvalue())
    buffer.seek(0)
    return "torch", _tensors(torch.export.load(buffer).module()(*args, **kwargs))


def _copysign(size: Tensor, sign: Tensor) -> Tensor:
    """``copysign`` for signs that are never -0.0 (``bidensify.nn.ste`` sees to it): ONNX cannot ask for a sign bit."""
    return torch.where(sign < 0, -size.abs(), size.abs())


def _write_onnx(
    program: torch.export.ExportedProgram, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str | None, list[Tensor] | None]:
    import onnx

    from bidensify.deploy.operator import reference_operator

    operator = torch.ops.bidensify.packed_layer.default
    with any_order():
        plain = program.run_decompositions({operator: reference_operator, torch.ops.aten.copysign.Tensor: _copysign})
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        # Without optimize=False constants are folded, and the bits become floats.
        exported = torch.onnx.export(plain, args, kwargs=kwargs, dynamo=True, optimize=False, verbose=False)
    assert exported is not None
    proto = exported.model_proto
    for node in proto.graph.node:
        node.ClearField("metadata_props")
        node.ClearField("doc_string")
    if proto.ByteSize() > _LARGEST_ONNX:
        raise FormatError(
            f"the network takes {proto.ByteSize():,} bytes, one ONNX file at most {_LARGEST_ONNX:,}; pack it first, or "
            "export to .pt2"
        )
    onnx.checker.check_model(proto)
    data = proto.SerializeToString()
    path.write_bytes(data)
    try:
        import onnxruntime
    except ImportError:
        return None, None
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    given = [value for value in _tensors((args, kwargs)) if isinstance(value, Tensor)]
    feed = {entry.name: value.detach().cpu().numpy() for entry, value in zip(session.get_inputs(), given, strict=True)}
    return "onnxruntime", [torch.from_numpy(value) for value in session.run(None, feed)]


def _tensors(value: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _compare(expected: list[Tensor], outputs: list[Tensor], name: str, tolerance: float = _TOLERANCE) -> float:
    shapes = [tuple(value.shape) for value in expected], [tuple(value.shape) for value in outputs]
    if shapes[0] != shapes[1]:
        raise CheckError(f"{name}: the file's outputs have shapes {shapes[1]}, the network's {shapes[0]}")
    error = sum(float((a.double().cpu() - b.double()).abs().sum()) for a, b in zip(expected, outputs))
    size = sum(float(a.double().abs().sum()) for a in expected)
    difference = error / size if size else error
    if not difference <= tolerance:
        raise CheckError(
            f"{name}: the file's outputs differ from the network's by {difference:.3g} of their mean size, more than "
            f"{tolerance}; nothing was written"
        )
    return difference
