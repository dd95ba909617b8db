"""Packed layers take the sum behind them, and its activation, where nothing else reads what lies between."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from helpers import relative, settle
from runtimes import outputs
from torch import Tensor, nn

import bidensify as bd
from bidensify.deploy.executorch.absorb import absorb_sums
from bidensify.deploy.executorch.constants import drop_unread
from bidensify.deploy.export.capture import capture
from bidensify.deploy.runtimes.prepare import prepared
from bidensify.nn import BiDenseConv2d, RPReLU

pytest.importorskip("executorch")
aten = torch.ops.aten
PACKED = torch.ops.bidensify.packed_layer.default


class Net(nn.Module):
    """A layer, and what is done with its result and its input."""

    def __init__(self, behind: Callable[..., Tensor], activation: bool = False) -> None:
        super().__init__()
        self.layer = BiDenseConv2d(16, 16, 3, padding=1, activation=activation)
        self.rprelu, self.prelu = RPReLU(16), nn.PReLU()
        self.shift = nn.Parameter(torch.randn(16))
        for parameter in self.rprelu.parameters():
            nn.init.normal_(parameter)
        self.behind = behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self, self.layer(x), x)


# Name -> (what stands behind a layer, the operators that stay).
TAKEN: dict[str, tuple[Callable[..., Tensor], set[Any]]] = {
    "a sum": (lambda net, y, x: y + x, set()),
    "a sum the other way": (lambda net, y, x: x + y, set()),
    "RPReLU": (lambda net, y, x: net.rprelu(y + x), set()),
    "ReLU": (lambda net, y, x: torch.relu(x + y), set()),
    "ReLU in place": (lambda net, y, x: torch.relu_(y + x), set()),
    "one slope": (lambda net, y, x: net.prelu(y + x), set()),
    "shifts alone": (lambda net, y, x: y + x + net.shift.view(1, -1, 1, 1), set()),
    "in place": (lambda net, y, x: y.add_(x), {aten.add_.Tensor}),
    "two residuals": (
        lambda net, y, x: torch.relu(y + x + 2 * x),
        {aten.add.Tensor, aten.relu.default, aten.mul.Tensor},
    ),
    "a sum that is read again": (lambda net, y, x: torch.relu(s := y + x) * s, {aten.relu.default, aten.mul.Tensor}),
    "another activation": (lambda net, y, x: torch.tanh(y + x), {aten.tanh.default}),
}
LEFT: dict[str, Callable[..., Tensor]] = {
    "a factor": lambda net, y, x: torch.add(y, x, alpha=2),
    "a number": lambda net, y, x: y + 1.0,
    "one value per sample": lambda net, y, x: y + x.mean((1, 2, 3), keepdim=True),
    "a row": lambda net, y, x: y + x[:, :, :1],
    "a result that is read again": lambda net, y, x: (y + x) * y,
    "a result that is written": lambda net, y, x: y.mul_(2) + x,
    "another type": lambda net, y, x: y + x.double(),
}


def absorbed(net: nn.Module, x: Tensor) -> tuple[int, set[Any], Tensor]:
    """How many layers take a sum, the operators of images then, and what the program gives."""
    program = capture(prepared(net), (x,), {}, None)
    count = absorb_sums(program)
    drop_unread(program)
    program.graph_module.recompile()
    program.graph.lint()
    targets = {node.target for node in program.graph.nodes if node.op == "call_function" and node.target is not PACKED}
    ignored = {aten._assert_tensor_metadata.default, aten.to.dtype_layout, aten.to.dtype, aten.view.default}
    return count, targets - ignored, program.module()(x)


def packed(behind: Callable[..., Tensor], **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return bd.pack(settle(Net(behind, **options)))


@pytest.mark.parametrize("name", list(TAKEN))
def test_what_a_layer_takes(name: str) -> None:
    behind, left = TAKEN[name]
    net, x = packed(behind), torch.randn(2, 16, 9, 7)
    count, operators, found = absorbed(net, x)
    assert operators == left
    assert count == (name != "in place")
    with torch.no_grad():
        assert relative(found, net(x.clone())) < 1e-6


@pytest.mark.parametrize("name", list(LEFT))
def test_what_a_layer_leaves(name: str) -> None:
    net, x = packed(LEFT[name]), torch.randn(2, 16, 9, 7)
    count, _, found = absorbed(net, x)
    assert count == 0
    with torch.no_grad():
        assert relative(found, net(x.clone())) < 1e-6


def test_a_layer_with_an_activation_of_its_own_leaves_the_sum() -> None:
    net, x = packed(TAKEN["RPReLU"][0], activation=True), torch.randn(2, 16, 9, 7)
    assert absorbed(net, x)[0] == 0


def before_the_sum(net: Net, y: Tensor, z: Tensor) -> Tensor:
    z.mul_(2)
    return torch.relu(y + z)


def behind_the_sum(net: Net, y: Tensor, z: Tensor) -> Tensor:
    total = y + z
    z.mul_(2)
    return torch.relu(total)


@pytest.mark.parametrize("behind", [before_the_sum, behind_the_sum])
def test_what_is_written_between_stays(behind: Callable[..., Tensor]) -> None:
    class Writing(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.behind(self, self.layer(z := x * 3), z)

    torch.manual_seed(0)
    net, x = bd.pack(settle(Writing(behind))), torch.randn(2, 16, 9, 7)
    count, _, found = absorbed(net, x)
    assert count == 0
    with torch.no_grad():
        assert relative(found, net(x)) < 1e-6


def test_a_file_of_residual_blocks(tmp_path: Any) -> None:
    class Blocks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 3, 2, 1)
            self.first, self.second = Net(TAKEN["RPReLU"][0]), Net(TAKEN["ReLU"][0])

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.second(self.first(torch.relu(self.stem(x)))))

    torch.manual_seed(0)
    net, x = bd.pack(settle(Blocks())), torch.randn(2, 3, 24, 32)
    done = bd.export(net, tmp_path / "net.pte", example_inputs=x)
    with torch.no_grad():
        assert relative(outputs(done.path, [x])[0], net(x)) < 1e-5
