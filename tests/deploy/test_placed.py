"""Full-precision operations between packed layers: the same bits, in the memory of packed layers' outputs."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers import settle
from torch import Tensor, nn

from bidensify.deploy import pack
from bidensify.kernels import memory
from bidensify.kernels.library import library as load_library
from bidensify.nn import BiDenseConv2d, RPReLU

library = load_library()
pytestmark = pytest.mark.skipif(
    library is None or not hasattr(library, "bd_tensor_new") or sys.platform == "win32",
    reason="needs kernels, built from this checkout, and mmap",
)
PLACED: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda x: x + x,
    "add parameter": lambda x: torch.add(x, ROW.to(x.dtype)),
    "add method": lambda x: x.add(x),
    "batch_norm": lambda x: F.batch_norm(x, MEAN.to(x.dtype), VARIANCE.to(x.dtype), VARIANCE.to(x.dtype), MEAN.to(x.dtype)),
    "batch_norm plain": lambda x: F.batch_norm(x, MEAN.to(x.dtype), VARIANCE.to(x.dtype), eps=1e-3),
    "bilinear size": lambda x: F.interpolate(x, size=(50, 31), mode="bilinear"),
    "bilinear same size": lambda x: F.interpolate(x, size=x.shape[2:], mode="bilinear"),
    "bilinear same size corners": lambda x: F.interpolate(x, size=x.shape[2:], mode="bilinear", align_corners=True),
    "bilinear corners": lambda x: F.interpolate(x, (64, 48), mode="bilinear", align_corners=True),
    "bilinear scale": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False),
    "bilinear scale corners": lambda x: F.interpolate(x, scale_factor=4.0, mode="bilinear", align_corners=True),
    "max_pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "max_pool defaults": lambda x: F.max_pool2d(x, (2, 1)),
    "max_pool ceil": lambda x: F.max_pool2d(x, 3, stride=[2, 1], ceil_mode=True, dilation=2),
}  # fmt: skip
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "add scalar": lambda x: x + 1.5,
    "add alpha": lambda x: torch.add(x, x, alpha=2),
    "add dtype": lambda x: x + x.double(),
    "add growing": lambda x: x[:1] + x.new_ones(3, 1, 1, 1),
    "add out": lambda x: torch.add(x, x, out=torch.empty_like(x)),
    "add plain": lambda x: x.contiguous() + x.contiguous(),
    "batch_norm training": lambda x: F.batch_norm(x, None, None, training=True),
    "batch_norm float32": lambda x: F.batch_norm(x, MEAN, VARIANCE, VARIANCE, MEAN),
    "bilinear fraction": lambda x: F.interpolate(x, scale_factor=1.5, mode="bilinear"),
    "bilinear two": lambda x: F.interpolate(x, scale_factor=(2, 3), mode="bilinear"),
    "bilinear recompute": lambda x: F.interpolate(x, scale_factor=2, mode="bilinear", recompute_scale_factor=True),
    "bilinear antialias": lambda x: F.interpolate(x.float(), (9, 9), mode="bilinear", antialias=True),
    "bicubic": lambda x: F.interpolate(x, (9, 9), mode="bicubic"),
    "max_pool indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
}
CHANNELS = 48
torch.manual_seed(0)
MEAN, VARIANCE, ROW = torch.randn(CHANNELS), torch.rand(CHANNELS) + 0.5, torch.randn(CHANNELS, 1, 1)


class Net(nn.Module):
    """An operation inside a packed model, which has a binary layer so that it can be packed."""

    def __init__(self, operation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer = BiDenseConv2d(4, 4, 1)
        self.operation = operation

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x)


def dense(dtype: torch.dtype, n: int = 4) -> Tensor:
    return torch.randn(n, CHANNELS, 28, 27).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*PLACED, *OTHERS])
def test_the_same_bits(name: str, dtype: torch.dtype) -> None:
    operation = {**PLACED, **OTHERS}[name]
    packed, x = pack(settle(Net(operation))), dense(dtype)
    want, before = operation(x), memory.kept()[0]
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            got = packed(x)
        assert torch.equal(got, want)
        assert got.dtype == want.dtype
        assert got.stride() == want.stride()
        if name in PLACED:
            assert memory.kept()[0] > before
        elif name != "batch_norm float32" or dtype == torch.bfloat16:
            assert memory.kept()[0] == before
        del got
    assert memory.kept()[0] == before


@pytest.mark.parametrize("size", [(6, 8), (12, 16), (24, 32)])
def test_tokens_as_a_map_are_upsampled_in_channels_last(size: tuple[int, int]) -> None:
    torch.manual_seed(1)
    tokens = torch.randn(1, size[0] * size[1], 256)
    packed = pack(
        settle(Net(lambda x: F.interpolate(x.transpose(1, 2).reshape(1, 256, *size), (24, 32), mode="bilinear")))
    )
    want = packed.operation(tokens)
    with torch.inference_mode():
        got = packed(tokens)
    assert torch.equal(got, want)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_rprelu() -> None:
    torch.manual_seed(1)
    activation = RPReLU(CHANNELS)
    for parameter in activation.parameters():
        nn.init.normal_(parameter)
    packed, x, before = pack(settle(Net(activation))), dense(torch.float32), memory.kept()[0]
    want = activation(x).detach()
    with torch.inference_mode():
        got = packed(x)
    assert torch.equal(got, want)
    assert memory.kept()[0] > before


def test_with_gradients_autocast_and_transforms_nothing_changes() -> None:
    packed, x = pack(settle(Net(lambda x: F.interpolate(x + x, scale_factor=2, mode="bilinear")))), dense(torch.float32)
    y = packed(x.requires_grad_())
    assert y.grad_fn is not None
    x = x.detach()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = packed(x)
        want = packed.operation(x)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)
    with torch.no_grad():
        mapped = torch.func.vmap(packed)(torch.stack([x, x + 1]))
        assert torch.equal(mapped[1], packed(x + 1))


def test_a_compiled_model_computes_the_same() -> None:
    packed, x = pack(settle(Net(PLACED["bilinear size"]))), dense(torch.float32)
    with torch.no_grad():
        assert torch.equal(torch.compile(packed, backend="eager")(x), packed(x))


def test_wrong_arguments_get_torchs_own_answer() -> None:
    for operation in (
        lambda x: F.interpolate(x, mode="bilinear"),
        lambda x: F.max_pool2d(x, 99),
        lambda x: x.add(x[:, :5]),
    ):
        packed, x = pack(settle(Net(operation))), dense(torch.float32)
        with pytest.raises((ValueError, RuntimeError)) as plain:
            operation(x)
        with torch.no_grad(), pytest.raises(type(plain.value)) as inside:
            packed(x)
        assert str(inside.value).splitlines()[0] == str(plain.value).splitlines()[0]


class Stem(nn.Module):
    """What a ResNet begins with, and a residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = BiDenseConv2d(16, 16, 3, padding=1)
        self.norm, self.activation = nn.BatchNorm2d(16), RPReLU(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.norm(x))
        return F.interpolate(F.max_pool2d(self.layer(x) + x, 3, 2, 1), scale_factor=2, mode="bilinear")


def test_a_second_run_has_no_fresh_pages() -> None:
    packed = pack(settle(Stem()))
    x = torch.randn(1, 16, 512, 512).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        for _ in range(3):
            packed(x)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(5):
            packed(x)
    # Each of a run's five results is 16 MiB, 4096 pages.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 5 * 400
