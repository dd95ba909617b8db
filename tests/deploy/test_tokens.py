"""Packed layers between tokens: what reads them as they are, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import settle
from runtimes import RUNTIMES, needs
from torch import Tensor, nn

import bidensify as bd
from bidensify.deploy.runtimes.prepare import prepared
from bidensify.deploy.runtimes.tokens import read_tokens
from bidensify.nn import BiDenseConv2d

N, C, H, W = 2, 8, 6, 10
Forward = Callable[[Any, Tensor], Tensor]


def image(x: Tensor) -> Tensor:
    return x.transpose(1, 2).view(len(x), C, H, W)


def tokens(y: Tensor) -> Tensor:
    return y.flatten(2).transpose(1, 2)


def written(net: Any, x: Tensor) -> Tensor:
    copied = image(x).contiguous()
    y = net.first(copied)
    copied.mul_(2.0)
    return tokens(y) + tokens(copied) + tokens(net.second(copied))


def written_before(net: Any, x: Tensor) -> Tensor:
    turned = image(x.clone())
    turned.relu_()
    return tokens(net.first(turned)) * 2.0


# Name -> (how tokens (N, H * W, C) go through two layers; layers that read or write tokens; transposes that are left).
WAYS: dict[str, tuple[Forward, int, int]] = {
    "there and back": (lambda net, x: net.linear(tokens(net.first(image(x)))), 1, 0),
    "twice": (lambda net, x: net.linear(tokens(net.second(image(net.linear(tokens(net.first(image(x)))))))), 2, 0),
    "an activation of the image": (lambda net, x: tokens(net.first(image(x)).relu().clamp(max=1.0)) * 2.0, 1, 0),
    "an activation before": (lambda net, x: tokens(net.first(image(x).abs())) * 2.0, 1, 0),
    "permuted in four dimensions": (
        lambda net, x: net.first(x.view(N, H, W, C).permute(0, 3, 1, 2)).permute(0, 2, 3, 1) * 2.0, 1, 0
    ),
    "a copy between": (lambda net, x: tokens(net.first(image(x).contiguous()).clone()) * 2.0, 1, 0),
    "nothing between": (lambda net, x: tokens(image(x).reshape(N, C, W, H)) + x, 0, 0),
    "layer after layer": (lambda net, x: tokens(net.second(net.first(image(x)))) * 2.0, 2, 0),
    "a result that is an image too": (lambda net, x: tokens(y := net.first(image(x))) + y.mean((2, 3))[:, None], 1, 1),
    "an image that comes of none": (lambda net, x: tokens(net.first(x.view(N, C, H, W))) * 2.0, 1, 0),
    "a result that goes out": (lambda net, x: tokens(net.first(image(x))), 1, 1),
    "attention": (lambda net, x: tokens(net.first(image(x))) @ net.linear(x).transpose(1, 2), 1, 1),
    "written behind a copy": (written, 2, 2),
    "written before": (written_before, 1, 1),
}  # fmt: skip


class Net(nn.Module):
    def __init__(self, way: Forward) -> None:
        super().__init__()
        self.first, self.second = BiDenseConv2d(C, C, 3, padding=1), BiDenseConv2d(C, C, 3, padding=1, groups=C)
        self.linear, self.way = nn.Linear(C, C), way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def turns(graph: torch.fx.Graph) -> int:
    aten = torch.ops.aten
    return sum(node.target in (aten.transpose.int, aten.permute.default) for node in graph.nodes)


@pytest.mark.parametrize("name", WAYS)
def test_tokens_are_read_as_they_are(name: str) -> None:
    way, changed, left = WAYS[name]
    model = prepared(bd.pack(settle(Net(way))))
    x = torch.randn(N, H * W, C)
    with torch.no_grad():
        want = model(x.clone())
        program = torch.export.export(model, (x.clone(),))
        assert read_tokens(program.graph) == changed
        program.graph.lint()
        program.graph_module.recompile()
        assert torch.equal(program.module()(x.clone()), want)
    assert turns(program.graph) == left, program.graph


def test_sizes_may_vary() -> None:
    class Varying(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = BiDenseConv2d(C, C, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            n, c, h, w = x.shape
            tokens_in = x.flatten(2).transpose(1, 2).abs()
            return tokens(self.layer(tokens_in.transpose(1, 2).view(n, c, h, w))) * 2.0

    model = prepared(bd.pack(settle(Varying())))
    sizes = {2: torch.export.Dim("height", min=2, max=32), 3: torch.export.Dim("width", min=2, max=32)}
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(1, C, H, W),), dynamic_shapes=(sizes,))
        assert read_tokens(program.graph) == 1
        program.graph_module.recompile()
        for height, width in ((H, W), (5, 3), (17, 32)):
            x = torch.randn(1, C, height, width)
            assert torch.equal(program.module()(x), model(x))


class Block(nn.Module):
    """Segformer's: attention over tokens, then a depthwise layer between two linear ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, C, 3, padding=1), BiDenseConv2d(C, C, 3, padding=1, groups=C)
        self.norm, self.a, self.b, self.head = nn.LayerNorm(C), nn.Linear(C, C), nn.Linear(C, C), nn.Conv2d(C, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        n, _, h, w = x.shape
        y = tokens(self.stem(x))
        q = self.norm(y)[:, None]
        y = y + (torch.softmax(q @ q.transpose(-2, -1), -1) @ q)[:, 0]
        y = y + self.b(nn.functional.gelu(tokens(self.depthwise(self.a(y).transpose(1, 2).view(n, C, h, w)))))
        return self.head(y.transpose(1, 2).view(n, C, h, w))


@pytest.mark.parametrize("ending", RUNTIMES)
@pytest.mark.parametrize("int8", [False, True])
def test_files_give_what_the_network_gives(tmp_path: Path, ending: str, int8: bool) -> None:
    x = torch.randn(1, 3, H, W)
    images = [torch.randn_like(x) for _ in range(2)] if int8 else None
    done = bd.export(bd.pack(settle(Block())), tmp_path / f"net{ending}", example_inputs=x, int8_rest=images)
    assert done.difference is not None
    assert done.difference < (0.1 if int8 else 1e-5)


@needs("executorch")
@pytest.mark.parametrize("int8", [False, True])
def test_a_pte_moves_no_tokens(tmp_path: Path, int8: bool) -> None:
    from executorch.exir._serialize._program import deserialize_pte_binary

    x = torch.randn(1, 3, H, W)
    file = tmp_path / "net.pte"
    images = [torch.randn_like(x) for _ in range(2)] if int8 else None
    bd.export(bd.pack(settle(Block())), file, example_inputs=x, int8_rest=images)
    read: Any = deserialize_pte_binary(file.read_bytes())
    plan = getattr(read, "program", read).execution_plan[0]
    names = {operator.name for operator in plan.operators}
    assert "bidensify::packed_layer" in names
    # No operand is expanded to its own size, and no image turned by ExecuTorch's own kernels.
    assert not [name for name in names if "expand" in name or "dim_order" in name or "permute" in name]
