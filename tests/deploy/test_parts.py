"""Programs whose layers read concatenations and upsamplings in parts compute the same, whatever is written in place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import settle
from torch import Tensor, nn

import bidensify as bd
from bidensify.deploy.export.capture import capture
from bidensify.deploy.runtimes.prepare import prepared, read_in_parts
from bidensify.nn import BiDenseConv2d


class Writing(nn.Module):
    """A concatenation before a packed layer, and something written in place before, between or behind."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.one, self.two = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 16, 3, padding=1)
        self.layer = BiDenseConv2d(32, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        how = self.how
        u, v = self.one(x), self.two(x)
        if how == "before":
            u, v = F.relu_(u), v.add_(3)
        view = v[:, :8]
        up = torch.cat([u, v], 1)
        if how == "upsampled":
            up = torch.cat([F.interpolate(t, scale_factor=2.0, mode="nearest") for t in (u, v)], 1)
        if how == "dropped":
            up = F.dropout(up, 0.5, False)
        nested = torch.cat([F.interpolate(up, scale_factor=2.0, mode="nearest")], 1) if how == "nested" else up
        if how in ("part", "upsampled", "dropped", "nested"):
            v += 3
        if how == "view":
            view.neg_()
        if how == "slice":
            v[:, 3:5] = 7
        if how == "chunk":
            v.chunk(2, 1)[1].mul_(-1)
        if how == "chain":
            v.relu_().add_(3)
        if how == "whole":
            F.relu_(nested)
        y = self.layer(nested)
        if how == "behind":
            u.neg_()
        return y + u.mean() + v.mean()


@pytest.mark.parametrize(
    ("how", "changed"),
    [
        *((how, 1) for how in ("nothing", "before", "behind")),
        *((how, 0) for how in ("part", "view", "slice", "chunk", "chain", "whole")),
        # Something goes, and what changes stays.
        *((how, 1) for how in ("upsampled", "nested", "dropped")),
    ],
)
def test_what_is_written_in_place_is_read_as_it_was(how: str, changed: int) -> None:
    torch.manual_seed(0)
    net = bd.pack(settle(Writing(how)))
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        program = capture(prepared(net), (x,), {}, None)
        assert read_in_parts(program.graph) == changed
        program.graph_module.recompile()
        assert torch.equal(program.module()(x), net(x))


class Enlarging(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor
        self.layer = BiDenseConv2d(16, 32, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.interpolate(x, scale_factor=self.factor, mode="nearest"))


@pytest.mark.parametrize(("factor", "changed"), [(4.0, 1), (4.1, 0), (3.0, 0)])
def test_an_enlargement_is_of_the_factor_that_was_asked_for(factor: float, changed: int) -> None:
    """5 pixels times 4.1 are 20 as well, and others of them are repeated."""
    torch.manual_seed(0)
    layer, x = Enlarging(factor).eval(), torch.randn(2, 16, 5, 5)
    bd.calibrate(layer, [x])
    net = bd.pack(layer)
    with torch.no_grad():
        program = capture(prepared(net), (x[:1],), {}, None)
        assert read_in_parts(program.graph) == changed
        program.graph_module.recompile()
        assert torch.equal(program.module()(x[:1]), net(x[:1]))
