"""Concatenations that packed layers read in parts: the same bits as from the tensor, and a plain tensor for all else."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import settle
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode

import bidensify as bd
from bidensify.deploy import pack
from bidensify.deploy.backends import available_kernels, choose_backend
from bidensify.deploy.between.deferred import Deferred, Part
from bidensify.deploy.freeze import freeze
from bidensify.deploy.layers import PackedConv2d
from bidensify.errors import ConfigError
from bidensify.methods.insta import InstanceSign
from bidensify.models import build_model
from bidensify.nn import BiDenseConv2d, BiDenseConvTranspose2d

NATIVE = [name for name in available_kernels() if name != "reference"]
pytestmark = pytest.mark.skipif(not NATIVE, reason="needs kernels, built from this checkout")


def dense(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_parts_give_the_same_bits(data: st.DataObject) -> None:
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 10**6)))
    ups = draw(st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=4))
    channels = [draw(st.integers(1, 70)) for _ in ups]
    cin, height, width = sum(channels), 4 * draw(st.integers(1, 4)), 4 * draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["conv", "transposed", "depthwise"]))
    kernel, stride = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    layer: nn.Module
    if kind == "conv":
        layer = BiDenseConv2d(cin, draw(st.integers(1, 70)), kernel, stride, kernel // 2)
    elif kind == "depthwise":
        layer = BiDenseConv2d(cin, cin, kernel, stride, kernel // 2, groups=cin)
    else:
        layer = BiDenseConvTranspose2d(cin, draw(st.integers(1, 70)), kernel, stride)
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    n = draw(st.integers(1, 2))
    parts = [Part(dense(n, c, height // up, width // up, dtype=dtype), up) for c, up in zip(channels, ups, strict=True)]
    whole = torch.cat([F.interpolate(part.x, scale_factor=part.up, mode="nearest") for part in parts], 1)
    for name in NATIVE:
        packed = freeze(settle(layer), kernel=name)  # type: ignore[arg-type]
        backend = choose_backend(name)
        assert backend.run is not None
        got = backend.run(whole, packed.tiles, packed.side, packed.spec, None, None, None, parts=parts)
        assert torch.equal(got, packed(whole)), name


def test_parts_that_do_not_fit_are_refused() -> None:
    packed = freeze(settle(BiDenseConv2d(8, 8, 1)))  # type: ignore[arg-type]
    backend = choose_backend(NATIVE[0])
    assert backend.run is not None
    x = dense(1, 8, 4, 4)
    for parts in (
        [Part(dense(1, 4, 4, 4), 1)],
        [Part(dense(1, 8, 4, 4), 2)],
        [Part(dense(1, 8, 4, 4, dtype=torch.bfloat16), 1)],
        [Part(torch.randn(1, 8, 4, 4), 1)],
    ):
        with pytest.raises(ConfigError, match="part"):
            backend.run(x, packed.tiles, packed.side, packed.spec, None, None, None, parts=parts)


class Decoder(nn.Module):
    """A step of a U-Net's decoder, with `between` done to what it concatenates before the binary layer has it."""

    def __init__(self, between: Callable[..., object] = lambda *_: None) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.down = BiDenseConv2d(8, 24, 3, 2, 1)
        self.up = BiDenseConv2d(32, 16, 3, padding=1)
        self.between = between
        self.seen: list[type] = []

    def forward(self, x: Tensor) -> Tensor:
        skip = self.stem(x)
        low = self.down(skip)
        high = F.interpolate(low, size=skip.shape[-2:], mode="nearest")
        both = torch.cat([high, skip], dim=1)
        self.between(both, skip, low)
        self.seen.append(type(both))
        return self.up(both)


def expected(model: nn.Module, x: Tensor) -> Tensor:
    """Without deferral: gradients are on."""
    with torch.enable_grad():
        return model(x).detach()


def packed_decoder(between: Callable[..., object] = lambda *_: None) -> nn.Module:
    torch.manual_seed(1)
    return pack(settle(Decoder(between)))


def test_a_concatenation_is_never_made(monkeypatch: pytest.MonkeyPatch) -> None:
    packed, x = packed_decoder(), dense(2, 3, 16, 16)
    want = expected(packed, x)
    monkeypatch.setattr(Deferred, "make", lambda self: pytest.fail("the concatenation was made"))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(packed(x), want)
    assert packed.seen == [Tensor, Deferred, Deferred]


def test_layers_that_need_the_whole_input_get_it() -> None:
    x = dense(1, 3, 8, 8)
    for change in ("kernel", "bypass"):
        packed = packed_decoder()
        layer = packed.up
        assert isinstance(layer, PackedConv2d)
        if change == "kernel":
            layer.kernel = "reference"
        else:
            layer.bypass = Outside()
        want = expected(packed, x)
        with torch.no_grad():
            assert torch.equal(packed(x), want)


class Operators(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "arguments",
    [
        {"scale_factor": 2},
        {"size": (16, 16)},
        {"size": 16, "mode": "nearest"},
        {"scale_factor": 2.0, "antialias": False},
    ],
)
def test_an_upsampling_is_never_made(arguments: dict[str, Any]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.after = BiDenseConv2d(8, 8, 1), BiDenseConv2d(16, 8, 3, padding=1)

        def forward(self, a: Tensor, skip: Tensor) -> Tensor:
            return self.after(torch.cat([F.interpolate(self.layer(a), **arguments), skip], 1))

    packed, a, skip = pack(settle(Net())), dense(2, 8, 8, 8), dense(2, 8, 16, 16)
    with torch.enable_grad():
        want = packed(a, skip).detach()
    with torch.inference_mode(), Operators() as seen:
        assert torch.equal(packed(a, skip), want)
    assert not {"upsample_nearest2d", "cat"} & set(seen.names)


class Outside(nn.Module):
    """A bypass that kernels do not know."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return x[:, :16] * 2


WRITES: list[Callable[[Tensor, Tensor, Tensor], object]] = [
    lambda both, skip, low: skip.mul_(-1),
    lambda both, skip, low: F.relu(low, True),
    lambda both, skip, low: nn.ReLU(inplace=True)(skip),
    lambda both, skip, low: torch.neg(skip, out=skip),
    lambda both, skip, low: skip.__setitem__((slice(None), 0), 0.0),
    lambda both, skip, low: both.add_(1),
    lambda both, skip, low: both[:, :4].zero_(),
    lambda both, skip, low: (both + 1, skip.add_(1)),
]


@pytest.mark.parametrize("write", WRITES)
def test_writes_between_concatenation_and_use(write: Callable[[Tensor, Tensor, Tensor], object]) -> None:
    packed, x = packed_decoder(write), dense(1, 3, 8, 8)
    plain = copy.deepcopy(packed)
    plain._forward_pre_hooks.clear()
    plain._forward_hooks.clear()
    plain._forward_hooks_always_called.clear()
    with torch.no_grad():
        want = plain(x)
        assert torch.equal(packed(x), want)
    assert plain.seen == [Tensor]
    assert packed.seen == [Deferred]


class Twice(nn.Module):
    """Two layers take one concatenation, and a part changes between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = BiDenseConv2d(16, 8, 1), BiDenseConv2d(16, 8, 1)

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.cat([a, b], 1)
        y = self.first(both)
        a.mul_(3)
        return y, self.second(both)


def test_a_part_that_changes_after_its_first_use() -> None:
    packed = pack(settle(Twice()))
    a, b = dense(1, 8, 4, 4), dense(1, 8, 4, 4)
    whole = torch.cat([a, b], 1)
    want = packed.first(whole), packed.second(whole)
    with torch.no_grad():
        got = packed(a.clone(memory_format=torch.preserve_format), b)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


class Kept(nn.Module):
    """Gives its concatenation and a dictionary of things made from it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = BiDenseConv2d(16, 8, 1)

    def forward(self, a: Tensor) -> dict[str, object]:
        both = torch.cat([a, a], 1)
        return {"y": self.layer(both), "both": both, "sizes": [both.shape, both.dim(), both.dtype]}


def test_a_deferred_output_is_a_plain_tensor() -> None:
    packed, a = pack(settle(Kept())), dense(1, 8, 4, 4)
    with torch.inference_mode():
        got = packed(a)
    assert type(got["both"]) is Tensor
    assert torch.equal(got["both"], torch.cat([a, a], 1))
    assert got["both"].stride() == torch.cat([a, a], 1).stride()
    assert got["sizes"] == [(1, 16, 4, 4), 4, torch.float32]


@pytest.mark.parametrize(
    "make",
    [
        lambda a: torch.cat([a, a], 0),
        lambda a: torch.cat([a, a], 2),
        lambda a: torch.cat([a, a.double()], 1),
        lambda a: torch.cat([a.contiguous(), a.contiguous()], 1),
        lambda a: F.interpolate(a, scale_factor=3, mode="nearest"),
        lambda a: F.interpolate(a, scale_factor=(2, 4), mode="nearest"),
        lambda a: F.interpolate(a, scale_factor=0.5, mode="nearest"),
        lambda a: F.interpolate(a, size=(5, 7), mode="nearest"),
        lambda a: F.interpolate(a, scale_factor=2, mode="nearest-exact"),
        lambda a: F.interpolate(a, scale_factor=2, mode="bilinear"),
        lambda a: F.interpolate(a, 8),
        lambda a: F.interpolate(a, None, 2),
        lambda a: torch.cat((a, a), axis=-3),
        lambda a: torch.concat(tensors=[a, F.interpolate(F.interpolate(a, scale_factor=2), scale_factor=2)[..., :4, :4]], dim=1),
    ],
)  # fmt: skip
def test_whatever_is_concatenated_or_scaled_comes_out_as_without(make: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = BiDenseConv2d(8, 8, 1)

        def forward(self, a: Tensor) -> Tensor:
            return make(self.layer(a))

    packed, a = pack(settle(Net())), dense(2, 8, 4, 4)
    want = expected(packed, a)
    with torch.no_grad():
        assert torch.equal(packed(a), want)


def test_an_exception_ends_the_mode() -> None:
    def fail(*_: object) -> None:
        raise ValueError("stop")

    packed, x = packed_decoder(fail), dense(1, 3, 8, 8)
    with torch.no_grad(), pytest.raises(ValueError, match="stop"):
        packed(x)
    with torch.no_grad():
        assert type(torch.cat([x, x], 1)) is Tensor


class Watching(TorchFunctionMode):
    """Counts the calls of one function."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += func is Tensor.pow
        return func(*args, **(kwargs or {}))


def test_a_methods_own_binarizer_runs_outside_of_the_mode_and_inside_of_anybody_elses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    student = bd.bidensify(build_model("demo:unet", width=8), method="insta").eval()
    student.to(memory_format=torch.channels_last)
    packed, x = pack(student), dense(2, 3, 32, 48)
    seen = set[str]()
    codes = InstanceSign.codes

    def spied(self: InstanceSign, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen.add(type(_get_current_function_mode()).__name__)
        return codes(self, x)

    monkeypatch.setattr(InstanceSign, "codes", spied)
    with torch.no_grad():
        want = student(x)
        seen.clear()
        torch.testing.assert_close(packed(x), want, rtol=0, atol=0)
        assert seen == {"NoneType"}
        with Watching() as watching:
            torch.testing.assert_close(packed(x), want, rtol=0, atol=0)
    assert watching.calls > 5
    assert seen == {"NoneType", "Watching"}


@dataclasses.dataclass(frozen=True)
class Held:
    """An output that torch does not look into."""

    first: Tensor
    more: dict[str, list[Tensor]]
    inner: Held | None = None


class Keeps(nn.Module):
    """Gives a concatenation in a dataclass and keeps another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.layer = nn.Conv2d(3, 16, 3, padding=1), BiDenseConv2d(32, 16, 3, padding=1)
        self.kept: Tensor | None = None

    def forward(self, x: Tensor) -> Held:
        u = self.stem(x)
        self.kept = torch.cat([u, u + 1], 1)
        y = self.layer(self.kept)
        return Held(y, {"all": [torch.cat([u, y], 1)]}, Held(torch.cat([y, y], 1), {}))


def test_nothing_deferred_leaves_a_network() -> None:
    torch.manual_seed(0)
    latent = settle(Keeps())
    packed = pack(latent)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        want, got = latent(x), packed(x)
    assert got.inner is not None
    for a, b in (
        (got.first, want.first),
        (got.more["all"][0], want.more["all"][0]),
        (got.inner.first, want.inner.first),
    ):
        assert type(a) is Tensor
        torch.testing.assert_close(a, b)
    kept, wanted = packed.kept, latent.kept
    assert isinstance(kept, Tensor)
    assert isinstance(wanted, Tensor)
    # NumPy and others read memory themselves.
    torch.testing.assert_close(torch.from_numpy(kept.numpy()), wanted)
    torch.testing.assert_close(torch.from_dlpack(kept), wanted)
    torch.testing.assert_close(torch.tensor(kept.tolist()), wanted)
    torch.testing.assert_close(copy.deepcopy(kept), wanted)
    file = io.BytesIO()
    torch.save(kept, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=True), wanted)
    assert kept.data_ptr()
    assert torch.equal(kept.share_memory_(), kept + 0)
