"""Every method takes a training step on a real network, and what evaluation computes is what is packed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bidensify as bd
from bidensify.methods import get_method
from bidensify.models import build_model
from bidensify.nn import binary_layers, set_progress

METHODS = [name for name in bd.available_methods() if not name.startswith("own-")]


def unet() -> nn.Module:
    pytest.importorskip("segmentation_models_pytorch")
    return build_model("smp:Unet/resnet18", classes=3)


def segformer() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        hidden_sizes=[16, 32, 40, 64], depths=[1, 1, 1, 1], decoder_hidden_size=32, num_labels=3
    )
    network: nn.Module = transformers.SegformerForSemanticSegmentation(config)
    return network


def run(network: nn.Module, x: Tensor) -> Tensor:
    y: Any = network(x)
    return y if isinstance(y, Tensor) else y.logits


@pytest.mark.parametrize(
    ("method", "make"),
    [(name, unet) for name in METHODS if get_method(name).takes("conv2d")]
    + [(name, segformer) for name in METHODS if not get_method(name).takes("conv2d")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_one_step_then_packed(method: str, make: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32, 32)
    config = bd.BidensifyConfig(method=method, linear="all" if make is segformer else "pointwise")
    student = bd.bidensify(make(), config, example_inputs=x)
    layers = dict(binary_layers(student))
    assert len(layers) > 10
    bd.calibrate(student, [x])
    student.train()
    set_progress(student, 0.5)
    optimizer = torch.optim.Adam(student.parameters(), 1e-3)
    before = {path: layer.latent_weight.detach().clone() for path, layer in layers.items()}
    run(student, x).square().mean().backward()
    optimizer.step()
    for path, layer in layers.items():
        assert bool(torch.isfinite(layer.latent_weight).all()), path
        assert not torch.equal(layer.latent_weight, before[path]), path
    student.eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        want = run(student, x)
        assert bool(torch.isfinite(want).all())
        torch.testing.assert_close(run(bd.pack(student), x), want, rtol=1e-4, atol=1e-4)
