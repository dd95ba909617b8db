"""Under both runtimes, packed layers read what other operators give in whatever order it lies there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from helpers import relative, settle
from layouts import BEFORE, Net
from runtimes import RUNTIMES, Beside, needs, outputs
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import bidensify as bd
from bidensify.nn import BiDenseConv2d

# What a runtime itself cannot.
WITHOUT = {".pte": {"a largest value"}, ".xml": set()}  # ExecuTorch 1.5 has no adaptive_max_pool2d
GROUPS = [list(BEFORE)[start::4] for start in range(4)]


@pytest.mark.parametrize("suffix", RUNTIMES)
@pytest.mark.parametrize("names", GROUPS, ids=[names[0] for names in GROUPS])
def test_what_comes_before_a_packed_layer(names: list[str], suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    names = [name for name in names if name not in WITHOUT[suffix]]
    model = bd.pack(settle(Beside([Net(name) for name in names])))
    inputs = [torch.randn(2, 3, 24, 32) for _ in names]
    done = bd.export(model, tmp_path / f"net{suffix}", example_inputs=tuple(inputs))
    with torch.no_grad():
        wanted = model(*inputs)
    for i, (got, want) in enumerate(zip(outputs(done.path, inputs), wanted, strict=True)):
        assert relative(got, want) < 1e-5, (names[i // 3], i % 3)


def file_agrees(network: Callable[[], nn.Module], x: Tensor, path: Path) -> None:
    """Every output of the packed network's file is the packed network's."""
    torch.manual_seed(0)
    model = bd.pack(settle(network()))
    done = bd.export(model, path, example_inputs=x)
    with torch.no_grad():
        wanted = tree_leaves(model(x))
    for i, (got, want) in enumerate(zip(outputs(done.path, [x]), wanted, strict=True)):
        assert relative(got, want) < 1e-5, i


class Pooled(nn.Module):
    """Packed layers on pools of one packed layer's result, enlarged and joined before another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 2, 1)
        self.first = BiDenseConv2d(16, 16, 3, padding=1)
        self.branches = nn.ModuleList(BiDenseConv2d(16, 8, 1) for _ in range(4))
        self.whole = nn.Sequential(nn.Conv2d(16, 8, 1), nn.ReLU())
        self.joined = BiDenseConv2d(56, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.stem(x))
        parts = [x]
        for size, branch in zip((1, 2, 3, 5), self.branches):
            y = branch(F.adaptive_avg_pool2d(x, size))
            parts.append(F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=True))
        y = self.whole(F.adaptive_avg_pool2d(x, 1))
        parts.append(F.interpolate(y, x.shape[2:], mode="bilinear", align_corners=True))
        y = self.joined(torch.cat(parts, 1))
        return cast(Tensor, y)


@pytest.mark.parametrize("suffix", RUNTIMES)
@pytest.mark.parametrize("batch", [1, 2])
def test_pooled_branches_of_packed_layers(batch: int, suffix: str, tmp_path: Path) -> None:
    file_agrees(Pooled, torch.randn(batch, 3, 24, 32), tmp_path / f"net{suffix}")


@needs("executorch")
def test_a_gate_under_sizes_that_vary(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = bd.pack(settle(Net("squeeze and excite")))
    sizes = {"height": (16, 32, 8), "width": (16, 32, 8)}
    done = bd.export(model, tmp_path / "net.pte", example_inputs=torch.randn(1, 3, 24, 32), dynamic=sizes)
    assert done.difference is not None
    assert done.difference < 1e-5


@needs("executorch")
def test_every_tensor_lies_as_its_kernel_was_written_for(tmp_path: Path) -> None:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower

    from bidensify.deploy.executorch.passes import kernels_pass, layout_pass
    from bidensify.deploy.export.capture import capture
    from bidensify.deploy.runtimes.prepare import prepared

    with torch.no_grad():
        program = capture(prepared(bd.pack(settle(Pooled()))), (torch.randn(2, 3, 24, 32),), {}, None)
    edge = to_edge_transform_and_lower(
        program,
        transform_passes=[layout_pass()],
        partitioner=[XnnpackPartitioner()],
        compile_config=EdgeCompileConfig(_check_ir_validity=False),
    )
    before = {
        node.name: node.meta["val"].dim_order()
        for node in edge.exported_program().graph.nodes
        if isinstance(node.meta.get("val"), Tensor)
    }
    graph = edge.to_executorch(ExecutorchBackendConfig(passes=[kernels_pass()])).exported_program().graph
    pools = [node for node in graph.nodes if "adaptive_avg_pool2d" in str(node.target)]
    assert len(pools) == 3  # that of one pixel is XNNPACK's
    for node in pools:
        assert node.args[0].meta["val"].dim_order() == (0, 1, 2, 3)
        (reader,) = node.users
        assert reader.meta["val"].dim_order() == before[node.name] == (0, 2, 3, 1)
    for node in graph.nodes:
        if "packed_layer" in str(node.target):
            assert all(part.meta["val"].is_contiguous(memory_format=torch.channels_last) for part in node.args[0])


@pytest.mark.parametrize("suffix", RUNTIMES)
@pytest.mark.parametrize("channels", [1, 2])
def test_a_map_of_one_channel_leaves_and_is_read_again(channels: int, suffix: str, tmp_path: Path) -> None:
    class Depth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, channels, 1)
            self.first, self.second = BiDenseConv2d(16, 16, 3, padding=1), BiDenseConv2d(channels, 16, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = torch.relu(self.head(self.first(self.stem(x))))
            return y, F.interpolate(y, scale_factor=2, mode="bilinear"), self.head(self.second(y))

    file_agrees(Depth, torch.randn(2, 3, 24, 32), tmp_path / f"net{suffix}")


@pytest.mark.parametrize("suffix", RUNTIMES)
def test_a_map_of_one_channel_lies_in_both_orders(suffix: str, tmp_path: Path) -> None:
    class Depth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.packed, self.head = nn.Conv2d(3, 16, 3, 2, 1), BiDenseConv2d(16, 16, 1), nn.Conv2d(16, 1, 1)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            y = self.head(self.packed(self.stem(x)))
            pixel = F.adaptive_avg_pool2d(y, 1)
            gated = torch.where(pixel > 0, 1.0, y), (y.mean((2, 3), keepdim=True) > 0) * y
            return F.softplus(y), torch.where(y > 0.1, y, y * 2), (y > 0).float() * 2, *gated, F.softplus(pixel) + y

    file_agrees(Depth, torch.randn(2, 3, 24, 32), tmp_path / f"net{suffix}")


@pytest.mark.parametrize("suffix", RUNTIMES)
@pytest.mark.parametrize("channels", [1, 3])
def test_an_image_is_read_by_what_xnnpack_has_not(channels: int, suffix: str, tmp_path: Path) -> None:
    class Prompted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Conv2d(channels, 16, 3, 2, 1), nn.Conv2d(16, channels, 1)
            self.packed = BiDenseConv2d(16, 16, 3, padding=1)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            # The least value is no operator of XNNPACK's, what stands before it and behind it is.
            above = x - x.reshape(len(x), -1).amin(1)[:, None, None, None]
            y = F.interpolate(self.head(self.packed(self.stem(above))), x.shape[2:], mode="bilinear")
            return y + x, above.to(x.dtype).contiguous()

    file_agrees(Prompted, torch.randn(2, channels, 24, 32), tmp_path / f"net{suffix}")


class Hollow(nn.Module):
    """Concatenations with levels that have no channels, as encoders of transformers hand on for the first ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, 1, 1)
        self.packed = BiDenseConv2d(16, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        nothing = x.new_empty(x.shape[0], 0, x.shape[2], x.shape[3])
        y = self.packed(torch.cat([self.stem(x), nothing], 1))
        return cast(Tensor, self.head(torch.cat([nothing, F.interpolate(y, scale_factor=2.0)[:, :, ::2, ::2]], 1)))


@pytest.mark.parametrize("suffix", RUNTIMES)
def test_parts_without_channels(suffix: str, tmp_path: Path) -> None:
    file_agrees(Hollow, torch.randn(2, 3, 16, 24), tmp_path / f"net{suffix}")
