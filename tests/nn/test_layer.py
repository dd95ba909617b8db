"""Binary layers as wholes: values, gradients, formats, copies, compilation."""

from __future__ import annotations

import copy
import importlib.util
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bidensify.nn import (
    BatchNormLast,
    BiDenseConv2d,
    BiDenseConvTranspose2d,
    BiDenseLinear,
    BinaryLayer,
    Bypass,
    DistributionAdaptiveBinarizer,
    RPReLU,
    WeightBinarizer,
    binary_layers,
    fusion,
    make_binary,
    set_binarization,
    sign,
)

_spec = importlib.util.spec_from_file_location("plain", Path(__file__).with_name("plain.py"))
assert _spec is not None
assert _spec.loader is not None
plain = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(plain)


class PaddedConv(nn.Conv2d):
    """A subclass with its own forward, as timm's Conv2dSame has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias, self.stride)


def shake(layer: nn.Module) -> nn.Module:
    """Moves every parameter off its initial value, so that no gradient is zero by luck."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if not name.endswith("weight") or parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return layer


def exchanged(conv: nn.Conv2d, *, bypass: bool = True, norm: bool = True, act_scale: str = "per_tensor") -> Any:
    conv.__class__ = make_binary(type(conv))
    layer: Any = conv
    layer.install(
        binarizer=DistributionAdaptiveBinarizer(conv.in_channels, act_scale),
        weight_binarizer=WeightBinarizer(),
        norm=nn.BatchNorm2d(conv.out_channels) if norm else None,
        bypass=Bypass(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        if bypass
        else None,
        activation=RPReLU(conv.out_channels),
    )
    return layer


def plain_conv(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """The layer's equation in straight PyTorch, in whichever dtype x has."""
    to = x.dtype
    binarizer = layer.binarizer
    a = plain.dab(x, binarizer.k.to(to), binarizer.b.to(to), binarizer.a.to(to), binarizer.act_scale)
    weight = layer.latent_weight.to(to)
    if layer.weight_binarizer.transposed:
        scale = layer.weight_binarizer.like(layer.weight_binarizer.channel_scale(weight), weight)
    else:
        scale = weight.detach().abs().mean((1, 2, 3), keepdim=True)
    layer_weight = scale * plain.clipped(weight)
    bias = None if layer.bias is None else layer.bias.to(to)
    if isinstance(layer, nn.ConvTranspose2d):
        y = F.conv_transpose2d(
            a, layer_weight, bias, layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
        )
    else:
        y = F.conv2d(a, layer_weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    if layer.norm is not None:
        y = plain.batch_norm(y, layer.norm.weight.to(to), layer.norm.bias.to(to), layer.norm.eps)
    if layer.bypass is not None:
        y = y + layer.bypass(x, y.shape[-2:])
    if isinstance(layer.activation, RPReLU):
        act = layer.activation
        y = plain.rprelu(y, act.bias_in.to(to), act.slope.to(to), act.bias_out.to(to))
    return y


LAYERS: dict[str, Any] = {
    "same": lambda s: BiDenseConv2d(6, 6, 3, padding=1, act_scale=s),
    "up": lambda s: BiDenseConv2d(4, 10, 3, padding=1, act_scale=s),
    "down": lambda s: BiDenseConv2d(12, 4, 3, padding=1, act_scale=s),
    "down, remainder": lambda s: BiDenseConv2d(11, 4, 1, act_scale=s),
    "strided": lambda s: BiDenseConv2d(6, 12, 3, 2, 1, act_scale=s),
    "strided down": lambda s: BiDenseConv2d(12, 6, 3, 2, 1, act_scale=s),
    "valid": lambda s: BiDenseConv2d(6, 6, 3, act_scale=s),
    "dilated, bias": lambda s: BiDenseConv2d(6, 6, 3, padding=2, dilation=2, bias=True, act_scale=s),
    "depthwise": lambda s: BiDenseConv2d(6, 6, 3, padding=1, groups=6, act_scale=s),
    "grouped": lambda s: BiDenseConv2d(6, 9, 3, padding=1, groups=3, act_scale=s),
    "no activation": lambda s: BiDenseConv2d(6, 6, 3, padding=1, act_scale=s, activation=False),
    "transposed": lambda s: BiDenseConvTranspose2d(6, 4, 4, 2, 1, act_scale=s),
    "transposed, grouped": lambda s: BiDenseConvTranspose2d(6, 4, 2, 2, groups=2, act_scale=s),
    "no bypass": lambda s: exchanged(nn.Conv2d(6, 6, 3, padding=1, bias=False), bypass=False, act_scale=s),
    "no norm": lambda s: exchanged(nn.Conv2d(6, 6, 3, padding=1), norm=False, act_scale=s),
    "convolution alone": lambda s: exchanged(nn.Conv2d(6, 6, 3, padding=1), bypass=False, norm=False, act_scale=s),
}


def compare(layer: Any, x: torch.Tensor, rtol: float, atol: float) -> None:
    """Values and all gradients of ``layer`` on ``x`` against the equation in float64."""
    x = x.requires_grad_()
    twin = copy.deepcopy(layer).double()
    wide = x.detach().double().requires_grad_()
    theirs = plain_conv(twin, wide)
    ours = layer(x)
    torch.testing.assert_close(ours.double(), theirs, rtol=rtol, atol=atol)
    upstream = torch.randn_like(ours)
    (ours * upstream).sum().backward()
    (theirs * upstream.double()).sum().backward()
    named = dict(twin.named_parameters())
    assert x.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=rtol, atol=atol)
    for name, parameter in layer.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.grad is not None, name
        # A bias before a BatchNorm has no gradient but rounding.
        scale = max(float(named[name].grad.abs().max()), 1e-2)
        torch.testing.assert_close(
            parameter.grad.double() / scale,
            named[name].grad / scale,
            rtol=rtol,
            atol=atol,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize("act_scale", ["per_tensor", "per_channel", "none"])
@pytest.mark.parametrize("kind", LAYERS)
def test_float64_against_plain_autograd(kind: str, act_scale: str) -> None:
    torch.manual_seed(0)
    layer = shake(LAYERS[kind](act_scale)).double()
    compare(layer, torch.randn(3, layer.in_channels, 8, 7, dtype=torch.float64), 1e-7, 1e-8)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", LAYERS)
def test_float32_in_both_memory_formats(kind: str, layout: torch.memory_format) -> None:
    torch.manual_seed(1)
    layer = shake(LAYERS[kind]("per_tensor")).to(memory_format=layout)
    x = torch.randn(2, layer.in_channels, 16, 12).contiguous(memory_format=layout)
    assert layer(x).is_contiguous(memory_format=layout)
    compare(layer, x, 2e-3, 2e-3)


@pytest.mark.parametrize("channels", [(6, 6), (4, 10), (12, 4)])
def test_linear_is_a_pointwise_convolution(channels: tuple[int, int]) -> None:
    torch.manual_seed(0)
    linear: Any = shake(BiDenseLinear(*channels)).double()
    conv: Any = BiDenseConv2d(*channels, 1).double()
    with torch.no_grad():
        values = dict(linear.named_parameters())
        for name, parameter in conv.named_parameters():
            parameter.copy_(values[name].reshape(parameter.shape))
    x = torch.randn(3, channels[0], 5, 4, dtype=torch.float64)
    tokens = x.flatten(2).transpose(1, 2).requires_grad_()
    out = linear(tokens)
    torch.testing.assert_close(out.transpose(1, 2).reshape(3, channels[1], 5, 4), conv(x))
    torch.testing.assert_close(linear.norm.running_mean, conv.norm.running_mean)
    torch.testing.assert_close(linear.norm.running_var, conv.norm.running_var)
    out.sum().backward()
    assert tokens.grad is not None
    conv(x).sum().backward()
    for name, parameter in conv.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(values[name].grad.reshape(parameter.shape), parameter.grad, msg=name)


def test_batch_norm_last() -> None:
    x = torch.randn(2, 3, 5, 4)
    norm, image_norm = BatchNormLast(4), nn.BatchNorm2d(4)
    torch.testing.assert_close(norm(x), image_norm(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
def test_running_statistics_follow_batch_norm(momentum: float | None) -> None:
    layer: Any = BiDenseConv2d(5, 6, 3, padding=1)
    layer.norm.momentum = momentum
    twin = copy.deepcopy(layer.norm)
    for _ in range(3):
        x = torch.randn(2, 5, 9, 8)
        layer(x)
        twin(layer.conv_only(layer.binarizer(x)))
    assert layer.norm.num_batches_tracked == 3
    torch.testing.assert_close(layer.norm.running_mean, twin.running_mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer.norm.running_var, twin.running_var, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", LAYERS)
def test_evaluation_uses_running_statistics(kind: str) -> None:
    layer = shake(LAYERS[kind]("per_tensor"))
    x = torch.randn(2, layer.in_channels, 10, 12)
    for _ in range(3):
        layer(x)
    layer.eval()
    with torch.no_grad():
        y = layer(x)
        z = layer.conv_only(layer.binarizer(x))
        if layer.norm is not None:
            norm = layer.norm
            z = F.batch_norm(z, norm.running_mean, norm.running_var, norm.weight, norm.bias, False, 0.0, norm.eps)
        if layer.bypass is not None:
            z = z + layer.bypass(x, z.shape[-2:])
        torch.testing.assert_close(y, layer.activation(z), rtol=1e-4, atol=1e-5)
    # With gradients the same values come out.
    torch.testing.assert_close(layer(x).detach(), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", LAYERS)
def test_bfloat16_autocast(kind: str, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    layer = shake(LAYERS[kind]("per_tensor")).to(memory_format=layout)
    twin = copy.deepcopy(layer)
    x = torch.randn(2, layer.in_channels, 12, 16).contiguous(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
    assert y.is_contiguous(memory_format=layout)
    y.float().square().mean().backward()
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.dtype == torch.float32
    expected = twin(x)
    error = (y.float() - expected).abs().mean() / expected.abs().mean()
    assert error < 0.02


def test_two_runs_are_bit_equal() -> None:
    layer = shake(BiDenseConv2d(16, 24, 3, 2, 1))
    x = torch.randn(3, 16, 33, 31)
    results = []
    for _ in range(2):
        copied = copy.deepcopy(layer)
        leaf = x.clone().requires_grad_()
        copied(leaf).square().sum().backward()
        results.append([leaf.grad, *(p.grad for p in copied.parameters()), *copied.buffers()])
    for first, second in zip(*results):
        assert torch.equal(first, second)


def test_threads_do_not_change_the_result() -> None:
    layer = shake(BiDenseConv2d(16, 16, 1))
    threads = torch.get_num_threads()
    results = []
    try:
        for layout in (torch.contiguous_format, torch.channels_last):
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                torch.manual_seed(0)
                x = torch.randn(2, 16, 64, 48).contiguous(memory_format=layout).requires_grad_()
                y = layer.binarizer(x)
                (y * torch.randn_like(y)).sum().backward()
                results.append((y.detach(), x.grad))
    finally:
        torch.set_num_threads(threads)
    for i in (1, 2, 4, 5):
        assert torch.equal(results[i][0], results[i // 3 * 3][0])
        assert torch.equal(results[i][1], results[i // 3 * 3][1])


def test_stages_switch_binarization() -> None:
    model = nn.Sequential(BiDenseConv2d(4, 4, 3, padding=1), BiDenseConv2d(4, 6, 3, padding=1))
    x = torch.randn(1, 4, 6, 6)
    first: Any = model[0]
    set_binarization(model, activations=True, weights=False)
    assert first.weight is first.latent_weight
    assert first.binarizer(x).abs().unique().numel() == 1
    set_binarization(model, activations=False, weights=False)
    assert first.binarizer(x) is x
    expected = first.activation(
        F.batch_norm(F.conv2d(x, first.latent_weight, None, 1, 1), None, None, training=True) + x
    )
    torch.testing.assert_close(first(x), expected, rtol=1e-4, atol=1e-5)
    set_binarization(model, activations=True, weights=True)
    assert first.weight.abs().flatten(1).std(1).max() < 1e-6
    assert [path for path, _ in binary_layers(model)] == ["0", "1"]


def test_exchanged_class_keeps_the_forward_of_the_class_below() -> None:
    conv = PaddedConv(4, 6, 3, 2, bias=True)
    reference = copy.deepcopy(conv)
    keys = list(conv.state_dict())
    layer = exchanged(conv)
    assert isinstance(layer, PaddedConv)
    assert isinstance(layer, BinaryLayer)
    assert type(layer) is make_binary(PaddedConv)
    assert type(layer).__name__ == "BinaryPaddedConv"
    x = torch.randn(2, 4, 9, 9)
    signs, scale, offset = layer.binary_weight()
    assert offset is None
    assert torch.equal(signs, sign(reference.weight))
    reference.weight.data = signs * scale.view(-1, 1, 1, 1)
    torch.testing.assert_close(layer.conv_only(x), reference(x))
    assert layer(x).shape == reference(x).shape
    assert keys == [key for key in layer.state_dict() if key in ("weight", "bias")]
    assert layer.latent_weight is dict(layer.named_parameters())["weight"]
    layer(x).sum().backward()
    assert layer.latent_weight.grad.abs().sum() > 0


def test_latent_weight_can_be_replaced() -> None:
    layer: Any = BiDenseConv2d(3, 4, 1)
    layer.weight = nn.Parameter(torch.full((4, 3, 1, 1), -0.25))
    assert torch.equal(layer.weight, torch.full((4, 3, 1, 1), -0.25))
    assert (layer.latent_weight == -0.25).all()
    layer.load_state_dict({**layer.state_dict(), "weight": torch.full((4, 3, 1, 1), 0.5)})
    assert torch.equal(layer.weight, torch.full((4, 3, 1, 1), 0.5))
    moved = layer.double()
    assert moved.weight.dtype == torch.float64


@pytest.mark.parametrize(
    "make", [lambda: exchanged(PaddedConv(4, 6, 3, bias=True)), lambda: BiDenseConv2d(4, 6, 3, padding=1)]
)
def test_copies(make: Any) -> None:
    model = nn.Sequential(make()).eval()
    x = torch.randn(1, 4, 7, 7)
    y = model(x)
    copied = copy.deepcopy(model)
    assert type(copied[0]) is type(model[0])
    assert copied[0].latent_weight is not model[0].latent_weight
    assert torch.equal(copied(x), y)
    pickled = pickle.loads(pickle.dumps(model))
    assert torch.equal(pickled(x), y)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), y)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(model(x), y)
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied(x), y)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: BiDenseConv2d(4, 6, 3, 2, 1),
        lambda: BiDenseConvTranspose2d(6, 4, 2, 2),
        lambda: BiDenseLinear(6, 8),
        lambda: exchanged(PaddedConv(4, 4, 3)),
    ],
)
def test_compiles_in_one_graph(make: Any, backend: str) -> None:
    layer = shake(make())
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 5, 6) if isinstance(layer, nn.Linear) else torch.randn(2, layer.in_channels, 8, 8)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = compiled(first), twin(second)
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-4)
    y.square().sum().backward()
    z.square().sum().backward()
    torch.testing.assert_close(first.grad, second.grad, rtol=1e-3, atol=1e-3)
    for (name, p), q in zip(layer.named_parameters(), twin.parameters()):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_fake_and_meta_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        layer = BiDenseConv2d(4, 6, 3, 2, 1)
        y = layer(torch.randn(2, 4, 8, 8))
        assert y.shape == (2, 6, 4, 4)
        y.sum().backward()
    with torch.device("meta"):
        layer = BiDenseConv2d(4, 6, 3, 2, 1)
        assert layer(torch.randn(2, 4, 8, 8)).shape == (2, 6, 4, 4)


def test_hooks_on_parts_are_called() -> None:
    layer: Any = BiDenseConv2d(4, 4, 3, padding=1)
    seen = []
    for name in ("binarizer", "norm", "bypass", "activation"):
        getattr(layer, name).register_forward_hook(lambda m, i, o, n=name: seen.append(n))
    layer(torch.randn(1, 4, 6, 6))
    assert sorted(seen) == ["activation", "binarizer", "bypass", "norm"]


def test_an_input_changed_in_place_is_noticed() -> None:
    layer = BiDenseConv2d(4, 4, 3, padding=1)
    x = torch.randn(2, 4, 16, 16, requires_grad=True)
    hidden = x * 2
    y = layer(hidden)
    hidden.add_(1)
    with pytest.raises(RuntimeError, match=r"modified (by an )?inplace"):
        y.sum().backward()


def test_fusion_keeps_scale_through_depth() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(BiDenseConv2d(16, 16, 3, padding=1, activation=False) for _ in range(4)))
    x = torch.randn(2, 16, 16, 16)
    y = model(x)
    assert 0.25 < float((y.std() / fusion(x, 16).std()).detach()) < 4
