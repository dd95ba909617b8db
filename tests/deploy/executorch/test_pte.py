"""Networks under ExecuTorch: the .pte gives what the packed network gives, and what cannot be is refused with the reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import LAYERS, Decoder, Layers, packed_with, settle
from runtimes import needs
from torch import Tensor, nn

import bidensify as bd
from bidensify.deploy import packed_layers
from bidensify.deploy.backends import available_kernels
from bidensify.deploy.executorch.lower import seal
from bidensify.deploy.executorch.program import Program
from bidensify.deploy.freeze import freeze
from bidensify.errors import ConfigError, MissingExtraError
from bidensify.methods import get_method
from bidensify.models.unet import unet
from bidensify.nn import BiDenseConv2d

here = needs("executorch")
EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture(scope="session")
def library() -> Path:
    """The runtime, built once for these sources."""
    from bidensify.deploy.runtimes.build import EXECUTORCH

    return EXECUTORCH.find()


def run(library: Path, path: Path, *values: Tensor) -> list[Tensor]:
    """The outputs of a .pte."""
    arrays = [value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy() for value in values]
    return [torch.from_numpy(value) for value in Program(path, library)(*arrays)]


@here
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_layers_give_the_same_bits_on_every_kernel(
    dtype: torch.dtype, tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layers = [freeze(settle(make())) for make, _ in LAYERS.values()]
    inputs = tuple(torch.randn(shape).to(dtype) for _, shape in LAYERS.values())
    model = Layers(layers)
    done = bd.export(model, tmp_path / "layers.pte", example_inputs=inputs)
    assert done.difference == 0
    with torch.no_grad():
        wanted = model(*inputs)
    for kernel in available_kernels()[:-1]:
        monkeypatch.setenv("BIDENSIFY_KERNEL", kernel)
        for name, want, got in zip(LAYERS, wanted, run(library, done.path, *inputs), strict=True):
            assert torch.equal(got, want.float()), (name, kernel)


@here
@pytest.mark.parametrize(
    "method", [name for name in bd.available_methods() if get_method(name).takes("conv2d") and name != "bidense"]
)
def test_every_method(method: str, tmp_path: Path, library: Path) -> None:
    done = bd.export(packed_with(method), tmp_path / "net.pte", example_inputs=torch.randn(2, 3, 12, 12))
    assert done.difference is not None
    assert done.difference < 1e-5


@pytest.fixture(scope="module")
def decoder() -> nn.Module:
    torch.manual_seed(0)
    return bd.pack(settle(Decoder()))


@pytest.fixture(scope="module")
def exported(decoder: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .pte for images of 16 to 64 pixels."""
    sizes = {"height": (16, 64, 4), "width": (16, 64, 4)}
    path = tmp_path_factory.mktemp("pte") / "net.pte"
    done = bd.export(decoder, path, runtime="executorch", example_inputs=torch.randn(1, 3, 32, 48), dynamic=sizes)
    assert done.runtime == "executorch"
    assert done.difference is not None
    assert done.difference < 1e-5
    return path


@here
def test_a_network_of_other_sizes_and_arg_max(decoder: nn.Module, exported: Path, library: Path) -> None:
    for size in ((16, 16), (64, 64), (32, 20)):
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            want = decoder(x)
        got = run(library, exported, x)
        for a, b in zip(got, want.values(), strict=True):
            assert float((a - b).abs().max()) < 1e-5 * float(b.abs().max())
        assert torch.equal(got[0].argmax(1), want["scores"].argmax(1))


@here
def test_parts_are_read_where_they_lie(decoder: nn.Module) -> None:
    from bidensify.deploy.executorch.lower import shapes_of
    from bidensify.deploy.export.capture import capture
    from bidensify.deploy.runtimes.prepare import prepared, read_in_parts

    x = torch.randn(1, 3, 32, 48)
    shapes = shapes_of({"height": (16, 64, 4), "width": (16, 64, 4)}, (x,), {}, ["x"])
    with torch.no_grad():
        program = capture(prepared(decoder), (x,), {}, shapes)
    assert read_in_parts(program.graph) == 2
    left = [str(node.target) for node in program.graph.nodes]
    assert not any("cat" in name or "upsample" in name for name in left)
    ups = [node.args[1] for node in program.graph.nodes if "packed_layer" in str(node.target)]
    assert ups == [[1], [2, 1], [2]]


class Tokens(nn.Module):
    """A packed layer on an image that tokens make, as in Segformer, and one on a part of it that lies plainly."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Linear(6, 40), nn.Linear(40, 10)
        self.depthwise = BiDenseConv2d(40, 40, 3, padding=1, groups=40)
        self.packed = BiDenseConv2d(50, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        tokens = self.first(self.stem(x).flatten(2).transpose(1, 2))
        image = tokens.transpose(1, 2).reshape(n, 40, h, w)
        tokens = self.second(self.depthwise(image).flatten(2).transpose(1, 2))
        return self.packed(torch.cat([tokens.transpose(1, 2).reshape(n, 10, h, w), image], 1))


@here
@pytest.mark.parametrize("shape", [(1, 3, 20, 19), (2, 3, 5, 33), (3, 3, 1, 7)])
def test_images_that_tokens_make_are_turned_by_the_layer_that_reads_them(
    shape: tuple[int, ...], tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ExecuTorch's own copy goes element by element, and took a third of Segformer's time."""
    from bidensify.deploy.executorch import lower

    copies: list[bool] = []
    real = lower.turns_pass

    def watched() -> Any:
        def run_pass(module: torch.fx.GraphModule) -> Any:
            result = real()(module)
            given = [part for node in module.graph.nodes if "packed_layer" in str(node.target) for part in node.args[0]]
            copies.extend("dim_order" in str(part.target) for part in given)
            return result

        return run_pass

    monkeypatch.setattr(lower, "turns_pass", watched)
    torch.manual_seed(0)
    model, x = bd.pack(settle(Tokens())), torch.randn(shape)
    done = bd.export(model, tmp_path / "net.pte", example_inputs=x)
    assert done.difference is not None
    assert done.difference < 1e-5
    assert len(copies) == 3
    assert not any(copies)
    with torch.no_grad():
        wanted = model(x)
    for kernel in available_kernels()[:-1]:
        monkeypatch.setenv("BIDENSIFY_KERNEL", kernel)
        (got,) = run(library, done.path, x)
        assert float((got - wanted).abs().mean()) < 1e-4 * float(wanted.abs().mean()), kernel


@here
def test_an_int8_rest_is_near(decoder: nn.Module, tmp_path: Path, library: Path) -> None:
    images = [torch.randn(1, 3, 32, 32) for _ in range(4)]
    done = bd.export(decoder, tmp_path / "net.pte", example_inputs=images[0], int8_rest=images)
    assert done.difference is not None
    assert 0 < done.difference < 0.3


@here
def test_what_does_not_fit_is_refused_with_the_reason(
    decoder: nn.Module, exported: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = Program(exported, library)
    good = np.zeros((1, 3, 32, 32), np.float32)
    program(good)
    for bad in (good[:, :2], good[0], np.zeros((1, 3, 96, 32), np.float32), np.zeros((2, 3, 32, 32), np.float32)):
        with pytest.raises(
            ValueError, match=r"input 0 has the shape .*, the program takes \(1, 3, 16, 16\) to \(1, 3, 64, 64\)"
        ):
            program(bad)
    with pytest.raises(ValueError, match="input 0 is float64, the program takes float32"):
        program(good.astype(np.float64))
    with pytest.raises(ValueError, match="0 inputs, the program takes 1"):
        program()
    program(good)
    monkeypatch.setenv("BIDENSIFY_KERNEL", "abacus")
    with pytest.raises(RuntimeError, match="packed_layer: BIDENSIFY_KERNEL=abacus is no kernel"):
        program(good)


@here
def test_a_truncated_or_edited_file_is_refused_or_runs_inside_its_memory(
    exported: Path, library: Path, tmp_path: Path
) -> None:
    data = exported.read_bytes()
    path = tmp_path / "bad.pte"
    for length in (0, 1, 47, 48, 100, len(data) // 2, len(data) - 1000, len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(RuntimeError, match=r"bad\.pte was cut, edited or damaged"):
            Program(path, library)
    for at in (0, 8, 100, len(data) // 2, len(data) - 49, len(data) - 48, len(data) - 1):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(RuntimeError, match=r"bad\.pte was cut, edited or damaged"):
            Program(path, library)
    # Sealed, and no program.
    for content in (b"", b"x" * 63, b"y" * 65536, data[:1000]):
        path.write_bytes(seal(content))
        with pytest.raises(RuntimeError, match="is no program that this runtime runs"):
            Program(path, library)
    with pytest.raises(RuntimeError, match=r"missing\.pte cannot be read"):
        Program(tmp_path / "missing.pte", library)


@here
def test_random_edits_of_a_whole_file_are_refused_by_the_runner(exported: Path, library: Path, tmp_path: Path) -> None:
    script = Path(__file__).with_name("fuzz_pte.py")
    done = subprocess.run(
        [sys.executable, script, library, exported, "500"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "500 edits, 500 refused, 0 ran, 0 crashes" in done.stdout


@here
def test_a_newer_layer_is_refused_with_a_message(
    decoder: nn.Module, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bidensify.deploy import operator
    from bidensify.errors import CheckError

    monkeypatch.setattr(operator, "SPEC_VERSION", 3)
    monkeypatch.setattr(operator, "spec_ints", lambda spec: [3, 0, *spec.to_ints()])
    newer = bd.pack(settle(Decoder()))
    with pytest.raises(CheckError, match="a layer of version 3; this runtime runs 1 to 2: build a newer one"):
        bd.export(newer, tmp_path / "net.pte", example_inputs=torch.randn(1, 3, 32, 32))
    assert not (tmp_path / "net.pte").exists()


@here
def test_the_file_and_the_network(decoder: nn.Module, exported: Path, tmp_path: Path) -> None:
    words = sum(4 * layer.tiles.numel() for layer in packed_layers(decoder).values())
    floats = sum(t.numel() * t.element_size() for t in decoder.state_dict().values() if t.dtype != torch.uint8)
    assert exported.stat().st_size < words + floats + 40_000
    assert all(layer.bits.numel() for layer in packed_layers(decoder).values()), "the network is left as it was"


@here
def test_executorchs_own_python_runs_it_too(decoder: nn.Module, exported: Path, library: Path) -> None:
    code = (
        "import ctypes, sys, torch\n"
        "from executorch.runtime import Runtime\n"
        "ctypes.CDLL(sys.argv[1])\n"
        "net = Runtime.get().load_program(sys.argv[2]).load_method('forward')\n"
        "torch.manual_seed(0)\n"
        "torch.save(net.execute((torch.randn(1, 3, 32, 32),)), sys.argv[3])\n"
    )
    result = exported.parent / "result.pt"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, library, exported, result], check=True, capture_output=True
    )
    torch.manual_seed(0)
    with torch.no_grad():
        want = decoder(torch.randn(1, 3, 32, 32))
    for a, b in zip(torch.load(result, weights_only=True), want.values(), strict=True):
        torch.testing.assert_close(a, b)


@here
def test_the_example_without_torch_and_the_one_in_c(library: Path, tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    numbers = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.25, 0.3], "palette": [*map(float, range(171))]}
    nets, files = {}, {}
    for classes in (19, 1, 300):
        torch.manual_seed(0)
        student = bd.bidensify(unet(num_classes=classes, width=8), example_inputs=torch.randn(2, 3, 64, 64))
        bd.calibrate(student, [torch.randn(2, 3, 64, 64)])
        nets[classes] = bd.pack(student.eval())
        path = tmp_path / f"{classes}.pte"
        files[classes] = bd.export(
            nets[classes], path, example_inputs=torch.randn(1, 3, 64, 64), constants=numbers
        ).path
    assert Program(files[1], library).constant("palette") == numbers["palette"]
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    image.fromarray(pixels).save(tmp_path / "image.png")
    x = (
        torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255 - torch.tensor(numbers["image_mean"]).view(3, 1, 1)
    ) / torch.tensor(numbers["image_std"]).view(3, 1, 1)
    with torch.no_grad():
        masks = {19: nets[19](x).argmax(1)[0].numpy(), 1: (nets[1](x)[0, 0] > 0).numpy()}

    from bidensify.deploy.executorch import program

    (tmp_path / "runtime").mkdir()
    for file, name in ((library, library.name), (Path(program.__file__), "bidensify_program.py")):
        os.symlink(file, tmp_path / "runtime" / name)
    script = EXAMPLES / "deploy_python_without_torch.py"

    def check(program: list[Any], *rest: Any) -> None:
        for classes, file in files.items():
            command = [*program, file, tmp_path / "image.png", tmp_path / "mask.png", *rest]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            if classes == 300:
                assert done.returncode == 1
                assert "at most 256 classes" in done.stderr
                continue
            assert done.returncode == 0, done.stderr
            assert "64x64" in done.stdout
            mask = np.asarray(image.open(tmp_path / "mask.png"))
            assert (mask == masks[classes]).mean() > 0.999
            assert len(np.unique(mask)) > 1

    check([sys.executable, script], "--runtime", tmp_path / "runtime")

    if not any(Path(folder, "stb_image.h").is_file() for folder in ("/usr/include/stb", "/usr/include")):
        pytest.skip("stb is not installed: apt-get install libstb-dev")
    build = tmp_path / "build"
    subprocess.run(["cmake", "-S", EXAMPLES / "deploy_cpp", "-B", build], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", build, "--parallel", "2"], check=True, capture_output=True)
    check([build / "mask"])
    for wrong in ([tmp_path / "image.png", tmp_path / "image.png"], [files[19], files[19]]):
        bad = subprocess.run([build / "mask", *wrong, tmp_path / "no.png"], capture_output=True, text=True, check=False)
        assert bad.returncode == 1
        assert bad.stderr


def test_arguments_that_do_not_go_together(decoder: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 3, 32, 32)
    with pytest.raises(ConfigError, match=r"runtime='onnx' does not write 'net\.pte'"):
        bd.export(decoder, tmp_path / "net.pte", runtime="onnx", example_inputs=x)
    with pytest.raises(ConfigError, match="are ExecuTorch's"):
        bd.export(decoder, tmp_path / "net.onnx", example_inputs=x, int8_rest=[x])
    with pytest.raises(ConfigError, match="dynamic=True has no bound"):
        bd.export(decoder, tmp_path / "net.pte", example_inputs=x, dynamic=True)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "1.4.0")
    with pytest.raises(MissingExtraError, match=r"executorch"):
        bd.export(decoder, tmp_path / "net.pte", example_inputs=x)


@here
@pytest.mark.parametrize(
    "sizes", [{"depth": (1, 2, 1)}, {"height": (64, 16, 4)}, {"height": (16, 63, 4)}, {"height": (0, 4, 1)}]
)
def test_bounds_that_are_none(decoder: nn.Module, sizes: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must be"):
        bd.export(decoder, tmp_path / "net.pte", example_inputs=torch.randn(1, 3, 32, 32), dynamic=sizes)


@here
def test_a_latent_network_is_to_be_packed_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"give bidensify\.pack\(model\)"):
        bd.export(settle(Decoder()), tmp_path / "net.pte", example_inputs=torch.randn(1, 3, 32, 32))
