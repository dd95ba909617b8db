"""Exported files compute what the network computes, keep the bits packed, and take other sizes."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

import pytest
import torch
from runtimes import needs
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


@needs("openvino")
def test_openvino_reads_the_onnx(packed: nn.Module, tmp_path: Path) -> None:
    import openvino as ov

    pytest.importorskip("onnxscript")
    x = torch.randn(2, 3, 64, 64)
    done = export(packed, tmp_path / "net.onnx", example_inputs=x)
    network = ov.Core().compile_model(str(done.path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    with torch.no_grad():
        want = packed(x)
    got = torch.from_numpy(network([x.numpy()])[0])
    assert float((got - want).abs().mean()) < 1e-5 * float(want.abs().mean())


@pytest.mark.parametrize("name", ["net.onnx", "net.pt2"])
@pytest.mark.parametrize("state", ["latent", "packed"])
def test_two_bits_of_activations_run_elsewhere(tmp_path: Path, name: str, state: str) -> None:
    if name.endswith("onnx"):
        pytest.importorskip("onnxruntime")
        pytest.importorskip("onnxscript")
    torch.manual_seed(0)
    student = bd.bidensify(unet(width=8), bd.BidensifyConfig(act_bits=2)).eval()
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
    student = bd.bidensify(unet(width=8, levels=2), method=method)
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
def test_files_hold_no_path_of_this_machine(packed: nn.Module, tmp_path: Path, name: str) -> None:
    if name.endswith("onnx"):
        pytest.importorskip("onnxscript")
    done = export(packed, tmp_path / name, example_inputs=torch.randn(2, 3, 64, 64))
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


def test_command(tmp_path: Path, packed: nn.Module) -> None:
    from bidensify.cli.app import app

    pytest.importorskip("onnxscript")
    made = CliRunner().invoke(app, ["convert", "demo:unet", str(tmp_path / "latent"), "-o", "width=8"])
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
