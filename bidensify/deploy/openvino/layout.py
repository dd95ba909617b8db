"""Between packed layers images stay NHWC: what computes each element or each channel is turned instead of the images.

OpenVINO runs its own convolutions on NHWC, whatever it calls the layout, but sums, products, means and concatenations whose
operands are transposed packed layers it computes as NCHW, and moves every image there and back.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from bidensify.deploy.openvino.enlarge import enlarged

__all__ = ["ELEMENTWISE", "NCHW", "NHWC", "turn"]

NHWC, NCHW = (0, 2, 3, 1), (0, 3, 1, 2)
# Each element by itself, with NumPy's broadcasting.
ELEMENTWISE = {
    "Abs", "Add", "Clamp", "Convert", "Divide", "Elu", "Equal", "Erf", "Exp", "Gelu", "Greater", "GreaterEqual",
    "HSigmoid", "HSwish", "Less", "LessEqual", "Log", "LogicalAnd", "LogicalNot", "LogicalOr", "Maximum", "Minimum",
    "Mish", "Multiply", "Negative", "Power", "Relu", "Select", "Sigmoid", "Sign", "SoftPlus", "Sqrt",
    "SquaredDifference", "Subtract", "Swish", "Tanh",
}  # fmt: skip
# Input 1 holds the axes.
_REDUCTIONS = frozenset(("ReduceMax", "ReduceMean", "ReduceSum"))
_FREE = ("Convolution", "GroupConvolution")


def turn(network: Any) -> None:
    """Lets transposes behind packed layers sink to where an image is needed as NCHW, so that those that meet go.

    Args:
        network: an ``openvino.Model`` whose packed layers read and write NHWC between two transposes each; changed in place.
    """
    ops = importlib.import_module("openvino.opset13")
    ordered = network.get_ordered_ops()
    # Taken before anything is turned: shapes behind it are stale until the end.
    images = {node.get_name() for node in ordered if node.get_output_size() == 1 and _rank(node.output(0)) == 4}
    # Outputs in NCHW -> the same image in NHWC, by node.
    turned: dict[str, Any] = {}

    def nhwc(value: Any) -> Any:
        known = turned.get(_key(value))
        return ops.transpose(value, NHWC).output(0) if known is None else known

    for node in ordered:
        kind = node.get_type_name()
        order = _order(node)
        if order == NCHW:
            turned[_key(node.output(0))] = node.input_value(0)
        elif order == NHWC:
            source = turned.get(_key(node.input_value(0)))
            if source is not None:
                _replace(node.output(0), source)
        elif kind == "Interpolate" and _key(node.input_value(0)) in turned:
            network.validate_nodes_and_infer_types()
            large = enlarged(node, turned[_key(node.input_value(0))])
            if large is not None:
                image = ops.transpose(large, NCHW).output(0)
                _replace(node.output(0), image)
                turned[_key(image)] = large
        elif node.get_name() in images and _worth(node, kind, turned):
            for i in _images(node, kind):
                node.input(i).replace_source_output(nhwc(node.input_value(i)))
            if kind == "Concat":
                node.set_attribute("axis", 3)
            elif kind in _REDUCTIONS:
                node.input(1).replace_source_output(ops.constant(np.array([1, 2], np.int64)).output(0))
            readers = list(node.output(0).get_target_inputs())
            image = ops.transpose(node.output(0), NCHW).output(0)
            for reader in readers:
                reader.replace_source_output(image)
            turned[_key(image)] = node.output(0)
    network.validate_nodes_and_infer_types()


def _worth(node: Any, kind: str, turned: dict[str, Any]) -> bool:
    """Whether the node can be turned and an image that it reads was a packed layer's."""
    if kind in _REDUCTIONS:
        kept = node.get_attributes()["keep_dims"] and _values(node.input_value(1)) == [2, 3]
        return bool(kept and _key(node.input_value(0)) in turned)
    images = _images(node, kind)
    if kind == "Concat":
        if node.get_attributes()["axis"] not in (1, -3):
            return False
    elif kind not in ELEMENTWISE or any(
        i not in images and not _scalar(node.input_value(i)) for i in range(node.get_input_size())
    ):
        return False
    # A move of another image is not worth the one it spares: that of a pooled map, a constant or a convolution is none.
    here = [node.input_value(i) for i in images]
    moved = [value for value in here if _key(value) not in turned and not _moves_nothing(value)]
    return any(_key(value) in turned and not _pooled(value) for value in here) and not moved


def _images(node: Any, kind: str) -> list[int]:
    """The inputs that are images."""
    if kind in _REDUCTIONS:
        return [0]
    return [i for i in range(node.get_input_size()) if _rank(node.input_value(i)) == 4]


def _moves_nothing(value: Any) -> bool:
    """Whether to turn this image costs nothing: it is pooled, constant, or comes out of a convolution, which gives NHWC."""
    kind = value.get_node().get_type_name()
    return kind == "Constant" or kind in _FREE or _pooled(value)


def _pooled(value: Any) -> bool:
    shape = value.get_partial_shape()
    return all(shape[i].is_static and shape[i].get_length() == 1 for i in (2, 3))


def _scalar(value: Any) -> bool:
    shape = value.get_partial_shape()
    return bool(shape.is_static and all(size.get_length() == 1 for size in shape))


def _rank(value: Any) -> int:
    rank = value.get_partial_shape().rank
    return int(rank.get_length()) if rank.is_static else -1


def _order(node: Any) -> tuple[int, ...]:
    """A transpose's order, () for other nodes."""
    return tuple(_values(node.input_value(1)) or ()) if node.get_type_name() == "Transpose" else ()


def _values(value: Any) -> list[int] | None:
    node = value.get_node()
    return [int(v) for v in node.data.flatten()] if node.get_type_name() == "Constant" else None


def _replace(old: Any, new: Any) -> None:
    for reader in list(old.get_target_inputs()):
        reader.replace_source_output(new)


def _key(value: Any) -> str:
    """An output's name in this graph: two Python objects may stand for one output."""
    return f"{value.get_node().get_name()}:{value.get_index()}"
