"""A model that caches what it computes is left as it was, whichever tensors the run was on."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bidensify as bd
from bidensify.rewrite import record


def cached(function: Callable[..., Any]) -> Callable[..., Any]:
    """A cache that no name reaches, as transformers' decorator makes it."""
    inner = functools.lru_cache(maxsize=10)(function)

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        return inner(*args)

    return wrapper


@cached
def ramp(length: int) -> Tensor:
    return torch.arange(length) / length


@functools.cache
def plain_ramp(length: int) -> Tensor:
    return torch.arange(length) + 1.0


class Caching(nn.Module):
    """Caches in every place that models use, and installs a hook on itself at its first run."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Conv2d(8, 2, 1)
        self.register_buffer("table", torch.zeros(1), persistent=False)
        self.tables: dict[int, Tensor] = {}
        self.calls: list[int] = []
        self.position: Tensor | None = None

    @cached
    def index(self, length: int) -> Tensor:
        return torch.arange(length).flip(0)

    def forward(self, x: Tensor) -> Tensor:
        width = x.shape[-1]
        if not self.calls:
            self.second.register_forward_hook(lambda module, args, output: output * 2)
        self.calls.append(width)
        if self.position is None:
            self.position = torch.arange(512) * 2.0
        if self.table.numel() != width:
            self.table = torch.ones(width)
        if width not in self.tables:
            self.tables[width] = torch.full((width,), 3.0)
        index = self.index(width)
        shift = ramp(width) + plain_ramp(width) + self.position[:width] + self.table + self.tables[width]
        return self.last(torch.relu(self.second(torch.relu(self.first(x) + shift[index]))))


def state(model: Caching) -> dict[str, Any]:
    return {
        "names": set(model.__dict__),
        "position": model.position,
        "table": model.table.clone(),
        "tables": dict(model.tables),
        "calls": list(model.calls),
        "hooks": len(model.second._forward_hooks),
    }


@pytest.mark.parametrize("fake", [True, False])
def test_nothing_of_a_run_stays(fake: bool) -> None:
    torch.manual_seed(0)
    # Small inputs run for real, large ones on fake tensors.
    model, x = Caching().eval(), torch.randn(2, 3, 256 if fake else 16, 256 if fake else 16)
    before = state(model)
    recorded = record(model, x)
    assert recorded.fake is fake
    after = state(model)
    assert torch.equal(before.pop("table"), after.pop("table"))
    assert before == after
    fresh = Caching().eval()
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(model(x), fresh(x))


def test_the_rewritten_model_is_not_poisoned_either() -> None:
    torch.manual_seed(0)
    model = Caching()
    student = bd.bidensify(model, example_inputs=torch.randn(2, 3, 16, 16))
    for width in (16, 32):
        assert student(torch.randn(2, 3, 16, width)).shape == (2, 2, 16, width)
        assert model(torch.randn(2, 3, 16, width)).shape == (2, 2, 16, width)
