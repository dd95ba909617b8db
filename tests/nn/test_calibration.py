"""Calibration: mixed signs, plain averages, flags left as they were."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn

from bidensify.errors import ConfigError
from bidensify.nn import BiDenseConv2d, BiDenseLinear, calibrate
from bidensify.nn.contract import mixing_threshold


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


def test_thresholds_lie_between_values() -> None:
    torch.manual_seed(2)
    values = torch.randint(-3, 4, (50, 37)).float()
    values[:10] = torch.randn(10, 37)
    values[10:20, :33] = 1.0
    found = mixing_threshold(values).tolist()
    for row, threshold in zip(values.tolist(), found):
        distinct = sorted(set(row))
        cuts = [(a + b) / 2 for a, b in pairwise(distinct)]
        uneven = [abs(2 * sum(v >= cut for v in row) - len(row)) for cut in cuts]
        assert abs(2 * sum(v >= threshold for v in row) - len(row)) == min(uneven)
        assert min(abs(threshold - cut) for cut in cuts) < 1e-6
    # One value summed in two orders is no pair of values, unless there is no other.
    noisy = torch.tensor([[1.0, 1.0 + 2e-7, 1.0 + 2e-7, 1.0 + 2e-7, 3.0], [1.0, 1.0, 1.0, 1.0 + 2e-7, 1.0 + 2e-7]])
    assert [round(v, 3) for v in mixing_threshold(noisy).tolist()] == [2.0, 1.0]
    assert (noisy >= mixing_threshold(noisy)[:, None]).sum(1).tolist() == [1, 2]
    assert mixing_threshold(torch.tensor([[4.0], [-1.0]])).tolist() == [4.0, -1.0]


def test_statistics_are_plain_averages() -> None:
    model = network().eval()
    batches = [torch.randn(2, 3, 12, 12) + i for i in range(4)]
    calibrate(model, batches)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    inputs: dict[nn.Module, list[torch.Tensor]] = {norm: [] for norm in norms}

    assert all(norm.num_batches_tracked == 4 for norm in norms)
    # What batch statistics are made of at every norm, with the thresholds that were found.
    for norm in norms:
        norm.train()
        norm.momentum = 0.0
        norm.register_forward_pre_hook(lambda m, args: inputs[m].append(args[0].double()))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for norm, seen in inputs.items():
        assert len(seen) == 4
        mean = torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0)
        var = torch.stack([x.var((0, 2, 3), correction=0) for x in seen]).mean(0)
        torch.testing.assert_close(norm.running_mean, mean.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, var.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_evaluation_computes_what_training_does_on_one_batch(dtype: torch.dtype) -> None:
    """Deep, on maps of nine pixels and behind a pooled one: each flipped sign would flip more of them."""

    class Pooled(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((2, 3), keepdim=True)

    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 4, 1), nn.BatchNorm2d(16), nn.ReLU()]
    for _ in range(8):
        layers += [BiDenseConv2d(16, 16, 3, padding=1), nn.ReLU(), BiDenseConv2d(16, 16, 1)]
    model = nn.Sequential(*layers, Pooled(), BiDenseConv2d(16, 16, 1), nn.Upsample((3, 3)), BiDenseConv2d(16, 16, 1))
    model = model.to(dtype)
    x = torch.randn(2, 3, 12, 12, dtype=dtype)
    calibrate(model, [x])
    for share in shares(model.eval(), x):
        assert share.min() > 0.05
        assert share.max() < 0.95
    with torch.no_grad():
        evaluated, trained = model.eval()(x), model.train()(x)
    torch.testing.assert_close(evaluated, trained, rtol=1e-3, atol=1e-3)


def test_a_norm_that_is_not_called_keeps_its_statistics() -> None:
    model = network()
    model.unused = nn.BatchNorm2d(4)
    model.unused.running_mean.fill_(3.0)
    model.__class__ = type("Skips", (nn.Sequential,), {"forward": lambda self, x: nn.Sequential(*self[:8])(x)})
    calibrate(model, [torch.randn(2, 3, 8, 8)])
    assert (model.unused.running_mean == 3).all()
    assert not (model[1].running_mean == 0).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    model = network().to(dtype)
    batches = [torch.randn(4, 3, 16, 16).to(dtype) for _ in range(2)]
    calibrate(model, batches)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_var is not None
            assert module.running_var.dtype == dtype
            assert (module.running_var > 0).all()
    for share in shares(model.eval(), torch.cat(batches)):
        assert share.min() > 0.05
        assert share.max() < 0.95


def test_a_norm_called_several_times_weighs_each_call() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.norm(x) + 5)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model, batches = Twice(), [torch.randn(2, 8, 3, 3) * (i + 1) for i in range(3)]
    calibrate(model, batches, thresholds=False)
    assert model.norm.num_batches_tracked == 6
    assert model.norm.running_var is not None
    # The second call always sees a variance of 1.
    own = torch.stack([batch.var((0, 2, 3), correction=0) for batch in batches]).mean(0)
    torch.testing.assert_close(model.norm.running_var, (own + 1) / 2, rtol=1e-3, atol=1e-3)


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


@pytest.mark.parametrize("batches", [torch.zeros(2, 3, 8, 8), {"x": torch.zeros(2, 3, 8, 8)}, 3])
def test_a_batch_in_place_of_a_list_is_an_error(batches: object) -> None:
    with pytest.raises(ConfigError, match=r"batches is a \w+; give a list of batches, \[batch\]"):
        calibrate(network(), batches)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_changes_nothing(value: float) -> None:
    model = network()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(ConfigError, match="batch 1 holds NaN or infinity"):
        calibrate(model, [x, torch.full_like(x, value)])
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_no_batch_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no batch was given"):
        calibrate(network(), [])
