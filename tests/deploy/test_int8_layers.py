"""Layers that a plan rounds to int8, in the files that run without torch: the same ranges, the same values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import relative
from runtimes import RUNTIMES, Beside, needs, outputs
from torch import nn

import bidensify as bd
from bidensify.errors import ConfigError
from bidensify.nn import Int8Layer, int8_layers, make_int8

LAYERS = {
    "conv": (lambda: nn.Conv2d(16, 24, 3, padding=1), (2, 16, 9, 11)),
    "strided, no bias": (lambda: nn.Conv2d(16, 8, 3, 2, 1, bias=False), (2, 16, 9, 11)),
    "depthwise": (lambda: nn.Conv2d(16, 16, 5, padding=2, groups=16), (2, 16, 9, 11)),
    "transposed": (lambda: nn.ConvTranspose2d(16, 12, 2, 2, groups=4), (2, 16, 5, 7)),
    "linear": (lambda: nn.Linear(16, 10), (2, 7, 16)),
}


class One(nn.Module):
    """A layer whose only output is in a tuple, as ``Beside`` joins them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.layer(x),)


def rounded(layer: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The layer in int8, calibrated."""
    layer.__class__ = make_int8(type(layer))
    assert isinstance(layer, Int8Layer)
    layer.install_int8()
    assert layer.int8 is not None
    layer.eval()
    layer.int8.begin_calibration()
    layer(torch.randn(shape) * 0.7 + 0.2)
    layer.int8.end_calibration()
    return layer


@pytest.mark.parametrize("suffix", RUNTIMES)
def test_every_kind_of_layer(suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Beside([One(rounded(make(), shape)) for make, shape in LAYERS.values()])
    inputs = [torch.randn(shape) for _, shape in LAYERS.values()]
    done = bd.export(model, tmp_path / f"net{suffix}", example_inputs=tuple(inputs))
    assert done.note.startswith("5 int8 layers ('nets.0.layer', ")
    with torch.no_grad():
        wanted = model(*inputs)
    for name, got, want in zip(LAYERS, outputs(done.path, inputs), wanted, strict=True):
        # One value of an input on the edge between two steps would be 1e-3 here.
        assert relative(got, want) < 1e-5, name


def network() -> nn.Module:
    """Binary and int8 layers, packed."""
    torch.manual_seed(0)
    conv = [nn.Conv2d(3, 16, 3, padding=1), *(nn.Conv2d(16, 16, 3, padding=1) for _ in range(3)), nn.Conv2d(16, 4, 1)]
    net = nn.Sequential(conv[0], nn.ReLU(), conv[1], nn.BatchNorm2d(16), nn.ReLU(), conv[2], conv[3], conv[4]).eval()
    x = torch.randn(2, 3, 24, 32)
    config = bd.BidensifyConfig(rules=[bd.Rule("2", "int8"), bd.Rule("6", "int8")])
    student = bd.bidensify(net, config, example_inputs=x)
    bd.calibrate(student, [torch.randn(4, 3, 24, 32)])
    return bd.pack(student.eval())


@pytest.mark.parametrize("suffix", RUNTIMES)
def test_a_network_of_both(suffix: str, tmp_path: Path) -> None:
    model, x = network(), torch.randn(1, 3, 24, 32)
    done = bd.export(model, tmp_path / f"net{suffix}", example_inputs=x)
    assert done.difference is not None
    assert done.difference < 1e-5
    assert "multiply them in float" in done.note
    assert len(int8_layers(model)) == 2, "the network is left as it was"


@needs("openvino")
def test_an_ir_rounds_within_the_recorded_ranges(tmp_path: Path) -> None:
    import openvino as ov

    from bidensify.deploy.runtimes.build import OPENVINO

    model = network()
    bd.export(model, tmp_path / "net.xml", example_inputs=torch.randn(1, 3, 24, 32))
    core = ov.Core()
    core.add_extension(str(OPENVINO.find()))
    nodes = [
        node
        for node in core.read_model(tmp_path / "net.xml").get_ordered_ops()
        if node.get_type_name() == "FakeQuantize"
    ]
    assert len(nodes) == 2
    for node, (_, layer) in zip(nodes, int8_layers(model), strict=True):
        assert layer.int8 is not None
        low, high = (float(node.input_value(i).get_node().data.reshape(())) for i in (3, 4))
        step = (high - low) / 255
        assert node.get_attributes()["levels"] == 256
        # The range, moved by less than a step so that 0 is on a level.
        assert high - low == pytest.approx(float(layer.int8.high - layer.int8.low), rel=1e-5)
        assert abs(low - float(layer.int8.low)) <= step
        assert low / step == pytest.approx(round(low / step), abs=1e-3)


@needs("executorch")
def test_a_pte_rounds_by_the_recorded_numbers() -> None:
    from bidensify.deploy.export.capture import capture
    from bidensify.deploy.runtimes.prepare import prepared

    model = network()
    with torch.no_grad():
        program = capture(prepared(model), (torch.randn(1, 3, 24, 32),), {}, None)
    found = [node.args[1:] for node in program.graph.nodes if "quantized_decomposed.quantize" in str(node.target)]
    wanted = []
    for _, layer in int8_layers(model):
        assert layer.int8 is not None
        step = float(layer.int8.high - layer.int8.low) / 255
        wanted.append((pytest.approx(step), round(-float(layer.int8.low) / step) - 128, -128, 127, torch.int8))
    assert found == wanted


@pytest.mark.parametrize("suffix", RUNTIMES)
def test_a_layer_without_a_range_is_refused(suffix: str, tmp_path: Path) -> None:
    layer = nn.Conv2d(3, 4, 3)
    layer.__class__ = make_int8(nn.Conv2d)
    layer.install_int8()  # type: ignore[operator]
    with pytest.raises(ConfigError, match="the int8 layer '0' has no range of its input: bidensify.calibrate"):
        bd.export(nn.Sequential(layer).eval(), tmp_path / f"net{suffix}", example_inputs=torch.randn(1, 3, 8, 8))
