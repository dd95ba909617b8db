"""Models as people write them: each converts with a plan that is checked, or fails saying what and where.

``student`` computes what a hand-written equivalent of its forward computes from its own layers: activations behind binary
layers inside them, residual adds that the bypasses carry gone, everything else as it was.
"""

from __future__ import annotations

import copy
import pickle
from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import bidensify as bd
from bidensify.errors import PlanError
from bidensify.nn import BinaryLayer, RPReLU, binary_layers
from bidensify.rewrite.plan.entries import LayerPlan

X = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(5))


def convert(model: nn.Module, **options: Any) -> tuple[Any, dict[str, LayerPlan]]:
    student = bd.bidensify(model, **options).eval()
    return student, {layer.path: layer for layer in student.bidensify_plan.layers}


def binary(layers: dict[str, LayerPlan]) -> set[str]:
    return {path for path, layer in layers.items() if layer.action == "binary"}


def same(student: nn.Module, by_hand: Callable[[Any, Tensor], Tensor], x: Tensor = X) -> None:
    with torch.no_grad():
        assert torch.allclose(student(x), by_hand(student, x), atol=1e-5)


class Base(nn.Module):
    """Stem, two layers, head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 2, 1)


def test_functional_convolution() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(8, 8, 3, 3))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.kernel, padding=1)

    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.block(self.a(self.stem(x)))))

    student, layers = convert(Net())
    assert binary(layers) == {"a", "b"}
    assert layers["block:conv2d"].action == "keep"
    assert layers["block:conv2d"].reason == "functional conv2d is out of reach: its weight is not a layer's"
    same(student, lambda s, x: s.head(s.b(F.conv2d(s.a(s.stem(x)), s.block.kernel, padding=1))))


def test_functional_activations() -> None:
    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            x = torch.relu(self.a(x))
            x = self.b(x).relu()
            return self.head(F.silu(x + 1))

    student, layers = convert(Net())
    assert layers["a"].activation
    assert layers["b"].activation
    assert isinstance(student.a.activation, RPReLU)
    names = dict(student.named_children())
    added = [name for name in names if name.startswith("activation_")]
    assert [names[name].channels for name in added] == [8, 8]
    first, last = (names[name] for name in added)
    same(student, lambda s, x: s.head(last(s.b(s.a(first(s.stem(x)))) + 1)))


def test_slices_of_a_sequential() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
                nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1),
            )  # fmt: skip

        def forward(self, x: Tensor) -> Tensor:
            low = self.features[:2](x)
            return self.features[-1](self.features[2:-1](low) + low)

    student, layers = convert(Net())
    assert binary(layers) == {"features.2", "features.4"}
    # A slice is made anew at each call and is no child: its steps are those of the code around it, which is edited.
    f = student.features
    assert not student.bidensify_plan.notes
    assert layers["features.2"].bypass
    assert layers["features.4"].reason == "default; replaces the residual add"
    assert isinstance(f[1], RPReLU)
    same(student, lambda s, x: f[5](f[4](f[2](f[1](f[0](x))))))


def test_lists_and_dicts_of_modules() -> None:
    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            self.steps = nn.ModuleList([nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()) for _ in range(2)])
            self.named = nn.ModuleDict({"left": nn.Conv2d(8, 8, 1), "right": nn.Conv2d(8, 8, 1)})
            self.plain = [self.a, self.b]

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for step in self.steps:
                x = step(x)
            outs = {name: layer(x) for name, layer in self.named.items()}
            x = outs["left"] * outs["right"]
            for layer in self.plain:
                x = layer(x)
            return self.head(x)

    student, layers = convert(Net())
    assert binary(layers) == {"a", "b", "steps.0.0", "steps.1.0", "named.left", "named.right"}
    assert student.plain[0] is student.a
    assert isinstance(student.plain[0], BinaryLayer)

    def by_hand(s: Any, x: Tensor) -> Tensor:
        x = s.steps[1][0](s.steps[0][0](s.stem(x)))
        return s.head(s.b(s.a(s.named["left"](x) * s.named["right"](x))))

    same(student, by_hand)


def test_a_shared_convolution_stays_shared() -> None:
    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(torch.cat([self.a(x), self.a(self.b(x))]).reshape(2, -1, 8, 16, 24).sum(1))

    student, layers = convert(Net(), example_inputs=X)
    assert layers["a"].calls == 2
    assert len(list(binary_layers(student))) == 2
    same(student, lambda s, x: s.head(_pairs(s, x)))


def _pairs(s: Any, x: Tensor) -> Tensor:
    y = s.stem(x)
    return torch.cat([s.a(y), s.a(s.b(y))]).reshape(2, -1, 8, 16, 24).sum(1)


def test_lambdas() -> None:
    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            self.up = lambda x: F.interpolate(x, scale_factor=2)
            self.act = lambda x: F.relu(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.act(self.up(self.a(self.stem(x))))))

    student, layers = convert(Net())
    assert binary(layers) == {"a", "b"}
    added = next(module for name, module in student.named_children() if name.startswith("activation_"))
    same(student, lambda s, x: s.head(s.b(added(F.interpolate(s.a(s.stem(x)), scale_factor=2)))))


def test_early_return_and_keyword_arguments() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor, **options: Any) -> Tensor:
            if options.get("skip"):
                return x
            return F.relu(self.conv(x)) + x

    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = Block(), Block()

        def forward(self, x: Tensor, **options: Any) -> Tensor:
            x = self.second(self.first(self.stem(x), skip=False), skip=True)
            return self.head(self.b(x)) if not options.get("features") else x

    student, layers = convert(Net())
    assert binary(layers) == {"first.conv", "b"}
    assert layers["second.conv"].reason == "never called in the recorded run"
    assert layers["first.conv"].activation
    assert layers["first.conv"].bypass is (layers["first.conv"].reason.endswith("replaces the residual add"))
    same(student, lambda s, x: s.head(s.b(s.first.conv(s.stem(x)))))
    # What was not recorded is refused where the code was changed, and runs where it was not.
    with pytest.raises(ValueError, match=r"options\['skip'\] was given as True, but the rewrite is of .*=False"):
        student.first(torch.randn(1, 8, 4, 4), skip=True)
    assert student.second(torch.ones(1, 8, 4, 4), skip=False).shape == (1, 8, 4, 4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_scripted_submodule() -> None:
    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            self.scripted = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.scripted(self.a(self.stem(x)))))

    model = Net()
    student, layers = convert(model)
    assert binary(layers) == {"a", "b"}
    assert layers["scripted.0"].action == "keep"
    assert layers["scripted.0"].reason == "inside a scripted module, whose code is fixed"
    same(student, lambda s, x: s.head(s.b(s.scripted(s.a(s.stem(x))))))


def test_control_flow_that_looks_at_values() -> None:
    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            rounds = 1 + int(x.detach().mean() > -1e9)
            for _ in range(rounds):
                x = F.relu(self.a(x))
            if x.sum() > 1e12:
                raise RuntimeError("too large")
            return self.head(self.b(x))

    student, layers = convert(Net())
    assert binary(layers) == {"a", "b"}
    assert layers["a"].calls == 2
    # The functional ReLU cannot be reached behind such code, and the plan says so and where.
    notes = student.bidensify_plan.notes
    assert any("the network: the functional activation relu stays as it is" in note for note in notes)
    same(student, lambda s, x: s.head(s.b(F.relu(s.a(F.relu(s.a(s.stem(x))))))))


def test_in_place_operations() -> None:
    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x), inplace=True)
            y = F.relu_(self.a(x))
            y *= 2
            y.add_(1)
            z = self.b(y)
            z += y
            return self.head(z.relu_())

    student, layers = convert(Net())
    assert layers["a"].activation
    assert layers["b"].reason.endswith("replaces the residual add")
    added = [module for name, module in student.named_children() if name.startswith("activation_")]

    def by_hand(s: Any, x: Tensor) -> Tensor:
        y = s.a(added[0](s.stem(x))) * 2 + 1
        z = s.b(y)
        return s.head(z if layers["b"].activation else added[1](z))

    same(student, by_hand)


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weights(norm: Callable[[nn.Module], nn.Module]) -> None:
    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            norm(self.a)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(F.relu(self.a(self.stem(x)))))

    student, layers = convert(Net())
    assert binary(layers) == {"a", "b"}
    assert "binarizes the weight that the parametrization _" in layers["a"].reason
    same(student, lambda s, x: s.head(s.b(s.a(s.stem(x)))))


def test_half_precision_and_frozen_parameters() -> None:
    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(F.relu(self.a(self.stem(x)))))

    model = Net().to(torch.bfloat16)
    model.a.requires_grad_(False)
    student, layers = convert(model)
    assert {p.dtype for p in student.parameters()} == {torch.bfloat16}
    assert not student.a.latent_weight.requires_grad
    assert any("a: its weight is frozen" in note for note in student.bidensify_plan.notes)
    assert student(X.to(torch.bfloat16)).dtype == torch.bfloat16
    assert binary(layers) == {"a", "b"}


class Padded(nn.Conv2d):
    """A convolution of somebody's own."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (1, 1, 1, 1), mode="reflect"))


def test_a_convolution_with_its_own_forward() -> None:
    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            self.a = Padded(8, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(F.relu(self.a(self.stem(x)))))

    student, layers = convert(Net())
    assert isinstance(student.a, Padded)
    assert isinstance(student.a, BinaryLayer)
    a = torch.where(torch.randn(1, 8, 6, 6) >= 0, 1.0, -1.0)
    signs, scale, _ = student.a.binary_weight()
    want = F.conv2d(F.pad(a, (1, 1, 1, 1), mode="reflect"), signs * scale.view(-1, 1, 1, 1))
    assert torch.allclose(student.a.conv_only(a), want, atol=1e-4)
    assert binary(layers) == {"a", "b"}


def test_a_module_called_several_times() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(16, 8, 3, padding=1)

        def forward(self, state: Tensor, x: Tensor) -> Tensor:
            return torch.relu(self.conv(torch.cat([state, x], 1)))

    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            self.cell = Cell()

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            state = torch.zeros_like(x)
            for _ in range(3):
                state = self.cell(state, x)
            return self.head(self.b(state))

    student, layers = convert(Net())
    assert layers["cell.conv"].calls == 3
    assert layers["cell.conv"].activation

    def by_hand(s: Any, x: Tensor) -> Tensor:
        x = s.stem(x)
        state = torch.zeros_like(x)
        for _ in range(3):
            state = s.cell.conv(torch.cat([state, x], 1))
        return s.head(s.b(state))

    same(student, by_hand)


@dataclass
class Prediction:
    logits: Tensor
    features: list[Tensor]


Named = namedtuple("Named", ["logits", "features"])


@pytest.mark.parametrize("kind", ["dict", "dataclass", "namedtuple"])
def test_structured_outputs(kind: str) -> None:
    class Net(Base):
        def forward(self, x: Tensor) -> Any:
            x = self.b(F.relu(self.a(self.stem(x))))
            out = self.head(x)
            if kind == "dict":
                return {"out": out, "features": [x]}
            return (Prediction if kind == "dataclass" else Named)(out, [x])

    student, layers = convert(Net())
    assert binary(layers) == {"a", "b"}
    assert layers["head"].reason == "prediction layer"
    out = student(X)
    expected = student.head(student.b(student.a(student.stem(X))))
    assert type(out) is {"dict": dict, "dataclass": Prediction, "namedtuple": Named}[kind]
    assert torch.allclose(out["out"] if kind == "dict" else out.logits, expected, atol=1e-5)


def test_hooks_stay_and_run() -> None:
    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(F.relu(self.a(self.stem(x)))))

    model, seen = Net(), []
    model.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    model.a.register_forward_hook(lambda m, args, out: out + 1)
    model.b.register_full_backward_hook(lambda m, grad_in, grad_out: seen.append("backward"))
    student, layers = convert(model)
    student(X).sum().backward()
    assert seen == ["backward"]
    # The hook on the layer sees its output before the activation, as it did.
    assert not layers["a"].activation
    act = next(module for name, module in student.named_children() if name.startswith("activation_"))
    assert torch.allclose(student(X), student.head(student.b(act(student.a(student.stem(X * 2))))), atol=1e-5)


def test_no_grad_inside() -> None:
    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                x = F.relu(self.a(self.stem(x)))
            return self.head(self.b(x))

    student, layers = convert(Net())
    assert binary(layers) == {"a", "b"}
    assert any("it changes the gradient or autocast mode on its way" in note for note in student.bidensify_plan.notes)
    student.train()(X).square().mean().backward()
    assert student.a.latent_weight.grad is None
    assert student.b.latent_weight.grad.abs().sum() > 0


def test_gradient_checkpointing() -> None:
    class Net(Base):
        def block(self, x: Tensor) -> Tensor:
            return F.relu(self.b(F.relu(self.a(x))))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.block, self.stem(x), use_reentrant=False))

    student, layers = convert(Net())
    assert binary(layers) == {"a", "b"}
    x = X.clone().requires_grad_()
    student.train()(x).square().mean().backward()
    first = student.a.latent_weight.grad.clone()
    student.zero_grad()
    plain = copy.deepcopy(student)
    y = plain.stem(X)
    y = F.relu(plain.b(F.relu(plain.a(y)))) if not layers["a"].activation else plain.b(plain.a(y))
    plain.head(y).square().mean().backward()
    assert torch.allclose(first, plain.a.latent_weight.grad, atol=1e-5)


def test_a_wrapped_network() -> None:
    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(F.relu(self.a(self.stem(x)))))

    net = Net()
    student, layers = convert(nn.DataParallel(net))
    assert isinstance(student, Net)
    assert binary(layers) == {"a", "b"}
    same(student, lambda s, x: s.head(s.b(s.a(s.stem(x)))))
    average, _ = convert(torch.optim.swa_utils.AveragedModel(net))
    assert isinstance(average, Net)


def test_residual_with_an_in_place_add() -> None:
    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.b(F.relu(self.a(x)))
            x += y
            return self.head(x)

    student, layers = convert(Net())
    assert layers["a"].bypass
    assert layers["b"].bypass
    assert layers["b"].reason.endswith("replaces the residual add")
    same(student, lambda s, x: s.head(s.b(s.a(s.stem(x)))))


def test_cat_and_a_weighted_add() -> None:
    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            self.merge = nn.Conv2d(16, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = torch.add(x, self.a(x), alpha=0.5)
            z = y + 0.25 * self.b(y)
            return self.head(self.merge(torch.cat([x, z], dim=1)))

    student, layers = convert(Net())
    assert binary(layers) == {"a", "b", "merge"}
    # A weighted add stays; the layer that it weighs has no bypass, or the signal would come in 1.5 times.
    assert not layers["a"].bypass
    assert not layers["b"].bypass
    assert layers["merge"].bypass

    def by_hand(s: Any, x: Tensor) -> Tensor:
        x = s.stem(x)
        y = x + 0.5 * s.a(x)
        return s.head(s.merge(torch.cat([x, y + 0.25 * s.b(y)], 1)))

    same(student, by_hand)


def test_a_module_that_is_made_in_forward() -> None:
    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            self.act = nn.GELU()
            x = self.act(self.a(self.stem(x)))
            return self.head(self.b(x))

    model = Net()
    student, layers = convert(model)
    assert binary(layers) == {"a", "b"}
    assert "act" not in dict(model.named_children())
    assert student(X).shape == (2, 2, 16, 24)
    assert (
        any("gelu" in note or "the network" in note for note in student.bidensify_plan.notes) or layers["a"].activation
    )


@pytest.mark.parametrize("training", [False, True])
def test_dropout_and_flags(training: bool) -> None:
    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.drop(F.relu(self.norm(self.a(self.stem(x)))))
            return self.head(F.dropout(self.b(x), 0.5, self.training))

    model = Net().train(training)
    model.drop.eval()
    student = bd.bidensify(model)
    assert student.training is training
    assert not student.drop.training
    assert student.a.norm.training is training
    layers = {layer.path: layer for layer in student.bidensify_plan.layers}
    assert layers["a"].norm == "norm"
    student.eval()
    assert torch.equal(student(X), student(X))
    student.train()
    assert not torch.equal(student(X), student(X))


def test_a_compiled_network_is_refused() -> None:
    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(self.a(self.stem(x))))

    with pytest.raises(PlanError, match="compiled: convert the network itself"):
        bd.bidensify(torch.compile(Net(), backend="eager"))


def test_a_lazy_network_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyConv2d(8, 3), nn.Conv2d(8, 2, 1))
    with pytest.raises(PlanError, match=r"1: .*LazyConv2d.* run the network once"):
        bd.bidensify(model)


def test_a_graph_module() -> None:
    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(F.relu(self.a(self.stem(x)))))

    student, layers = convert(torch.fx.symbolic_trace(Net()))
    assert binary(layers) == {"a", "b"}
    assert layers["a"].activation
    same(student, lambda s, x: s.head(s.b(s.a(s.stem(x)))))


def test_generated_code_reads_well_and_is_pickled() -> None:
    student = bd.bidensify(nn.Sequential(nn.Conv2d(3, 8, 1), Residual(), nn.Conv2d(8, 2, 1))).eval()
    text = type(student[1]).__doc__
    assert "Residual with a forward that bidensify generated" in text
    assert "self.conv" in text
    assert "relu" not in text
    x = torch.randn(1, 3, 8, 8)
    assert torch.equal(pickle.loads(pickle.dumps(student))(x), student(x))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


def test_an_error_in_the_network_is_quoted_with_its_inputs() -> None:
    class Net(Base):
        def forward(self, x: Tensor, *, prompt: Tensor) -> Tensor:
            return self.head(self.a(self.stem(x))) + prompt

    with pytest.raises(PlanError, match="example_inputs") as error:
        bd.bidensify(Net())
    assert "prompt" in str(error.value)
    student, layers = convert(Net(), example_inputs={"x": X, "prompt": torch.zeros(1)})
    assert binary(layers) == {"a"}
    assert student(X, prompt=torch.ones(1)).shape == (2, 2, 16, 24)
