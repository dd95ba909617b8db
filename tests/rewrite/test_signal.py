"""A full-precision signal reaches every point exactly once: never lost, never doubled.

Silence every binary branch (its BatchNorm gives 0) and make every activation linear: what is left is the full-precision
path alone. It only copies, averages and concatenates, so a signal of ones must come out as ones everywhere. A lost
path gives 0, a doubled one 2.
"""

from __future__ import annotations

import pytest
import torch
from networks import Net
from torch import Tensor, nn

import bidensify as bd
from bidensify.nn import RPReLU, binary_layers


def silence(model: nn.Module) -> None:
    with torch.no_grad():
        for _, layer in binary_layers(model):
            layer.norm.weight.zero_()
            layer.norm.bias.zero_()
        for module in model.modules():
            if isinstance(module, RPReLU):
                module.slope.fill_(1.0)
                module.bias_out.zero_()


def open_kept(model: nn.Module) -> list[object]:
    """Layers that stay in full precision give ones, so that they neither lose nor scale the signal."""
    return [
        model.get_submodule(layer.path).register_forward_hook(lambda m, a, out: torch.ones_like(out))
        for layer in model.bidensify_plan.kept
    ]


def seen_by_layers(model: nn.Module, after: str, image: Tensor) -> dict[str, Tensor]:
    """Inputs of all binary layers when the module at ``after`` gives ones."""
    found: dict[str, Tensor] = {}
    open_kept(model)
    hooks = [model.get_submodule(after).register_forward_hook(lambda m, a, out: torch.ones_like(out))]
    for path, layer in binary_layers(model):
        hooks.append(layer.register_forward_hook(lambda m, args, out, path=path: found.update({path: args[0]})))
    with torch.no_grad():
        model.eval()(image)
    for hook in hooks:
        hook.remove()
    return found


class WideSigmoid(nn.Sigmoid):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 50)


def check(model: nn.Module, after: str, size: int = 64) -> None:
    student = bd.bidensify(model)
    silence(student)
    found = seen_by_layers(student, after, torch.randn(1, 3, size, size))
    assert found
    wrong = {
        path: (x.min().item(), x.max().item())
        for path, x in found.items()
        if not torch.allclose(x, torch.ones(()), atol=1e-3)
    }
    assert not wrong


def test_own_network() -> None:
    check(Net(), "stem")


def test_doubling_is_seen_by_this_test() -> None:
    student = bd.bidensify(Net(), bd.BidensifyConfig(residual="double"))
    silence(student)
    found = seen_by_layers(student, "stem", torch.randn(1, 3, 64, 64))
    assert found["basic.1.conv1"].max() == 2


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnetv2_50", "seresnet18"])
def test_timm_backbones(name: str) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name, features_only=True)
    if name.startswith("se"):
        # A gate multiplies the signal by what it likes; with its sigmoid far to the right it hands it through.
        for module in model.modules():
            if type(module).__name__ == "SEModule":
                module.gate = WideSigmoid()
    check(model, "maxpool" if not name.startswith("resnetv2") else "stem_pool")


@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_resnet50"])
def test_torchvision_segmentation(name: str) -> None:
    models = pytest.importorskip("torchvision").models
    check(models.get_model(name, weights=None, weights_backbone=None), "backbone.maxpool")


@pytest.mark.parametrize("name", ["Unet", "UnetPlusPlus", "Linknet", "DeepLabV3Plus"])
def test_smp_decoders(name: str) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = getattr(smp, name)("resnet18", encoder_weights=None)
    student = bd.bidensify(model)
    silence(student)
    open_kept(student)

    def ones(m: nn.Module, a: object, out: object) -> object:
        return [torch.ones_like(each) for each in out]

    hook = student.encoder.register_forward_hook(ones)
    found: dict[str, Tensor] = {}
    for path, layer in binary_layers(student.decoder):
        layer.register_forward_hook(lambda m, args, out, path=path: found.update({path: args[0]}))
    with torch.no_grad():
        student.eval()(torch.randn(1, 3, 64, 64))
    hook.remove()
    # Linknet adds skip and upsampled features, two different signals: whole numbers, never 0.
    for path, x in found.items():
        if name == "Linknet":
            assert torch.allclose(x, x.round(), atol=1e-3), path
            assert x.min() > 0.9, path
        else:
            assert torch.allclose(x, torch.ones(()), atol=1e-3), path
