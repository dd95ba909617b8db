"""Decisions that hang on where a layer stands, and edits of code as people write it."""

from __future__ import annotations

import copy
import pickle

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo.signal import joined_signals

import bidensify as bd
from bidensify.nn import RPReLU
from bidensify.rewrite import Plan, apply_plan
from bidensify.rewrite.plan.entries import LayerPlan
from bidensify.rewrite.record.recorder import record

X = torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(5))


def planned(model: nn.Module, config: bd.BidensifyConfig | None = None) -> dict[str, LayerPlan]:
    student = bd.bidensify(model.eval(), config, example_inputs=X)
    counts = joined_signals(record(student, X))
    assert all(each in ([1], []) for each in counts.values()), counts
    return {layer.path: layer for layer in student.bidensify_plan.layers}


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.head = nn.Conv2d(8, 5, 1)


class Shapes(Base):
    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2], x.shape[3]
        x = F.relu(self.b(F.relu(self.a(self.stem(x)))))
        return F.interpolate(self.head(x), (height, width))


def test_code_that_reads_a_shape_is_edited() -> None:
    student = bd.bidensify(Shapes(), example_inputs=X)
    assert not student.bidensify_plan.notes
    assert isinstance(student.b.activation, RPReLU)
    expected = student(X)
    assert torch.equal(pickle.loads(pickle.dumps(student))(X), expected)
    assert torch.equal(copy.deepcopy(student)(X), expected)
    assert student(X[..., :8]).shape == (2, 5, 16, 8)


class Twice(Base):
    """An activation in a Sequential of an encoder that both images go through."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        act = nn.PReLU(8)
        self.body = nn.Sequential(
            nn.GroupNorm(2, 8), act, self.a, nn.GroupNorm(2, 8), act if shared else nn.ReLU(), self.b
        )
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        if self.shared:
            return self.head(self.body(self.stem(x)))
        return self.head(self.body(self.stem(x)) - self.body(self.stem(x.flip(-1))))


def _counting(student: nn.Module, x: Tensor) -> int:
    calls: list[int] = []
    hooks = [
        module.register_forward_hook(lambda *unused: calls.append(1))
        for module in student.modules()
        if isinstance(module, RPReLU)
    ]
    student(x)
    for hook in hooks:
        hook.remove()
    return len(calls)


def test_an_activation_in_a_block_that_runs_twice_is_exchanged_where_it_stands() -> None:
    student = bd.bidensify(Twice(shared=False), example_inputs=X)
    assert len(student.body) == 6
    assert isinstance(student.body[1], RPReLU)
    assert isinstance(student.body[4], RPReLU)
    assert _counting(student, X) == 4
    assert not student.bidensify_plan.blocks


def test_one_activation_at_two_places_of_a_sequential_becomes_two_entries() -> None:
    model = Twice(shared=True)
    student = bd.bidensify(model, example_inputs=X)
    assert len(student.body) == 6
    assert isinstance(student.body[1], RPReLU)
    assert isinstance(student.body[4], RPReLU)
    assert student.body[1] is not student.body[4]
    assert _counting(student, X) == 2
    student.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = student.stem(X)
        for part in student.body:
            expected = part(expected)
        assert torch.equal(student.head(expected), student(X))


def test_new_activations_have_one_order_whatever_the_file_does() -> None:
    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.stem(x))
            for _ in range(6):
                x = torch.relu(x + 1)
            x = torch.relu(self.a(x) + self.b(x))
            return self.head(x)

    student = bd.bidensify(Net(), example_inputs=X)
    data = student.bidensify_plan.to_dict()
    for block in data["blocks"]:
        block["modules"] = dict(sorted(block["modules"].items()))
    twin = apply_plan(Net(), Plan.from_dict(data))
    names = [name for name, _ in student.named_parameters()]
    assert sorted(names) != names
    assert [name for name, _ in twin.named_parameters()] == names


def test_a_projection_beside_a_layer_that_stays_gives_its_bypass_up() -> None:
    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(F.relu(self.b(F.relu(self.a(x))) + self.project(x)))

    layers = planned(Net(), bd.BidensifyConfig(rules=[bd.Rule("b", "keep")]))
    assert layers["a"].bypass
    assert not layers["project"].bypass


def test_a_projection_gives_its_bypass_up_behind_a_norm_of_its_own_too() -> None:
    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Sequential(nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(F.relu(self.b(F.relu(self.a(x))) + self.project(x)))

    layers = planned(Net(), bd.BidensifyConfig(rules=[bd.Rule("b", "keep")]))
    assert not layers["project.0"].bypass


def test_a_difference_to_what_a_block_reads_has_one_signal() -> None:
    class Net(Base):
        def __init__(self, first: bool) -> None:
            super().__init__()
            self.first, self.norm = first, nn.GroupNorm(2, 8)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.norm(self.b(F.relu(self.a(x))))
            return self.head(F.relu(y - x if self.first else x - y))

    for first in (True, False):
        layers = planned(Net(first))
        assert layers["a"].bypass
        assert not layers["b"].bypass


def test_an_add_to_some_of_the_channels_carries_their_signal() -> None:
    class Net(Base):
        """ReXNet's: the layer is wider than its shortcut."""

        def __init__(self) -> None:
            super().__init__()
            self.wider, self.head = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            y = self.wider(F.relu(self.a(x)))
            return self.head(torch.cat([y[:, :8] + x, y[:, 8:]], 1))

    layers = {layer.path: layer for layer in bd.plan(Net(), example_inputs=X).layers}
    assert not layers["wider"].bypass


def test_a_sum_that_begins_at_zero() -> None:
    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            return self.head(F.relu(sum(layer(x) for layer in (self.a, self.b)) + F.instance_norm(x)))

    layers = planned(Net())
    assert not layers["a"].bypass
    assert not layers["b"].bypass


def test_other_parts_of_the_channels_are_other_signals() -> None:
    class Net(Base):
        """Res2Net's: each part of the channels is added to what the part before it became."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.stem(x).chunk(2, 1)
            y = self.a(first)
            return self.head(torch.cat([y, self.b(y + second)], 1))

    layers = planned(Net())
    assert layers["a"].bypass
    assert layers["b"].bypass


def test_a_pooled_side_carries_no_signal() -> None:
    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            pooled = F.interpolate(F.relu(self.b(F.adaptive_avg_pool2d(x, 1))), x.shape[-2:])
            return self.head(F.relu(self.a(x)) + pooled)

    layers = planned(Net())
    assert layers["b"].reason == "on a pooled 1×1 map"
    assert layers["a"].bypass


def test_attention_matrices_are_no_higher_resolution() -> None:
    class Net(Base):
        """A projection shortcut beside an attention over few channels: its matrices have more columns than its values."""

        def forward(self, x: Tensor) -> Tensor:
            x = F.max_pool2d(self.stem(x), 2)
            q = x.flatten(2).reshape(x.shape[0], 2, 4, -1)
            weights = (q.transpose(-1, -2) @ q).softmax(-1)
            y = (q @ weights).reshape(x.shape)
            return self.head(F.relu(self.a(y) + self.b(x)))

    assert not planned(Net())["a"].bypass


def test_predictions_behind_norms_and_in_front_of_layers_on_values() -> None:
    class Depth(Base):
        """FastDepth's last layer has a norm and a ReLU, EDSR's is followed by a convolution that adds the mean."""

        def __init__(self, mean: bool) -> None:
            super().__init__()
            self.last = nn.Conv2d(8, 3, 1)
            self.tail = nn.Conv2d(3, 3, 1) if mean else nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return self.tail(self.last(F.relu(self.b(F.relu(self.a(self.stem(x)))))))

    for mean in (False, True):
        layers = planned(Depth(mean))
        assert layers["last"].reason == "prediction layer"
        assert layers["b"].action == "binary"


def test_a_prediction_that_the_network_reads_again_is_one() -> None:
    class Context(Base):
        """HRNet-OCR's: class maps are an output, and regions are gathered by them."""

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            x = F.relu(self.a(self.stem(x)))
            first = self.head(x)
            shares = first.flatten(2).softmax(-1)
            regions = (x.flatten(2) @ shares.transpose(1, 2)).mean(-1)
            return F.interpolate(first, scale_factor=2), self.last(F.relu(self.b(x * regions[:, :, None, None])))

        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Conv2d(8, 5, 1)

    layers = planned(Context())
    assert layers["head"].reason == "prediction layer"
    assert layers["a"].action == layers["b"].action == "binary"


def test_a_gate_may_be_resized_before_its_sigmoid() -> None:
    class Net(Base):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            gate = torch.sigmoid(F.interpolate(self.b(F.avg_pool2d(x, 2)), x.shape[-2:]))
            return self.head(self.a(x) * gate)

    layers = planned(Net())
    assert layers["b"].reason == "gate"
    assert layers["a"].bypass


def test_images_side_by_side_are_raw_values() -> None:
    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            first = self.head(self.a(self.stem(x)))[:, :3]
            return self.last(self.b(self.mix(torch.cat([x, first, x[:, :2]], 1))))

    net = Net()
    net.last = nn.Conv2d(8, 2, 1)
    layers = planned(net)
    assert layers["mix"].reason == "on 8 raw values, as a first layer is"
    assert layers["b"].action == "binary"


def test_padding_that_cannot_be_packed_is_said_in_the_plan() -> None:
    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.b(F.relu(self.a(self.stem(x)))))

    assert bd.plan(Net(), example_inputs=X).notes == [
        "a: pads with padding_mode='reflect', which can be trained but not packed; keep it by a rule, or pad with zeros"
    ]
    assert not bd.plan(Net(), bd.BidensifyConfig(rules=[bd.Rule("a", "keep")]), example_inputs=X).notes


class InPlace(Base):
    """Calls its activation as a statement; code between the layer and it cannot take it in."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.relu = nn.GroupNorm(2, 8), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.a(self.stem(x)))
        self.relu(x)
        return self.head(self.b(x))


def test_an_activation_that_only_writes_in_place_is_not_lost() -> None:
    student = bd.bidensify(InPlace(), example_inputs=X)
    assert isinstance(student.relu, nn.ReLU)
    assert [note for note in student.bidensify_plan.notes if note.startswith("relu: the activation stays as it is")]
    seen: list[Tensor] = []
    student.b.register_forward_hook(lambda module, args, output: seen.append(args[0]))
    student(X)
    assert seen[0].min() == 0


class Statements(Base):
    """Functional activations in place, called as statements."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        F.relu(x, inplace=True)
        y = self.a(x)
        y = y + self.b(x)
        y.relu_()
        return self.head(y)


def test_functional_activations_that_write_in_place_are_exchanged() -> None:
    student = bd.bidensify(Statements(), example_inputs=X)
    assert not student.bidensify_plan.notes
    first, second = (module for module in student.children() if isinstance(module, RPReLU))
    with torch.no_grad():
        x = first(student.stem(X))
        assert torch.equal(student(X), student.head(second(student.a(x) + student.b(x))))
