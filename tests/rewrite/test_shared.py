"""Shared activations and blocks with lists, tuples, dictionaries, *args and **kwargs among their arguments."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bidensify as bd
from bidensify.nn import ByWidth, RPReLU


class Controlled(nn.Module):
    """One SiLU for several widths behind control flow that no trace follows, as smp's EfficientNet has it."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(8, 24, 1)
        self.deep = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.reduce = nn.Conv2d(24, 4, 1)
        self.gate = nn.Conv2d(4, 24, 1)
        self.project = nn.Conv2d(24, 12, 1)
        self.act = nn.SiLU()

    def forward(self, x: Tensor, rate: float | None = None) -> Tensor:
        y = self.act(self.deep(self.act(self.expand(x))))
        if float(y.detach().mean()) > 1e9:
            return x
        squeezed = self.gate(self.act(self.reduce(F.adaptive_avg_pool2d(y, 1))))
        return self.act(self.project(torch.sigmoid(squeezed) * y))


def controlled() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), Controlled(), nn.Conv2d(12, 12, 3), nn.Conv2d(12, 2, 1))


def test_a_shared_activation_is_split_by_width_where_its_block_cannot_be_edited() -> None:
    model = controlled()
    hits: list[int] = []
    model[1].act.register_forward_hook(lambda m, a, out: hits.append(out.shape[1]))
    student = bd.bidensify(model)
    act = student[1].act
    assert isinstance(act, ByWidth)
    assert isinstance(act.original, nn.SiLU)
    assert {name: (type(part), part.channels) for name, part in act.widths.items()} == {
        "12": (RPReLU, 12),
        "24": (RPReLU, 24),
    }
    plan = student.bidensify_plan
    assert [item.widths for item in plan.activations if item.path == "1.act"] == [(12, 24)]
    assert not plan.notes
    hits.clear()
    student.eval()(torch.randn(1, 3, 16, 16))
    assert hits == [24, 24, 4, 12]
    # On the squeezed map, beside kept layers, the network's own activation computes as before.
    x = torch.randn(1, 4, 1, 1)
    assert torch.equal(act(x), F.silu(x))
    x = torch.randn(2, 24, 3, 3)
    assert torch.allclose(act(x), torch.where(x >= 0, x, 0.25 * x))
    again = pickle.loads(pickle.dumps(student.cpu()[1].act.widths))
    assert set(again) == {"12", "24"}
    assert not student.load_state_dict(model.state_dict()).missing_keys
    assert bd.rewrite.Plan.from_dict(plan.to_dict()).to_dict() == plan.to_dict()


def test_a_shared_activation_with_parameters_keeps_them_for_other_widths() -> None:
    model = controlled()
    model[1].act = nn.PReLU(init=0.7)
    student = bd.bidensify(model)
    state = model.state_dict()
    state["1.act.weight"] = torch.tensor([0.3])
    assert not student.load_state_dict(state).missing_keys
    assert torch.equal(student[1].act(torch.full((1, 4, 1, 1), -1.0)), torch.full((1, 4, 1, 1), -0.3))


class Conflicted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.reduce = nn.Conv2d(8, 8, 1)
        self.gate = nn.Conv2d(8, 8, 1)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv(x))
        if float(y.detach().mean()) > 1e9:
            return x
        return y * torch.sigmoid(self.gate(self.act(self.reduce(F.adaptive_avg_pool2d(y, 1)))))


def test_one_width_with_two_needs_is_left_with_a_note() -> None:
    plan = bd.plan(nn.Sequential(nn.Conv2d(3, 8, 3), Conflicted(), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 1)))
    assert any(note.startswith("1.act: the activation ReLU stays as it is") for note in plan.notes)
    assert not any(item.path == "1.act" for item in plan.activations)


class OneNorm(nn.Module):
    """One BatchNorm behind two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norm, self.head = nn.BatchNorm2d(8), nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(torch.cat([self.norm(self.a(x)), self.norm(self.b(x))], 1))


def test_a_shared_norm_is_absorbed_by_no_layer() -> None:
    student = bd.bidensify(OneNorm())
    assert {layer.path: layer.norm for layer in student.bidensify_plan.binary} == {"a": None, "b": None}
    assert isinstance(student.norm, nn.BatchNorm2d)
    student.load_state_dict(OneNorm().state_dict())


class Fuse(nn.Module):
    """Takes its inputs in whatever container."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.convs = nn.ModuleList([nn.Conv2d(8, 8, 3, padding=1) for _ in range(2)])

    def forward(self, features: Any, *more: Tensor, scale: float = 1.0, **named: Tensor) -> Any:
        if self.kind == "dict":
            a, b = features["low"], features["high"]
        elif self.kind == "args":
            a, b = features, more[0]
        elif self.kind == "kwargs":
            a, b = features, named["high"]
        else:
            a, b = features
        outs = [F.relu(self.convs[0](a)) + a, F.relu(self.convs[1](b)) * scale]
        return outs if self.kind == "list" else outs[0] + outs[1]


class Containers(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.fuse = Fuse(kind)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.first(x)
        b = self.second(a)
        if self.kind == "dict":
            return self.head(self.fuse({"low": a, "high": b}, scale=0.5))
        if self.kind == "args":
            return self.head(self.fuse(a, b))
        if self.kind == "kwargs":
            return self.head(self.fuse(a, high=b))
        if self.kind == "tuple":
            return self.head(self.fuse((a, b)))
        return self.head(sum(self.fuse([a, b])))


@pytest.mark.parametrize("kind", ["list", "tuple", "dict", "args", "kwargs"])
def test_blocks_with_containers_are_edited(kind: str) -> None:
    student = bd.bidensify(Containers(kind)).eval()
    plan = student.bidensify_plan
    assert not plan.notes
    layers = {layer.path: layer for layer in plan.layers}
    # Both functional ReLUs move into their layers.
    assert layers["fuse.convs.0"].activation
    assert layers["fuse.convs.1"].activation
    assert [block.path for block in plan.blocks] == ["fuse"]
    assert type(student.fuse).__name__ == "Fuse"
    x = torch.randn(1, 3, 12, 20)
    expected = student(x)
    assert torch.equal(copy.deepcopy(student)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(student))(x), expected)
    a, b = torch.randn(2, 1, 8, 6, 6).unbind()
    conv = student.fuse.convs
    # An independent computation of what the block does now: no ReLU between the layers (their RPReLU is inside).
    want = [conv[0](a) + (a if not layers["fuse.convs.0"].reason.endswith("add") else 0), conv[1](b)]
    if kind == "list":
        got = student.fuse([a, b])
        assert isinstance(got, list)
        assert all(torch.equal(x, y) for x, y in zip(got, want))
        with pytest.raises(ValueError, match="rewrite is of"):
            student.fuse([a, b, a])
        with pytest.raises(ValueError, match="rewrite is of"):
            student.fuse((a, b))
    elif kind == "dict":
        assert torch.allclose(student.fuse({"low": a, "high": b}, scale=0.25), want[0] + want[1] * 0.25)
        with pytest.raises(ValueError, match="rewrite is of"):
            student.fuse({"low": a}, scale=0.25)
    elif kind == "args":
        assert torch.equal(student.fuse(a, b), want[0] + want[1])
    elif kind == "kwargs":
        assert torch.equal(student.fuse(a, high=b), want[0] + want[1])
        with pytest.raises(ValueError, match="rewrite is of"):
            student.fuse(a, low=b)
    else:
        assert torch.equal(student.fuse((a, b)), want[0] + want[1])


def test_a_block_that_writes_into_the_list_it_is_given_is_left() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: list[Tensor]) -> Tensor:
            x[0] = F.relu(self.conv(x[0]))
            return x[0] * 2

    class Caller(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 3)
            self.writes = Writes()
            self.second = nn.Conv2d(8, 8, 1)
            self.head = nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            features = [self.first(x)]
            y = self.writes(features)
            return self.head(self.second(y + features[0]))

    plan = bd.plan(Caller())
    assert any("it writes into a list or dictionary that it is given" in note for note in plan.notes)
    assert not plan.blocks


@pytest.mark.parametrize("name", ["Unet", "FPN"])
def test_smps_efficientnet_leaves_no_note(name: str) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    plan = bd.plan(getattr(smp, name)("efficientnet-b0", encoder_weights=None))
    assert not [note for note in plan.notes if "_swish" in note or "activation" in note]
    assert sum(item.action == "by_width" for item in plan.activations) == 9


class Supervised(nn.Module):
    """The main path's norm and activation serve a head that training alone runs, on ``aux`` channels, as well."""

    def __init__(self, shared: str, aux: int = 16, pairs: bool = False) -> None:
        super().__init__()
        self.shared, self.pairs = shared, pairs
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn, self.relu = nn.BatchNorm2d(16), nn.ReLU()
        self.aux = nn.Conv2d(16, aux, 3, padding=1)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        y = self.head(self.relu(self.bn(self.conv(x))))
        if not self.training:
            return y
        if self.pairs:
            return y, self.relu(self.bn(self.conv(x.flip(3))))
        extra = 50 * self.aux(x)
        return y, self.bn(extra) if self.shared == "bn" else self.relu(extra)


@pytest.mark.parametrize(("shared", "aux"), [("bn", 16), ("relu", 16), ("relu", 24)])
def test_what_training_alone_calls_elsewhere_too_stays_what_it_is_there(shared: str, aux: int) -> None:
    torch.manual_seed(0)
    model = Supervised(shared, aux)
    student = bd.bidensify(model)
    plan = student.bidensify_plan
    assert [layer.path for layer in plan.binary] == ["conv"]
    x = torch.randn(2, 3, 12, 12)
    wanted = model.train()(x)[1]
    if (shared, aux) == ("relu", 16):
        # An RPReLU is beside the layer, and there too.
        wanted = F.leaky_relu(50 * model.aux(model.stem(x)), 0.25)
    torch.testing.assert_close(student.train()(x)[1], wanted)
    noted = "bn: stays behind conv and its new BatchNorm, since training calls it elsewhere too" in plan.notes
    assert noted is (shared == "bn")
    student.eval()
    with torch.no_grad():
        torch.testing.assert_close(bd.pack(student)(x), student(x))


def test_a_whole_block_that_training_calls_again_becomes_one_layer() -> None:
    student = bd.bidensify(Supervised("", pairs=True))
    assert isinstance(student.bn, nn.Identity)
    assert isinstance(student.relu, nn.Identity)
    assert not student.bidensify_plan.notes
    assert student.train()(torch.randn(2, 3, 12, 12))[1].shape == (2, 16, 12, 12)
