"""Sums that wait and are added up in one pass: the same bits as torch's operations one by one, in any use."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import bidensify as bd
from bidensify import nn as bnn
from bidensify.deploy.backends import available_kernels
from bidensify.deploy.between import sums
from bidensify.deploy.between.deferred import Deferred, made
from bidensify.deploy.between.mode import _Mode
from bidensify.nn import RPReLU

pytestmark = pytest.mark.skipif(available_kernels() == ("reference",), reason="needs kernels")


def image(height: int = 64, width: int = 48, channels: int = 48) -> Tensor:
    return torch.randn(2, channels, height, width).contiguous(memory_format=torch.channels_last)


def activation() -> RPReLU:
    act = RPReLU(48)
    for parameter in act.parameters():
        torch.nn.init.normal_(parameter)
    return act.eval()


ACT = activation()
CASES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "two": lambda a, b, small: a + b,
    "three": lambda a, b, small: torch.add(a, b) + a,
    "right": lambda a, b, small: a + (b + a),
    "upsampled": lambda a, b, small: a + F.interpolate(small, scale_factor=2.0, mode="nearest"),
    "upsampled first": lambda a, b, small: F.interpolate(small, scale_factor=2, mode="nearest").add(b),
    "stack": lambda a, b, small: torch.stack([a, b, a, b]).sum(dim=0),
    "stack of sums": lambda a, b, small: torch.sum(torch.stack((a + b, b, a)), 0) * 2,
    "stack alone": lambda a, b, small: torch.stack([a, b])[1],
    "stack, another dimension": lambda a, b, small: torch.stack([a, b]).sum(1),
    "rprelu": lambda a, b, small: ACT(a + b),
    "rprelu of three": lambda a, b, small: ACT(torch.stack([a, b, a]).sum(0)),
    "rprelu and more": lambda a, b, small: (lambda s: ACT(s) - s)(a + b),
    "rprelu of an upsampled": lambda a, b, small: ACT(a + F.interpolate(small, size=(64, 48))),
    "changed in place": lambda a, b, small: (lambda s: (b.mul_(2), s)[1])(a + b),
    "changed behind rprelu": lambda a, b, small: (lambda s: (ACT(s), b.mul_(2), s)[2])(a + b),
    "concatenated": lambda a, b, small: torch.cat([a + b, b], 1),
    "alpha": lambda a, b, small: torch.add(a, b, alpha=2),
    "broadcast": lambda a, b, small: a + b[:, :, :1, :1],
    "number": lambda a, b, small: a + 1.5,
    "keepdim": lambda a, b, small: torch.stack([a, b]).sum(0, keepdim=True),
    "bfloat16": lambda a, b, small: a.bfloat16() + b.bfloat16(),
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", CASES)
def test_the_same_bits(name: str, threads: int) -> None:
    torch.manual_seed(0)
    given = image(), image(), image(32, 24)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            want = CASES[name](*(tensor.clone(memory_format=torch.preserve_format) for tensor in given))
            with _Mode():
                got = made(CASES[name](*given))
    finally:
        torch.set_num_threads(before)
    assert got.dtype == want.dtype
    assert torch.equal(got, want)


def test_sums_wait_and_are_taken_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    add_up = sums.add_up

    def counted(shape: tuple[int, ...], parts: tuple[sums.Part, ...], activation: object = None) -> Tensor | None:
        passes.append(len(parts))
        return add_up(shape, parts, activation)  # type: ignore[arg-type]

    monkeypatch.setattr(sums, "add_up", counted)
    a, b = image(), image()
    with torch.no_grad(), _Mode():
        waits = torch.stack([a, b, a, b]).sum(dim=0)
        assert type(waits) is Deferred
        assert not passes
        y = ACT(waits)
    assert passes == [4]
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_a_packed_network_of_sums_is_the_latent_one() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = torch.nn.Conv2d(3, 32, 3, padding=1)
            self.first, self.second = (bnn.BiDenseConv2d(32, 32, 3, padding=1, activation=False) for _ in range(2))
            self.act = RPReLU(32)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.act(x + self.first(x))
            small = F.max_pool2d(y, 2)
            y = y + F.interpolate(self.second(small), scale_factor=2, mode="nearest")
            return torch.stack([y, self.second(y), x]).sum(dim=0)

    torch.manual_seed(0)
    latent = Net().eval().to(memory_format=torch.channels_last)
    torch.nn.init.normal_(latent.act.bias_in)
    x = torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(bd.pack(latent)(x), latent(x))
