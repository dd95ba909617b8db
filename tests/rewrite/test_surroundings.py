"""What a block's new code was made under: another value is an error that names it, and what may change may."""

from __future__ import annotations

import copy
import json
import pickle
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bidensify as bd
from bidensify.errors import PlanError
from bidensify.nn import binary_layers
from bidensify.rewrite import Plan, apply_plan

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
SLOPE = 1.0
WARNED = False


class Settings:
    def __init__(self) -> None:
        self.both = False
        self.unread = 1


def _scaled(x: Tensor) -> Tensor:
    global WARNED
    if not WARNED:
        WARNED = True
    return x * SLOPE


class Neck(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.levels = [1, 2]
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def gather(self, x: Tensor) -> Tensor:
        for level in self.levels:
            x = x + level
        return x

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


class Net(nn.Module):
    """Reads attributes of its own, of a child and of a configuration, a property, a function, a global."""

    classwide = "relu"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        self.neck = Neck()
        self.deep_supervision, self.weight_of = False, {"aux": 0.5}
        self.config = Settings()
        self.squash = torch.tanh
        self._count = 2
        self.grad_checkpointing = False

    @property
    def count(self) -> int:
        return self._count

    def forward(self, x: Tensor) -> Any:
        y = F.relu(self.b(F.relu(self.a(x))))
        y = self.neck.gather(self.neck(y)) * self.weight_of["aux"]
        for _ in range(self.count):
            y = y + 1
        if self.grad_checkpointing and self.training:
            y = y * 1
        if self.classwide != "relu":
            y = -y
        out = self.squash(_scaled(self.head(y)))
        if self.config.both or (self.training and self.deep_supervision):
            return out, y
        return (out, y) if self.deep_supervision else out


@pytest.fixture(scope="module")
def student() -> Any:
    made = bd.bidensify(Net().eval())
    assert "" in {block.path for block in made.bidensify_plan.blocks}, "the network's own code is not edited"
    return made


CHANGES: tuple[tuple[Callable[[Any], Any], str], ...] = (
    (lambda n: setattr(n, "deep_supervision", True), "self.deep_supervision is True, but was False"),
    (lambda n: setattr(n, "deep_supervision", None), "self.deep_supervision is None, but was False"),
    (lambda n: setattr(n.config, "both", True), "self.config.both is True, but was False"),
    (lambda n: n.neck.levels.append(3), r"self.neck.levels is \[1, 2, 3\], but was \[1, 2\]"),
    (lambda n: n.weight_of.update(aux=1.0), r"self.weight_of is {'aux': 1.0}, but was {'aux': 0.5}"),
    (lambda n: setattr(n, "squash", torch.sigmoid), "self.squash is .*sigmoid, but was .*tanh"),
    (lambda n: setattr(n, "_count", 1), "self._count is 1, but was 2"),
    (lambda n: setattr(n, "classwide", "gelu"), "self.classwide is 'gelu', but was 'relu'"),
)


@pytest.mark.parametrize(("change", "message"), CHANGES)
@pytest.mark.parametrize("training", [False, True])
def test_what_the_code_read_is_checked_when_it_runs(
    student: Any, change: Callable[[Any], Any], message: str, training: bool
) -> None:
    changed = copy.deepcopy(student).train(training)
    changed(X)
    change(changed)
    with pytest.raises(ValueError, match=f"Net: {message} when it was rewritten"):
        changed(X)
    student(X)


def test_a_global_that_the_code_reads_is_checked(student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "SLOPE", 2.0)
    with pytest.raises(ValueError, match=r"\.SLOPE is 2.0, but was 1.0"):
        student(X)


def test_what_changes_no_result_may_change(student: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "WARNED", "set by the code itself")
    changed = copy.deepcopy(student).train()
    changed.grad_checkpointing = True
    changed.config.unread = 2
    changed.new = 3
    changed(X)
    changed.eval()(X)
    changed.neck.levels = [1, 2]
    changed.deep_supervision = 0
    changed(X)


def test_copies_and_files_keep_what_was_read(student: Any) -> None:
    x = student(X)
    for twin in (pickle.loads(pickle.dumps(student)), bd.pack(copy.deepcopy(student))):
        twin(X)
        twin.deep_supervision = True
        with pytest.raises(ValueError, match="self.deep_supervision is True, but was False"):
            twin(X)
    plan = Plan.from_dict(json.loads(json.dumps(student.bidensify_plan.to_dict())))
    again = apply_plan(Net(), plan).eval()
    assert torch.equal(again(X), x)
    again.neck.levels = (1, 2, 3)
    with pytest.raises(ValueError, match=r"self.neck.levels is \(1, 2, 3\)"):
        again(X)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda n: setattr(n, "deep_supervision", True),
            "the plan is of Net with deep_supervision=False, which is True here",
        ),
        (lambda n: n.neck.levels.append(1), "with neck.levels="),
        (lambda n: delattr(n, "_count"), "with _count=2, which is gone here"),
    ],
)
def test_a_plan_is_not_replayed_under_other_values(student: Any, change: Callable[[Any], Any], message: str) -> None:
    model = Net()
    change(model)
    with pytest.raises(PlanError, match=message):
        apply_plan(model, student.bidensify_plan)
    assert not list(binary_layers(model))


def test_compiled_and_exported_under_what_was_read(student: Any) -> None:
    want = student.eval()(X)
    compiled = torch.compile(copy.deepcopy(student), fullgraph=True, backend="eager")
    assert torch.allclose(compiled(X), want, atol=1e-5)
    assert torch.allclose(torch.export.export(student, (X,)).module()(X), want, atol=1e-5)
    torch._dynamo.reset()


def test_code_that_reads_what_the_network_sets_as_it_runs_stays() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.rows = nn.Conv2d(8, 8, 3, padding=1), 16

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.conv(x)).flatten(2).unflatten(2, (self.rows, -1))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.inner, self.head = nn.Conv2d(3, 8, 3, padding=1), Inner(), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            self.inner.rows = x.shape[2]
            return self.head(self.inner(self.stem(x)))

    student = bd.bidensify(Outer(), example_inputs=X)
    notes = student.bidensify_plan.notes
    assert any(
        "inner: its code is left as it is, since it reads self.rows, which the network sets as it runs" in n
        for n in notes
    )
    assert student(torch.randn(1, 3, 24, 8)).shape == (1, 2, 24, 8)
