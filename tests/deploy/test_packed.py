"""Packed layers and models against the latent ones they were made of."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import LAYERS, relative, settle
from torch import Tensor, nn

import bidensify as bd
from bidensify.deploy import (
    PackedConv2d,
    PackedConvTranspose2d,
    PackedLinear,
    PackedSpec,
    backends,
    pack,
    packed_layers,
    replace_layers,
    set_kernel,
)
from bidensify.deploy.backends import available_kernels
from bidensify.deploy.freeze import empty_from_meta, freeze
from bidensify.deploy.operator import spec_ints
from bidensify.deploy.pack import set_float_dtype
from bidensify.errors import ConfigError, FormatError, PackError
from bidensify.kernels import library as loader
from bidensify.kernels.library import library as load_library
from bidensify.models.unet import unet
from bidensify.nn import (
    ActivationBinarizer,
    BiDenseConv2d,
    BiDenseConvTranspose2d,
    BiDenseLinear,
    BinaryLayer,
    Bypass,
    SignBinarizer,
    WeightBinarizer,
    make_binary,
    set_binarization,
)

KERNELS = available_kernels()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", LAYERS)
def test_a_packed_layer_computes_what_the_latent_one_does(case: str, kernel: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[case]
    layer = settle(make())
    assert isinstance(layer, BinaryLayer)
    packed = freeze(layer, kernel=kernel)
    with torch.no_grad():
        for grown in (0, 3):
            # A layer knows no input size: another one works as well.
            size = (shape[0], shape[1], *(s + grown for s in shape[2:])) if packed.kind != "linear" else shape
            x = torch.randn(size) * 2
            assert relative(packed(x), layer(x)) < 1e-5


@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_in_gives_bfloat16_out(kernel: str) -> None:
    layer = settle(BiDenseConv2d(32, 32, 3, padding=1))
    packed = freeze(layer, kernel=kernel)
    x = torch.randn(1, 32, 8, 8).bfloat16()
    with torch.no_grad():
        y = packed(x)
        want = layer(x.float())
    assert y.dtype == torch.bfloat16
    assert relative(y, want) < 0.3
    # Against the same thresholds the only error is the output's rounding.
    with torch.no_grad():
        assert relative(y, freeze(layer, kernel="reference")(x)) < 1e-2


class Shifted(ActivationBinarizer):
    """RSign of ReActNet with learned, lopsided levels: a binarizer that the package does not know."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.shift = nn.Parameter(torch.randn(1, channels, 1, 1) * 0.2)
        self.level = nn.Parameter(torch.tensor([-0.4, 1.1]))

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = x.detach().abs().mean((1, 2, 3), keepdim=True)
        return self.shift, self.level[0] * size, self.level[1] * size

    def binarize(self, x: Tensor) -> Tensor:
        beta, low, high = self.codes(x)
        return torch.where(x >= beta, high, low)


def build(base: nn.Module, binarizer: ActivationBinarizer, **parts: object) -> nn.Module:
    base.__class__ = make_binary(type(base))
    assert isinstance(base, BinaryLayer)
    transposed = isinstance(base, nn.ConvTranspose2d)
    weights = WeightBinarizer(transposed=transposed, groups=getattr(base, "groups", 1))
    base.install(binarizer=binarizer, weight_binarizer=weights, **{"norm": None, "bypass": None, **parts})
    return base.eval()


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", ["conv", "depthwise", "transposed", "pointwise"])
def test_a_methods_own_binarizer_with_two_free_values(case: str, kernel: str) -> None:
    torch.manual_seed(0)
    base = {
        "conv": nn.Conv2d(20, 33, 3, 2, 2, dilation=2),
        "depthwise": nn.Conv2d(20, 20, 5, padding=2, groups=20),
        "transposed": nn.ConvTranspose2d(20, 8, 3, 2, 1, 1, groups=2),
        "pointwise": nn.Conv2d(20, 40, 1),
    }[case]
    layer = build(base, Shifted(20), norm=nn.BatchNorm2d(base.out_channels).eval())
    packed = freeze(layer, kernel=kernel)
    x = torch.randn(2, 20, 9, 10)
    with torch.no_grad():
        assert relative(packed(x), layer(x)) < 1e-5
    # Rebuilt from JSON-able data beside the latent layer, then filled.
    again = empty_from_meta(packed.meta(), like=layer, kernel=kernel)
    again.load_state_dict(packed.state_dict())
    with torch.no_grad():
        assert torch.equal(again.eval()(x), packed(x))
    with pytest.raises(FormatError, match="binarizer"):
        empty_from_meta(packed.meta())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.LeakyReLU(0.2), nn.PReLU(24), nn.PReLU(), nn.Hardtanh(), nn.ReLU6(), nn.GELU()]
)
def test_activations_are_fused_or_kept(activation: nn.Module, kernel: str) -> None:
    layer = build(
        nn.Conv2d(16, 24, 3, padding=1), SignBinarizer(16), activation=activation, norm=nn.BatchNorm2d(24).eval()
    )
    packed = freeze(layer, kernel=kernel)
    assert (packed.activation is None) == (not isinstance(activation, nn.GELU))
    x = torch.randn(1, 16, 7, 7)
    with torch.no_grad():
        assert relative(packed(x), layer(x)) < 1e-5


class Neighbours(Bypass):
    """Averages neighbouring channels: its forward is its own, so what the base says of itself is not true of it."""

    def forward(self, x: Tensor, size: Any = None) -> Tensor:
        return torch.stack([part.mean(1) for part in torch.tensor_split(x, self.out_channels, 1)], 1)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_bypass_of_ones_own_is_kept_and_called(kernel: str) -> None:
    bypass = Neighbours(24, 16, 3, 1, 1)
    layer = build(nn.Conv2d(24, 16, 3, padding=1), SignBinarizer(24), bypass=bypass, norm=nn.BatchNorm2d(16).eval())
    packed = freeze(layer, kernel=kernel)
    x = torch.randn(2, 24, 7, 7)
    with torch.no_grad():
        assert relative(packed(x), layer(x)) < 1e-5


class DynamicSame(nn.Conv2d):
    """TensorFlow's SAME padding, as timm and EfficientNets have it."""

    def forward(self, x: Tensor) -> Tensor:
        pads: list[int] = []
        for axis in (1, 0):
            size = x.shape[2 + axis]
            reach = (self.kernel_size[axis] - 1) * self.dilation[axis] + 1
            total = max((-(-size // self.stride[axis]) - 1) * self.stride[axis] + reach - size, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class StaticSame(nn.Conv2d):
    """Fixed, lopsided padding in a module of its own, as in efficientnet_pytorch."""

    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        self.static_padding = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.static_padding(x), self.weight, self.bias, self.stride, 0, self.dilation, self.groups)


class Standardised(nn.Conv2d):
    """Centres its weights: with a binary weight that is no longer two opposite values."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("make", [DynamicSame, StaticSame])
def test_subclasses_with_padding_of_their_own(make: type[nn.Conv2d], kernel: str) -> None:
    layer = build(make(16, 24, 3, stride=2), SignBinarizer(16), norm=nn.BatchNorm2d(24).eval())
    packed = freeze(layer, kernel=kernel)
    for size in ((1, 16, 8, 9), (1, 16, 7, 12)):
        x = torch.randn(size)
        with torch.no_grad():
            assert relative(packed(x), layer(x)) < 1e-5


def test_what_is_no_zero_padded_convolution_is_refused() -> None:
    layer = build(Standardised(16, 24, 3, padding=1), SignBinarizer(16))
    with pytest.raises(PackError, match=r"stem\.conv: BinaryStandardised does not compute"):
        freeze(layer, name="stem.conv")
    reflected = build(nn.Conv2d(16, 24, 3, padding=1, padding_mode="reflect"), SignBinarizer(16))
    with pytest.raises(PackError, match="padding_mode='reflect'"):
        freeze(reflected)


@pytest.mark.parametrize("base", [nn.Conv2d, nn.Linear])
@pytest.mark.parametrize("how", ["nothing", "half", "normalised", "tanh", "residual", "little", "clamped", "plus"])
def test_what_is_no_product_with_the_weights_is_refused(base: type[nn.Module], how: str) -> None:
    class Other(base):  # type: ignore[misc, valid-type]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = super().forward(torch.nn.functional.normalize(x, dim=1) if how == "normalised" else x)
            return {
                "half": lambda: y * 0.5,
                "tanh": lambda: y.tanh(),
                "residual": lambda: y + x,
                "little": lambda: y + 1e-3 * x,
                "clamped": lambda: y.clamp(-2, 2),
                "plus": lambda: y + 1e-3,
            }.get(how, lambda: y)()

    torch.manual_seed(0)
    linear = base is nn.Linear
    layer = Other(32, 32) if linear else Other(32, 32, 3, padding=1)
    model = nn.Sequential(layer, nn.Sigmoid(), nn.Linear(32, 32) if linear else nn.Conv2d(32, 32, 3, padding=1))
    x = torch.randn(2, 10, 32) if linear else torch.randn(2, 32, 8, 8)
    student = bd.bidensify(model, bd.BidensifyConfig(rules=[bd.Rule("0", "bidense")]), example_inputs=x).eval()
    if how == "nothing":
        assert torch.allclose(bd.pack(student)(x), student(x), atol=1e-5)
        return
    with pytest.raises(PackError, match=r"^0: BinaryOther does not compute .*Rule\('0', 'keep'\)"):
        bd.pack(student)


def test_per_channel_scales_are_refused_by_name_with_the_way_out() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), BiDenseConv2d(16, 16, 3), BiDenseConv2d(16, 16, 3, act_scale="per_channel")
    )
    with pytest.raises(PackError, match=r'^2: act_scale="per_channel" .*act_scale="per_tensor"'):
        pack(model)


@pytest.mark.parametrize("scaled", [True, False])
def test_weights_that_are_not_finite(scaled: bool) -> None:
    layer = settle(BiDenseConv2d(16, 16, 3))
    layer.weight_binarizer = WeightBinarizer(scaled=scaled)
    with torch.no_grad():
        layer.latent_weight[3, 2, 1, 1] = float("nan")
    with pytest.raises(PackError, match=r"^0: its weights are not finite"):
        pack(nn.Sequential(layer))


def test_no_parameter_of_a_packed_network_takes_a_gradient() -> None:
    network = trained()
    packed = pack(network)
    assert not any(parameter.requires_grad for parameter in packed.parameters())
    assert all(parameter.requires_grad for parameter in network.parameters())
    with pytest.raises(RuntimeError, match="does not require grad"):
        packed(torch.randn(1, 3, 16, 16))["out"].sum().backward()


def test_other_refusals() -> None:
    for value in (None, 3, nn.Conv2d):
        with pytest.raises(PackError, match=r"is no nn.Module; give the network that bidensify\(\) returned"):
            pack(value)  # type: ignore[arg-type]
    with pytest.raises(PackError, match=r"Sequential has no binary layer .* bidensify\(\)"):
        pack(nn.Sequential(nn.Conv2d(3, 4, 1)))
    model = nn.Sequential(settle(BiDenseConv2d(16, 16, 3)))
    with pytest.raises(ConfigError, match="kernel='sse'"):
        pack(model, kernel="sse")
    with pytest.raises(ConfigError, match="float_dtype"):
        pack(model, float_dtype=torch.int8)
    with pytest.raises(PackError, match="packed already"):
        pack(pack(model))
    set_binarization(model, activations=True, weights=False)
    with pytest.raises(PackError, match="binarize_weights=False"):
        pack(model)
    set_binarization(model, activations=True, weights=True)
    with torch.no_grad():
        model[0].norm.running_var.fill_(float("nan"))
    with pytest.raises(PackError, match="not finite"):
        pack(model)
    model[0].norm = nn.BatchNorm2d(16, track_running_stats=False)
    with pytest.raises(PackError, match="running statistics"):
        pack(model)


class Network(nn.Module):
    """A stem, a residual pair, a layer met twice and reached through a plain list too, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(
            BiDenseConv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), BiDenseConv2d(32, 32, 3, padding=1)
        )
        self.up = BiDenseConvTranspose2d(32, 16, 2, 2)
        self.again = self.body[2]
        self.plain = [self.up]
        self.head = nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.body(self.stem(x))
        y = self.plain[0](self.again(y))
        return {"out": self.head(y)}


def trained(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    network = Network()
    settle(network)
    return network


@pytest.mark.parametrize("kernel", KERNELS)
def test_pack_keeps_paths_sharing_and_results(kernel: str) -> None:
    network = trained().train()
    before = copy.deepcopy(network.state_dict())
    packed = pack(network, kernel=kernel)
    assert network.training
    assert not packed.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert list(packed_layers(packed)) == ["body.0", "body.2", "up"]
    assert isinstance(packed.body[0], PackedConv2d)
    assert isinstance(packed.up, PackedConvTranspose2d)
    assert packed.again is packed.body[2]
    assert packed.plain[0] is packed.up
    assert not any(isinstance(module, BinaryLayer) for module in packed.modules())
    x = torch.randn(2, 3, 16, 20)
    with torch.no_grad():
        assert relative(packed(x)["out"], network.eval()(x)["out"]) < 1e-5
        assert torch.equal(copy.deepcopy(packed)(x)["out"], packed(x)["out"])


def test_a_single_layer_is_a_model_too() -> None:
    layer = settle(BiDenseLinear(16, 16))
    assert isinstance(pack(layer), PackedLinear)


def test_replace_layers_reaches_every_reference() -> None:
    network, packed = trained(), pack(trained())
    result = replace_layers(network, packed_layers(packed))
    assert result.again is result.body[2] is packed.body[2]
    assert result.plain[0] is result.up is packed.up


def test_float_dtype_runs_the_rest_in_bfloat16() -> None:
    network = trained()
    packed = pack(network, float_dtype=torch.bfloat16)
    assert packed.head.weight.dtype == torch.bfloat16
    assert packed.body[0].side.dtype == torch.float32
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        y = packed(x)["out"]
    assert y.dtype == torch.float32
    assert torch.isfinite(y).all()
    assert network.head.weight.dtype == torch.float32


def test_moving_to_another_dtype_keeps_side_parameters() -> None:
    packed = pack(trained())
    side = packed.up.side.clone()
    packed.to(torch.float16).float()
    assert torch.equal(packed.up.side, side)
    assert packed.up.bits.dtype == torch.uint8


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_and_inference_mode(kernel: str) -> None:
    packed = pack(trained(), kernel=kernel)
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        want = packed(x)["out"]
    with torch.inference_mode():
        assert torch.equal(packed(x)["out"], want)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = packed(x)["out"]
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(y).all()


def test_output_size_of_a_transposed_layer() -> None:
    layer = settle(BiDenseConvTranspose2d(16, 8, 3, 2, 1))
    for kernel in KERNELS:
        packed = freeze(layer, kernel=kernel)
        x = torch.randn(1, 16, 5, 6)
        with torch.no_grad():
            for size in ([9, 11], [10, 12], [9, 12]):
                assert relative(packed(x, output_size=size), layer(x, output_size=size)) < 1e-5
            with pytest.raises(ConfigError, match=r"output_size=\[12, 12\]"):
                packed(x, output_size=[12, 12])


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("shape", [(0, 5, 40), (2, 0, 40), (2, 3, 0, 40), (0, 40), (0, 0, 40)])
def test_no_samples_or_no_tokens_give_none(shape: tuple[int, ...], kernel: str) -> None:
    make, _ = LAYERS["linear"]
    latent = settle(make())
    packed = freeze(latent, kernel)
    x = torch.randn(shape)
    with torch.no_grad():
        # A latent layer has no statistics of no tokens.
        assert packed(x).shape == (*shape[:-1], 72)
        program = torch.export.export(packed, (torch.randn(2, 5, 40),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
        assert program.module()(torch.randn(3, 5, 40)).shape == (3, 5, 72)
        whole = torch.ops.bidensify.packed_layer
        found = whole([x], [1], packed.tiles, packed.side, spec_ints(packed.spec), None, None, None)
        assert found.shape == (*shape[:-1], 72)


def test_wrong_inputs_name_the_layer_and_the_shape() -> None:
    packed = freeze(settle(BiDenseConv2d(16, 8, 3)))
    with pytest.raises(ConfigError, match=r"\(1, 15, 5, 5\).*16 channels"):
        packed(torch.zeros(1, 15, 5, 5))
    with pytest.raises(ConfigError, match="16 channels"):
        packed(torch.zeros(16, 5, 5))


def test_set_kernel_switches_every_layer() -> None:
    packed = set_kernel(pack(trained()), "reference")
    assert {layer.kernel for layer in packed_layers(packed).values()} == {"reference"}
    with pytest.raises(ConfigError, match="kernel='fast'"):
        set_kernel(packed, "fast")


def test_meta_of_another_architecture_is_refused() -> None:
    layer = settle(BiDenseConv2d(16, 8, 3))
    meta = freeze(layer).meta()
    with pytest.raises(FormatError, match=r"kernel: file \(3, 3\), model \(5, 5\)"):
        empty_from_meta(meta, like=BiDenseConv2d(16, 8, 5))
    with pytest.raises(FormatError, match="no 'spec'"):
        empty_from_meta({"type": "PackedConv2d"})
    with pytest.raises(ConfigError, match="'conv' layer"):
        PackedConv2d(PackedSpec("linear", 4, 4))


def test_weight_reads_as_signs() -> None:
    layer = settle(BiDenseConv2d(16, 8, 3, groups=2))
    packed = freeze(layer)
    assert torch.equal(packed.weight, layer.binary_weight()[0])


def test_without_a_library_one_warning_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for cached in (load_library, loader.training_library, backends._choose):
        cached.cache_clear()
    monkeypatch.setattr(loader, "_find", lambda: None)
    monkeypatch.delenv(loader.LIBRARY_VARIABLE, raising=False)
    monkeypatch.delenv(backends.KERNEL_VARIABLE, raising=False)
    try:
        x = torch.randn(1, 16, 5, 5)
        with pytest.warns(RuntimeWarning, match="pip install"):
            layer = settle(BiDenseConv2d(16, 8, 3))
            packed = freeze(layer)
            y = packed(x).detach()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pack(nn.Sequential(layer))(x)
        assert available_kernels() == ("reference",)
        with torch.no_grad():
            assert relative(y, layer(x)) < 1e-5
        monkeypatch.setenv(loader.LIBRARY_VARIABLE, str(tmp_path / "libnone.so"))
        load_library.cache_clear()
        with pytest.warns(RuntimeWarning, match="cannot be loaded"):
            assert load_library() is None
    finally:
        for cached in (load_library, loader.training_library, backends._choose):
            cached.cache_clear()


def test_a_packed_network_keeps_nothing_of_the_latent_one() -> None:
    student = bd.bidensify(unet(width=8)).eval()
    latent = [weakref.ref(layer.latent_weight) for _, layer in bd.nn.binary_layers(student)]
    packed = bd.pack(student)
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        packed(x)
    del student
    gc.collect()
    assert latent
    assert all(reference() is None for reference in latent)
    for layer in packed_layers(packed).values():
        held = sum(t.untyped_storage().nbytes() for t in layer.buffers())
        assert held == layer.bits.numel() + 4 * layer.side.numel() + 4 * layer.tiles.numel()
        assert not list(layer.parameters())


def test_the_last_float_dtype_holds_and_nothing_is_cast_twice() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), settle(BiDenseConv2d(16, 16, 3, padding=1)), nn.Conv2d(16, 4, 1)
    )
    x = torch.randn(1, 3, 8, 8)
    once = set_float_dtype(pack(network), torch.bfloat16)
    again = set_float_dtype(set_float_dtype(pack(network), torch.bfloat16), torch.bfloat16)
    assert len(again._forward_pre_hooks) == len(once._forward_pre_hooks)
    assert len(again._forward_hooks) == len(once._forward_hooks)
    assert torch.equal(again(x), once(x))
    back = set_float_dtype(set_float_dtype(pack(network), torch.bfloat16), torch.float32)
    assert back(x).dtype == torch.float32
    assert len(back._forward_hooks) == len(pack(network)._forward_hooks)
