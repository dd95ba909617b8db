"""Packed and latent networks on CUDA: against the same network on the CPU, and against one another.

Where CUDA computes with the definition of ``bidensify.exact`` on the same values, results are equal bit for bit
(packed against latent, one layer against itself under another setting). Against the CPU they are equal to rounding: a
division by a number and an exponential round otherwise there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYERS, network, relative, settle
from torch import Tensor, nn

import bidensify as bd
from bidensify.deploy import PackedConv2d, PackedLayer, PackedLinear, PackedSpec, pack, packed_layers
from bidensify.deploy.bits import bits_from_signs
from bidensify.deploy.freeze import freeze
from bidensify.deploy.operator import spec_ints
from bidensify.errors import ConfigError
from bidensify.methods import get_method
from bidensify.models.unet import unet
from bidensify.nn import BiDenseConv2d, BiDenseConvTranspose2d, BiDenseLinear, BinaryLayer

CONVOLUTIONAL = [name for name in bd.available_methods() if get_method(name).takes("conv2d")]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@contextmanager
def flags(tf32: bool, autotune: bool) -> Iterator[None]:
    """cuDNN's and cuBLAS's choices, put back at the end."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=autotune, allow_tf32=tf32):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where the CPU waits for the device, by a copy or a read."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def made(case: str) -> tuple[BinaryLayer, Tensor]:
    """The layer and an input, on the CPU."""
    torch.manual_seed(0)
    make, shape = LAYERS[case]
    layer = settle(make())
    assert isinstance(layer, BinaryLayer)
    return layer, torch.randn(shape) * 2


def student(method: str = "bidense") -> tuple[nn.Module, nn.Module, Tensor]:
    """(the demo's network, its calibrated student, an input), on the CPU."""
    torch.manual_seed(0)
    model = unet(5, width=8).eval()
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    made = bd.bidensify(model, method=method)
    bd.calibrate(made, [x])
    return model, made.eval(), x


# --- single layers ---


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LAYERS)
def test_a_packed_layer_computes_what_it_does_on_the_cpu(case: str, dtype: torch.dtype) -> None:
    layer, x = made(case)
    x = x.to(dtype)
    packed = freeze(layer, kernel="reference")
    moved = copy.deepcopy(packed).cuda()
    with torch.inference_mode():
        want, got = packed(x), moved(x.cuda())
    assert got.device.type == "cuda"
    assert got.dtype == dtype
    # One unit in the last place of the dtype, where the float32 results lie on two sides of a rounding.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    assert relative(got.cpu(), want) < tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LAYERS)
def test_a_packed_layer_gives_the_bits_of_the_latent_one(case: str, dtype: torch.dtype) -> None:
    layer, x = made(case)
    layer, x = layer.cuda(), x.cuda().to(dtype)
    if x.dim() == 4 and not isinstance(layer, nn.Linear):
        x = x.contiguous(memory_format=torch.channels_last)
    packed = freeze(layer)
    assert packed.bits.device.type == "cuda"
    with torch.inference_mode():
        assert torch.equal(packed(x), layer(x))
    if dtype == torch.float32:
        # And the layer as it computes in training, with running statistics, by another path.
        trained = layer(x.clone().requires_grad_()).detach()
        with torch.no_grad():
            assert relative(packed(x), trained) < 2e-3


def exact_layer(kind: str, channels: int, out: int, kernel: int, groups: int, agreeing: bool) -> tuple[Any, Tensor]:
    """(a packed layer that gives its bare dot products, its signs), on the CPU; ``agreeing``: one sign for all taps."""
    generator = torch.Generator().manual_seed(channels + kernel)
    pad = kernel // 2
    packed: PackedLayer
    if kind == "linear":
        packed = PackedLinear(PackedSpec("linear", channels, out))
    else:
        packed = PackedConv2d(
            PackedSpec("conv", channels, out, (kernel, kernel), padding=(pad, pad, pad, pad), groups=groups)
        )
    signs = torch.randint(0, 2, packed.spec.weight_shape, generator=generator) * 2 - 1
    if agreeing:
        signs = signs[:, :, :1, :1].expand_as(signs).contiguous()
    packed.bits.copy_(bits_from_signs(signs))
    packed.part("scale").fill_(1)
    packed.arrange()
    return packed, signs


@pytest.mark.parametrize("autotune", [False, True])
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("agreeing", [False, True])
@pytest.mark.parametrize(
    ("kind", "channels", "out", "kernel", "groups", "size"),
    [
        ("conv", 512, 64, 3, 1, (1, 16, 16)),
        ("conv", 512, 512, 3, 1, (4, 16, 16)),
        ("conv", 64, 64, 3, 1, (2, 64, 64)),
        ("conv", 2048, 32, 1, 1, (1, 12, 12)),
        ("conv", 200, 24, 5, 1, (1, 20, 20)),
        ("conv", 128, 128, 7, 1, (1, 20, 20)),
        ("conv", 96, 96, 7, 96, (1, 32, 32)),
        ("linear", 6000, 40, 1, 1, (2, 30)),
    ],
)
def test_dot_products_are_exact_integers(
    kind: str,
    channels: int,
    out: int,
    kernel: int,
    groups: int,
    size: tuple[int, ...],
    agreeing: bool,
    dtype: torch.dtype,
    tf32: bool,
    autotune: bool,
) -> None:
    packed, signs = exact_layer(kind, channels, out, kernel, groups, agreeing)
    generator = torch.Generator().manual_seed(7)
    shape = (size[0], size[1], channels) if kind == "linear" else (size[0], channels, *size[1:])
    x = torch.randn(shape, generator=generator)
    if agreeing:
        # Every product is +1 in the first output channel, so that sums are as large as they can be.
        first = signs[0, :, 0, 0] if groups == 1 else signs[:, 0, 0, 0]
        x = x.abs() * (first if kind == "linear" else first.view(1, channels, 1, 1))
    # float16 rounds what is smaller than this to zero, whose sign is +1.
    x = torch.where(x.abs() < 1e-3, 1e-3 * torch.where(x >= 0, 1.0, -1.0), x)
    bits = torch.where(x >= 0, 1.0, -1.0).double()
    # The reference: float64 sums on the CPU.
    if kind == "linear":
        want = bits @ signs.view(out, channels).double().T
    else:
        want = F.conv2d(bits, signs.double(), padding=kernel // 2, groups=groups)
    moved = packed.cuda()
    with torch.inference_mode(), flags(tf32, autotune):
        got = moved(x.cuda().to(dtype)).cpu()
    # float16 holds integers up to 2048, and rounds larger ones to nearest even.
    assert torch.equal(got, want.to(dtype))


def test_settings_change_no_bit() -> None:
    layer, x = made("same 3x3")
    packed, x = freeze(layer.cuda()), x.cuda()
    with torch.inference_mode():
        want = packed(x)
        for tf32 in (False, True):
            for autotune in (False, True):
                with flags(tf32, autotune):
                    assert torch.equal(packed(x), want)
        with torch.autocast("cuda", torch.bfloat16):
            assert torch.equal(packed(x), want)
        with torch.autocast("cuda", torch.float16):
            assert torch.equal(packed(x), want)
    with torch.no_grad():
        assert torch.equal(packed(x), want)


@pytest.mark.parametrize("case", ["strided", "fusion down", "depthwise", "transposed 4x4", "linear"])
def test_a_layer_waits_for_nothing_and_can_be_captured(case: str) -> None:
    layer, x = made(case)
    packed, x = freeze(layer.cuda()), x.cuda()
    with torch.inference_mode():
        want = packed(x)
        with no_waiting():
            packed(x)
        fixed = x.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            packed(fixed)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = packed(fixed)
        graph.replay()
        assert torch.equal(captured, want)
        fixed.copy_(-x)
        graph.replay()
        assert torch.equal(captured, packed(-x))


def test_another_stream() -> None:
    layer, x = made("same 3x3")
    packed, x = freeze(layer.cuda()), x.cuda()
    with torch.inference_mode():
        want = packed(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = packed(x)
        stream.synchronize()
    assert torch.equal(got, want)


def test_an_input_on_another_device_is_named() -> None:
    layer, x = made("same 3x3")
    packed = freeze(layer)
    with pytest.raises(ConfigError, match="cuda"):
        packed(x.cuda())
    with pytest.raises(ConfigError, match="on cpu"):
        packed.cuda()(x)


@pytest.mark.parametrize("case", ["strided", "depthwise", "transposed 2x2"])
def test_opcheck(case: str) -> None:
    layer, x = made(case)
    packed = freeze(layer.cuda())
    x = x.cuda().contiguous(memory_format=torch.channels_last)
    arguments = ([x], [1], packed.tiles, packed.side, spec_ints(packed.spec), None, None, None)
    torch.library.opcheck(torch.ops.bidensify.packed_layer.default, arguments)


# --- training ---


@pytest.mark.parametrize("act_scale", ["per_tensor", "per_channel", "none"])
@pytest.mark.parametrize("case", ["conv", "transposed", "linear"])
def test_a_training_step_is_the_cpus(case: str, act_scale: str) -> None:
    torch.manual_seed(0)
    layer: nn.Module
    if case == "conv":
        layer, x = BiDenseConv2d(12, 20, 3, 2, 1, act_scale=act_scale), torch.randn(3, 12, 8, 10)
    elif case == "transposed":
        layer, x = BiDenseConvTranspose2d(12, 8, 4, 2, 1, act_scale=act_scale), torch.randn(3, 12, 5, 6)
    else:
        layer, x = BiDenseLinear(12, 20, act_scale=act_scale), torch.randn(3, 7, 12)
    layer = settle(layer).double().train()
    twin = copy.deepcopy(layer).cuda()
    here, there = x.double().requires_grad_(), x.double().cuda().requires_grad_()
    y, z = layer(here), twin(there)
    assert relative(z.detach().cpu(), y.detach()) < 1e-9
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (y * weights).sum().backward()
    (z * weights.cuda()).sum().backward()
    assert here.grad is not None
    assert there.grad is not None
    assert relative(there.grad.cpu(), here.grad) < 1e-9
    for (name, ours), theirs in zip(layer.named_parameters(), twin.parameters()):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None and theirs.grad is not None and ours.grad.abs().max() > 0:
            assert relative(theirs.grad.cpu(), ours.grad) < 1e-8, name
    for ours, theirs in zip(layer.buffers(), twin.buffers()):
        assert torch.allclose(ours.double(), theirs.cpu().double(), rtol=1e-9)


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_student_learns_on_cuda(dtype: torch.dtype | None, memory: torch.memory_format) -> None:
    _, made, x = student()
    made, x = made.cuda().to(memory_format=memory).train(), x.cuda().contiguous(memory_format=memory)
    target = torch.arange(x.shape[3], device="cuda").div(20, rounding_mode="floor").expand(2, x.shape[2], -1)
    optimizer = torch.optim.AdamW(made.parameters(), lr=5e-3)
    losses = []
    for _ in range(12):
        with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
            loss = F.cross_entropy(made(x).float(), target)
        optimizer.zero_grad()
        loss.backward()
        assert all(bool(torch.isfinite(p.grad).all()) for p in made.parameters() if p.grad is not None)
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0], losses
    # What was trained there freezes there, and computes what the latent network does.
    made.eval()
    x = x.contiguous(memory_format=torch.channels_last)
    packed = pack(made)
    with torch.inference_mode():
        assert torch.equal(packed(x), made.to(memory_format=torch.channels_last)(x))


def test_calibration_sets_what_the_cpu_sets() -> None:
    torch.manual_seed(0)
    model = unet(5, width=8).double()
    made = bd.bidensify(model)
    twin = copy.deepcopy(made).cuda()
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    bd.calibrate(made, [x])
    bd.calibrate(twin, [x.cuda()])
    first = next(layer for layer in made.modules() if isinstance(layer, BinaryLayer))
    other = next(layer for layer in twin.modules() if isinstance(layer, BinaryLayer))
    # Further on a threshold may fall between two other values of equal distance from the middle.
    assert relative(other.binarizer.b.cpu(), first.binarizer.b) < 1e-6
    mixed = 0.0
    for layer in twin.modules():
        if isinstance(layer, BinaryLayer):
            assert layer.binarizer.b.device.type == "cuda"
            mixed += float(layer.binarizer.b.abs().sum())
    assert mixed > 0


# --- whole networks ---


def test_a_model_on_cuda_is_rewritten_there() -> None:
    torch.manual_seed(0)
    model = unet(5, width=8).eval()
    here, there = bd.bidensify(model), bd.bidensify(copy.deepcopy(model).cuda())
    assert {p.device.type for p in there.parameters()} == {"cuda"}
    assert {b.device.type for b in there.buffers()} == {"cuda"}
    assert there.bidensify_plan.to_dict() == here.bidensify_plan.to_dict()  # type: ignore[union-attr,operator]
    state = there.state_dict()
    for name, value in here.state_dict().items():
        assert torch.allclose(state[name].cpu(), value, rtol=1e-6), name


@pytest.mark.parametrize("method", CONVOLUTIONAL)
def test_packed_is_latent_on_cuda_bit_for_bit(method: str) -> None:
    _, made, x = student(method)
    made, x = made.cuda().to(memory_format=torch.channels_last), x.cuda().contiguous(memory_format=torch.channels_last)
    packed = pack(made)
    assert {b.device.type for b in packed.buffers()} == {"cuda"}
    with torch.inference_mode():
        assert torch.equal(packed(x), made(x))
        # A captured or replayed network needs that nothing waits.
        with no_waiting():
            packed(x)
    assert packed_layers(packed)


@pytest.mark.parametrize("method", CONVOLUTIONAL)
def test_cpu_and_cuda_see_the_same_classes(method: str, record_property: Callable[[str, object], None]) -> None:
    _, made, x = student(method)
    packed = pack(made)
    x = x.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode(), flags(tf32=False, autotune=False):
        want = packed(x)
        there = packed.to("cuda")(x.cuda())
        back = packed.cpu()(x)
    assert torch.equal(back, want)
    share = float((there.argmax(1).cpu() == want.argmax(1)).float().mean())
    record_property("share", share)
    # Rounding of the float layers moves single values across thresholds, and signs cascade.
    assert share > 0.95


@pytest.mark.parametrize(
    "source", ["smp:Unet/resnet18", "smp:DeepLabV3Plus/resnet18", "torchvision:lraspp_mobilenet_v3_large"]
)
def test_library_networks(source: str) -> None:
    from bidensify.models import build_model

    if source.startswith("smp:"):
        pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    options = {"classes": 7, "encoder_weights": None} if source.startswith("smp:") else {}
    made = bd.bidensify(build_model(source, **options).eval().cuda())
    x = torch.randn(2, 3, 96, 128, device="cuda").contiguous(memory_format=torch.channels_last)
    bd.calibrate(made, [x])
    made.eval().to(memory_format=torch.channels_last)
    packed = pack(made)
    with torch.inference_mode():
        want, got = made(x), packed(x)
    if isinstance(want, dict):
        want, got = want["out"], got["out"]
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_float_rest_in_half_precision(dtype: torch.dtype) -> None:
    _, made, x = student()
    packed, half = pack(made.cuda()), pack(made.cuda(), float_dtype=dtype)
    with torch.inference_mode():
        want, got = packed(x.cuda()), half(x.cuda())
    assert got.dtype == torch.float32
    assert bool(torch.isfinite(got).all())
    # An untrained network's classes are close to one another; by chance a fifth would agree.
    assert float((got.argmax(1) == want.argmax(1)).float().mean()) > 0.4


def test_autocast_of_a_packed_network() -> None:
    _, made, x = student()
    packed = pack(made.cuda())
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        y = packed(x.cuda())
    assert bool(torch.isfinite(y).all())


def test_saved_on_cuda_read_anywhere(tmp_path: Path) -> None:
    model, made, x = student()
    made.cuda()
    packed = pack(made)
    x = x.contiguous(memory_format=torch.channels_last)
    bd.save_pretrained(packed, tmp_path / "packed")
    bd.save_pretrained(made, tmp_path / "latent")
    again = bd.from_pretrained(tmp_path / "packed", model)
    latent = bd.from_pretrained(tmp_path / "latent", model).cuda().to(memory_format=torch.channels_last)
    assert {b.device.type for b in again.buffers()} == {"cpu"}
    with torch.inference_mode():
        want = packed(x.cuda())
        assert torch.equal(again.cuda()(x.cuda()), want)
        assert torch.equal(latent(x.cuda()), want)
    on_cuda = bd.from_pretrained(tmp_path / "packed", copy.deepcopy(model).cuda())
    with torch.inference_mode():
        assert torch.equal(on_cuda(x.cuda()), want)


def test_the_devices_generator_is_left_alone() -> None:
    model = unet(5, width=8)
    for place in ("cpu", "cuda"):
        model.to(place)
        torch.cuda.manual_seed(5)
        want = torch.rand(4, device="cuda")
        torch.cuda.manual_seed(5)
        bd.bidensify(model)
        assert torch.equal(torch.rand(4, device="cuda"), want)


def test_compile_and_export() -> None:
    packed = pack(network().cuda())
    x = torch.randn(1, 3, 12, 12, device="cuda")
    with torch.no_grad():
        want = packed(x)
        exported = torch.export.export(packed, (x,))
        assert relative(exported.module()(x), want) < 1e-5
        for backend in ("aot_eager", "inductor"):
            torch._dynamo.reset()
            compiled: Any = torch.compile(packed, fullgraph=True, backend=backend)
            assert relative(compiled(x), want) < 2e-3
    linear = pack(settle(BiDenseLinear(16, 24)).cuda())
    tokens = torch.randn(2, 5, 16, device="cuda")
    torch._dynamo.reset()
    with torch.no_grad():
        assert relative(torch.compile(linear, fullgraph=True)(tokens), linear(tokens)) < 1e-5


def test_an_exported_network_moves_to_cuda() -> None:
    from torch.export.passes import move_to_device_pass

    packed = pack(network())
    x = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        exported = move_to_device_pass(torch.export.export(packed, (x,)), "cuda")
        assert relative(exported.module()(x.cuda()).cpu(), packed(x)) < 2e-3


def test_a_latent_network_compiles_in_training() -> None:
    torch._dynamo.reset()
    made = network().cuda().train()
    x = torch.randn(2, 3, 16, 16, device="cuda")
    want = made(x).sum()
    want.backward()
    expected = [p.grad.clone() for p in made.parameters() if p.grad is not None]
    made.zero_grad()
    torch.compile(made)(x).sum().backward()
    got = [p.grad for p in made.parameters() if p.grad is not None]
    assert len(got) == len(expected)
    assert all(bool(torch.isfinite(grad).all()) for grad in got)
