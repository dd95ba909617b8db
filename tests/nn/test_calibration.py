"""Calibration: mixed signs, plain averages, flags left as they were."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from bidensify.errors import ConfigError
from bidensify.nn import BiDenseConv2d, BiDenseLinear, calibrate
from bidensify.nn.binarizer import mixing_threshold


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        BiDenseConv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        BiDenseConv2d(8, 16, 3, 2, 1),
        nn.Dropout(0.5),
        BiDenseConv2d(16, 16, 1),
    )


def shares(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Share of +1 per input channel of every binary layer."""
    found: list[torch.Tensor] = []
    hooks = [
        module.binarizer.register_forward_hook(lambda m, i, o: found.append((o > 0).float().mean((0, 2, 3))))
        for module in model.modules()
        if isinstance(module, BiDenseConv2d)
    ]
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def test_signs_are_mixed_behind_relus() -> None:
    model = network()
    batches = [torch.randn(4, 3, 16, 16) for _ in range(3)]
    blind = shares(model, batches[0])[0]
    assert (blind > 0.99).any()
    calibrate(model, batches)
    model.train()
    model[6].eval()
    for batch in batches:
        for share in shares(model, batch):
            assert share.min() > 0.05
            assert share.max() < 0.95


@pytest.mark.parametrize("zeros", [0.3, 0.6, 0.9])
def test_threshold_with_ties(zeros: float) -> None:
    torch.manual_seed(1)
    values = torch.rand(5, 2000) + 0.1
    values[:, : int(2000 * zeros)] = 0
    share = (values >= mixing_threshold(values)[:, None]).float().mean(1)
    assert share.min() > 0.05
    assert share.max() < 0.95
    assert (mixing_threshold(torch.full((2, 10), 3.0)) == 3).all()


def test_statistics_are_plain_averages() -> None:
    model = network().eval()
    batches = [torch.randn(2, 3, 12, 12) + i for i in range(4)]
    calibrate(model, batches)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    means: list[list[torch.Tensor]] = [[] for _ in norms]
    variances: list[list[torch.Tensor]] = [[] for _ in norms]

    # Batch statistics at every norm, with the thresholds that were found.
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    with torch.no_grad():
        for batch in batches:
            saved = [(n.running_mean.clone(), n.running_var.clone()) for n in norms]  # type: ignore[union-attr]
            model(batch)
            for i, norm in enumerate(norms):
                assert norm.running_mean is not None
                assert norm.running_var is not None
                means[i].append(norm.running_mean.clone())
                variances[i].append(norm.running_var.clone())
                norm.running_mean.copy_(saved[i][0])
                norm.running_var.copy_(saved[i][1])
    for i, norm in enumerate(norms):
        torch.testing.assert_close(norm.running_mean, torch.stack(means[i]).mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, torch.stack(variances[i]).mean(0), rtol=1e-4, atol=1e-5)


def test_flags_and_momenta_are_left_as_found() -> None:
    model = network()
    model.eval()
    model[3].train()
    model[1].momentum = 0.37
    before = {name: module.training for name, module in model.named_modules()}
    calibrate(model, [torch.randn(1, 3, 8, 8)])
    assert before == {name: module.training for name, module in model.named_modules()}
    assert model[1].momentum == 0.37
    assert not any(getattr(m, "calibrating", False) for m in model.modules())


def test_flags_are_left_as_found_after_an_error() -> None:
    model = network()
    with pytest.raises(RuntimeError):
        calibrate(model, [torch.randn(1, 5, 8, 8)])
    assert all(module.training for module in model.modules())
    assert model[1].momentum == 0.1
    assert not any(getattr(m, "calibrating", False) for m in model.modules())


def test_parts_can_be_chosen() -> None:
    model = network()
    layer: Any = model[3]
    before = layer.binarizer.b.clone()
    calibrate(model, [torch.randn(2, 3, 8, 8)], thresholds=False)
    assert torch.equal(layer.binarizer.b, before)
    mean = layer.norm.running_mean.clone()
    calibrate(model, [torch.randn(2, 3, 8, 8)], norms=False)
    assert not torch.equal(layer.binarizer.b, before)
    assert torch.equal(layer.norm.running_mean, mean)


def test_inputs_of_every_kind() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = BiDenseLinear(4, 4)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.layer(x + y)

    x = torch.rand(2, 9, 4)
    for batch in ((x, x), {"x": x, "y": x}):
        model = Two()
        calibrate(model, iter([batch]))
        share = (model.layer.binarizer(2 * x) > 0).float().mean((0, 1))
        assert share.min() > 0.05
        assert share.max() < 0.95


def test_no_batch_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no batch was given"):
        calibrate(network(), [])
