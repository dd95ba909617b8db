"""What becomes operators that XNNPACK has computes what it did, and what cannot stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runtimes import needs
from torch import Tensor, nn

from bidensify.deploy.executorch.simpler import for_xnnpack

aten = torch.ops.aten


class Enlarged(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.interpolate(x * 2, mode="nearest", **self.options) + 1


class Summed(nn.Module):
    def __init__(self, stack: int, *axes: Any, **options: Any) -> None:
        super().__init__()
        self.stack, self.axes, self.options = stack, axes, options

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([x, x * 2, x + 1], self.stack).sum(*self.axes, **self.options) * 2


def both(module: nn.Module, x: Tensor, **options: Any) -> tuple[set[Any], Tensor, Tensor]:
    """The operators that are left, what the program gives then, and what the module does."""
    program = torch.export.export(module.eval(), (x,), **options)
    for_xnnpack(program)
    program.graph.lint()
    return {node.target for node in program.graph.nodes}, program.module()(x), module(x)


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "options",
    [{"scale_factor": 2}, {"scale_factor": (3, 1)}, {"scale_factor": (1, 4)}, {"size": (15, 14)}],
)
def test_enlargements_repeat_pixels_and_rows(options: dict[str, Any], order: torch.memory_format) -> None:
    x = torch.randn(2, 3, 5, 7).contiguous(memory_format=order)
    operators, found, wanted = both(Enlarged(**options), x)
    assert torch.equal(found, wanted)
    assert not operators & {aten.upsample_nearest2d.vec, aten.upsample_nearest2d.default}


@pytest.mark.parametrize(
    "options",
    [{"scale_factor": 1.5}, {"size": (5, 10)}, {"scale_factor": 6}, {"scale_factor": 1}, {"scale_factor": 3.1}],
)
def test_enlargements_of_other_factors_stay(options: dict[str, Any]) -> None:
    operators, found, wanted = both(Enlarged(**options), torch.randn(1, 3, 5, 7))
    assert torch.equal(found, wanted)
    assert aten.upsample_nearest2d.vec in operators


def test_sizes_that_vary_stay() -> None:
    sizes = {"x": {2: torch.export.Dim("H", min=2, max=32)}}
    operators, found, wanted = both(Enlarged(scale_factor=2), torch.randn(1, 3, 6, 7), dynamic_shapes=sizes)
    assert torch.equal(found, wanted)
    assert aten.upsample_nearest2d.vec in operators


@pytest.mark.parametrize("module", [Summed(0, 0), Summed(0, [0]), Summed(1, 1), Summed(-1, -1), Summed(2, [-3])])
def test_sums_of_stacks_are_additions(module: nn.Module) -> None:
    operators, found, wanted = both(module, torch.randn(2, 3, 4, 5))
    torch.testing.assert_close(found, wanted)
    assert not operators & {aten.sum.dim_IntList, aten.stack.default}


@pytest.mark.parametrize(
    "module",
    [
        Summed(0, 1),
        Summed(0, None),
        Summed(0, [0, 1]),
        Summed(0, 0, keepdim=True),
        Summed(0, 0, dtype=torch.float64),
        Summed(0),
    ],
)
def test_other_sums_stay(module: nn.Module) -> None:
    operators, found, wanted = both(module, torch.randn(2, 3, 4, 5))
    torch.testing.assert_close(found, wanted)
    assert aten.stack.default in operators


class Written(nn.Module):
    def __init__(self, into_stack: bool) -> None:
        super().__init__()
        self.into_stack = into_stack

    def forward(self, x: Tensor) -> Tensor:
        part = x * 2
        stack = torch.stack([x, part])
        (stack if self.into_stack else part).add_(1)
        return stack.sum(0) + part


@pytest.mark.parametrize("into_stack", [False, True])
def test_what_is_written_between(into_stack: bool) -> None:
    _, found, wanted = both(Written(into_stack), torch.randn(2, 3))
    torch.testing.assert_close(found, wanted)


def test_integers_stay() -> None:
    operators, found, wanted = both(Summed(0, 0), torch.arange(24).view(2, 3, 4))
    assert torch.equal(found, wanted)
    assert aten.stack.default in operators


@needs("executorch")
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("groups", "channels", "affine"), [(4, 16, True), (1, 6, True), (5, 5, True), (3, 12, False)])
def test_group_norms_are_means_and_products(
    groups: int, channels: int, affine: bool, order: torch.memory_format
) -> None:
    norm = nn.GroupNorm(groups, channels, affine=affine, eps=0.1)
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    # The mean is a thousand deviations.
    x = (1000 + torch.randn(2, channels, 7, 5)).contiguous(memory_format=order)
    operators, found, _ = both(nn.Sequential(norm, nn.ReLU()), x)
    # Not beside PyTorch's own, which is off by tenths in channels_last.
    wanted = nn.functional.relu(norm.double()(x.double()))
    assert (found - wanted).abs().max() < 1e-3
    assert aten.group_norm.default not in operators


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 9)])
def test_group_norms_of_what_is_no_image_stay(shape: tuple[int, ...]) -> None:
    operators, found, wanted = both(nn.GroupNorm(3, 6), torch.randn(shape))
    assert torch.equal(found, wanted)
    assert aten.group_norm.default in operators


class Shifted(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(6))
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return (x * 2 + self.shift.view(self.shape).to(x.dtype)) / self.shift.reshape(self.shape)


@needs("executorch")
@pytest.mark.parametrize(("shape", "dims"), [((-1, 1, 1), 4), ((6, 1, 1), 4), ((1, 6, 1), 3)])
def test_values_per_channel_have_four_dimensions(shape: tuple[int, ...], dims: int) -> None:
    program = torch.export.export(Shifted(*shape).eval(), (torch.randn((2, 6, 6, 5)),))
    for_xnnpack(program)
    program.graph.lint()
    read = [node.args[1] for node in program.graph.nodes if node.target in (aten.add.Tensor, aten.div.Tensor)]
    assert [node.meta["val"].dim() for node in read] == [dims, dims]
    _, found, wanted = both(Shifted(*shape), torch.randn((2, 6, 6, 5)))
    assert torch.equal(found, wanted)
