"""Norms around binary layers: absorbed, kept or taken over, frozen parameters, dropped paths, half precision."""

from __future__ import annotations

import pytest
import torch
from case import check_mixed_signs
from torch import Tensor, nn

import bidensify as bd
from bidensify.nn import BinaryLayer, RPReLU, binary_layers
from bidensify.rewrite import apply_plan


def around(norm: nn.Module, *after: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False), norm, *after,
        nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1),
    )  # fmt: skip


def frozen_norms() -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    torchvision = pytest.importorskip("torchvision")
    found["torchvision"] = torchvision.ops.misc.FrozenBatchNorm2d(8, eps=1e-3)
    detr = pytest.importorskip("transformers.models.detr.modeling_detr")
    found["detr"] = detr.DetrFrozenBatchNorm2d(8)
    layers = pytest.importorskip("timm.layers")
    found["timm"] = layers.FrozenBatchNormAct2d(8)
    return found


@pytest.mark.parametrize("kind", ["torchvision", "detr", "timm"])
def test_a_frozen_batchnorm_becomes_the_layers_own_with_its_values(kind: str) -> None:
    norm = frozen_norms()[kind]
    for name, buffer in norm.named_buffers():
        nn.init.uniform_(buffer, 0.5 if name == "running_var" else -1, 2)
    values = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    model = around(norm, nn.ReLU())
    student = bd.bidensify(model)
    layer = student[1]
    assert f"absorbs {type(norm).__name__}, whose statistics must follow" in student.bidensify_plan.layers[1].reason
    assert type(layer.norm) is nn.BatchNorm2d
    for name in ("weight", "bias", "running_mean", "running_var"):
        assert torch.equal(getattr(layer.norm, name), values[name]), name
    assert layer.norm.eps == getattr(norm, "eps", 1e-5)
    assert layer.norm.weight.requires_grad
    assert isinstance(student[2], nn.Identity)
    # A full-precision state_dict loads: the frozen buffers go to the layer's norm.
    other = {key: value + 1 for key, value in model.state_dict().items()}
    assert not student.load_state_dict(other).missing_keys
    assert torch.equal(layer.norm.running_var, values["running_var"] + 1)
    check_mixed_signs(student, torch.randn(4, 3, 16, 16))


@pytest.mark.parametrize("method", ["bidense", "bidense-in-paper"])
@pytest.mark.parametrize("bypass", [True, False])
def test_an_activation_starts_centred_on_what_it_is_given(bypass: bool, method: str) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    nn.init.uniform_(norm.weight, -2, 2)
    nn.init.uniform_(norm.bias, -2, 2)
    weight, bias = (value.detach().view(-1, 1, 1) for value in (norm.weight, norm.bias))
    model = around(norm, nn.ReLU())
    student = bd.bidensify(model, bd.BidensifyConfig(method=method, rules=[bd.Rule("1", {"bypass": bypass})]))
    activation = student[1].activation
    assert (student[1].bypass is not None) == bypass
    assert torch.equal(student[1].norm.weight, norm.weight)
    assert torch.equal(student[1].norm.bias, norm.bias)
    # Many signals as the norm gives them, and what a row of such layers hands on, each deviation as its layer's.
    carried = torch.zeros(1, 8, 100, 1000)
    # A bypass that joins behind the activation is no part of that.
    for _ in range(12 * (bypass and method == "bidense-in-paper")):
        carried = nn.functional.relu(carried + weight * torch.randn(carried.shape))
        carried = carried - carried.mean((2, 3), keepdim=True)
    with torch.no_grad():
        means = activation(carried + weight * torch.randn(carried.shape) + bias).mean((0, 2, 3))
    # What is carried is not quite normal.
    assert means.abs().max() < 0.1
    assert activation.bias_out.abs().max() > 0.3


def test_an_activation_starts_centred_without_values_too() -> None:
    around_unit = around(nn.BatchNorm2d(8, affine=False), nn.ReLU())
    # -0.75 / sqrt(2 pi), what a PReLU of slope 0.25 leaves of a normal signal's mean.
    found = bd.bidensify(around_unit)[1].activation.bias_out
    torch.testing.assert_close(found, torch.full((8,), -0.2992), rtol=1e-3, atol=0)
    plain = bd.bidensify(around_unit, method="bidense-in-paper")
    # 0.75 sigma / sqrt(2 pi) of a normal signal, for sigma^2 = 1 / (1 - 0.4417): a PReLU of slope 0.25 leaves
    # (1 + 0.25^2) / 2 - 0.75^2 / (2 pi) of the variance.
    torch.testing.assert_close(plain[1].activation.bias_out, torch.full((8,), -0.4004), rtol=1e-3, atol=0)
    model = around(nn.BatchNorm2d(8), nn.ReLU())
    student = bd.bidensify(model)
    replayed = apply_plan(model.to("meta"), student.bidensify_plan)
    replayed.load_state_dict(student.state_dict(), assign=True)
    assert torch.equal(replayed[1].activation.bias_out, student[1].activation.bias_out)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(("transposed", "kernel", "stride"), [(False, 3, 2), (True, 4, 4), (True, 4, 2), (True, 3, 1)])
def test_a_new_norm_starts_from_what_the_float_layer_gives(
    transposed: bool, kernel: int, stride: int, groups: int
) -> None:
    torch.manual_seed(0)
    cls = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = cls(64, 8, kernel, stride, groups=groups, bias=False)
    with torch.no_grad():
        layer.weight.mul_(torch.rand(layer.weight.shape) * 4)
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), layer, nn.Conv2d(8, 2, 1))
    student = bd.bidensify(model, example_inputs=torch.randn(1, 3, 32, 32))
    # Inputs of either sign of which only the power is that behind a ReLU, so that the output has no mean.
    x = torch.randn(2, 64, 64, 64) / 2**0.5
    with torch.no_grad():
        y = layer(x)[..., kernel:-kernel, kernel:-kernel]
    torch.testing.assert_close(student[2].norm.weight.detach(), y.std((0, 2, 3)), rtol=0.05, atol=0)


def test_a_frozen_batchnorm_elsewhere_stays() -> None:
    norm = frozen_norms()["torchvision"]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1))
    student = bd.bidensify(model)
    assert type(student[1]) is type(norm)
    assert torch.equal(student[1].running_var, norm.running_var)


@pytest.mark.parametrize("name", ["GroupNormAct", "LayerNormAct2d"])
def test_a_fused_norm_that_stays_gets_rprelu_inside(name: str) -> None:
    layers = pytest.importorskip("timm.layers")
    options = {"num_groups": 2} if name == "GroupNormAct" else {}
    model = around(getattr(layers, name)(8, **options))
    student = bd.bidensify(model)
    assert type(student[2]) is type(model[2])
    assert isinstance(student[2].act, RPReLU)
    assert (student[2].act.channels, student[2].act.dim) == (8, 1)
    assert torch.equal(student[2].weight, model[2].weight)
    # The norm between stays on the path: the layer has its own BatchNorm and bypass in front of it.
    assert student[1].bypass is not None
    assert student[1].norm.num_features == 8
    x = torch.randn(2, 8, 4, 4)
    assert model[2](x).min() == 0
    assert student[2](x).min() < 0
    check_mixed_signs(student, torch.randn(4, 3, 16, 16))


def test_batchnormact_is_absorbed_behind_a_layer_and_opened_in_front_of_one() -> None:
    layers = pytest.importorskip("timm.layers")
    behind = bd.bidensify(around(layers.BatchNormAct2d(8)))
    assert isinstance(behind[1].activation, RPReLU)
    assert isinstance(behind[2], nn.Identity)
    torch.manual_seed(0)
    ahead = bd.bidensify(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), layers.BatchNormAct2d(8), nn.Conv2d(8, 8, 3), nn.AvgPool2d(2),
            layers.BatchNormAct2d(8), nn.Conv2d(8, 2, 1),
        )
    )  # fmt: skip
    assert isinstance(ahead[1], nn.BatchNorm2d)
    assert isinstance(ahead[1].act, RPReLU)
    assert isinstance(ahead[4].act, RPReLU)
    check_mixed_signs(ahead, torch.randn(4, 3, 16, 16))


def test_layernorm2d_stays() -> None:
    layers = pytest.importorskip("timm.layers")
    student = bd.bidensify(around(layers.LayerNorm2d(8), nn.GELU()))
    assert type(student[2]) is layers.LayerNorm2d
    assert isinstance(student[3], RPReLU)
    assert student[1].norm is not None
    check_mixed_signs(student, torch.randn(4, 3, 16, 16))


class Dropped(nn.Module):
    def __init__(self, drop: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.drop = drop

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.norm(self.conv(x)))


@pytest.mark.parametrize("kind", ["identity", "off", "stochastic depth", "drop path", "dropout"])
def test_a_path_that_is_dropped_in_training_never_carries_the_only_signal(kind: str) -> None:
    torchvision, layers = pytest.importorskip("torchvision"), pytest.importorskip("timm.layers")
    drop = {
        "identity": nn.Identity(),
        "off": nn.Dropout(0.0),
        "stochastic depth": torchvision.ops.StochasticDepth(1.0, "row"),
        "drop path": layers.DropPath(0.999),
        "dropout": nn.Dropout(1.0),
    }[kind]
    torch.manual_seed(0)
    student = bd.bidensify(nn.Sequential(nn.Conv2d(3, 8, 1), Dropped(drop), nn.Conv2d(8, 2, 1)))
    layer = student[1].conv
    carried = kind in ("identity", "off")
    assert (layer.bypass is not None) == carried
    nn.init.zeros_(layer.norm.weight)
    x = torch.randn(4, 8, 6, 6)
    # With the binary branch silenced the block hands its input through, in training too.
    assert torch.allclose(student.train()[1](x), x, atol=1e-6)


def test_frozen_parameters_stay_frozen_and_the_plan_says_so() -> None:
    model = around(nn.BatchNorm2d(8), nn.ReLU())
    for module in (model[1], model[2]):
        module.requires_grad_(False)
    student = bd.bidensify(model)
    plan = student.bidensify_plan
    assert any("1: its weight is frozen" in note for note in plan.notes)
    layer = student[1]
    assert not layer.latent_weight.requires_grad
    assert not layer.norm.weight.requires_grad
    assert layer.binarizer.b.requires_grad
    assert student[4].latent_weight.requires_grad
    student.train()(torch.randn(2, 3, 8, 8)).square().mean().backward()
    assert layer.latent_weight.grad is None
    assert layer.binarizer.b.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types(dtype: torch.dtype) -> None:
    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = around(nn.BatchNorm2d(8), nn.ReLU())
            self.up = nn.ConvTranspose2d(2, 2, 2, 2)
            self.head = nn.Conv2d(2, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.relu(self.up(self.body(x))))

    model = Small().to(dtype)
    student = bd.bidensify(model)
    assert {p.dtype for p in student.parameters()} == {dtype}
    # The transposed convolution reads two values and stays, and so does the layer that gives them.
    assert sum(1 for _ in binary_layers(student)) == 2
    bd.calibrate(student, [torch.randn(4, 3, 16, 16, dtype=dtype)])
    out = student.train()(torch.randn(2, 3, 16, 16, dtype=dtype))
    assert out.dtype == dtype
    out.float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)
    assert isinstance(student.body[1], BinaryLayer)
    assert student.body[1].latent_weight.grad.abs().sum() > 0


def test_a_batchnorm_without_running_statistics_stays() -> None:
    """It normalizes each batch on its own in evaluation too, which no constant of a layer can do."""
    model = around(nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU())
    student = bd.bidensify(model)
    assert student.bidensify_plan.layers[1].norm is None
    assert isinstance(student[2], nn.BatchNorm2d)
    assert student[1].norm.running_mean is not None
