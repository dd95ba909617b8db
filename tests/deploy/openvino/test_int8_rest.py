"""The int8 rest under OpenVINO multiplies what it rounded, on every processor: no sum of two products saturates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import settle
from ir_tools import read
from runtimes import needs
from torch import Tensor, nn

import bidensify as bd
from bidensify.deploy.openvino import convert
from bidensify.deploy.openvino.program import open_network
from bidensify.errors import PlanError
from bidensify.nn import BiDenseConv2d

pytestmark = needs("openvino", "nncf")


class Large(nn.Module):
    """Behind a packed layer convolutions whose products are large and of one sign: two of them do not fit in 16 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.packed = nn.Conv2d(3, 16, 3, padding=1), BiDenseConv2d(16, 16, 3, padding=1)
        self.layers = nn.ModuleList((nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 1), nn.Conv2d(16, 16, 3, 2, 1)))
        for layer in self.layers:
            layer.weight.data = 0.05 + 0.01 * layer.weight.data

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = 5 + torch.sigmoid(self.packed(self.stem(x)))
        values = []
        for layer in self.layers:
            values += [y, layer(y)]
            y = 5 + torch.sigmoid(values[-1] - values[-1].mean())
        return tuple(values)


def _constants(node: Any) -> list[Any]:
    """Arrays that an operator's value is made of."""
    if node.get_type_name() == "Constant":
        return [node.data]
    return [array for value in node.input_values() for array in _constants(value.get_node())]


def test_int8_multiplies_what_it_rounded(tmp_path: Path) -> None:
    from bidensify.deploy.runtimes.build import OPENVINO

    torch.manual_seed(0)
    packed = bd.pack(settle(Large()))
    images = [torch.randn(1, 3, 16, 16) for _ in range(4)]
    path = bd.export(packed, tmp_path / "net.xml", example_inputs=images[0], int8_rest=images).path
    found = open_network(path, OPENVINO.find())([images[0].numpy()])
    values = [torch.from_numpy(found[i]).double() for i in range(6)]
    network = read(path)
    nodes = [node for node in network.get_ordered_ops() if node.get_type_name() == "Convolution"]
    assert len(nodes) == 4
    for i, node in enumerate(nodes[1:]):
        rounded = node.input_value(0).get_node()
        low, high = (float(rounded.input_value(k).get_node().data.flatten()[0]) for k in (1, 2))
        step = (high - low) / 255
        x = ((values[2 * i].clamp(low, high) - low) / step).round() * step + low
        codes, scale = (
            torch.from_numpy(array.astype("float64")) for array in _constants(node.input_value(1).get_node())
        )
        assert float(codes.abs().max()) <= 64
        layer = packed.get_submodule(f"layers.{i}")
        (reader,) = node.output(0).get_target_inputs()
        # NNCF corrects the bias.
        (bias,) = _constants(reader.get_node().input_value(1).get_node())
        want = F.conv2d(x, codes * scale, torch.from_numpy(bias.flatten()).double(), layer.stride, layer.padding)
        assert float((values[2 * i + 1] - want).abs().mean()) < 1e-5 * float(want.abs().mean()), i


class Chain(nn.Module):
    """Additions between packed layers, each of which doubles the paths back to the stem, and what stands behind them."""

    def __init__(self, behind: nn.Module, length: int = 26) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1)
        self.layers = nn.ModuleList(BiDenseConv2d(8, 8, 1) for _ in range(length))
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        for layer in self.layers:
            y = (y + layer(y)) * 0.5
        return self.head(self.behind(y))


@pytest.mark.parametrize(
    "behind",
    [
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Sequential(nn.PixelShuffle(2), nn.PixelUnshuffle(2)),
        nn.GroupNorm(2, 8),
    ],
)
def test_what_stands_behind_many_additions_compiles_in_int8(tmp_path: Path, behind: nn.Module) -> None:
    """OpenVINO walks back along all paths from a reshape until it meets a convolution: 2 to the power of 26 here."""
    model = bd.pack(settle(Chain(behind)))
    images = [torch.randn(1, 3, 16, 16) for _ in range(2)]
    done = bd.export(model, tmp_path / "net.xml", example_inputs=images[0], int8_rest=images)
    assert done.difference is not None
    assert done.difference < 0.1


def test_walks_that_would_not_end_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind tokens there is no place for a convolution."""
    monkeypatch.setattr(convert, "_MANY_STEPS", 0)
    monkeypatch.setattr(convert, "_MOST_STEPS", 0)
    model = bd.pack(settle(Chain(nn.Sequential(nn.Flatten(2), nn.Softmax(2), nn.Unflatten(2, (16, 16))), length=2)))
    images = [torch.randn(1, 3, 16, 16) for _ in range(2)]
    with pytest.raises(PlanError, match="would not end compiling this network in int8.*leave int8_rest out"):
        bd.export(model, tmp_path / "int8.xml", example_inputs=images[0], int8_rest=images)
