"""Norms over an image's channels, NHWC, as norms over the rows of a matrix.

OpenVINO's CPU plugin (2026.4) has no kernel for a norm over the last of four axes and takes it to pieces: a mean, a
difference, its square and so on, each a pass over the image. Nor do its low-precision passes end then: every such norm makes
four paths of one, and they walk back along each (see convert.py). Over the last of three axes it has a kernel, and the
reshapes around it move nothing.
"""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

__all__ = ["as_rows", "taken_to_pieces"]


def taken_to_pieces(node: Any) -> bool:
    """Whether the plugin has no kernel for this ``MVN``: it has them for the last axes, all but the batch's or (from three
    axes on) the channels'.
    """
    rank, axes = _axes(node)
    if rank is None or axes is None:
        return True
    return axes not in (list(range(1, rank)), list(range(2, rank)), [0] if rank == 1 else [])


def as_rows(network: Any) -> None:
    """Norms over the last of four or more axes, in place."""
    ops = importlib.import_module("openvino.opset13")
    for node in network.get_ordered_ops():
        if node.get_type_name() != "MVN":
            continue
        rank, axes = _axes(node)
        if rank is None or rank < 4 or axes != [rank - 1]:
            continue
        image = node.input_value(0)
        channels = image.get_partial_shape()[rank - 1]
        if channels.is_dynamic:
            continue
        given = node.get_attributes()
        readers = list(node.output(0).get_target_inputs())
        rows = ops.reshape(image, np.array([0, -1, channels.get_length()], np.int64), True)
        norm = ops.mvn(rows, np.array([2], np.int64), given["normalize_variance"], given["eps"], given["eps_mode"])
        back = ops.reshape(norm, ops.shape_of(image), False).output(0)
        for reader in readers:
            reader.replace_source_output(back)
    network.validate_nodes_and_infer_types()


def _axes(node: Any) -> tuple[int | None, list[int] | None]:
    """The rank of what an ``MVN`` reads, and its axes, counted from the front; None where they are open."""
    shape, given = node.input_value(0).get_partial_shape(), node.input_value(1).get_node()
    if shape.rank.is_dynamic:
        return None, None
    rank = int(shape.rank.get_length())
    if given.get_type_name() != "Constant":
        return rank, None
    return rank, sorted(int(axis) % rank for axis in np.ravel(given.get_data()))
