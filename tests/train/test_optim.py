from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from bidensify.errors import ConfigError
from bidensify.recipe.sections import EmaSection, OptimizerSection, StageSection
from bidensify.train.optim import Ema, build_optimizer, lr_factor, parameter_groups, set_lr


def stage(**changes: Any) -> StageSection:
    return StageSection.model_validate({"name": "s", "binarize": "all", "epochs": 1, "lr": 0.1, **changes})


def decay_of(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, float]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}


def test_only_weights_decay(tiny: ModuleType) -> None:
    model = tiny.network(binary=True)
    decay = decay_of(model, parameter_groups(model, OptimizerSection(weight_decay=0.3), stage()))
    assert set(decay) == {name for name, _ in model.named_parameters()}
    assert {name for name, value in decay.items() if value} == {"0.weight", "4.weight"}
    assert any(name.endswith("binarizer.k") for name in decay)


def test_latent_weights_decay_where_they_are_not_binarized(tiny: ModuleType) -> None:
    model = tiny.network(binary=True)
    options = OptimizerSection(weight_decay=0.3)
    latent = "1.weight"
    assert decay_of(model, parameter_groups(model, options, stage()))[latent] == 0
    assert decay_of(model, parameter_groups(model, options, stage(binarize="activations")))[latent] == 0.3
    assert decay_of(model, parameter_groups(model, options, stage(latent_weight_decay=0.1)))[latent] == 0.1
    own = OptimizerSection(weight_decay=0.3, latent_weight_decay=0.2)
    assert decay_of(model, parameter_groups(model, own, stage()))[latent] == 0.2
    assert decay_of(model, parameter_groups(model, options, stage(weight_decay=0.5)))["0.weight"] == 0.5


def test_weights_with_axes_of_size_one_decay_and_broadcast_vectors_do_not() -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 1, 1)
            self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
            self.gamma = nn.Parameter(torch.ones(1, 8, 1, 1))
            self.prelu = nn.PReLU(8)

    model = Head()
    decay = decay_of(model, parameter_groups(model, OptimizerSection(weight_decay=1), stage()))
    assert {name for name, value in decay.items() if value} == {"conv.weight", "depthwise.weight"}


def test_lr_scale(tiny: ModuleType) -> None:
    model = tiny.network()
    optimizer = build_optimizer(model, OptimizerSection(lr_scale={"0.*": 0.1}), stage())
    set_lr(optimizer, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates[id(model[0].weight)] == pytest.approx(0.05)
    assert rates[id(model[4].weight)] == pytest.approx(0.5)
    with pytest.raises(ConfigError, match=r"'encoder\.\*' matches no parameter"):
        parameter_groups(model, OptimizerSection(lr_scale={"encoder.*": 0.1}), stage())


def test_steps_on_a_cpu_are_adamws(tiny: ModuleType) -> None:
    """In one pass, and the values of Loshchilov and Hutter's equations (arXiv 1711.05101, algorithm 2)."""
    model = tiny.network().double()
    optimizer = build_optimizer(model, OptimizerSection(weight_decay=0.1, betas=(0.8, 0.9)), stage(lr=0.01))
    assert all(group["fused"] for group in optimizer.param_groups)
    decays = decay_of(model, optimizer.param_groups)
    wanted = {name: value.detach().numpy().copy() for name, value in model.named_parameters()}
    first = {name: np.zeros_like(value) for name, value in wanted.items()}
    second = {name: np.zeros_like(value) for name, value in wanted.items()}
    for step in range(1, 4):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            grad = parameter.grad.numpy()
            first[name] = 0.8 * first[name] + 0.2 * grad
            second[name] = 0.9 * second[name] + 0.1 * grad**2
            moved = (
                first[name] / (1 - 0.8**step) / (np.sqrt(second[name] / (1 - 0.9**step)) + optimizer.defaults["eps"])
            )
            wanted[name] = wanted[name] * (1 - 0.01 * decays[name]) - 0.01 * moved
        optimizer.step()
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), wanted[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", ["onecycle", "cosine", "linear", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.3])
def test_schedules_rise_then_fall(schedule: str, total: int, warmup: float) -> None:
    factors = [lr_factor(schedule, step, total, warmup) for step in range(total)]
    assert all(0 < f <= 1 for f in factors)
    top = factors.index(max(factors))
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    if total == 100:
        assert max(factors) > 0.99
        assert factors[-1] < 0.02 or schedule == "constant"
        if warmup:
            assert factors[0] < 0.06


@pytest.mark.parametrize(
    ("schedule", "first", "end"), [("onecycle", 0.04, 4e-6), ("cosine", 0.0, 0.0), ("linear", 0.0, 0.0)]
)
def test_where_schedules_start_and_end(schedule: str, first: float, end: float) -> None:
    """One-cycle: the top divided by 25 at the start, that by 1e4 at the end."""
    assert lr_factor(schedule, 0, 10**6, 0.5) == pytest.approx(first, abs=1e-5)
    assert lr_factor(schedule, 100, 100, 0.5) == pytest.approx(end, abs=1e-12)


def test_ema_is_the_recursion_and_swaps_back(tiny: ModuleType) -> None:
    model = tiny.network()
    ema = Ema(model, EmaSection(decay=0.5))
    weight, mean = model[0].weight, model[1].norm.running_mean
    expected, expected_mean = weight.detach().clone(), mean.clone()
    for step in range(12):
        with torch.no_grad():
            weight.add_(1.0)
            mean.add_(2.0)
        ema.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach()
        expected_mean = decay * expected_mean + (1 - decay) * mean
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with ema.swapped():
        assert torch.allclose(weight, expected, atol=1e-5)
        assert torch.allclose(mean, expected_mean, atol=1e-5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_ema_may_copy_buffers(tiny: ModuleType) -> None:
    model = tiny.network()
    ema = Ema(model, EmaSection(decay=0.5, buffers="copy"))
    model.train()
    model(torch.rand(2, 3, 8, 8))
    ema.update()
    with ema.swapped():
        kept = model[1].norm.running_mean.clone()
    assert torch.equal(kept, model[1].norm.running_mean)
    assert torch.equal(ema.shadow["1.norm.num_batches_tracked"], torch.tensor(1))


def test_ema_state_round_trip(tiny: ModuleType) -> None:
    model = tiny.network()
    ema = Ema(model, EmaSection())
    with torch.no_grad():
        model[0].weight.add_(1)
    ema.update()
    other = Ema(tiny.network(seed=1), EmaSection())
    other.load_state_dict(ema.state_dict())
    assert other.updates == 1
    assert all(torch.equal(value, other.shadow[key]) for key, value in ema.shadow.items())
