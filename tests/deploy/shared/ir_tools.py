"""Small networks through OpenVINO's IR."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from helpers import settle
from torch import nn

import bidensify as bd
from bidensify.deploy.openvino.program import open_network


def exported(model: nn.Module, path: Path) -> Any:
    """The packed network's IR, run on two images beside the packed network in PyTorch."""
    from bidensify.deploy.runtimes.build import OPENVINO

    torch.manual_seed(0)
    packed = bd.pack(settle(model))
    bd.export(packed, path, example_inputs=torch.randn(2, 3, 12, 20))
    x = torch.randn(2, 3, 12, 20)
    with torch.no_grad():
        wanted = packed(x)
    found = open_network(path, OPENVINO.find(), threads=1)([x.numpy()])
    for i, want in enumerate(wanted if isinstance(wanted, tuple) else (wanted,)):
        got = torch.from_numpy(found[i])
        assert got.shape == want.shape
        assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    return read(path)


def read(path: Path) -> Any:
    """The IR as an ``openvino.Model``."""
    import openvino

    from bidensify.deploy.runtimes.build import OPENVINO

    core = openvino.Core()
    core.add_extension(str(OPENVINO.find()))
    return core.read_model(path)


def moved(network: Any) -> list[list[int]]:
    """The shapes of what transposes move, constants aside."""
    return [
        list(node.input_value(0).get_shape())
        for node in network.get_ordered_ops()
        if node.get_type_name() == "Transpose" and node.input_value(0).get_node().get_type_name() != "Constant"
    ]
