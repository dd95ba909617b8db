"""Every method takes a training step on a real network, and what evaluation computes is what is packed."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bidensify as bd
from bidensify.methods import get_method
from bidensify.models import build_model
from bidensify.nn import binary_layers, set_progress

METHODS = [name for name in bd.available_methods() if not name.startswith("own-")]


# The four kinds of network that the methods are for, with decoders of few channels: (source, options, input size).
CONVOLUTIONAL = {
    "unet": ("smp:Unet/resnet18", {"decoder_channels": [64, 32, 32, 16, 16]}, 32),
    "upernet": ("smp:UPerNet/tu-convnext_tiny", {"decoder_channels": 32}, 64),
    "deeplab": (
        "smp:DeepLabV3Plus/tu-mobilenetv3_large_100",
        {"decoder_channels": 64, "decoder_atrous_rates": [2, 4, 6]},
        64,
    ),
}


@functools.cache
def network(kind: str) -> tuple[nn.Module, int]:
    """One network of a kind for all methods, and its input size."""
    torch.manual_seed(0)
    if kind == "segformer":
        transformers = pytest.importorskip("transformers")
        config = transformers.SegformerConfig(
            hidden_sizes=[16, 32, 40, 64], depths=[1, 1, 1, 1], decoder_hidden_size=32, num_labels=3
        )
        return transformers.SegformerForSemanticSegmentation(config), 32
    pytest.importorskip("segmentation_models_pytorch")
    source, options, size = CONVOLUTIONAL[kind]
    return build_model(source, classes=3, **options), size


def run(network: nn.Module, x: Tensor) -> Tensor:
    y: Any = network(x)
    return y if isinstance(y, Tensor) else y.logits


@pytest.mark.parametrize(
    ("kind", "method"),
    [(kind, name) for kind in CONVOLUTIONAL for name in METHODS if get_method(name).takes("conv2d")]
    + [("segformer", name) for name in METHODS if not get_method(name).takes("conv2d")],
)
def test_one_step_then_packed(kind: str, method: str) -> None:
    model, size = network(kind)
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size)
    config = bd.BidensifyConfig(method=method, linear="all" if kind == "segformer" else "pointwise")
    student = bd.bidensify(model, config, example_inputs=x)
    layers = dict(binary_layers(student))
    assert len(layers) > 10
    bd.calibrate(student, [x])
    student.train()
    set_progress(student, 0.5)
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    before = {path: layer.latent_weight.detach().clone() for path, layer in layers.items()}
    silent = set[str]()
    handles = [
        layer.binarizer.register_forward_hook(
            lambda _, args, values, path=path: None if bool(values.detach().any()) else silent.add(path)
        )
        for path, layer in layers.items()
    ]
    run(student, x).square().mean().backward()
    for handle in handles:
        handle.remove()
    optimizer.step()
    still = {path for path, layer in layers.items() if torch.equal(layer.latent_weight, before[path])}
    # Of an input below 0.5 everywhere, as behind an untrained network's GELU, DoReFa's values are all 0, which move no weight.
    assert still <= silent
    assert len(silent) < len(layers) / 2
    for path, layer in layers.items():
        assert bool(torch.isfinite(layer.latent_weight).all()), path
    student.eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        want = run(student, x)
        assert bool(torch.isfinite(want).all())
        torch.testing.assert_close(run(bd.pack(student), x), want, rtol=0, atol=0)
