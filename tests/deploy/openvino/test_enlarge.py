"""Enlargements between packed layers under OpenVINO: products in NHWC, equal to PyTorch's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ir_tools import exported, moved, read
from runtimes import needs
from torch import Tensor, nn

import bidensify as bd
from bidensify.nn import BiDenseConv2d

pytestmark = needs("openvino")


class Enlarging(nn.Module):
    """Two packed layers, an enlargement between them, and the sum with another packed layer's image of that size."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options
        self.first, self.second, self.last = (
            BiDenseConv2d(3, 16, 3, padding=1, stride=2),
            BiDenseConv2d(3, 16, 3, padding=1),
            BiDenseConv2d(16, 8, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        large = F.interpolate(torch.tanh(self.first(x)), **self.options)
        return self.last(large + F.interpolate(self.second(x), large.shape[2:]))  # type: ignore[no-any-return]


def kinds(network: Any) -> list[str]:
    return [node.get_type_name() for node in network.get_ordered_ops()]


@pytest.mark.parametrize(
    "options",
    [
        {"scale_factor": 2, "mode": "bilinear"},
        {"scale_factor": 2, "mode": "bilinear", "align_corners": True},
        {"scale_factor": (3, 2), "mode": "bilinear", "align_corners": True},
        {"size": (17, 23), "mode": "bilinear"},
        {"size": (17, 23), "mode": "bilinear", "align_corners": True},
        {"size": (4, 5), "mode": "bilinear"},
        {"size": (1, 1), "mode": "bilinear", "align_corners": True},
        {"size": (19, 20), "mode": "nearest"},
        {"scale_factor": (3.0, 4.0), "mode": "nearest"},
    ],
    ids=str,
)
def test_enlargements_stay_in_nhwc(tmp_path: Path, options: dict[str, Any]) -> None:
    network = exported(Enlarging(**options), tmp_path / "net.xml")
    assert "Interpolate" not in kinds(network)
    # The image that comes in, and the one that leaves.
    assert sum(shape.count(1) < 2 for shape in moved(network)) <= 2


@pytest.mark.parametrize(
    "options",
    [
        {"scale_factor": 1.7, "mode": "bilinear"},
        {"scale_factor": 2, "mode": "bicubic"},
        {"size": (12, 20), "mode": "area"},
    ],
    ids=str,
)
def test_what_no_product_says_is_computed_as_before(tmp_path: Path, options: dict[str, Any]) -> None:
    exported(Enlarging(**options), tmp_path / "net.xml")


def test_an_enlargement_stays_in_float_beside_an_int8_rest(tmp_path: Path) -> None:
    pytest.importorskip("nncf")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = BiDenseConv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.interpolate(self.first(x), scale_factor=2, mode="bilinear"))  # type: ignore[no-any-return]

    images = [torch.randn(1, 3, 12, 20) for _ in range(2)]
    found = bd.export(bd.pack(Net().eval()), tmp_path / "net.xml", example_inputs=images[0], int8_rest=images)
    assert found.difference is not None
    assert found.difference < 0.05
    network = read(tmp_path / "net.xml")
    assert kinds(network).count("MatMul") == 2
    assert "FakeQuantize" in kinds(network)
    for node in network.get_ordered_ops():
        if node.get_type_name() == "MatMul":
            assert {value.get_node().get_type_name() for value in node.input_values()} <= {
                "Constant",
                "Reshape",
                "packed_layer",
            }
