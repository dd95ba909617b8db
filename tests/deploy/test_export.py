"""Exported files compute what the network computes, keep the bits packed, and take other sizes."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from halves import refused_half
from torch import nn
from typer.testing import CliRunner

import bidensify as bd
from bidensify.deploy import export as module
from bidensify.deploy import packed_layers
from bidensify.deploy.export import export
from bidensify.errors import CheckError, ConfigError, PlanError
from bidensify.methods import get_method
from bidensify.models.unet import unet

CONVOLUTIONAL = [name for name in bd.available_methods() if get_method(name).takes("conv2d")]


@pytest.fixture(scope="module")
def packed() -> nn.Module:
    torch.manual_seed(0)
    student = bd.bidensify(unet(width=8))
    bd.calibrate(student, [torch.randn(2, 3, 64, 64)])
    return bd.pack(student.eval())


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """Where what is asked does not depend on how many layers there are."""
    torch.manual_seed(0)
    student = bd.bidensify(unet(width=8, levels=1))
    bd.calibrate(student, [torch.randn(2, 3, 64, 64)])
    return bd.pack(student.eval())


def test_onnx_runs_elsewhere_on_other_sizes_and_stays_small(packed: nn.Module, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    done = export(packed, tmp_path / "net.onnx", example_inputs=torch.randn(2, 3, 64, 64))
    assert done.runtime == "onnxruntime"
    assert done.difference is not None
    assert done.difference < 1e-4
    session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    for shape in ((2, 3, 64, 64), (3, 3, 96, 128)):
        x = torch.randn(shape)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            close = torch.isclose(torch.from_numpy(y), packed(x), rtol=1e-3, atol=1e-3)
        assert close.float().mean() > 0.99

    import onnx

    proto = onnx.load(str(done.path))
    weights = sum(len(tensor.raw_data) for tensor in proto.graph.initializer)
    words = sum(4 * layer.tiles.numel() for layer in packed_layers(packed).values())
    floats = sum(t.numel() * t.element_size() for t in packed.state_dict().values() if t.dtype != torch.uint8)
    assert words < weights <= words + floats + 10_000
    assert done.bytes < weights + 2_000_000
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}


@pytest.mark.parametrize("name", ["net.onnx", "net.pt2"])
@pytest.mark.parametrize("state", ["latent", "packed"])
def test_two_bits_of_activations_run_elsewhere(tmp_path: Path, name: str, state: str) -> None:
    if name.endswith("onnx"):
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    student = bd.bidensify(unet(width=8, levels=1), bd.BidensifyConfig(act_bits=2)).eval()
    bd.calibrate(student, [torch.randn(2, 3, 64, 64)])
    network = bd.pack(student) if state == "packed" else student
    done = export(network, tmp_path / name, example_inputs=torch.randn(2, 3, 64, 64))
    assert done.runtime is not None
    assert done.difference is not None
    assert done.difference < 1e-3


@pytest.mark.parametrize("method", CONVOLUTIONAL)
def test_a_latent_network_goes_to_onnx(method: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for layer in (nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1), nn.ConvTranspose2d(8, 8, 2, 2)):
        layers += [layer, nn.BatchNorm2d(8), nn.ReLU()]
    student = bd.bidensify(nn.Sequential(*layers, nn.Conv2d(8, 5, 1)), method=method)
    bd.calibrate(student, [torch.randn(2, 3, 32, 32)])
    done = export(student.eval(), tmp_path / "net.onnx", example_inputs=torch.randn(2, 3, 32, 32))
    assert done.difference is not None
    assert done.difference < 1e-4
    session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    x = torch.zeros(1, 3, 40, 48)  # sign(0) = +1 there too
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        close = torch.isclose(torch.from_numpy(y), student(x), rtol=1e-3, atol=1e-3)
    assert close.float().mean() > 0.99


@pytest.mark.parametrize("name", ["net.pt2", "net.onnx"])
def test_files_hold_no_path_of_this_machine(small: nn.Module, tmp_path: Path, name: str) -> None:
    if name.endswith("onnx"):
        pytest.importorskip("onnxscript")
    done = export(small, tmp_path / name, example_inputs=torch.randn(2, 3, 64, 64))
    parts = [done.path.read_bytes()]
    if zipfile.is_zipfile(done.path):
        with zipfile.ZipFile(done.path) as file:
            parts = [file.read(part) for part in file.namelist()]
            assert any(b"import bidensify.deploy" in part for part in parts)
    for place in (bd.__path__[0], torch.__path__[0], str(Path(__file__).parent), sys.prefix, str(Path.home()), ".py"):
        assert not any(place.encode() in part for part in parts), place


def test_torch_program_loads_again(packed: nn.Module, tmp_path: Path) -> None:
    done = export(packed, tmp_path / "net.pt2", example_inputs=torch.randn(2, 3, 64, 64))
    again = torch.export.load(str(done.path)).module()
    x = torch.randn(3, 3, 32, 96)
    with torch.no_grad():
        torch.testing.assert_close(again(x), packed(x))
    assert any("packed_layer" in str(node.target) for node in again.graph.nodes)


def test_the_network_is_left_as_it_was(packed: nn.Module, tmp_path: Path) -> None:
    packed.train()
    packed.get_submodule("encoder").eval()
    before = [m.training for m in packed.modules()]
    export(packed, tmp_path / "net.pt2", dynamic=False)
    assert [m.training for m in packed.modules()] == before


class Fork(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if float(x.sum()) > 0 else -x


def test_errors_say_what_and_what_to_do(packed: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'net\.bin'.*\.onnx"):
        export(packed, tmp_path / "net.bin")
    with pytest.raises(PlanError, match="cannot capture Fork"):
        export(Fork(), tmp_path / "net.pt2", example_inputs=torch.ones(2, 3, 4, 4))
    with pytest.raises(PlanError, match="none of the example inputs"):
        export(packed, tmp_path / "net.pt2", example_inputs=torch.ones(2, 5, 4, 4))
    real = module._write_program

    def wrong(*args: object) -> tuple[str | None, list[torch.Tensor]]:
        runtime, outputs = real(*args)  # type: ignore[arg-type]
        return runtime, [1.1 * value for value in outputs or []]

    monkeypatch.setattr(module, "_write_program", wrong)
    with pytest.raises(CheckError, match=r"differ from the network's by 0\.1"):
        export(packed, tmp_path / "net.pt2")
    assert not list(tmp_path.iterdir())


def test_command(tmp_path: Path) -> None:
    from bidensify.cli.app import app

    pytest.importorskip("onnxscript")
    made = CliRunner().invoke(
        app, ["convert", "demo:unet", str(tmp_path / "latent"), "-o", "width=8", "-o", "levels=1"]
    )
    assert made.exit_code == 0, made.output
    arguments = ["export", str(tmp_path / "latent"), str(tmp_path / "net.onnx"), "--input", "2x3x64x64"]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "bytes" in done.output
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2


def test_no_output_hides_behind_a_larger_one() -> None:
    from bidensify.deploy.export.capture import compare

    small, large, nan = torch.ones(4), torch.full((4, 4), 1e6), torch.tensor([float("nan")])
    assert compare([small, large], [small, large * 1.001], "net") == pytest.approx(1e-3, rel=1e-2)
    assert compare([small, large, torch.zeros(2)], [small * 1.004, large, torch.zeros(2)], "net") == pytest.approx(
        4e-3, rel=1e-2
    )
    for wrong in ([-small, large, small], [small, large, nan.expand(4)], [small * nan, large, small]):
        with pytest.raises(CheckError, match="nothing was written"):
            compare([small, large, small], wrong, "net")


@pytest.mark.parametrize("suffix", [".pte", ".xml"])
@pytest.mark.parametrize(
    "constants", [{"forward": [1.0]}, {"input0_least": [1.0]}, {"my name": [1.0]}, {1: [1.0]}, {"é": [1.0]}]
)
def test_names_that_a_program_cannot_give_to_numbers(constants: dict[str, list[float]], suffix: str) -> None:
    with pytest.raises(ConfigError, match=f"the name {next(iter(constants))!r} must be of letters"):
        export(nn.Identity(), f"net{suffix}", constants=constants)


@pytest.mark.parametrize("values", [3.0, "12", None, ["a"], [[1.0]], {"a": 1.0}])
def test_what_is_no_sequence_of_numbers(values: Any) -> None:
    with pytest.raises(ConfigError, match="constants: scale=.* must be a sequence of numbers"):
        export(nn.Identity(), "net.xml", constants={"scale": values})


class Same(nn.Conv2d):
    """TensorFlow's "same" padding."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads: list[int] = []
        for size, stride, kernel in zip(x.shape[:1:-1], self.stride[::-1], self.kernel_size[::-1]):
            total = max(((size + stride - 1) // stride - 1) * stride + kernel - size, 0)
            pads += [total // 2, total - total // 2]
        return nn.functional.conv2d(nn.functional.pad(x, pads), self.weight, self.bias, self.stride)


def test_same_padding_of_sizes_that_vary(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), Same(16, 32, 3, stride=2), nn.Sigmoid(), nn.Conv2d(32, 4, 1))
    x = torch.randn(2, 3, 33, 33)
    packed = bd.pack(bd.bidensify(net, bd.BidensifyConfig(rules=[bd.Rule("1", "bidense")]), example_inputs=x).eval())
    assert packed[1].spec.same  # type: ignore[index, union-attr]
    done = export(packed, tmp_path / "net.onnx", example_inputs=x)
    session = onnxruntime.InferenceSession(str(done.path), providers=["CPUExecutionProvider"])
    for size in ((33, 33), (32, 32), (45, 64), (17, 18)):
        x = torch.randn(2, 3, *size)
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(y), packed(x), rtol=1e-3, atol=1e-3)


def test_what_onnx_does_not_know_is_an_error_of_ours(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")

    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    with pytest.raises(PlanError, match=r"torch\.onnx does not take this network: \w+Error"):
        export(Odd(), tmp_path / "net.onnx", example_inputs=torch.randn(1, 3, 8, 8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["packed so", "moved"])
def test_onnx_of_a_packed_network_is_in_float32(how: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    refused_half(".onnx", torch.bfloat16, how, tmp_path)


def test_onnx_takes_half_precision(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval().half()
    done = export(net, tmp_path / "net.onnx", example_inputs=torch.randn(1, 3, 16, 16).half())
    assert done.difference is not None
    assert done.difference < 1e-2
