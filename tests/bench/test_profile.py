"""Profiles: what each kind of layer takes of a network's time, on a clock that the layers themselves advance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bidensify
from bidensify.bench import profile as profiles
from bidensify.bench.profile import BETWEEN, PACKED, profile
from bidensify.bench.result import render
from bidensify.bench.run import run_bench
from bidensify.deploy.backends import available_kernels
from bidensify.errors import ConfigError
from bidensify.models import build_model

KERNEL = available_kernels()[0]


class Clock:
    """Seconds that pass only when somebody works."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(profiles, "time", made)
    return made


class Work(nn.Module):
    """Takes some seconds, and then those of another layer that it knows but does not own."""

    def __init__(self, clock: Clock, seconds: float, other: nn.Module | None = None) -> None:
        super().__init__()
        self.clock, self.seconds = clock, seconds
        self.other = [other]

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += self.seconds
        return x if self.other[0] is None else self.other[0](x)


class Heavy(Work):
    """Another kind."""


class Net(nn.Module):
    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.body = nn.Sequential(Work(clock, 0.002), Work(clock, 0.003), Heavy(clock, 0.02))
        self.last = Heavy(clock, 0.001, self.body[1])
        self.idle = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        self.clock.now += 0.1
        return self.last(self.body[0](x))


def test_each_kind_has_its_layers_time(clock: Clock) -> None:
    net = Net(clock)
    found = {share.kind: share for share in profile(net, torch.zeros(1), runs=3)}
    assert list(found) == [BETWEEN, "Heavy", "Work"]
    assert found[BETWEEN].milliseconds == pytest.approx(100)
    # body.2, and last with the layer that it calls.
    assert found["Heavy"].milliseconds == pytest.approx(20 + 1 + 3)
    assert (found["Heavy"].calls, found["Heavy"].largest) == (2, "body.2")
    assert found["Heavy"].largest_milliseconds == pytest.approx(20)
    # body.0 twice, body.1 once.
    assert found["Work"].milliseconds == pytest.approx(2 + 3 + 2)
    assert (found["Work"].calls, found["Work"].largest) == (3, "body.0")
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_an_error_leaves_no_hook(clock: Clock) -> None:
    net = Net(clock)
    net.last.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        profile(net, torch.zeros(1))
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()) == 1


def test_a_packed_network_in_bench(capsys: pytest.CaptureFixture[str]) -> None:
    network = build_model("demo:unet", width=8).eval()
    result = run_bench(network, size=(64, 64), kernels=[KERNEL], seconds=0.01, bfloat16=False, profile=True)
    (row,) = result["rows"]
    assert set(row["profile"]) == {"float", KERNEL}
    kinds = {variant: {share["kind"]: share for share in shares} for variant, shares in row["profile"].items()}
    binary = sum(decision.action != "keep" for decision in bidensify.plan(network).layers)
    assert kinds[KERNEL][PACKED]["calls"] == binary
    assert PACKED not in kinds["float"]
    assert kinds["float"]["Conv2d"]["calls"] > binary / 2
    from rich.console import Console

    console = Console(width=160)
    console.print(render(result))
    text = capsys.readouterr().out
    assert PACKED in text
    assert BETWEEN in text


def test_layers_have_no_profile() -> None:
    with pytest.raises(ConfigError, match="give a network"):
        run_bench(profile=True)
