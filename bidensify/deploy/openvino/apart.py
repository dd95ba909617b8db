"""Elementwise operators stay apart from group norms and attention that they read: OpenVINO's CPU plugin crashes on them.

The plugin (2026.4.1) computes chains of elementwise operators as one, and a group norm or an attention as one that nothing else
may join. An operator that reads such a whole *and* a chain, as the sum of a residual does, it lets join both: it looks for the
whole's copy, which was never made, and the process ends (``tokenize_node`` of its snippets) as the network is compiled.
"""

from __future__ import annotations

import importlib
from typing import Any

from bidensify.deploy.openvino.layout import ELEMENTWISE

__all__ = ["keep_apart"]

_PRODUCTS = ("MatMul", "ScaledDotProductAttention")


def keep_apart(network: Any) -> None:
    """Lets elementwise operators that read a whole and something else run in one dimension more in front, which moves nothing.

    Args:
        network: an ``openvino.Model``; changed in place.
    """
    ops = importlib.import_module("openvino.opset13")
    for node in network.get_ordered_ops():
        if node.get_type_name() not in ELEMENTWISE:
            continue
        given = [
            i for i in range(node.get_input_size()) if node.input_value(i).get_node().get_type_name() != "Constant"
        ]
        if len(given) < 2 or not any(_whole(node.input_value(i).get_node()) for i in given):
            continue
        readers = list(node.output(0).get_target_inputs())
        for i in given:
            node.input(i).replace_source_output(ops.unsqueeze(node.input_value(i), 0).output(0))
        node.validate_and_infer_types()
        image = ops.squeeze(node.output(0), 0).output(0)
        for reader in readers:
            reader.replace_source_output(image)
    network.validate_nodes_and_infer_types()


def _whole(node: Any) -> bool:
    """Whether the plugin computes it as a whole: a group norm, an attention's result as it is turned behind its product."""
    kind = node.get_type_name()
    turned = kind == "Transpose" and node.input_value(0).get_node().get_type_name() in _PRODUCTS
    return turned or kind == "GroupNormalization"
