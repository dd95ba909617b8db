"""Each method's forward and both gradients in float64, against the equations written out once more.

Here a surrogate is added and taken away again (``ste``), a channel's weights are cut out one by one, and nothing of the library
is called but the parts under test.
"""

from __future__ import annotations

from collections.abc import Callable
from math import e, exp, log, sqrt

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import bidensify as bd
from bidensify.methods import LayerParts, LayerSpec, get_method
from bidensify.nn import set_progress

CONVOLUTIONAL = [
    "adabin", "bidense", "bidense-cfb", "bidense-dab", "bireal", "bisrnet", "bnn", "dorefa", "insta", "irnet", "react", "recu",
    "xnor",
]  # fmt: skip
LINEAR = ["bibert", "bit", "bivit"]


def test_every_method_is_here() -> None:
    assert sorted([*CONVOLUTIONAL, *LINEAR]) == [name for name in bd.available_methods() if not name.startswith("own-")]


def ste(value: Tensor, through: Tensor) -> Tensor:
    return (value - through).detach() + through


def sgn(u: Tensor) -> Tensor:
    return torch.where(u >= 0, 1.0, -1.0).to(u)


def clip(u: Tensor) -> Tensor:
    return ste(sgn(u), u.clamp(-1, 1))


def strict(u: Tensor) -> Tensor:
    return ste(sgn(u), torch.where(u.abs() < 1, u, u.detach()))


def poly(u: Tensor) -> Tensor:
    middle = torch.where(u < 0, u * u + 2 * u, 2 * u - u * u)
    return ste(sgn(u), torch.where(u.abs() < 1, middle, u.detach()))


def decay(u: Tensor, p: float) -> Tensor:
    t = 10 ** (-3 + 4 * p)
    return ste(sgn(u), max(1 / t, 1) * torch.tanh(t * u))


# -- weights: of a list of what feeds each output channel, (C_in / groups, kh, kw) each ----------------------------------


def scaled(u: Tensor, size: Tensor, sign: Callable[[Tensor], Tensor]) -> Tensor:
    """size * sign(u), gradient unscaled."""
    return ste(size * sgn(u), sign(u))


def centred(w: Tensor) -> Tensor:
    return w - w.mean() if w.numel() > 1 else w


def weights_bidense(rows: list[Tensor], parts: LayerParts, p: float) -> list[Tensor]:
    return [w.abs().mean().detach() * clip(w) for w in rows]


def weights_bnn(rows: list[Tensor], parts: LayerParts, p: float) -> list[Tensor]:
    return [clip(w) for w in rows]


def weights_bireal(rows: list[Tensor], parts: LayerParts, p: float) -> list[Tensor]:
    return [scaled(w, w.abs().mean(), clip) for w in rows]


def weights_dorefa(rows: list[Tensor], parts: LayerParts, p: float) -> list[Tensor]:
    size = torch.stack(rows).abs().mean()
    return [ste(size * sgn(w), w) for w in rows]


def weights_xnor(rows: list[Tensor], parts: LayerParts, p: float) -> list[Tensor]:
    out = []
    for w in rows:
        c = (w - w.mean(0, keepdim=True) if len(w) > 1 else w).detach().clamp(-1, 1)
        size = c.abs().mean()
        slope = torch.where(c.abs() < 1, size, torch.zeros_like(c)) + 1 / c.numel()
        out.append(ste(size * sgn(c), slope * w))
    return out


def weights_irnet(rows: list[Tensor], parts: LayerParts, p: float) -> list[Tensor]:
    out = []
    for w in rows:
        v = (w - w.mean()) / w.std() if w.numel() > 1 else w
        out.append(2.0 ** torch.round(torch.log(v.abs().mean()) / log(2)).detach() * decay(v, p))
    return out


def weights_adabin(rows: list[Tensor], parts: LayerParts, p: float) -> list[Tensor]:
    out = []
    for w in rows:
        if w.numel() == 1:
            out.append(w.abs() * decay(w, p))
            continue
        beta = w.mean()
        alpha = torch.sqrt(((w - beta) ** 2).sum() / w.numel())
        out.append(alpha * decay((w - beta) / alpha, p) + beta)
    return out


def weights_recu(rows: list[Tensor], parts: LayerParts, p: float) -> list[Tensor]:
    standard = []
    for w in rows:
        spread = (w - w.mean()).var() if w.numel() > 1 else torch.ones_like(w.sum())
        standard.append(centred(w) / (torch.sqrt(spread + 1e-5) / 2 / sqrt(2)))
    tau = 0.14 / (e - 1) * exp(p) + 0.85 - 0.14 / (e - 1)
    bound = -float(torch.stack(standard).detach().abs().mean()) * log(2 - 2 * tau)
    alpha = parts.weight_binarizer.alpha
    return [a * ste(sgn(v), v.clamp(-bound, bound)) for a, v in zip(alpha, standard, strict=True)]


def weights_bibert(rows: list[Tensor], parts: LayerParts, p: float) -> list[Tensor]:
    return [scaled(centred(w), w.abs().mean(), clip) for w in rows]


def weights_bit(rows: list[Tensor], parts: LayerParts, p: float) -> list[Tensor]:
    every = torch.stack(rows)
    middle = every.mean() if every.numel() > 1 else 0
    return [ste(every.abs().mean() * sgn(w - middle), w) for w in rows]


def weights_bivit(rows: list[Tensor], parts: LayerParts, p: float) -> list[Tensor]:
    alpha = getattr(parts.weight_binarizer, "alpha", None)
    sizes = [w.abs().mean().detach() for w in rows] if alpha is None else alpha
    return [size * strict(centred(w)) for size, w in zip(sizes, rows, strict=True)]


WEIGHTS = {
    "adabin": weights_adabin, "bidense": weights_bidense, "bidense-cfb": weights_bidense, "bidense-dab": weights_bidense,
    "bireal": weights_bireal, "bisrnet": weights_bireal, "bnn": weights_bnn, "dorefa": weights_dorefa,
    "insta": weights_bireal, "irnet": weights_irnet, "react": weights_bireal, "recu": weights_recu, "xnor": weights_xnor,
    "bibert": weights_bibert, "bit": weights_bit, "bivit": weights_bivit,
}  # fmt: skip


# -- activations: x is (N, C, P), parameters (C, 1) -----------------------------------------------------------------------


def acts_bidense(x: Tensor, part: torch.nn.Module, p: float) -> Tensor:
    k, b = part.k.reshape(-1, 1), part.b.reshape(-1, 1)
    beta = k * x.detach().mean(2, keepdim=True) + b
    away = (x - beta).detach().abs().mean((1, 2), keepdim=True)
    return torch.exp(part.a * (away - 1)) * poly(x - beta)


def acts_react(x: Tensor, part: torch.nn.Module, p: float) -> Tensor:
    return poly(x + part.b[:, None])


def acts_adabin(x: Tensor, part: torch.nn.Module, p: float) -> Tensor:
    return part.alpha * (poly((x - part.beta) / part.alpha) + part.beta)


def acts_bisrnet(x: Tensor, part: torch.nn.Module, p: float) -> Tensor:
    u = part.k[:, None] * x + part.b[:, None]
    return ste(sgn(u), torch.tanh(part.beta * u))


def acts_insta(x: Tensor, part: torch.nn.Module, p: float) -> Tensor:
    first, third = x.mean(2, keepdim=True), (x * x * x).mean(2, keepdim=True)
    return poly(x - (part.alpha[:, None] * first + part.beta[:, None] * third + part.b[:, None]))


def acts_dorefa(x: Tensor, part: torch.nn.Module, p: float) -> Tensor:
    return ste(torch.round(x.clamp(0, 1)), x.clamp(0, 1))


def acts_recu(x: Tensor, part: torch.nn.Module, p: float) -> Tensor:
    spread = x.var((1, 2), keepdim=True) if x[0].numel() > 1 else 1 - 1e-5
    return poly(x / (spread + 1e-5) ** 0.5)


def acts_xnor(x: Tensor, part: torch.nn.Module, p: float) -> Tensor:
    mean = x.mean((0, 2), keepdim=True)
    u = (x - mean) / torch.sqrt(((x - mean) ** 2).mean((0, 2), keepdim=True) + 1e-5)
    return strict(part.norm.weight[:, None] * u + part.norm.bias[:, None])


def acts_bit(x: Tensor, part: torch.nn.Module, p: float) -> Tensor:
    u, alpha = x + part.b[:, None], part.alpha
    share = alpha / sqrt(x.numel())
    if not part.nonnegative:
        bound = float(alpha.detach())
        return ste(bound * sgn(u), u.clamp(-bound, bound) + sgn(u.detach()) * share)
    q = (u / alpha).detach()
    slope = torch.where(q > 1, 1.0, torch.where(q < 0, 0.0, torch.round(q) - q))
    bound = float(alpha.detach())
    return ste(bound * torch.round(q.clamp(0, 1)), u.clamp(0, bound) + slope * share)


ACTIVATIONS: dict[str, Callable[[Tensor, torch.nn.Module, float], Tensor]] = {
    "adabin": acts_adabin, "bidense": acts_bidense, "bidense-cfb": acts_react, "bidense-dab": acts_bidense,
    "bireal": lambda x, part, p: poly(x), "bisrnet": acts_bisrnet, "bnn": lambda x, part, p: clip(x), "dorefa": acts_dorefa,
    "insta": acts_insta, "irnet": lambda x, part, p: decay(x, p), "react": acts_react, "recu": acts_recu, "xnor": acts_xnor,
    "bibert": lambda x, part, p: clip(x), "bit": acts_bit, "bivit": lambda x, part, p: strict(x),
}  # fmt: skip


def channels_of(weight: Tensor, spec: LayerSpec) -> list[Tensor]:
    """What feeds each output channel, cut out of ``weight``."""
    if not spec.transposed:
        return list(weight)
    per_group = spec.out_channels // spec.groups
    size = spec.in_channels // spec.groups
    return [weight[g * size : (g + 1) * size, j] for g in range(spec.groups) for j in range(per_group)]


@st.composite
def layers(draw: st.DrawFn, kinds: tuple[str, ...]) -> tuple[LayerSpec, int]:
    kind = draw(st.sampled_from(kinds))
    cin, cout = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    groups = 1 if kind == "linear" else draw(st.integers(1, 3))
    kernel = (1, 1) if kind == "linear" else (draw(st.integers(1, 3)), draw(st.integers(1, 3)))
    dim = -1 if kind == "linear" else 1
    seed = draw(st.integers(0, 2**20))
    nonnegative = draw(st.booleans())
    return LayerSpec(kind, cin * groups, cout * groups, groups, dim, kernel, nonnegative=nonnegative), seed


def weight_of(spec: LayerSpec) -> Tensor:
    per_group = spec.in_channels // spec.groups
    if spec.kind == "linear":
        shape: tuple[int, ...] = (spec.out_channels, spec.in_channels)
    elif spec.transposed:
        shape = (spec.in_channels, spec.out_channels // spec.groups, *spec.kernel_size)
    else:
        shape = (spec.out_channels, per_group, *spec.kernel_size)
    # Some beyond 1, and off centre.
    return torch.randn(shape, dtype=torch.float64) * 0.8 + 0.2


def made(method: str, spec: LayerSpec, progress: float) -> LayerParts:
    parts = get_method(method).parts(spec, bd.BidensifyConfig(method=method))
    for part in (parts.binarizer, parts.weight_binarizer):
        part.double().train()
        set_progress(part, progress)
        with torch.no_grad():
            for parameter in part.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.4)
    if method == "bit":
        # Its step is positive: the part takes no smaller one than a floor.
        parts.binarizer.alpha.data.abs_().add_(1e-3)
    return parts


def gradients(loss: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(loss, tensors, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(tensors, found, strict=True)]


def check(method: str, spec: LayerSpec, seed: int, progress: float) -> None:
    torch.manual_seed(seed)
    parts = made(method, spec, progress)

    weight = weight_of(spec).requires_grad_()
    grad = torch.randn_like(weight)
    learned = [weight, *parts.weight_binarizer.parameters()]
    got = parts.weight_binarizer(weight)
    rows = [w.reshape(spec.in_channels // spec.groups, -1) for w in channels_of(weight, spec)]
    want = WEIGHTS[method](rows, parts, progress)
    for row, mine in zip(want, channels_of(got, spec), strict=True):
        torch.testing.assert_close(mine.detach().flatten(), row.detach().flatten(), rtol=1e-10, atol=1e-12)
        assert mine.unique().numel() <= 2
    loss = sum((row.flatten() * g.flatten()).sum() for row, g in zip(want, channels_of(grad, spec), strict=True))
    for mine, theirs in zip(gradients((got * grad).sum(), learned), gradients(loss, learned), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)

    tokens = spec.kind == "linear"
    shape = (3, 4, spec.in_channels) if tokens else (3, spec.in_channels, 2, 3)
    x = (torch.randn(shape, dtype=torch.float64) * 0.9 + 0.1).requires_grad_()
    learned = [x, *parts.binarizer.parameters()]
    grad = torch.randn_like(x)
    got = parts.binarizer(x)
    flat = (lambda t: t.movedim(-1, 1)) if tokens else (lambda t: t.flatten(2))
    want = ACTIVATIONS[method](flat(x), parts.binarizer, progress)
    torch.testing.assert_close(flat(got.detach()), want.detach(), rtol=1e-10, atol=1e-12)
    pairs = zip(gradients((got * grad).sum(), learned), gradients((want * flat(grad)).sum(), learned), strict=True)
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", CONVOLUTIONAL)
@settings(max_examples=25, deadline=None)
@given(layer=layers(("conv2d", "conv_transpose2d", "linear")), progress=st.sampled_from([0.0, 0.4, 0.8, 1.0]))
def test_of_convolutions(method: str, layer: tuple[LayerSpec, int], progress: float) -> None:
    # Of two weights mean |v| is 2^-0.5, halfway between two powers of two.
    assume(method != "irnet" or layer[0].fan_in != 2)
    check(method, *layer, progress)


@pytest.mark.parametrize("method", LINEAR)
@settings(max_examples=40, deadline=None)
@given(layer=layers(("linear",)), progress=st.sampled_from([0.0, 1.0]))
def test_of_linear_layers(method: str, layer: tuple[LayerSpec, int], progress: float) -> None:
    check(method, *layer, progress)
