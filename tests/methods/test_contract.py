"""What every method keeps, the library's, a user's, and parts that this suite makes itself (``own_parts``).

Training's forward = evaluation = packed on every geometry, dtype and memory format; two values per output channel and per
sample; sign(0) = +1; gradients everywhere; copies, pickles, state_dict, autocast and torch.compile.
"""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from own_parts import register
from torch import Tensor, nn
from torch._ops import HigherOrderOperator

import bidensify as bd
from bidensify.deploy import available_kernels
from bidensify.deploy.freeze import freeze
from bidensify.errors import PackError
from bidensify.methods import LayerSpec, get_method
from bidensify.nn import BatchNormLast, BinaryLayer, Bypass, make_binary, set_progress

METHODS = [*register(), *bd.available_methods()]
METHODS = list(dict.fromkeys(METHODS))
TWO_BITS = ", 2 bits"
METHODS += [name + TWO_BITS for name in METHODS if 2 in get_method(name).act_bits]

GEOMETRIES: dict[str, tuple[Any, tuple[int, ...]]] = {
    "3x3": (lambda: nn.Conv2d(16, 16, 3, padding=1, bias=False), (2, 16, 9, 7)),
    "3x3 with bias, up": (lambda: nn.Conv2d(20, 48, 3, padding=1), (2, 20, 6, 11)),
    "1x1 down": (lambda: nn.Conv2d(70, 24, 1), (1, 70, 8, 8)),
    "strided": (lambda: nn.Conv2d(32, 40, 3, 2, 1), (2, 32, 9, 12)),
    "dilated": (lambda: nn.Conv2d(16, 16, 3, padding=2, dilation=2), (1, 16, 10, 9)),
    "valid 5x3": (lambda: nn.Conv2d(8, 12, (5, 3)), (1, 8, 9, 9)),
    "same, even": (lambda: nn.Conv2d(16, 8, 4, padding="same"), (1, 16, 7, 8)),
    "groups": (lambda: nn.Conv2d(36, 72, 3, padding=1, groups=3), (2, 36, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(40, 40, 3, padding=1, groups=40), (2, 40, 9, 9)),
    "depthwise 1x1": (lambda: nn.Conv2d(33, 33, 1, groups=33), (1, 33, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(24, 16, 2, 2), (2, 24, 5, 6)),
    "transposed, groups": (lambda: nn.ConvTranspose2d(24, 32, 3, 2, 1, 1, groups=2), (1, 24, 5, 4)),
    "linear": (lambda: nn.Linear(40, 56), (2, 13, 40)),
    "linear, qkv": (lambda: nn.Linear(24, 72), (2, 5, 24)),
}


def layer_of(method: str, geometry: str, *, seed: int = 0) -> BinaryLayer:
    """A binary layer as the method has it, with a norm of random statistics where the method has one; evaluation mode."""
    torch.manual_seed(seed)
    base: Any = GEOMETRIES[geometry][0]()
    linear = isinstance(base, nn.Linear)
    transposed = isinstance(base, nn.ConvTranspose2d)
    cin, cout = (base.in_features, base.out_features) if linear else (base.in_channels, base.out_channels)
    with torch.no_grad():
        # Off centre, so that centring and offsets show.
        base.weight.add_(base.weight.std() * 0.3)
    dim = -1 if linear else 1
    kind = "linear" if linear else "conv_transpose2d" if transposed else "conv2d"
    bits = 2 if method.endswith(TWO_BITS) else 1
    method = method.removesuffix(TWO_BITS)
    sizes = {} if linear else {"kernel_size": base.kernel_size, "stride": base.stride, "dilation": base.dilation}
    spec = LayerSpec(kind, cin, cout, 1 if linear else base.groups, dim, **sizes, weight=base.weight.detach())
    found = get_method(method)
    parts = found.parts(spec, bd.BidensifyConfig(method=method, act_bits=bits))
    assert parts.binarizer.planes == bits
    norm: Any = None
    if found.norm == "after":
        norm = BatchNormLast(cout) if linear else nn.BatchNorm2d(cout)
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 4)
    bypass = None
    if found.has_bypass(spec):
        geometry_of = () if linear else (base.kernel_size, base.stride, base.padding, base.dilation)
        bypass = Bypass(cin, cout, *geometry_of, transposed=transposed, dim=dim)
    activation = None if found.activation is None else found.activation(cout, dim)
    base.__class__ = make_binary(type(base))
    base.install(
        binarizer=parts.binarizer, weight_binarizer=parts.weight_binarizer, norm=norm, bypass=bypass, activation=activation,
        method=method, activation_first=found.activation_first,
    )  # fmt: skip
    with torch.no_grad():
        for parameter in [*base.binarizer.parameters(), *base.activation.parameters()]:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    made: BinaryLayer = base.eval()
    return made


def input_of(geometry: str, dtype: torch.dtype = torch.float32, *, last: bool = False) -> Tensor:
    x = torch.randn(GEOMETRIES[geometry][1], generator=torch.Generator().manual_seed(1)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if last and x.dim() == 4 else x


def of_codes(layer: BinaryLayer, x: Tensor) -> Tensor:
    """What the binarizer's codes and flips say that it gives."""
    threshold, low, high = layer.binarizer.codes(x)
    flips = layer.binarizer.flips()
    first = x >= threshold
    if layer.binarizer.planes == 2:
        half = (high - low) / 2
        second = x >= torch.where(first, threshold + half, threshold - half)
        low, high = low + torch.where(second, half, -half) / 2, high + torch.where(second, half, -half) / 2
    values = torch.where(first, high, low).expand_as(x)
    return values if flips is None else values * layer.binarizer._shaped(flips, x)


def is_packable(layer: BinaryLayer) -> bool:
    return layer.binarizer.packable and layer.weight_binarizer.packable


each_method = pytest.mark.parametrize("method", METHODS)
each_geometry = pytest.mark.parametrize("geometry", list(GEOMETRIES))


@each_method
@each_geometry
def test_training_evaluation_and_packed_agree(method: str, geometry: str) -> None:
    layer = layer_of(method, geometry)
    for last in (False, True):
        x = input_of(geometry, last=last)
        trained = layer(x.clone().requires_grad_())
        assert trained.requires_grad
        with torch.no_grad():
            evaluated = layer(x)
        torch.testing.assert_close(evaluated, trained.detach(), rtol=1e-4, atol=1e-4)
        if not is_packable(layer):
            reason = layer.binarizer.unpackable_reason or layer.weight_binarizer.unpackable_reason
            assert len(reason) > 20
            with pytest.raises(PackError):
                freeze(layer)
            continue
        for kernel in available_kernels():
            packed = freeze(layer, kernel)
            assert torch.equal(packed(x), evaluated), kernel


@each_method
@pytest.mark.parametrize("geometry", ["3x3", "strided", "depthwise", "transposed", "linear"])
def test_half_precision_evaluates_as_it_packs(method: str, geometry: str) -> None:
    layer = layer_of(method, geometry)
    if not is_packable(layer):
        pytest.skip("it says why it does not pack")
    for dtype in (torch.bfloat16, torch.float16):
        x = input_of(geometry, dtype, last=True)
        with torch.no_grad():
            want = layer.to(dtype)(x)
            packed = freeze(layer)
            assert want.dtype == dtype
            assert torch.equal(packed(x), want)
        layer = layer_of(method, geometry)


@each_method
@pytest.mark.parametrize("geometry", ["3x3", "groups", "transposed, groups", "depthwise 1x1", "linear"])
def test_two_values_per_output_channel_and_per_sample(method: str, geometry: str) -> None:
    layer = layer_of(method, geometry)
    rows = layer.weight_binarizer.rows(layer.weight.detach())
    for row in rows:
        values = row.unique()
        apart = values[values - values.min() > 1e-5 * values.abs().max()]
        assert len(apart) == 0 or float(apart.max() - apart.min()) <= 1e-5 * float(values.abs().max())
        assert bool(torch.isfinite(row).all())
        assert float(row.abs().max()) > 0
    signs, scale, offset = layer.binary_weight()
    assert set(signs.unique().tolist()) <= {-1.0, 1.0}
    like = layer.weight_binarizer.like
    again = like(scale, signs) * signs + (0 if offset is None else like(offset, signs))
    torch.testing.assert_close(again, layer.weight.detach(), rtol=1e-4, atol=1e-5)
    if layer.binarizer.packable:
        x = input_of(geometry)
        torch.testing.assert_close(layer.binarizer(x), of_codes(layer, x))


@each_method
def test_a_value_on_the_threshold_is_the_high_one(method: str) -> None:
    layer = layer_of(method, "3x3")
    if not layer.binarizer.packable:
        pytest.skip("it says no codes")
    x = input_of("3x3")
    for _ in range(2):
        # Statistics move with what is put on the threshold; a constant input's threshold may be itself.
        threshold = layer.binarizer.codes(x)[0]
        on = threshold.expand_as(x)
        if torch.equal(layer.binarizer.codes(on.contiguous())[0].expand_as(x), on):
            assert torch.equal(layer.binarizer(on.contiguous()), of_codes(layer, on.contiguous()))
            return
    with torch.no_grad():
        zero = torch.zeros_like(x)
        assert torch.equal(layer.binarizer(zero), of_codes(layer, zero))


@each_method
@each_geometry
def test_gradients_reach_every_parameter(method: str, geometry: str) -> None:
    layer = layer_of(method, geometry).train()
    set_progress(layer, 0.5)
    for _ in range(2):
        x = (input_of(geometry) * 0.5).requires_grad_()
        y = layer(x)
        (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    assert x.grad is not None
    assert bool(torch.isfinite(x.grad).all())
    assert float(x.grad.abs().sum()) > 0
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert bool(torch.isfinite(parameter.grad).all()), name
    assert float(layer.latent_weight.grad.abs().sum()) > 0


@each_method
def test_progress_changes_gradients_and_never_the_output(method: str) -> None:
    layer = layer_of(method, "3x3")
    x = input_of("3x3")
    results = []
    for fraction in (0.0, 1.0):
        set_progress(layer, fraction)
        layer.zero_grad()
        y = layer(x.clone().requires_grad_())
        y.sum().backward()
        results.append((y.detach(), layer.latent_weight.grad.clone()))
    assert torch.equal(results[0][0], results[1][0])
    if layer.weight_binarizer.ste.name == "tanh":
        assert not torch.allclose(results[0][1], results[1][1])


@each_method
@pytest.mark.parametrize("geometry", ["3x3", "transposed", "linear"])
def test_copies_pickles_and_states(method: str, geometry: str) -> None:
    layer, x = layer_of(method, geometry), input_of(geometry)
    if any("<locals>" in type(module).__qualname__ for module in layer.modules()):
        pytest.skip("its parts are local classes")
    other = layer_of(method, geometry, seed=5)
    other.load_state_dict(layer.state_dict())
    with torch.no_grad():
        want = layer(x)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), other):
            assert torch.equal(twin(x), want)
            assert list(twin.state_dict()) == list(layer.state_dict())


@each_method
def test_autocast_and_compile(method: str) -> None:
    layer, x = layer_of(method, "3x3"), input_of("3x3")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x.clone().requires_grad_())
        y.float().sum().backward()
    assert bool(torch.isfinite(layer.latent_weight.grad).all())
    trained = layer(x.clone().requires_grad_()).detach()
    # Each method is another graph of the same forward.
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x.clone().requires_grad_()).detach(), trained, rtol=1e-4, atol=1e-4)


@each_method
def test_exported_graphs_have_no_regions_without_gradients(method: str) -> None:
    """torch.export splits a graph at each of them and traces all of it again: an hour for a network of 300 layers."""
    layer, x = layer_of(method, "3x3"), torch.randn(2, 16, 9, 7)
    program = torch.export.export(layer, (x,))
    assert [node.name for node in program.graph.nodes if isinstance(node.target, HigherOrderOperator)] == []
    torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-4)


@each_method
def test_packed_layers_keep_their_file(method: str, tmp_path: Any) -> None:
    layer, x = layer_of(method, "3x3"), input_of("3x3")
    if not is_packable(layer):
        pytest.skip("it says why it does not pack")
    from bidensify.deploy import read_packed, write_packed
    from bidensify.deploy.freeze import empty_from_meta

    packed = nn.Sequential(freeze(layer))
    write_packed(tmp_path, packed)
    header, tensors = read_packed(tmp_path)
    again = nn.Sequential(empty_from_meta(header["layers"]["0"], layer)).eval()
    again.load_state_dict(tensors)
    with torch.no_grad():
        assert torch.equal(again(x), packed(x))
