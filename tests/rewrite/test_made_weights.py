"""Layers that make the weight that they convolve with: standardised, parametrized, hooked; the made weight is binarized."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import bidensify as bd
from bidensify.nn import BinaryLayer


class TwoStep(nn.Conv2d):
    """Weight standardisation as its authors' code has it: mean and standard deviation by hand."""

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        weight = weight - weight.mean(dim=(1, 2, 3), keepdim=True)
        std = weight.view(weight.size(0), -1).std(dim=1).view(-1, 1, 1, 1) + 1e-5
        return F.conv2d(input, weight / std, self.bias, self.stride, self.padding, self.dilation, self.groups)


def standardised(weight: Tensor, eps: float = 1e-6) -> Tensor:
    mean = weight.mean((1, 2, 3), keepdim=True)
    variance = weight.var((1, 2, 3), keepdim=True, unbiased=False)
    return (weight - mean) / torch.sqrt(variance + eps)


def two_step(channels: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    def made(layer: nn.Module) -> Tensor:
        w = layer.weight if not isinstance(layer, BinaryLayer) else layer.latent_weight
        centred = w - w.mean((1, 2, 3), keepdim=True)
        return centred / (centred.flatten(1).std(1).view(-1, 1, 1, 1) + 1e-5)

    return TwoStep(channels, channels, 3, padding=1, bias=False), made


def timm_layer(name: str, **options: object) -> Callable[[int], tuple[nn.Module, Callable[[nn.Module], Tensor]]]:
    def build(channels: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
        layers = pytest.importorskip("timm.layers")
        layer = getattr(layers, name)(channels, channels, 3, **options)

        def made(module: nn.Module) -> Tensor:
            gain = module.gain * module.scale if name.startswith("Scaled") else 1.0
            return standardised(module.latent_weight) * gain

        return layer, made

    return build


def bit_layer(channels: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    bit = pytest.importorskip("transformers.models.bit.modeling_bit")
    return bit.WeightStandardizedConv2d(channels, channels, 3, padding="SAME"), lambda m: standardised(m.latent_weight)


def weight_norm(channels: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    def made(module: nn.Module) -> Tensor:
        g, v = module.parametrizations.weight.original0, module.parametrizations.weight.original1
        return g * v / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    return parametrizations.weight_norm(nn.Conv2d(channels, channels, 3, padding=1)), made


def spectral_norm(channels: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    def made(module: nn.Module) -> Tensor:
        w, norm = module.parametrizations.weight.original, module.parametrizations.weight[0]
        return w / (norm._u @ w.flatten(1) @ norm._v)

    return parametrizations.spectral_norm(nn.Conv2d(channels, channels, 3, padding=1)), made


class Symmetric(nn.Module):
    """A parametrization of somebody's own: every kernel equals its mirror image."""

    def forward(self, weight: Tensor) -> Tensor:
        return (weight + weight.flip(-1)) / 2


def own_parametrization(channels: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    layer = nn.Conv2d(channels, channels, 3, padding=1)
    parametrize.register_parametrization(layer, "weight", Symmetric())

    def made(module: nn.Module) -> Tensor:
        original = module.parametrizations.weight.original
        return (original + original.flip(-1)) / 2

    return layer, made


def old_weight_norm(channels: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Conv2d(channels, channels, 3, padding=1))

    def made(module: nn.Module) -> Tensor:
        return module.weight_g * module.weight_v / module.weight_v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    return layer, made


def old_spectral_norm(channels: int) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    layer = nn.utils.spectral_norm(nn.Conv2d(channels, channels, 3, padding=1))

    def made(module: nn.Module) -> Tensor:
        return module.weight_orig / (module.weight_u @ module.weight_orig.flatten(1) @ module.weight_v)

    return layer, made


KINDS: dict[str, Callable[[int], tuple[nn.Module, Callable[[nn.Module], Tensor]]]] = {
    "by hand": two_step,
    "StdConv2d": timm_layer("StdConv2d"),
    "StdConv2dSame": timm_layer("StdConv2dSame", stride=2),
    "ScaledStdConv2d": timm_layer("ScaledStdConv2d", gain_init=0.7),
    "ScaledStdConv2dSame": timm_layer("ScaledStdConv2dSame", stride=2),
    "transformers' BiT": bit_layer,
    "weight_norm": weight_norm,
    "spectral_norm": spectral_norm,
    "own parametrization": own_parametrization,
    "old weight_norm": old_weight_norm,
    "old spectral_norm": old_spectral_norm,
}
PICKLED = ("by hand", "StdConv2d", "ScaledStdConv2d", "StdConv2dSame", "ScaledStdConv2dSame", "transformers' BiT")


def network(kind: str) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    torch.manual_seed(2)
    middle, made = KINDS[kind](8)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), middle, nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)
    )
    return model, made


@pytest.mark.parametrize("kind", KINDS)
def test_the_made_weight_is_binarized_exactly(kind: str) -> None:
    model, made = network(kind)
    student = bd.bidensify(model).eval()
    layer = student[2]
    assert isinstance(layer, BinaryLayer)
    plan = student.bidensify_plan.layers[1]
    assert plan.makes_weight
    assert "binarizes the weight that" in plan.reason
    student(torch.randn(1, 3, 8, 8))
    # An independent binary convolution: two values per output channel, of the weight that the layer makes.
    with torch.no_grad():
        weight = made(layer)
        scale = weight.abs().mean((1, 2, 3))
        binary = torch.where(weight >= 0, 1.0, -1.0) * scale.view(-1, 1, 1, 1)
        a = torch.where(torch.randn(2, 8, 8, 8) >= 0, 1.0, -1.0)
        if isinstance(layer.padding, str) or "Same" in kind:
            want = F.conv2d(F.pad(a, (0, 1, 0, 1)), binary, layer.bias, layer.stride)
        else:
            want = F.conv2d(a, binary, layer.bias, layer.stride, layer.padding)
        got = layer.conv_only(a)
    assert torch.allclose(got, want, atol=1e-4)
    signs, own, offset = layer.binary_weight()
    assert offset is None
    assert torch.equal(signs, binary.sign())
    assert torch.allclose(own, scale, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_packs_exactly(kind: str) -> None:
    model, _ = network(kind)
    student = bd.bidensify(model)
    bd.calibrate(student, [torch.randn(4, 3, 16, 16)])
    student.eval()
    packed = bd.pack(student, kernel="reference")
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(packed(x), student(x), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_every_parameter_and_originals_load(kind: str) -> None:
    model, _ = network(kind)
    original = {key: value.detach().clone() for key, value in model.state_dict().items()}
    student = bd.bidensify(model)
    student.train()(torch.randn(2, 3, 8, 8)).square().mean().backward()
    for name, parameter in student[2].named_parameters():
        assert parameter.grad is not None, name
    latent = student[2].latent_parameters()
    assert latent
    assert all(parameter.grad.abs().sum() > 0 for parameter in latent)
    # Its own keys stay; only those of the absorbed norm move.
    changed = {key: value + 0.5 if value.is_floating_point() else value for key, value in original.items()}
    assert not student.load_state_dict(changed).missing_keys
    own = dict(student.named_parameters())
    for name in (n for n in original if n.startswith("2.") and n in own):
        assert torch.equal(own[name], changed[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_copies(kind: str) -> None:
    model, _ = network(kind)
    student = bd.bidensify(model).eval()
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        expected = student(x)
        assert torch.equal(copy.deepcopy(student)(x), expected)
        if kind in PICKLED:
            assert torch.equal(pickle.loads(pickle.dumps(student))(x), expected)


def test_parametrized_modules_refuse_to_be_pickled_as_torchs_own_do() -> None:
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(bd.bidensify(network("weight_norm")[0]))


@pytest.mark.parametrize("kind", ["ScaledStdConv2d", "weight_norm"])
def test_compile_and_export(kind: str) -> None:
    student = bd.bidensify(network(kind)[0]).eval()
    x = torch.randn(1, 3, 16, 16)
    expected = student(x)
    assert torch.allclose(torch.compile(student, fullgraph=True, backend="eager")(x), expected, atol=1e-5)
    assert torch.allclose(torch.export.export(student, (x,)).module()(x), expected, atol=1e-5)


def test_weights_can_be_left_float_for_a_stage() -> None:
    model, made = network("ScaledStdConv2d")
    student = bd.bidensify(model)
    bd.nn.set_binarization(student, activations=True, weights=False)
    a = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        want = F.conv2d(a, made(student[2]), student[2].bias, 1, 1)
        assert torch.allclose(student[2].conv_only(a), want, atol=1e-5)


def test_pruned_layers_stay_and_the_plan_says_why() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1))
    prune.l1_unstructured(model[1], "weight", amount=0.5)
    plan = bd.plan(model)
    assert plan.layers[1].action == "keep"
    assert "a bit has no zero" in plan.layers[1].reason
    prune.remove(model[1], "weight")
    assert bd.plan(model).layers[1].action == "binary"


def test_a_forward_that_is_no_convolution_is_kept_with_a_reason() -> None:
    class Unfolded(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            columns = F.unfold(input, self.kernel_size)
            out = self.weight.flatten(1) @ columns
            return out.view(input.shape[0], -1, input.shape[2] - 2, input.shape[3] - 2)

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Unfolded(8, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1))
    layer = bd.plan(model).layers[1]
    assert (layer.action, layer.reason) == ("keep", "the forward of Unfolded is not one convolution with its weight")
    assert torch.isfinite(bd.bidensify(model)(torch.randn(1, 3, 16, 16))).all()
