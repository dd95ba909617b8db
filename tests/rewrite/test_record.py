"""The recorder: what it writes, and that it leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from networks import Net
from torch import Tensor, nn

from bidensify.errors import PlanError
from bidensify.rewrite.record.recorded import TensorSpec
from bidensify.rewrite.record.recorder import record


def state_of(model: nn.Module) -> tuple[object, ...]:
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: module.training for name, module in model.named_modules()},
        {name: sorted(module.__dict__) for name, module in model.named_modules()},
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    )


def test_nothing_stays_on_the_model() -> None:
    model = Net()
    model.train()
    model.deep.eval()
    values, flags, attributes, hooks = state_of(model)
    call = nn.Module.__call__
    rng = torch.get_rng_state()
    record(model)
    after_values, after_flags, after_attributes, after_hooks = state_of(model)
    assert (flags, attributes, hooks) == (after_flags, after_attributes, after_hooks)
    assert all(torch.equal(values[name], after_values[name]) for name in values)
    assert nn.Module.__call__ is call
    assert torch.equal(rng, torch.get_rng_state())


def test_graph_has_every_call_with_its_shape() -> None:
    model = Net()
    run = record(model)
    calls = run.module_nodes()
    hits: dict[str, list[tuple[int, ...]]] = {}
    hooks = [
        module.register_forward_hook(lambda m, a, out, name=name: hits.setdefault(name, []).append(tuple(out.shape)))
        for name, module in model.named_modules()
        if name and not list(module.children())
    ]
    args, kwargs = run.inputs
    with torch.no_grad():
        model.eval()(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    assert {name: [node.meta["spec"].shape for node in nodes] for name, nodes in calls.items()} == hits
    assert "unused" not in calls
    assert len(calls["basic.0.relu"]) == 2


def test_blocks_keep_the_none_pattern_of_their_arguments() -> None:
    run = record(Net())
    with_skip, without = run.calls["up1"][0], run.calls["up2"][0]
    assert isinstance(with_skip.args[3], TensorSpec)
    assert len(without.args) == 3


class DataDependent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.other = nn.Conv2d(4, 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if y.sum().item() > -1e9:
            y = y * 2
        return self.other(y)


def test_a_model_that_looks_at_values_runs_on_real_tensors() -> None:
    run = record(DataDependent())
    assert not run.fake
    assert set(run.module_nodes()) == {"conv", "other"}


def test_error_quotes_what_was_tried() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("no such luck")

    with pytest.raises(PlanError, match="example_inputs") as error:
        record(Broken())
    assert "no such luck" in str(error.value)
    assert "2×3×" in str(error.value)


@pytest.mark.parametrize(
    "inputs", [torch.zeros(1, 3, 32, 32), (torch.zeros(1, 3, 32, 32),), {"image": torch.zeros(1, 3, 32, 32)}]
)
def test_example_inputs_of_every_kind(inputs: object) -> None:
    assert "1×3×32×32" in record(Net(), inputs).inputs_text


def test_example_inputs_of_no_kind() -> None:
    with pytest.raises(PlanError, match="example_inputs=str"):
        record(Net(), "image.png")


class Messy(nn.Module):
    """A forward that leaves all sorts of things behind: caches, lists, counters, new attributes, hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.middle = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 2, 1)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("grid", None)
        self.seen: list[Tensor] = []
        self.by_size: dict[object, Tensor] = {}
        self.latest: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        self.grid = torch.ones_like(x)
        self.latest = x
        self.fresh = x.mean()
        self.seen.append(x)
        self.by_size[x.shape[-1]] = x
        self.conv.register_forward_hook(lambda m, a, o: None)
        self.train()
        return self.last(self.middle(self.conv(x) + torch.rand(1)))


@pytest.mark.parametrize("size", [64, 512])
def test_nothing_that_a_forward_leaves_behind_stays(size: int) -> None:
    model = Messy().eval()
    attributes = {name: dict(module.__dict__) for name, module in model.named_modules()}
    image = torch.randn(1, 3, size, size)
    rng = torch.get_rng_state()
    run = record(model, image)
    assert run.fake == (size == 512)
    for name, module in model.named_modules():
        assert list(module.__dict__) == list(attributes[name])
        assert all(module.__dict__[key] is value for key, value in attributes[name].items())
    assert (model.seen, model.by_size, model.latest, model.grid) == ([], {}, None, None)
    assert model.steps == 0
    assert not model.conv._forward_hooks
    assert not any(module.training for module in model.modules())
    assert torch.equal(rng, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("_tensor_constant" in name for module in model.modules() for name in vars(module))


class Momentum(nn.Module):
    """Changes parameters and buffers in place while it trains, draws, and keeps what it made."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1)
        self.relu = nn.ReLU()
        self.register_buffer("queue", torch.zeros(4))
        self.made: Any = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.conv(self.stem(x)))
        if self.training:
            with torch.no_grad():
                self.conv.weight.data.mul_(0.9)
                self.stem.weight.lerp_(torch.zeros_like(self.stem.weight), 0.5)
                self.queue.add_(torch.rand(4))
            self.made = self.relu(y - 1)
        return self.head(y)


def test_the_run_in_training_mode_leaves_nothing_behind() -> None:
    model = Momentum()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    found = record(model)
    assert found.more_in_training == {"relu": 1}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert model.made is None
    assert model.training
    assert all(type(value) is nn.Parameter for value in model.parameters())
