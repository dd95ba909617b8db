"""From a captured program to OpenVINO's IR: packed layers become the extension's operator, on NHWC; the rest float or int8."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bidensify.deploy.openvino import quantize
from bidensify.deploy.openvino.apart import keep_apart
from bidensify.deploy.openvino.layout import NCHW, NHWC, turn
from bidensify.deploy.openvino.norms import as_rows, taken_to_pieces
from bidensify.deploy.runtimes.again import run_program, save_arrays
from bidensify.deploy.runtimes.build import OPENVINO
from bidensify.deploy.runtimes.prepare import flat, read_in_parts
from bidensify.deploy.runtimes.quiet import quiet
from bidensify.deploy.runtimes.tokens import lasting, read_tokens
from bidensify.errors import MissingExtraError, PlanError

__all__ = ["convert", "save", "with_int8_rest"]

# OpenVINO (2026.4, low-precision passes) asks whether what a reshape or a quantization reads is constant, and walks back along
# every path until it meets one of these; each addition between packed layers makes two paths of one, a norm taken to pieces four.
# It makes reshapes of a group norm.
_ASKED = ("Reshape", "GroupNormalization", "FakeQuantize")
_PIECES = 4
_TOLD = (
    "Parameter", "Convolution", "GroupConvolution", "MatMul", "ConvolutionBackpropData", "GroupConvolutionBackpropData",
)  # fmt: skip
# A tenth of a second of them, and some minutes.
_MANY_STEPS, _MOST_STEPS = 10**6, 10**9

# Numbers beside the network stand in the file under this name.
_SECTION = "bidensify"


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(f"{name} cannot be imported ({error}): pip install 'bidensify[openvino]'") from error


def convert(program: torch.export.ExportedProgram, library: Path, sizes: Sequence[Sequence[int]] | None) -> Any:
    """The program as an ``openvino.Model``.

    Packed layers read and write images as NHWC, between two transposes each; ``turn`` lets those that meet go, and at
    convolutions they are a matter of how OpenVINO names a layout, since its own run on NHWC.

    Args:
        program: of a packed network.
        library: the extension.
        sizes: the inputs' sizes; None leaves those that vary open.

    Raises:
        MissingExtraError: OpenVINO cannot be imported.
        PlanError: OpenVINO does not take it.
    """
    ov, ops = _import("openvino"), _import("openvino.opset13")
    frontend, factories = _import("openvino.frontend.pytorch"), _import("openvino.utils.node_factory")
    factory = factories.NodeFactory()
    factory.add_extension(str(library))

    def layer(context: Any) -> Any:
        up, ints = ([int(v) for v in context.get_values_from_const_input(i)] for i in (1, 4))
        turned_in, turned_out = lasting(ints)
        # Here images are (N, H, W, C) whatever a program calls them.
        ints = [1, *ints[2:]] if ints[0] == 2 else ints

        def last(value: Any, turned: bool) -> Any:
            return ops.transpose(value, NHWC).output(0) if turned else value

        optional = [None if _is_none(value) else value for value in map(context.get_input, (5, 6, 7))]
        if optional[2] is not None:
            optional[2] = last(optional[2], turned_out)
        given = sum(1 << i for i, value in enumerate(optional) if value is not None)
        parts = (last(part, turned_in) for part in context.get_input(0).get_node().input_values())
        rest = (value for value in optional if value is not None)
        inputs = [*parts, context.get_input(2), context.get_input(3), *rest]
        node = factory.create("packed_layer", inputs, {"up": up, "spec": ints, "given": given})
        return (ops.transpose(node, NCHW) if turned_out else node).outputs()

    read_in_parts(program.graph)
    read_tokens(program.graph)
    program.graph_module.recompile()
    try:
        with quiet():
            extension = frontend.ConversionExtension("bidensify.packed_layer.default", layer)
            network = ov.convert_model(program, extension=[extension])
            if sizes is not None:
                network.reshape({i: list(shape) for i, shape in enumerate(sizes)})
            turn(network)
            as_rows(network)
            keep_apart(network)
    except Exception as error:
        raise PlanError(f"OpenVINO does not take this network: {type(error).__name__}: {str(error)[:600]}") from error
    return network


def _is_none(value: Any) -> bool:
    """Whether an argument is Python's None, for which the frontend puts an operator of no name without inputs."""
    node = value.get_node()
    return bool(node.get_type_name() == "PtFrameworkNode" and not node.get_input_size())


def with_int8_rest(network: Any, images: Sequence[Any], library: Path) -> Any:
    """The network with its float convolutions and matrix products in int8 (NNCF), calibrated on ``images``.

    Raises:
        MissingExtraError: NNCF cannot be imported.
        PlanError: NNCF or OpenVINO, which it runs, does not take it. That runs in a process of its own, for it may end it.
    """
    if importlib.util.find_spec("nncf") is None:
        raise MissingExtraError("an int8 rest under OpenVINO needs the package nncf: pip install 'bidensify[openvino]'")
    ov = _import("openvino")
    given = [flat((), image) if isinstance(image, Mapping) else flat(image, {}) for image in images]
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        save_arrays(place / "images.npz", given)
        ov.save_model(network, str(place / "float.xml"), compress_to_fp16=False)
        files = (place / "float.xml", place / "images.npz", place / "int8.xml")
        error = run_program(quantize.__file__, library, *files, OPENVINO.folder().parent)
        if error:
            raise PlanError(f"NNCF does not take this network ({error}")
        core = ov.Core()
        # Else the network would go on reading the file.
        core.set_property({"ENABLE_MMAP": False})
        core.add_extension(str(library))
        made = core.read_model(str(place / "int8.xml"))
    _stop_walks(made)
    return made


def _stop_walks(network: Any) -> None:
    """Puts a convolution by one before what OpenVINO would ask for longer than anybody waits.

    Raises:
        PlanError: that is no image.
    """
    ops = _import("openvino.opset13")
    for node in network.get_ordered_ops():
        steps = _steps_back(node) if node.get_type_name() in _ASKED else 0
        if steps <= _MANY_STEPS:
            continue
        shape = node.input_value(0).get_partial_shape()
        if len(shape) == 4 and shape[1].is_static:
            one = ops.constant(np.ones((shape[1].get_length(), 1, 1, 1, 1), np.float32))
            same = ops.group_convolution(node.input_value(0), one, [1, 1], [0, 0], [0, 0], [1, 1])
            node.input(0).replace_source_output(same.output(0))
        elif steps > _MOST_STEPS:
            raise PlanError(
                f"OpenVINO would not end compiling this network in int8: before {node.get_friendly_name()!r} it walks every path "
                f"back to a convolution, through packed layers and additions {steps:.2g} steps; leave int8_rest out"
            )


def _steps_back(node: Any) -> int:
    """How many steps OpenVINO takes until it knows, level by level of the nodes before."""
    steps, level = 0, {node.get_name(): (node, 1)}
    while level:
        before: dict[str, tuple[Any, int]] = {}
        for reader, paths in level.values():
            paths *= _PIECES if reader.get_type_name() == "MVN" and taken_to_pieces(reader) else 1
            steps += paths
            for value in reader.input_values():
                source = value.get_node()
                if source.get_type_name() in _TOLD:
                    return steps
                before[source.get_name()] = (source, before.get(source.get_name(), (source, 0))[1] + paths)
        level = before
    return steps


def _leave_in_rows(network: Any) -> None:
    """Lets images that a convolution gives leave as a matrix that is turned.

    OpenVINO's convolutions give NHWC, and its own change to NCHW takes a full-size output longer than the convolution.
    """
    ops = _import("openvino.opset13")
    for result in network.get_results():
        value = result.input_value(0)
        node = value.get_node()
        if node.get_type_name() == "Add":
            node = node.input_value(0).get_node()
        shape = value.get_partial_shape()
        if "Convolution" not in node.get_type_name() or shape.is_dynamic or len(shape) != 4:
            continue
        n, c, h, w = (int(size.get_length()) for size in shape)
        names = value.get_names()
        rows = ops.reshape(ops.transpose(value, NHWC), [n, h * w, c], False)
        image = ops.reshape(ops.transpose(rows, [0, 2, 1]), [n, c, h, w], False).output(0)
        value.set_names(set())
        image.set_names(names)
        result.input(0).replace_source_output(image)


def save(network: Any, path: Path, constants: Mapping[str, Sequence[float]]) -> None:
    """Writes ``path`` (.xml) and the .bin beside it, weights as they are; ``constants`` stand among the network's properties."""
    ov = _import("openvino")
    _leave_in_rows(network)
    network.validate_nodes_and_infer_types()
    for name, values in constants.items():
        network.set_rt_info(" ".join(repr(float(value)) for value in values), [_SECTION, name])
    ov.save_model(network, str(path), compress_to_fp16=False)
