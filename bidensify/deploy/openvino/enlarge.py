"""Enlargements of NHWC images as matrix products: by columns, then by rows.

OpenVINO enlarges in NCHW, and a change to NHWC behind that takes longer than the enlargement; two products of an image with a
constant matrix take an eighth to a half of both.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

__all__ = ["NAME", "enlarged"]

# How the products' names begin: they stay in float where the rest becomes int8.
NAME = "bidensify_enlarge"
# The columns of an image, up to which a product is the faster way (its work grows with them).
_WIDEST = 128


def enlarged(node: Any, image: Any) -> Any | None:
    """The output of an ``Interpolate`` over height and width, in NHWC; None where it is to stay as it is.

    Args:
        node: the ``Interpolate``, on an NCHW image.
        image: the same image in NHWC.
    """
    shapes = node.input_value(0).get_partial_shape(), node.output(0).get_partial_shape()
    if any(shape.is_dynamic for shape in shapes):
        return None
    (n, c, h, w), (_, channels, height, width) = (tuple(shape.to_shape()) for shape in shapes)
    options = _options(node)
    if options is None or channels != c or w > _WIDEST or not _plain(node, (height / h, width / w)):
        return None
    ops = importlib.import_module("openvino.opset13")
    rows, columns = _matrix(h, height, options), _matrix(w, width, options)
    name = f"{NAME}_{node.get_name()}"
    # Reshapes behind products alone: see convert.py, where OpenVINO asks what a reshape reads.
    wide = ops.matmul(ops.constant(columns[None, None]), image, False, False, name=f"{name}_columns")
    lines = ops.reshape(wide, [n, h, width * c], False)
    tall = ops.matmul(ops.constant(rows[None]), lines, False, False, name=f"{name}_rows")
    return ops.reshape(tall, [n, height, width, c], False).output(0)


def _options(node: Any) -> dict[str, Any] | None:
    """The mode as ``torch.nn.functional.interpolate`` calls it on one dimension."""
    given = node.get_attributes()
    if given["antialias"] or any((*given["pads_begin"], *given["pads_end"])):
        return None
    mode, place = given["mode"], given["coordinate_transformation_mode"]
    if mode == "nearest":
        return {"mode": "nearest"} if (place, given["nearest_mode"]) == ("asymmetric", "floor") else None
    if mode != "linear_onnx" or place not in ("align_corners", "pytorch_half_pixel", "half_pixel"):
        return None
    return {"mode": "linear", "align_corners": place == "align_corners"}


def _plain(node: Any, factors: tuple[float, float]) -> bool:
    """Whether height and width alone change, and by the factors that the sizes say."""
    given = [node.input_value(i).get_node() for i in range(1, node.get_input_size())]
    if len(given) != 2 or any(each.get_type_name() != "Constant" for each in given):
        return False
    values, axes = (each.data.flatten() for each in given)
    said = node.get_attributes()["shape_calculation_mode"] == "sizes" or np.allclose(values, factors, rtol=1e-6)
    return axes.tolist() == [2, 3] and bool(said)


def _matrix(size: int, target: int, options: dict[str, Any]) -> Any:
    """(target, size): what each line of the target takes of the image's."""
    return F.interpolate(torch.eye(size)[None], size=target, **options)[0].T.contiguous().numpy()
