"""Running again from a changed layer gives the bits of a whole run, and computes nothing that came before it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bidensify import bidensify
from bidensify.models import build_model
from bidensify.nn import binary_layers
from bidensify.precisions.replay import Replay


class Careless(nn.Module):
    """Writes into what its layers gave, takes entries out of a list that a child returned, calls one layer twice."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.relu = nn.ReLU(inplace=True)

        def forward(self, x: Tensor) -> list[Tensor]:
            a = self.relu(self.first(x))
            return [x, a, self.second(a)]

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.Encoder()
        self.twice, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.encoder(x)
        features.pop(0)
        y = features.pop()
        y += features.pop()
        y = self.twice(y).relu_()
        y = self.twice(y)
        y *= 2
        return self.head(y)


def check(model: nn.Module, paths: list[str], x: Tensor) -> None:
    model.eval()
    replay = Replay(model, x[:1], paths)
    assert replay.exact
    base = replay.begin(x)
    with torch.no_grad():
        assert torch.equal(base, model(x))
    for path in [*paths, *reversed(paths)]:
        module = model.get_submodule(path)
        module.__dict__["forward"] = lambda x, f=module.forward: f(x * 1.5)
        again = replay.again(x, [path])
        with torch.no_grad():
            whole = model(x)
        del module.__dict__["forward"]
        assert torch.equal(again, whole), path
        assert not torch.equal(again, base), path
    assert torch.equal(replay.again(x, paths[-1:]), base)


def test_networks_that_write_into_their_results() -> None:
    torch.manual_seed(0)
    check(Careless(), ["encoder.first", "encoder.second", "twice", "head"], torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("binary", [False, True])
def test_a_network_and_its_student(binary: bool) -> None:
    torch.manual_seed(0)
    model = build_model("demo:unet", width=4, num_classes=3)
    student = bidensify(model)
    paths = [path for path, _ in binary_layers(student)]
    check(student if binary else model, paths, torch.randn(2, 3, 32, 32))


def test_nothing_before_the_changed_layer_is_computed() -> None:
    torch.manual_seed(0)
    model = build_model("demo:unet", width=4, num_classes=3).eval()
    path = "decoder.1.conv1.0"
    replay = Replay(model, torch.randn(1, 3, 32, 32), [path])
    x = torch.randn(2, 3, 32, 32)
    replay.begin(x)
    order: list[str] = []

    def hook(name: str) -> Any:
        return lambda module, args, output: order.append(name)

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(hook(name))
    replay.again(x, [path])
    assert order[0] == path
    assert set(order) == {path, "decoder.1.conv2.0", "decoder.2.conv1.0", "decoder.2.conv2.0", "head"}
    order.clear()
    assert replay.again(x, [path], stop=True) is None
    assert order == [path]


def test_a_network_that_keeps_state_is_run_as_a_whole() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.runs = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), 0

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            return self.second(self.first(x)) + self.runs

    replay = Replay(Counting().eval(), torch.randn(1, 3, 4, 4), ["second"])
    assert not replay.exact
    ran: list[int] = []
    replay.model.first.register_forward_hook(lambda *args: ran.append(1))  # type: ignore[union-attr]
    x = torch.randn(2, 3, 4, 4)
    replay.begin(x)
    replay.again(x, ["second"])
    assert len(ran) == 2
