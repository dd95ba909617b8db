"""Networks under OpenVINO: the IR gives what the packed network gives, and what cannot be is refused with the reason."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import LAYERS, Decoder, Layers, packed_with, settle
from ir_tools import read
from runtimes import needs
from torch import Tensor, nn
from typer.testing import CliRunner

import bidensify as bd
from bidensify.cli.app import app
from bidensify.deploy.backends import available_kernels
from bidensify.deploy.freeze import freeze
from bidensify.deploy.openvino.program import open_network
from bidensify.deploy.openvino.program import run as run_network
from bidensify.errors import CheckError, ConfigError, MissingExtraError, PlanError
from bidensify.methods import get_method
from bidensify.models import build_model

ROOT = Path(__file__).parents[3]
here = needs("openvino")


@pytest.fixture(scope="session")
def library() -> Path:
    """The extension, built once for these sources."""
    from bidensify.deploy.runtimes.build import OPENVINO

    return OPENVINO.find()


def run(library: Path, path: Path, *values: Tensor) -> list[Tensor]:
    """The outputs of an IR."""
    network = open_network(path, library, threads=1)
    return [torch.from_numpy(found) for found in run_network(network, [value.numpy() for value in values])]


@here
def test_single_layers_give_the_same_bits_on_every_kernel(
    tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layers = [freeze(settle(make())) for make, _ in LAYERS.values()]
    inputs = tuple(torch.randn(shape) for _, shape in LAYERS.values())
    model = Layers(layers)
    done = bd.export(model, tmp_path / "layers.xml", example_inputs=inputs)
    assert done.runtime == "openvino"
    assert done.difference == done.largest == 0
    with torch.no_grad():
        wanted = model(*inputs)
    for kernel in available_kernels()[:-1]:
        monkeypatch.setenv("BIDENSIFY_KERNEL", kernel)
        for name, want, got in zip(LAYERS, wanted, run(library, done.path, *inputs), strict=True):
            assert torch.equal(got, want), (name, kernel)


@here
@pytest.mark.parametrize("method", [name for name in bd.available_methods() if get_method(name).takes("conv2d")])
def test_every_method(method: str, tmp_path: Path, library: Path) -> None:
    done = bd.export(packed_with(method), tmp_path / "net.xml", example_inputs=torch.randn(2, 3, 12, 12))
    assert done.difference is not None
    assert done.difference < 1e-5


@pytest.fixture(scope="module")
def decoder() -> nn.Module:
    torch.manual_seed(0)
    return bd.pack(settle(Decoder()))


@pytest.fixture(scope="module")
def exported(decoder: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An IR for images of 32x48."""
    path = tmp_path_factory.mktemp("ir") / "net.xml"
    numbers = {"image_mean": [0.5, 0.25, 0.125]}
    done = bd.export(decoder, path, runtime="openvino", example_inputs=torch.randn(1, 3, 32, 48), constants=numbers)
    assert done.difference is not None
    assert done.difference < 1e-5
    assert sorted(file.name for file in path.parent.iterdir()) == ["net.bin", "net.xml"]
    return path


@here
def test_parts_are_read_where_they_lie_and_transposes_that_meet_are_gone(exported: Path) -> None:
    net = read(exported)
    layers = [node for node in net.get_ordered_ops() if node.get_type_name() == "packed_layer"]
    assert [list(node.get_attributes()["up"]) for node in layers] == [[1], [2, 1], [2]]
    # From one layer to the next there is nothing between.
    assert layers[1].input_value(0).get_node() == layers[0]
    kinds = [node.get_type_name() for node in net.get_ops()]
    assert not {"Concat", "Interpolate"} & set(kinds)
    assert net.get_rt_info(["bidensify", "image_mean"]).astype(str) == "0.5 0.25 0.125"


@here
def test_a_network_of_any_size(decoder: nn.Module, library: Path, tmp_path: Path) -> None:
    done = bd.export(decoder, tmp_path / "net.xml", example_inputs=torch.randn(2, 3, 32, 48), dynamic=True)
    for size in ((1, 16, 16), (2, 64, 64), (3, 32, 20)):
        x = torch.randn(size[0], 3, *size[1:])
        with torch.no_grad():
            want = decoder(x)
        for a, b in zip(run(library, done.path, x), want.values(), strict=True):
            assert float((a - b).abs().max()) < 1e-5 * float(b.abs().max())


@here
@needs("nncf")
def test_an_int8_rest_is_near(tmp_path: Path, library: Path) -> None:
    torch.manual_seed(0)
    decoder = bd.pack(settle(Decoder()))
    images = [torch.randn(1, 3, 32, 32) for _ in range(4)]
    done = bd.export(decoder, tmp_path / "net.xml", example_inputs=images[0], int8_rest=images)
    assert done.difference is not None
    assert 0 < done.difference < 0.3
    text = (tmp_path / "net.xml").read_text()
    # The stem's and the head's inputs alone.
    assert text.count('type="FakeQuantize"') == 2
    with pytest.raises(ConfigError, match="at least one"):
        bd.export(decoder, tmp_path / "other.xml", example_inputs=images[0], int8_rest=[])


@here
@needs("nncf")
def test_a_crash_of_the_quantizer_is_an_error(
    decoder: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bidensify.deploy.openvino import quantize

    (tmp_path / "crash.py").write_text("import os; print('so far', flush=True); os.abort()")
    monkeypatch.setattr(quantize, "__file__", str(tmp_path / "crash.py"))
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(PlanError, match=r"NNCF does not take this network \(exit -6\): so far"):
        bd.export(decoder, tmp_path / "net.xml", example_inputs=x, int8_rest=[x])


def edited(exported: Path, place: Path, pattern: str, replacement: str) -> Path:
    """A copy of the IR with its .xml edited."""
    text, count = re.subn(pattern, replacement, exported.read_text(), count=1)
    assert count == 1
    (place / "bad.xml").write_text(text)
    (place / "bad.bin").write_bytes(exported.with_suffix(".bin").read_bytes())
    return place / "bad.xml"


@here
@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (r'spec="1, ', 'spec="3, ', "a layer of version 3; this runtime runs 1 to 2: build a newer one"),
        (r'spec="1, 0, 16, 32', 'spec="1, 0, 17, 32', "17 channels|the layer takes 17|must be"),
        (r'spec="1, 0, 16, 32', 'spec="1, 0, 0, 32', "a channel count or groups of 0"),
        (r'spec="1, 0, 16, 32, 3', 'spec="1, 0, 16, 32', "has 33 integers, got 32"),
        (r'up="2, 1"', 'up="3, 1"', "does not fit"),
        (r'up="2, 1"', 'up="2"', "5 inputs|4 inputs; there must be"),
        (r'up="2, 1"', 'up="-2, 1"', "upsampled -2 times"),
        (r'given="0"', 'given="9"', "given=9 is not within"),
        (r'given="0"', 'given="4"', "3 inputs; there must be 4"),
    ],
)
def test_an_edited_layer_is_refused_with_the_reason(
    exported: Path, library: Path, tmp_path: Path, pattern: str, replacement: str, message: str
) -> None:
    path = edited(exported, tmp_path, pattern, replacement)
    with pytest.raises(RuntimeError, match=message):
        run(library, path, torch.zeros(1, 3, 32, 48))


@here
def test_other_inputs_kernels_and_files_are_refused(
    exported: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for bad in (torch.zeros(1, 2, 32, 48), torch.zeros(1, 3, 64, 64), torch.zeros(3, 32, 48)):
        with pytest.raises(RuntimeError):
            run(library, exported, bad)
    with monkeypatch.context() as patched:
        patched.setenv("BIDENSIFY_KERNEL", "abacus")
        with pytest.raises(RuntimeError, match="BIDENSIFY_KERNEL=abacus is no kernel"):
            run(library, exported, torch.zeros(1, 3, 32, 48))
    (tmp_path / "short.xml").write_bytes(exported.read_bytes())
    (tmp_path / "short.bin").write_bytes(exported.with_suffix(".bin").read_bytes()[:-40])
    with pytest.raises(RuntimeError):
        run(library, tmp_path / "short.xml", torch.zeros(1, 3, 32, 48))


@here
@pytest.mark.parametrize("threads", [1, 2])
def test_what_a_layer_refuses_when_it_runs_is_told(
    exported: Path, library: Path, threads: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also on one thread, where OpenVINO 2026.4 drops the errors of ``infer``."""
    network = open_network(exported, library, threads=threads)
    monkeypatch.setenv("BIDENSIFY_KERNEL", "abacus")
    with pytest.raises(RuntimeError, match="BIDENSIFY_KERNEL=abacus is no kernel"):
        run_network(network, [torch.randn(1, 3, 32, 48).numpy()])
    capfd.readouterr()
    with contextlib.suppress(RuntimeError):
        network([torch.randn(1, 3, 32, 48).numpy()])
    assert "BIDENSIFY_KERNEL=abacus is no kernel" in capfd.readouterr().err


@here
def test_a_file_that_gives_other_values_is_not_written(
    decoder: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bidensify.deploy.export import several

    real = several.run_again

    def wrong(*arguments: Any) -> Any:
        return [[value + 1 for value in values] for values in real(*arguments)]

    monkeypatch.setattr(several, "run_again", wrong)
    with pytest.raises(CheckError, match=r"^net\.xml: .*nothing was written"):
        bd.export(decoder, tmp_path / "net.xml", example_inputs=torch.randn(1, 3, 32, 32))
    assert not list(tmp_path.iterdir())


@here
def test_readmes_lines_run_and_need_no_torch(exported: Path, library: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"```py\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    (tmp_path / "runtime").mkdir()
    (tmp_path / "runtime" / library.name).symlink_to(library)
    for suffix in (".xml", ".bin"):
        (tmp_path / f"scenes{suffix}").symlink_to(exported.with_suffix(suffix))
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import numpy as np; image = np.zeros((1, 3, 32, 48), np.float32)\n"
        f"{block}\nassert scores.shape == (1, 5, 32, 48), scores.shape\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=tmp_path)


@here
def test_the_command_line(library: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = build_model("demo:unet", num_classes=5, width=8)
    student = bd.bidensify(net, example_inputs=torch.randn(2, 3, 32, 32)).eval()
    bd.save_pretrained(bd.pack(student), tmp_path / "packed")
    call = CliRunner()
    done = call.invoke(app, ["export", str(tmp_path / "packed"), str(tmp_path / "net.xml"), "--input", "1x3x32x64"])
    assert done.exit_code == 0, done.output
    assert "run again by openvino" in done.output
    assert run(library, tmp_path / "net.xml", torch.zeros(1, 3, 32, 64))[0].shape == (1, 5, 32, 64)
    sources = call.invoke(app, ["runtime", "sources", "--runtime", "openvino"])
    assert (Path(sources.output.strip()) / "CMakeLists.txt").is_file()


def test_arguments_that_do_not_go_together(decoder: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(ConfigError, match=r"runtime='openvino' does not write 'net\.pte'"):
        bd.export(decoder, tmp_path / "net.pte", runtime="openvino", example_inputs=x)
    with pytest.raises(ConfigError, match="bounds are ExecuTorch's"):
        bd.export(decoder, tmp_path / "net.xml", example_inputs=x, dynamic={"height": (32, 64, 32)})
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2024.1.0")
    with pytest.raises(MissingExtraError, match=r"needs openvino 2026|the package openvino"):
        bd.export(decoder, tmp_path / "net.xml", example_inputs=x)


@here
def test_a_latent_network_and_halves(decoder: nn.Module, tmp_path: Path, library: Path) -> None:
    with pytest.raises(ConfigError, match=r"give bidensify\.pack\(model\)"):
        bd.export(settle(Decoder()), tmp_path / "net.xml", example_inputs=torch.randn(1, 3, 32, 32))
    half = bd.pack(settle(Decoder()), float_dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match="give a float32 network"):
        bd.export(half, tmp_path / "net.xml", example_inputs=torch.randn(1, 3, 32, 32).bfloat16())
