"""What single methods have beyond the contract: degenerate weights, frames, channels turned round, maps of scales, schedules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from own_parts import OffsetWeight
from torch import Tensor, nn

import bidensify as bd
from bidensify.deploy import available_kernels
from bidensify.deploy.freeze import freeze
from bidensify.errors import ConfigError, PackError
from bidensify.methods import LayerParts, LayerSpec, get_method, in_frame
from bidensify.models import build_model
from bidensify.nn import BinaryLayer, RPReLU, SignBinarizer, make_binary, set_binarization, set_progress

METHODS = [name for name in bd.available_methods() if not name.startswith("own-")]
each_method = pytest.mark.parametrize("method", METHODS)
CONFIG = bd.BidensifyConfig()
IN_BIDENSE = bd.BidensifyConfig(frame="bidense")


def parts_of(method: str, spec: LayerSpec, act_scale: str = "per_tensor") -> LayerParts:
    return get_method(method).parts(spec, bd.BidensifyConfig(method=method, act_scale=act_scale))


def layer_of(base: Any, parts: LayerParts) -> BinaryLayer:
    """A bare binary layer: no norm, bypass or activation."""
    base.__class__ = make_binary(type(base))
    base.install(binarizer=parts.binarizer, weight_binarizer=parts.weight_binarizer, norm=None, bypass=None)
    made: BinaryLayer = base.eval()
    return made


def spec_of(base: Any, **options: Any) -> LayerSpec:
    if isinstance(base, nn.Linear):
        return LayerSpec("linear", base.in_features, base.out_features, dim=-1, weight=base.weight.detach(), **options)
    kind = "conv_transpose2d" if isinstance(base, nn.ConvTranspose2d) else "conv2d"
    return LayerSpec(
        kind, base.in_channels, base.out_channels, base.groups, 1, base.kernel_size, base.stride, base.dilation,
        weight=base.weight.detach(), **options,
    )  # fmt: skip


@each_method
@pytest.mark.parametrize(
    "base",
    [
        nn.Conv2d(6, 6, 1, groups=6), nn.Conv2d(6, 12, 3, groups=6), nn.ConvTranspose2d(4, 4, 1, groups=4), nn.Linear(1, 5),
        nn.Conv2d(5, 3, 2),
    ],
    ids=["depthwise 1x1", "depthwise", "transposed depthwise", "one feature", "plain"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["random", "equal", "equal up to rounding", "zero"])
def test_no_weights_are_lost_or_not_a_number(method: str, base: nn.Module, kind: str) -> None:
    torch.manual_seed(0)
    # Drawn as the file was read, before any seed; a learned scale starts from it.
    base.reset_parameters()
    shape = base.weight.shape
    weight = {
        "random": torch.randn(shape), "equal": torch.full(shape, -0.3),
        "equal up to rounding": torch.full(shape, 0.1) * (1 + torch.randint(0, 2, shape) * 1.2e-7), "zero": torch.zeros(shape),
    }[kind].requires_grad_()  # fmt: skip
    binarizer = parts_of(method, spec_of(base)).weight_binarizer
    binary = binarizer(weight)
    (binary * torch.randn(shape)).sum().backward()
    assert bool(torch.isfinite(binary).all())
    assert bool(torch.isfinite(weight.grad).all())
    _, scale, offset = binarizer.codes(weight)
    assert bool(torch.isfinite(scale).all())
    assert offset is None or bool(torch.isfinite(offset).all())
    if kind != "zero":
        assert bool((binarizer.rows(binary).abs().amax(1) > 1e-3).all())
        assert float(weight.grad.abs().sum()) > 0
    if kind == "random" and binarizer.rows(weight).shape[1] == 1 and method != "bit":
        # A single weight keeps its sign.
        assert torch.equal(binary.detach().sign(), weight.detach().sign() * binarizer.like(scale, weight).sign())


def test_frames() -> None:
    for name in METHODS:
        method = get_method(name)
        assert in_frame(name, CONFIG) == name
        for frame, bypass_last in ((IN_BIDENSE, True), (bd.BidensifyConfig(frame="bidense-paper"), False)):
            there = get_method(in_frame(name, frame))
            assert (there.bypass, there.norm, there.activation_first, there.residual) == (
                "all",
                "after",
                bypass_last,
                None,
            )
            assert there.activation is not None
            assert isinstance(there.activation(4, 1), RPReLU)
            assert there.parts is method.parts
    shortcut = LayerSpec("conv2d", 8, 16, stride=(2, 2))
    for name in ("bireal", "irnet", "adabin", "recu"):
        method = get_method(name)
        assert method.keeps is not None
        assert "downsampling shortcut" in method.keeps(shortcut)
        assert not method.keeps(LayerSpec("conv2d", 8, 16, kernel_size=(3, 3), stride=(2, 2)))
        assert not method.keeps(LayerSpec("conv2d", 8, 16))
        there = get_method(in_frame(name, IN_BIDENSE))
        assert there.keeps is not None
        assert not there.keeps(shortcut)
    for name in ("bibert", "bit", "bivit"):
        keeps = get_method(in_frame(name, IN_BIDENSE)).keeps
        assert keeps is not None
        assert "linear layers" in keeps(shortcut)
        assert not keeps(LayerSpec("linear", 8, 8, dim=-1))
    with pytest.raises(ConfigError, match="frame='ours' is none of its values; known: own, bidense"):
        bd.BidensifyConfig(frame="ours")
    with pytest.raises(ConfigError, match="unknown method 'xnor-in-paper-in-bidense'"):
        get_method("xnor-in-paper-in-bidense")


@pytest.mark.parametrize("method", ["bidense", "react", "dorefa"])
def test_in_the_teachers_frame_float_layers_compute_what_the_network_did(method: str) -> None:
    """Residual blocks, a projection, a decoder with concatenations; trained norms; hooks of no kind."""
    torch.manual_seed(0)
    network = build_model("demo:unet", num_classes=5, width=8)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    x = torch.randn(4, 3, 32, 48)
    with torch.no_grad():
        network.train()(x)
        expected = network.eval()(x)
    config = bd.BidensifyConfig(method=method, frame="teacher")
    student = bd.bidensify(network, config, example_inputs=x).eval()
    layers = dict(bd.nn.binary_layers(student))
    assert len(layers) > 10
    assert all(layer.bypass is None for layer in layers.values())
    student, image = student.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        binary = student(image)
        assert torch.equal(bd.pack(student)(image), binary)
        assert float((binary - expected).abs().max()) > 0.1
        set_binarization(student, activations=False, weights=False)
        torch.testing.assert_close(student(image), expected, rtol=1e-4, atol=1e-4)
    again = bd.BidensifyConfig.from_dict(config.to_dict())
    assert bd.plan(network, again, example_inputs=x).to_dict() == student.bidensify_plan.to_dict()


TURNED = {
    "plain": (lambda: nn.Conv2d(20, 9, 3, padding=1), (2, 20, 6, 7)),
    "groups": (lambda: nn.Conv2d(36, 72, 3, padding=1, groups=3), (2, 36, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(40, 40, 3, padding=1, groups=40), (1, 40, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(24, 32, 3, 2, 1, 1, groups=2), (1, 24, 5, 4)),
    "linear": (lambda: nn.Linear(40, 24), (2, 6, 40)),
}


@pytest.mark.parametrize("geometry", list(TURNED))
@pytest.mark.parametrize("method", ["bisrnet", "xnor"])
def test_a_channel_with_a_negative_scale_is_turned_round(method: str, geometry: str) -> None:
    torch.manual_seed(0)
    make, shape = TURNED[geometry]
    base = make()
    parts = parts_of(method, spec_of(base))
    channels = shape[-1] if geometry == "linear" else shape[1]
    k, b = torch.randn(channels), torch.randn(channels)
    k[3] = k[4] = 0
    b[3], b[4] = -0.5, 0.5
    with torch.no_grad():
        if method == "bisrnet":
            parts.binarizer.k.copy_(k)
            parts.binarizer.b.copy_(b)
        else:
            parts.binarizer.norm.weight.copy_(k)
            parts.binarizer.norm.bias.copy_(b)
            parts.binarizer.norm.eps = 0.0
    layer, x = layer_of(base, parts), torch.randn(shape)
    like = (lambda t: t) if geometry == "linear" else (lambda t: t.view(-1, 1, 1))
    want = torch.where(like(k) * x + like(b) >= 0, 1.0, -1.0)
    assert torch.equal(layer.binarizer(x), want)
    with torch.no_grad():
        evaluated = layer(x)
        torch.testing.assert_close(evaluated, layer.conv_only(want), rtol=1e-5, atol=1e-5)
        for kernel in available_kernels():
            assert torch.equal(freeze(layer, kernel)(x), evaluated), kernel


def test_turned_channels_need_weights_without_an_offset() -> None:
    base = nn.Conv2d(6, 4, 3)
    spec = spec_of(base)
    parts = LayerParts(parts_of("bisrnet", spec).binarizer, OffsetWeight())
    layer, x = layer_of(base, parts), torch.randn(1, 6, 5, 5)
    with torch.no_grad():
        parts.binarizer.k[2] = -1
        evaluated = layer(x)
    torch.testing.assert_close(evaluated, layer(x.clone().requires_grad_()).detach())
    with pytest.raises(PackError, match="turns the values of some channels round.*these weights have an offset"):
        freeze(layer, name="body.0")


def box(x: Tensor, base: Any) -> Tensor:
    """XNOR-Net's K: mean |x| over channels, averaged over each window, padding counting as 0."""
    if isinstance(base, nn.Linear):
        return x.abs().mean(-1, keepdim=True)
    kernel = torch.full((1, 1, *base.kernel_size), 1 / (base.kernel_size[0] * base.kernel_size[1]))
    across = x.abs().mean(1, keepdim=True)
    if isinstance(base, nn.ConvTranspose2d):
        taps = base.stride[0] * base.stride[1]
        return F.conv_transpose2d(across, kernel * taps, None, base.stride, base.padding, base.output_padding)
    return F.conv2d(across, kernel, None, base.stride, base.padding, base.dilation)


@pytest.mark.parametrize(
    "base",
    [
        nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 4, (3, 2), 2, 1, bias=False), nn.Conv2d(6, 8, 3, padding=2, dilation=2),
        nn.ConvTranspose2d(6, 4, 3, 2, 1, 1), nn.Linear(6, 4),
    ],
    ids=["3x3", "strided", "dilated", "transposed", "linear"],
)  # fmt: skip
def test_the_spatial_map_multiplies_the_output(base: Any) -> None:
    torch.manual_seed(0)
    spec = spec_of(base)
    parts, plain = parts_of("xnor", spec, "spatial"), parts_of("xnor", spec)
    x = torch.randn((2, 5, 6) if isinstance(base, nn.Linear) else (2, 6, 7, 8))
    bias = base.bias
    # The map is of what the layer reads: of the normalized input (section 3.2, figure 3 of the paper), not of the input itself.
    norm = plain.binarizer.norm
    for value, low, high in (
        (norm.running_mean, -1, 1),
        (norm.running_var, 0.3, 3),
        (norm.weight, 0.5, 2),
        (norm.bias, -1, 1),
    ):
        nn.init.uniform_(value, low, high)
    parts.binarizer.norm.load_state_dict(norm.state_dict())
    layer = layer_of(base, LayerParts(plain.binarizer, plain.weight_binarizer))
    bare = layer(x.clone().requires_grad_()).detach()
    layer.binarizer = parts.binarizer.eval()
    got = layer(x.clone().requires_grad_())
    read = norm(x).detach()
    shift = 0 if bias is None else bias.detach() if isinstance(base, nn.Linear) else bias.detach().view(-1, 1, 1)
    torch.testing.assert_close(got.detach(), (bare - shift) * box(read, base) + shift, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), got.detach())
    with pytest.raises(PackError, match='act_scale="spatial" multiplies each output pixel by a float.*\'?none'):
        freeze(layer)


def test_the_spatial_map_in_training_is_of_the_batch_and_counts_it_once() -> None:
    torch.manual_seed(0)
    base = nn.Conv2d(6, 4, 3, padding=1, bias=False)
    parts = parts_of("xnor", spec_of(base), "spatial")
    layer = layer_of(base, parts).train()
    x = 3 * torch.randn(4, 6, 7, 8) + 5
    own, plain = nn.BatchNorm2d(6), layer.conv_only
    y = layer(x)
    assert int(layer.binarizer.norm.num_batches_tracked) == 1
    torch.testing.assert_close(y, plain(layer.binarizer(x)) * box(own(x).detach(), base), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["bidense", "bnn", "adabin"])
def test_no_other_method_has_a_spatial_map(method: str) -> None:
    with pytest.raises(ConfigError, match="act_scale='spatial'"):
        parts_of(method, LayerSpec("conv2d", 4, 4), "spatial")


def test_xnor_normalizes_by_the_batch_while_it_trains_and_while_it_is_calibrated() -> None:
    torch.manual_seed(0)
    base = nn.Conv2d(4, 3, 3)
    layer = layer_of(base, parts_of("xnor", spec_of(base)))
    x = torch.rand(5, 4, 8, 8) * 2 + 3
    with torch.no_grad():
        # Behind a ReLU nothing is below 0, and the running statistics are still 0 and 1.
        assert bool((layer.binarizer(x) == 1).all())
        layer.binarizer.norm.train()
        shares = (layer.binarizer(x) == 1).float().mean((0, 2, 3))
        assert bool(((shares > 0.3) & (shares < 0.7)).all())
        layer.binarizer.norm.eval()
        bd.calibrate(layer, [x])
        shares = (layer.binarizer(x) == 1).float().mean((0, 2, 3))
        assert bool(((shares > 0.3) & (shares < 0.7)).all())


@pytest.mark.parametrize("method", ["react", "insta", "bisrnet", "bidense-cfb"])
@pytest.mark.parametrize("dim", [1, -1])
def test_calibration_leaves_every_channel_with_both_signs(method: str, dim: int) -> None:
    torch.manual_seed(0)
    spec = LayerSpec("conv2d" if dim == 1 else "linear", 5, 4, dim=dim)
    part = parts_of(method, spec).binarizer.eval()
    x = torch.randn(4, 5, 6, 6) + torch.linspace(3, 9, 5).view(1, -1, 1, 1)
    x = x if dim == 1 else x.flatten(2).movedim(1, -1)
    with torch.no_grad():
        part.begin_calibration()
        part(x[:2])
        part(x[2:])
        part.end_calibration()
        shares = (part(x) > 0).float().movedim(dim, 0).flatten(1).mean(1)
    assert bool(((shares > 0.4) & (shares < 0.6)).all())


def test_dorefa_rounds_a_tie_down() -> None:
    part = parts_of("dorefa", LayerSpec("conv2d", 3, 4)).binarizer
    for dtype in (torch.float32, torch.float64):
        half = torch.tensor(0.5, dtype=dtype)
        above = torch.nextafter(half, torch.tensor(1.0, dtype=dtype))
        x = torch.stack([half, above, -half, 2 * half]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
        assert part(x)[0, 0].flatten().tolist() == [0, 1, 0, 1] == x[0, 0].clamp(0, 1).round().flatten().tolist()


@pytest.mark.parametrize("nonnegative", [False, True])
def test_bit_packs_both_its_pairs_of_values(nonnegative: bool) -> None:
    torch.manual_seed(0)
    base = nn.Linear(40, 24)
    layer = layer_of(base, parts_of("bit", spec_of(base, nonnegative=nonnegative)))
    x = torch.randn(2, 7, 40)
    x = x.relu() if nonnegative else x
    bd.calibrate(layer, [x[:1], x[1:]])
    alpha = float(layer.binarizer.alpha.detach())
    assert alpha == pytest.approx(float(x.abs().mean()) * (4 if nonnegative else 2), rel=1e-5)
    with torch.no_grad():
        values = {round(float(v), 5) for v in layer.binarizer(x).unique()}
        assert values == {round(0.0 if nonnegative else -alpha, 5), round(alpha, 5)}
        evaluated = layer(x)
        for kernel in available_kernels():
            assert torch.equal(freeze(layer, kernel)(x), evaluated), kernel
        # A step size that training has pushed below 0 stays positive.
        layer.binarizer.alpha.fill_(-1.0)
        assert float(layer.binarizer(x).abs().amax()) == pytest.approx(1e-5)


def test_bivit_learns_the_scale_of_attention_alone() -> None:
    for cin, cout, learned in ((8, 8, True), (8, 16, True), (8, 24, True), (8, 32, False), (32, 8, False)):
        base = nn.Linear(cin, cout)
        binarizer = parts_of("bivit", spec_of(base)).weight_binarizer
        assert bool(list(binarizer.parameters())) == learned
        torch.testing.assert_close(binarizer.codes(base.weight)[1], base.weight.detach().abs().mean(1))


def test_recu_follows_its_schedule_and_has_one_sign_in_training_and_evaluation() -> None:
    parts = parts_of("recu", LayerSpec("conv2d", 4, 6, kernel_size=(3, 3)))
    taus = []
    for fraction in (0.0, 0.5, 1.0):
        set_progress(parts.weight_binarizer, fraction)
        taus.append(parts.weight_binarizer.tau)
    assert taus[0] == pytest.approx(0.85)
    assert taus[2] == pytest.approx(0.99)
    assert 0.85 < taus[1] < 0.92
    # The smallest there are: divided by a deviation they would be 0.
    x = torch.randn(2, 4, 3, 3) * 100
    x[0, 0, 0, 0] = -1e-45
    part = parts.binarizer
    assert isinstance(part, SignBinarizer)
    assert torch.equal(part.train()(x), part.eval()(x))


def test_insta_gives_the_same_thresholds_for_every_memory_format() -> None:
    torch.manual_seed(0)
    part = parts_of("insta", LayerSpec("conv2d", 7, 4)).binarizer
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.normal_()
    x = torch.randn(2, 7, 19, 23)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(part.codes(x)[0], part.codes(last)[0])
    tokens = parts_of("insta", LayerSpec("linear", 7, 4, dim=-1)).binarizer
    tokens.load_state_dict(part.state_dict())
    assert torch.equal(tokens.codes(x.flatten(2).movedim(1, 2))[0].movedim(2, 1), part.codes(x)[0].flatten(2))
