"""Training kernels against the same modules computed in torch operations, and in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from bidensify.kernels import autograd, dense
from bidensify.kernels import training_ops as ops
from bidensify.kernels.library import call
from bidensify.nn import (
    BatchNormLast,
    BiDenseConv2d,
    BiDenseLinear,
    Bypass,
    DistributionAdaptiveBinarizer,
    RPReLU,
    WeightBinarizer,
    make_binary,
)

pytestmark = pytest.mark.skipif(not dense.available(), reason="the training kernels are not built (or switched off)")
FORMATS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def reference(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Calls a function with the kernels out of reach."""

    def run(function: Any, *args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(dense, "available", lambda: False)
            return function(*args)

    return run


def shake(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return module


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float) -> None:
    """Relative to the largest value, in float64."""
    got, want = got.detach().double(), want.detach().double()
    scale = float(want.abs().max()) + 1e-6
    torch.testing.assert_close(got / scale, want / scale, rtol=0, atol=tolerance)


shapes = st.tuples(st.integers(1, 4), st.integers(1, 70), st.integers(1, 40), st.integers(1, 40))


@settings(max_examples=60, deadline=None)
@given(
    shape=shapes,
    last=st.booleans(),
    scale=st.sampled_from(list(ops.SCALES)),
    planes=st.sampled_from([1, 2]),
    data=st.data(),
)
def test_dab(shape: tuple[int, ...], last: bool, scale: str, planes: int, data: st.DataObject) -> None:
    """Values, the bypass's input and every gradient; float64 in torch operations is the reference."""
    channels = shape[1]
    groups = data.draw(st.integers(0, channels))
    layer: Any = shake(DistributionAdaptiveBinarizer(channels, scale, planes=planes), seed=channels)
    twin = copy.deepcopy(layer).double()
    x = torch.randn(shape).contiguous(memory_format=FORMATS[last])

    def nearest(x: torch.Tensor) -> torch.Tensor:
        """How far each value is from where something changes."""
        beta, _, step = twin.codes(x.double())
        edges = [beta + k * step for k in ((0,) if planes == 1 else (-2, -1, 0, 1, 2))]
        return torch.stack([(x - edge).abs().expand_as(x) for edge in edges]).amin(0)

    # Away from the thresholds, where float32 and float64 fall on different sides.
    for _ in range(3):
        x = torch.where(nearest(x) < 1e-4, x + 1e-3, x).float().contiguous(memory_format=FORMATS[last])
    assume(float(nearest(x).min()) > 1e-5)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    y, passed, _ = layer._dab(leaf, groups)
    theirs = twin(wide)
    close(y, theirs, 1e-5)
    grad_y, loss_wide = torch.randn_like(y), 0
    loss = (y * grad_y).sum()
    loss_wide = (theirs * grad_y.double()).sum()
    if groups:
        side = Bypass(channels, groups, dim=1)(wide)
        close(passed, side, 1e-5)
        grad_side = torch.randn_like(passed)
        loss = loss + (passed * grad_side).sum()
        loss_wide = loss_wide + (side * grad_side.double()).sum()
    loss.backward()
    loss_wide.backward()
    assert leaf.grad is not None
    assert wide.grad is not None
    assert leaf.grad.stride() == leaf.stride()
    close(leaf.grad, wide.grad, 1e-5)
    close(layer.k.grad, twin.k.grad, 3e-4)
    close(layer.b.grad, twin.b.grad, 3e-4)
    if scale != "none":
        torch.testing.assert_close(layer.a.grad.double(), twin.a.grad, rtol=1e-3, atol=1e-3 * x.numel() ** 0.5)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, last=st.booleans(), norm=st.booleans(), bypass=st.booleans(), act=st.booleans())
def test_post(shape: tuple[int, ...], last: bool, norm: bool, bypass: bool, act: bool) -> None:
    n, channels, h, w = shape
    if not (norm or act) or (norm and n * h * w < 3):
        return
    batch_norm: Any = shake(nn.BatchNorm2d(channels), seed=1) if norm else None
    activation: Any = shake(RPReLU(channels), seed=2) if act else None
    wide_norm, wide_act = copy.deepcopy(batch_norm), copy.deepcopy(activation)
    x = (torch.randn(shape) * 2 + 5).contiguous(memory_format=FORMATS[last])
    side = torch.randn(shape).contiguous(memory_format=FORMATS[last]) if bypass else None
    leaves = [t.clone().requires_grad_() for t in (x, side) if t is not None]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    y = autograd.post(leaves[0], leaves[1] if bypass else None, batch_norm, activation and activation.fused(), 1)
    theirs = wide_norm.double()(wide[0]) if norm else wide[0]
    theirs = theirs + wide[1] if bypass else theirs
    theirs = wide_act.double()(theirs) if act else theirs
    close(y, theirs, 2e-5)
    upstream = torch.randn_like(y)
    (y * upstream).sum().backward()
    (theirs * upstream.double()).sum().backward()
    for got, want in zip(leaves, wide):
        assert got.grad is not None
        assert want.grad is not None
        close(got.grad, want.grad, 2e-4)
    for module, twin in ((batch_norm, wide_norm), (activation, wide_act)):
        if module is not None:
            for got, want in zip(module.parameters(), twin.parameters()):
                torch.testing.assert_close(got.grad.double(), want.grad, rtol=1e-3, atol=1e-4 * x.numel() ** 0.5)
    if norm:
        torch.testing.assert_close(batch_norm.running_mean.double(), wide_norm.running_mean, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(batch_norm.running_var.double(), wide_norm.running_var, rtol=1e-4, atol=1e-5)
        assert batch_norm.num_batches_tracked == 1


@pytest.mark.parametrize("name", dense.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMATS)
def test_instruction_sets(name: str, dtype: torch.dtype, form: torch.memory_format, reference: Any) -> None:
    torch.manual_seed(0)
    before = dense.instruction_set()
    tolerance = 2e-3 if dtype == torch.float32 else 5e-2
    try:
        dense.use(name)
        for channels in (1, 7, 16, 32, 64, 100):
            x = (torch.randn(3, channels, 13, 21) * 2).to(dtype).contiguous(memory_format=form)
            # In bfloat16 operations x + bias_in is rounded and may change sides; float64 says which side is right.
            activation = shake(RPReLU(channels))
            twin = copy.deepcopy(activation).double()
            for got, want in zip(gradients(activation, x), gradients(twin, x.double())):
                close(got, want, tolerance)
            layer: Any = shake(DistributionAdaptiveBinarizer(channels))
            leaf = x.clone().requires_grad_()
            ours = layer(leaf)
            theirs = copy.deepcopy(layer).double()(x.double()) if dtype == torch.float32 else reference(layer, x)
            assert (ours.sign() == theirs.sign()).float().mean() > 0.999
            close(ours.abs(), theirs.abs(), tolerance)
            again = ops.dab_again(x, layer._dab(x, 0)[2], 0, 1)
            assert torch.equal(again, ours)
    finally:
        dense.use(before)


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match="instruction set 'mmx' is not among"):
        dense.use("mmx")


def test_moments_of_a_large_mean() -> None:
    x = torch.randn(4, 5, 64, 64) + 1000
    for form in FORMATS:
        mean, variance = ops.moments(x.contiguous(memory_format=form), 1)
        torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-6, atol=1e-4)
        torch.testing.assert_close(variance.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (1, 5, 1, 1), (33, 64, 3, 3), (16, 700, 1, 1)])
@pytest.mark.parametrize("scaled", [True, False])
def test_weights(shape: tuple[int, ...], form: torch.memory_format, scaled: bool, reference: Any) -> None:
    weight = (torch.randn(shape) * 0.8).contiguous(memory_format=form).requires_grad_()
    binarizer = WeightBinarizer(scaled=scaled)
    ours, theirs = binarizer(weight), reference(binarizer, weight)
    torch.testing.assert_close(ours, theirs)
    assert ours.stride() == weight.stride()
    upstream = torch.randn(shape)
    (got,) = torch.autograd.grad((ours * upstream).sum(), weight)
    (want,) = torch.autograd.grad((theirs * upstream).sum(), weight)
    torch.testing.assert_close(got, want)


def gradients(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    layer.zero_grad()
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    generator = torch.Generator().manual_seed(5)
    (y * torch.randn(y.shape, generator=generator).to(y.dtype)).sum().backward()
    assert leaf.grad is not None
    return [y, leaf.grad, *(p.grad for p in layer.parameters() if p.requires_grad), *layer.buffers()]


def same(layer: nn.Module, x: torch.Tensor, reference: Any, tolerance: float = 2e-3) -> None:
    twin = copy.deepcopy(layer)
    for got, want in zip(gradients(layer, x), reference(gradients, twin, x)):
        if got.numel() == 1:
            # A scalar is what is left of a sum over everything: the rounding of its terms shows.
            torch.testing.assert_close(got, want, rtol=tolerance, atol=1e-3 * x.numel() ** 0.5)
        else:
            close(got, want, tolerance)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("act_scale", ["per_tensor", "per_channel", "none"])
@pytest.mark.parametrize("act_bits", [1, 2])
def test_whole_layers(form: torch.memory_format, act_scale: str, act_bits: int, reference: Any) -> None:
    torch.manual_seed(0)
    for sizes in ((16, 16), (16, 40), (48, 16), (33, 7)):
        for stride in (1, 2):
            layer = shake(BiDenseConv2d(*sizes, 3, stride, 1, act_scale=act_scale, act_bits=act_bits))
            layer = layer.to(memory_format=form)
            # A popcount is exact where the convolution rounds: a value at an activation's kink may lie on its other side.
            same(layer, torch.randn(2, sizes[0], 14, 18).contiguous(memory_format=form), reference, tolerance=4e-3)


@pytest.mark.parametrize("sizes", [(16, 16), (12, 40), (48, 16)])
def test_linear(sizes: tuple[int, int], reference: Any) -> None:
    torch.manual_seed(0)
    layer: Any = shake(BiDenseLinear(*sizes))
    assert type(layer.norm) is BatchNormLast
    same(layer, torch.randn(3, 5, 7, sizes[0]), reference)


def test_inputs_that_are_not_dense(reference: Any) -> None:
    torch.manual_seed(0)
    layer = shake(BiDenseConv2d(6, 6, 3, padding=1))
    same(layer, torch.randn(2, 9, 8, 10)[:, 2:8], reference)
    same(layer, torch.randn(2, 6, 8, 20)[..., ::2], reference)
    same(layer, torch.randn(1, 6, 8, 10).expand(3, -1, -1, -1), reference)
    y = layer(torch.randn(2, 6, 8, 10, requires_grad=True))
    y.sum().backward()  # its gradient is an expanded scalar


def test_a_tensor_used_twice(reference: Any) -> None:
    """The input feeds the layer and something else; the layer's output too."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = shake(BiDenseConv2d(8, 8, 3, padding=1))
            self.b = shake(BiDenseConv2d(8, 8, 3, padding=1), seed=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            return self.b(y) * y + x + self.a(y)

    torch.manual_seed(0)
    same(Net(), torch.randn(2, 8, 12, 12), reference, tolerance=5e-3)


class Residual(nn.Conv2d):
    """Hands its input's gradient on to two consumers: it must not be overwritten for either."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + x + 0 * self.weight.sum()


def test_a_forward_that_uses_its_input_twice(reference: Any) -> None:
    torch.manual_seed(0)
    layer: Any = Residual(6, 6, 3, padding=1)
    layer.__class__ = make_binary(Residual)
    layer.install(
        binarizer=DistributionAdaptiveBinarizer(6),
        weight_binarizer=WeightBinarizer(),
        norm=None,
        bypass=None,
        activation=None,
    )
    shake(layer)
    same(layer, torch.randn(2, 6, 9, 9), reference)


def test_backward_twice() -> None:
    layer = shake(BiDenseConv2d(6, 6, 3, padding=1))
    x = torch.randn(2, 6, 9, 9, requires_grad=True)
    loss = layer(x).square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert torch.equal(first, second)


def test_only_two_activations_are_kept() -> None:
    """The layer's input and the convolution's output; neither binarized activations nor binarized weights."""
    layer = BiDenseConv2d(32, 32, 3, padding=1)
    x = torch.randn(2, 32, 40, 40, requires_grad=True)
    kept: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x)
    large = [t for t in kept.values() if t.numel() >= x.numel()]
    assert len(large) == 2
    assert any(t.data_ptr() == x.data_ptr() for t in large)
    assert not any(
        t.shape == layer.latent_weight.shape and t.data_ptr() != layer.latent_weight.data_ptr() for t in large
    )
    y.sum().backward()


def test_evaluation(reference: Any) -> None:
    layer = shake(BiDenseConv2d(16, 16, 3, padding=1))
    x = torch.randn(2, 16, 20, 20)
    layer(x)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), reference(layer, x), rtol=1e-4, atol=1e-4)


def test_modes_see_the_operators() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    names: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        BiDenseConv2d(4, 4, 3, padding=1)(torch.randn(1, 4, 5, 5))
    assert "bidensify.dab.default" in names
    assert "bidensify.post.default" in names


def test_function_modes_still_see_batch_norm() -> None:
    """A mode that takes batch statistics over several processes replaces ``F.batch_norm``."""
    from torch.overrides import TorchFunctionMode

    calls = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is nn.functional.batch_norm:
                calls.append(func)
            return func(*args, **(kwargs or {}))

    layer = shake(BiDenseConv2d(8, 8, 3, padding=1))
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 8, 10, 10)
    with Watch():
        watched = gradients(layer, x)
    assert len(calls) == 1
    for got, want in zip(watched, gradients(twin, x)):
        close(got, want, 2e-3)


def test_checkpointing_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    layer = shake(BiDenseConv2d(8, 12, 3, padding=1))
    layer.norm.momentum = 0.0  # type: ignore[union-attr]
    x = torch.randn(2, 8, 10, 10)
    plain = [t.clone() for t in gradients(layer, x)[:-1]]
    for got, want in zip(gradients(Checkpointed(layer), x)[:-1], plain):
        assert torch.equal(got, want)


def test_export_and_tracing_leave_no_kernel_in_the_graph() -> None:
    layer = shake(BiDenseConv2d(4, 6, 3, padding=1)).eval()
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        y = layer(x)
        exported = torch.export.export(layer, (x,))
        traced = torch.jit.trace(layer, x)
        torch.testing.assert_close(exported.module()(x), y, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(traced(x), y, rtol=1e-4, atol=1e-4)
    assert "bidensify" not in str(exported.graph)
    assert "bidensify::" not in str(traced.inlined_graph)


def test_operators_describe_themselves() -> None:
    x = torch.randn(2, 6, 5, 4)
    k, b, a = torch.randn(6), torch.randn(6), torch.tensor(0.3)
    tests = ["test_schema", "test_faketensor"]
    torch.library.opcheck(ops.dab, (x, k, b, a, 0, 3, 1), test_utils=tests)
    statistics = ops.dab_statistics(x, k, b, a, 1, 1)
    torch.library.opcheck(ops.dab_again, (x, statistics, 1, 1), test_utils=tests)
    torch.library.opcheck(ops.dab_backward, (x, None, x, statistics, 1, 1, torch.empty_like(x)), test_utils=tests)
    torch.library.opcheck(ops.moments, (x, 1), test_utils=tests)
    torch.library.opcheck(ops.post, (x, x, None, None, None, None, k, b, k, 1e-5, 1), test_utils=tests)
    torch.library.opcheck(
        ops.post_backward, (x, x, x, None, None, None, None, k, b, k, 1e-5, 1, True), test_utils=tests
    )
    w = torch.randn(4, 3, 3, 3)
    torch.library.opcheck(ops.weight, (w, True), test_utils=tests)
    torch.library.opcheck(ops.weight_backward, (w, w, torch.ones(4), torch.empty_like(w)), test_utils=tests)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"dense tensors, not shape \(2, 3, 4, 5\)"):
        ops.moments(torch.randn(2, 4, 3, 5).transpose(1, 2), 1)
    with pytest.raises(RuntimeError, match="kernel bdt_weight_forward failed: status 1"):
        call("bdt_weight_forward", 0, 1, 1, 0, 0, 0, 0)
