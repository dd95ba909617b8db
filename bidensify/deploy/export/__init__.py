"""Export to ExecuTorch and OpenVINO, which run from bits without torch; to ONNX, for other runtimes; or to ``torch.export``.

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
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bidensify._util.files import atomic_write
from bidensify._util.modes import evaluation_flags
from bidensify.deploy.export.capture import Exported, any_shapes, capture, compare, run, tensors
from bidensify.deploy.export.checks import check_floats, numbers
from bidensify.errors import ConfigError, FormatError, MissingExtraError, PlanError
from bidensify.exact import any_order

__all__ = ["RUNTIMES", "Exported", "export"]

RUNTIMES = {".pte": "executorch", ".xml": "openvino", ".onnx": "onnx", ".pt2": "torch_export"}
_NEEDS = "A network packed by bidensify: `import bidensify.deploy` before torch.export.load, which needs its operators."
_LARGEST_ONNX = 2_000_000_000


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    runtime: str | None = None,
    example_inputs: Any = None,
    dynamic: bool | Mapping[str, tuple[int, int, int]] | None = None,
    int8_rest: Sequence[Any] | None = None,
    constants: Mapping[str, Sequence[float]] | None = None,
) -> Exported:
    """Writes a latent, packed or full-precision network in evaluation mode to one file and compares the file's outputs.

    Args:
        model: the network; it is left as it was.
        path: ``*.pte`` (ExecuTorch 1.5: a packed network runs from its bits, in a process without torch, from C++ or Python),
            ``*.xml`` (OpenVINO's IR with its ``*.bin``, for PCs: from bits and without torch too),
            ``*.onnx`` (opset 20, any runtime, float arithmetic: it gains neither speed nor memory) or ``*.pt2``
            (``torch.export``; a packed network's program calls the operator ``bidensify::packed_layer``: ``import
            bidensify.deploy`` before ``torch.export.load``).
        runtime: "executorch", "openvino", "onnx" or "torch_export"; what the suffix says by default.
        example_inputs: a tensor, a tuple or a dict; derived from the model by default. Image tensors are (N, C, H, W).
        dynamic: batch and image size may differ from the example's where the network allows it (the default for
            ONNX and ``torch.export``; OpenVINO runs fixed sizes faster, ExecuTorch plans its memory for the largest: there
            ``{"height": (128, 512, 32), "width": (128, 512, 32)}``, least, most and step, and "batch" likewise).
        int8_rest: for ExecuTorch and OpenVINO, example inputs to calibrate with: what is not binary runs in int8
            then. Its outputs differ from the network's more than rounding; ``difference`` says by how much.
        constants: for ExecuTorch and OpenVINO, numbers by name that the file holds beside the network ("image_mean",
            "image_std"); programs read them (examples/deploy_cpp; of an IR ``model.get_rt_info(["bidensify", name])``).

    Raises:
        ConfigError: another suffix, or arguments that do not go with the runtime.
        MissingExtraError: the runtime's packages are not installed.
        PlanError: the network does not run on the inputs, or ``torch.export``, ``torch.onnx`` or the runtime cannot capture it.
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
        from bidensify.deploy.export.pte import export_pte

        return export_pte(model, target, example_inputs, dynamic, int8_rest, numbers(constants))
    if found == "openvino":
        from bidensify.deploy.export.ir import export_ir

        return export_ir(model, target, example_inputs, dynamic, int8_rest, numbers(constants))
    if int8_rest is not None or constants or not (dynamic is None or isinstance(dynamic, bool)):
        raise ConfigError(f"{target.name!r}: int8_rest, constants and bounds in dynamic are ExecuTorch's (*.pte)")
    if target.suffix == ".onnx":
        _need_onnx()
    with evaluation_flags(model), torch.no_grad():
        args, kwargs, output = run(model, example_inputs)
        if target.suffix == ".onnx":
            check_floats(model, tensors((args, kwargs)), target.name)
        given = any_shapes(model, args, kwargs) if dynamic or dynamic is None else None
        program = capture(model, args, kwargs, given)
        expected = tensors(output)
        with atomic_write(target) as temporary:
            write = _write_program if target.suffix == ".pt2" else _write_onnx
            ran, outputs = write(program, temporary, args, kwargs)
            difference = None if outputs is None else compare(expected, outputs, target.name)
    reason = "onnxruntime is not installed" if difference is None else ""
    return Exported(target, target.stat().st_size, ran, difference, reason)


def _need_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            f"export to ONNX needs the packages onnx and onnxscript ({error}): pip install 'bidensify[onnx]'"
        ) from None


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
    return "torch", tensors(torch.export.load(buffer).module()(*args, **kwargs))


def _copysign(size: Tensor, sign: Tensor) -> Tensor:
    """``copysign`` for signs that are never -0.0 (``bidensify.nn.ste`` sees to it): ONNX cannot ask for a sign bit."""
    return torch.where(sign < 0, -size.abs(), size.abs())


def _without_empty_shapes(graph: Any) -> None:
    """Scalars are no longer made by an Expand to the empty shape, which OpenVINO's reader takes for a number and refuses."""
    made = {name: node for node in graph.node for name in node.output}

    def empty(name: str) -> bool:
        node = made.get(name)
        if node is not None and node.op_type == "Cast":
            return empty(node.input[0])
        return node is not None and any(a.name == "value" and list(a.t.dims) == [0] for a in node.attribute)

    for node in graph.node:
        # What it expands has no dimension either.
        if node.op_type == "Expand" and empty(node.input[1]):
            node.op_type = "Identity"
            del node.input[1]


def _write_onnx(
    program: torch.export.ExportedProgram, path: Path, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[str | None, list[Tensor] | None]:
    import onnx

    from bidensify.deploy.operator import reference_operator

    operator = torch.ops.bidensify.packed_layer.default
    with any_order():
        plain = program.run_decompositions({operator: reference_operator, torch.ops.aten.copysign.Tensor: _copysign})
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            # Without optimize=False constants are folded, and the bits become floats.
            exported = torch.onnx.export(plain, args, kwargs=kwargs, dynamo=True, optimize=False, verbose=False)
    except Exception as error:
        raise PlanError(f"torch.onnx does not take this network: {type(error).__name__}: {str(error)[:600]}") from error
    assert exported is not None
    proto = exported.model_proto
    _without_empty_shapes(proto.graph)
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
    given = [value for value in tensors((args, kwargs)) if isinstance(value, Tensor)]
    feed = {entry.name: value.detach().cpu().numpy() for entry, value in zip(session.get_inputs(), given, strict=True)}
    return "onnxruntime", [torch.from_numpy(value) for value in session.run(None, feed)]
