"""The torch.library operator: opcheck, torch.compile and torch.export of packed models."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import network, relative, settle
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bidensify.deploy import operator, pack
from bidensify.deploy.backends import KERNEL_VARIABLE, available_kernels
from bidensify.deploy.freeze import freeze
from bidensify.deploy.operator import reference_operator
from bidensify.errors import ConfigError, FormatError
from bidensify.nn import BiDenseConv2d, BiDenseConvTranspose2d, BiDenseLinear

KERNELS = available_kernels()


@pytest.mark.parametrize("kernel", [KERNELS[0], "reference"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: BiDenseConv2d(16, 24, 3, 2, 1), (2, 16, 9, 8)),
        (lambda: BiDenseConvTranspose2d(16, 8, 2, 2), (1, 16, 4, 5)),
        (lambda: BiDenseConv2d(16, 16, 3, padding=1, groups=16), (1, 16, 6, 6)),
        (lambda: BiDenseLinear(16, 24), (2, 3, 5, 16)),
    ],
)
def test_opcheck(make: object, shape: tuple[int, ...], kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNEL_VARIABLE, kernel)
    packed = freeze(settle(make()))  # type: ignore[operator]
    x = torch.randn(shape)
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    rest = (packed.tiles, packed.side, operator.spec_ints(packed.spec), None, None, None)
    torch.library.opcheck(torch.ops.bidensify.packed_layer.default, ([x], [1], *rest))
    if packed.spec.in_channels % 2 == 0 and x.dim() == 4 and not shape[2] % 2 and not shape[3] % 2:
        halves = [x[:, : shape[1] // 2, ::2, ::2], x[:, shape[1] // 2 :]]
        torch.library.opcheck(torch.ops.bidensify.packed_layer.default, (halves, [2, 1], *rest))


@pytest.mark.parametrize("kernel", KERNELS)
def test_parts_are_the_whole_input(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KERNEL_VARIABLE, kernel)
    packed = freeze(settle(BiDenseConv2d(24, 16, 3, padding=1)))
    a, b, c = torch.randn(2, 8, 4, 3), torch.randn(2, 6, 12, 9), torch.randn(2, 10, 2, 1)
    with pytest.raises(ConfigError, match="part"):
        torch.ops.bidensify.packed_layer([a, b, c], [3, 1, 6], *_rest(packed))
    c = torch.randn(2, 10, 4, 3)
    parts, up = [a, b, c], [3, 1, 3]
    whole = torch.cat([p.repeat_interleave(u, 2).repeat_interleave(u, 3) for p, u in zip(parts, up)], 1)
    with torch.no_grad():
        want = packed(whole)
    assert torch.equal(torch.ops.bidensify.packed_layer(parts, up, *_rest(packed)), want)
    out = torch.empty_like(want)
    got = torch.ops.bidensify.packed_layer.out(parts, up, *_rest(packed), out=out)
    assert got is out
    assert torch.equal(out, want)


@pytest.mark.parametrize("kernel", [*KERNELS, "reference"])
@pytest.mark.parametrize(
    "inner", [operator.PARTS_INNER, operator.RESULT_INNER, operator.PARTS_INNER | operator.RESULT_INNER]
)
@pytest.mark.parametrize(
    ("make", "channels", "up"),
    [
        (lambda: BiDenseConv2d(24, 16, 3, padding=1), (24,), (1,)),
        (lambda: BiDenseConv2d(24, 16, 3, 2, 1), (8, 16), (2, 1)),
        (lambda: BiDenseConv2d(24, 24, 3, padding=1, groups=24), (24,), (1,)),
        (lambda: BiDenseConvTranspose2d(24, 8, 2, 2), (24,), (1,)),
    ],
)
def test_images_whose_channels_are_the_last_dimension(
    make: Callable[[], nn.Module], channels: tuple[int, ...], up: tuple[int, ...], inner: int, kernel: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv(KERNEL_VARIABLE, kernel)
    packed: Any = freeze(settle(make()))
    parts = [torch.randn(2, size, 6 // times, 8 // times) for size, times in zip(channels, up)]
    tiles, side, ints, *none = _rest(packed)
    run = torch.ops.bidensify.packed_layer
    residual = torch.randn_like(run(parts, up, tiles, side, ints, *none))
    for added in (None, residual):
        want = run(parts, up, tiles, side, ints, None, None, added)
        given = [part.permute(0, 2, 3, 1).contiguous() for part in parts] if inner & operator.PARTS_INNER else parts
        result = inner & operator.RESULT_INNER
        last = added.permute(0, 2, 3, 1).contiguous() if added is not None and result else added
        y = run(given, up, tiles, side, operator.spec_ints(packed.spec, inner), None, None, last)
        assert y.is_contiguous() or not result
        assert torch.equal(y.permute(0, 3, 1, 2) if result else y, want)
        arguments = (given, up, tiles, side, operator.spec_ints(packed.spec, inner), None, None, last)
        torch.library.opcheck(run.default, arguments, test_utils=("test_schema", "test_faketensor"))


def test_no_other_place_of_channels_is_known() -> None:
    packed, linear = freeze(settle(BiDenseConv2d(16, 16, 3, padding=1))), freeze(settle(BiDenseLinear(16, 24)))
    x = torch.randn(1, 16, 16, 16)
    for layer, inner, given in ((packed, 4, x), (packed, 0, x), (packed, -1, x), (linear, 1, x)):
        ints = [2, inner, *layer.spec.to_ints()]
        run = torch.ops.bidensify.packed_layer
        if inner == 0:
            assert torch.equal(run([given], [1], layer.tiles, layer.side, ints, None, None, None), layer(x))
            continue
        with pytest.raises(FormatError, match=f"{inner} does not say where the channels of a layer of kind"):
            run([given], [1], layer.tiles, layer.side, ints, None, None, None)
    with pytest.raises(ConfigError, match=r"\(16, 16, 16\) must be \(N, H, W, C\)"):
        run([x[0]], [1], packed.tiles, packed.side, operator.spec_ints(packed.spec, 1), None, None, None)


def _rest(packed: Any) -> tuple[Any, ...]:
    return packed.tiles, packed.side, operator.spec_ints(packed.spec), None, None, None


def test_a_newer_version_and_wrong_inputs_are_refused_with_the_reason() -> None:
    packed = freeze(settle(BiDenseConv2d(16, 16, 3, padding=1)))
    x = torch.randn(1, 16, 5, 6)
    tiles, side, ints, *none = _rest(packed)
    for wrong in ([operator.SPEC_VERSION + 1, *ints[1:]], [0, *ints[1:]], []):
        with pytest.raises(FormatError, match="of version.*install a newer one"):
            torch.ops.bidensify.packed_layer([x], [1], tiles, side, wrong, *none)
    for parts, up in (([x], [1, 1]), ([x], [0]), ([], []), ([x[:, :3]], [1]), ([x[0]], [1]), ([x, x.double()], [1, 1])):
        with pytest.raises(ConfigError, match=r"packed_layer: parts of shapes"):
            torch.ops.bidensify.packed_layer(parts, up, tiles, side, ints, *none)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_operator_of_earlier_versions_gives_the_same(kernel: str) -> None:
    packed = freeze(settle(BiDenseConv2d(16, 16, 3, padding=1)))
    linear = freeze(settle(BiDenseLinear(16, 24)))
    x, t = torch.randn(1, 16, 5, 6), torch.randn(2, 7, 16)
    old = torch.ops.bidensify.packed_conv2d
    with torch.no_grad():
        y = old(x, packed.tiles, packed.side, packed.spec.to_ints(), None, None, None, kernel)
        assert torch.equal(y, packed(x))
        y = old(
            t[:, None].permute(0, 3, 2, 1), linear.tiles, linear.side, linear.spec.to_ints(), None, None, None, kernel
        )
        assert torch.equal(y[..., 0].mT, linear(t))


def test_compile_agrees_with_eager() -> None:
    packed = pack(network())
    x = torch.randn(1, 3, 12, 12)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert relative(compiled(x), packed(x)) < 1e-5


def test_export_keeps_the_operator_and_a_dynamic_size() -> None:
    packed = pack(network())
    x = torch.randn(2, 3, 16, 12)
    height, width = torch.export.Dim("height", min=4, max=512), torch.export.Dim("width", min=4, max=512)
    # The strided layer and the 2x2 upsampling meet again at even sizes only.
    dynamic = {"input": {2: 2 * height, 3: 2 * width}}
    exported = torch.export.export(packed, (x,), dynamic_shapes=dynamic)
    calls = [node for node in exported.graph.nodes if "packed_layer" in str(node.target)]
    assert len(calls) == 2
    other = torch.randn(2, 3, 24, 20)
    with torch.no_grad():
        assert relative(exported.module()(x), packed(x)) < 1e-5
        assert relative(exported.module()(other), packed(other)) < 1e-5


def test_linear_under_compile() -> None:
    packed = pack(settle(BiDenseLinear(16, 24)))
    x = torch.randn(2, 5, 16)
    with torch.no_grad():
        assert relative(torch.compile(packed, fullgraph=True, backend="aot_eager")(x), packed(x)) < 1e-5


def test_fake_tensors_have_the_right_shape_and_order() -> None:
    packed = pack(network())
    with torch.device("meta"):
        x = torch.empty(1, 3, 10, 14)
    y = packed.to("meta")(x)
    assert isinstance(y, Tensor)
    assert y.shape == (1, 4, 10, 14)


@pytest.mark.parametrize("kernel", KERNELS)
def test_autocast_changes_nothing_inside_a_layer(kernel: str) -> None:
    # 9 * 70 products: a sum past 256 is no longer exact in bfloat16.
    packed = freeze(settle(BiDenseConv2d(70, 24, 3, padding=1)), kernel=kernel)
    x = torch.randn(1, 70, 6, 7) + 1
    with torch.no_grad():
        want = packed(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(packed(x), want)


def test_inductor_compiles_a_packed_network() -> None:
    packed = pack(network())
    x = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        assert relative(torch.compile(packed, fullgraph=True)(x), packed(x)) < 1e-5


@pytest.mark.parametrize("key", ["CUDA", "MPS", "XPU"])
def test_devices_without_kernels_run_the_path_that_is_tested_here(key: str) -> None:
    name = "bidensify::packed_layer"
    assert torch._C._dispatch_has_kernel_for_dispatch_key(name, key)
    # The same function, on tensors of this machine: what a device computes but for its own convolution.
    for make, shape in (
        (lambda: BiDenseConv2d(40, 24, 3, 2, 1, groups=2), (2, 40, 9, 8)),
        (lambda: BiDenseConv2d(33, 33, 5, padding=2, groups=33), (1, 33, 9, 8)),
        (lambda: BiDenseConvTranspose2d(16, 8, 3, 2, 1, 1), (1, 16, 4, 5)),
    ):
        packed = freeze(settle(make()))
        x = torch.randn(shape)
        with torch.no_grad():
            want = packed(x)
            assert torch.equal(operator.reference_operator([x], [1], *_rest(packed)), want)
        on_meta = (value.to("meta") if isinstance(value, Tensor) else value for value in _rest(packed))
        y = operator.reference_operator([x.to("meta")], [1], *on_meta)  # type: ignore[arg-type]
        assert y.shape == want.shape
        assert y.stride() == want.stride()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_cpu() -> None:
    packed = pack(network())
    x = torch.randn(1, 3, 12, 12)
    with torch.no_grad():
        want = packed(x)
        assert relative(packed.cuda()(x.cuda()).cpu(), want) < 1e-3


NAME = "packed_layer"


class _Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class _Dispatched(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("whole", [False, True])
def test_whoever_watches_operators_sees_packed_ones(whole: bool) -> None:
    packed: nn.Module = pack(network()) if whole else freeze(settle(BiDenseConv2d(3, 16, 3, padding=1)))
    x = torch.randn(1, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        want = packed(x)
        for mode in (_Functions(), _Dispatched()):
            with mode:
                assert torch.equal(packed(x), want)
            assert any(NAME in name for name in mode.seen), type(mode).__name__
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            packed(x)
        assert any(NAME in event.key for event in profile.key_averages())
        graph = make_fx(packed)(x).graph
        assert any(NAME in str(node.target) for node in graph.nodes)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            assert packed(fake.from_tensor(x)).shape == want.shape
        assert torch.equal(torch.func.vmap(lambda v: v * 1)(packed(x)), want)


@pytest.mark.parametrize("make", [lambda: BiDenseConv2d(40, 24, 3, padding=1), lambda: BiDenseLinear(40, 24)])
def test_the_same_call_once_more_sees_what_changed(make: Callable[[], nn.Module]) -> None:
    """Calls of the operator are kept; weights that changed, moved or went, other inputs and other types are not those kept."""
    layer, other = freeze(settle(make())), freeze(settle(make(), seed=1))
    shape = (2, 40, 9, 7) if layer.spec.kind != "linear" else (2, 9, 40)

    def both(x: Tensor, tiles: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
        arguments = ([x], [1], tiles, side, layer._ints, None, None, None)
        return torch.ops.bidensify.packed_layer(*arguments), reference_operator(*arguments)

    for round_ in range(3):
        x = torch.randn(shape)
        tiles, side = layer.tiles.clone(), layer.side.clone()
        for given in (x, x, 2 * x, x[:1], x.bfloat16(), x.double()):
            found, wanted = both(given, tiles, side)
            torch.testing.assert_close(found, wanted, rtol=1e-2 if given.dtype == torch.bfloat16 else 1e-5, atol=1e-2)
        before, _ = both(x, tiles, side)
        tiles.copy_(other.tiles)
        found, wanted = both(x, tiles, side)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
        assert not torch.equal(found, before), round_
        with pytest.raises((ConfigError, FormatError, RuntimeError)):
            both(x, tiles[..., :-1].contiguous() if tiles.dim() > 1 else tiles[:-1], side)
        with pytest.raises((ConfigError, FormatError, RuntimeError)):
            both(x, tiles, side[:-1])
