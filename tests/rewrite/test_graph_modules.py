"""Networks that are graphs of torch.fx already: their own graph is edited, and they copy, switch and pickle by it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bidensify as bd
from bidensify.nn import binary_layers

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.drop, self.head = nn.Dropout(0.1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.relu(self.b(torch.relu(self.a(x)))) + x
        return self.head(nn.functional.dropout(self.drop(x), 0.1, self.training))


def extractor(model: nn.Module, names: list[str]) -> Any:
    from torchvision.models.feature_extraction import create_feature_extractor

    return create_feature_extractor(model, names)


def _timm() -> Any:
    return pytest.importorskip("timm").create_model("resnet18", features_only=True, feature_cls="fx")


def _torchvision() -> Any:
    return extractor(pytest.importorskip("torchvision").models.resnet18(weights=None), ["layer2", "layer4"])


MADE: dict[str, Callable[[], Any]] = {
    "symbolic_trace": lambda: torch.fx.symbolic_trace(Small().eval()),
    "two graphs": lambda: extractor(Small(), ["b", "head"]),
    "torchvision": _torchvision,
    "timm": _timm,
}


@pytest.mark.parametrize("name", MADE)
def test_graph_modules_are_rewritten_copied_switched_packed_and_saved(name: str, tmp_path: Any) -> None:
    model = MADE[name]()
    student = bd.bidensify(model)
    assert list(binary_layers(student))
    for training in (True, False, True, False):
        student.train(training)
        student(X)
    with torch.no_grad():
        want = torch.utils._pytree.tree_leaves(student(X))

        def same(other: nn.Module) -> None:
            got = torch.utils._pytree.tree_leaves(other.eval()(X))
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

        same(copy.deepcopy(student))
        same(pickle.loads(pickle.dumps(student)))
        packed = bd.pack(student)
        packed(X)
        bd.save_pretrained(student, tmp_path / "latent")
        same(bd.from_pretrained(tmp_path / "latent", MADE[name]()))
    # Another network of the same class is no other's graph.
    again = MADE[name]().eval()
    bd.bidensify(again)
    again(X)


def test_its_activations_and_adds_are_edited_in_the_graph() -> None:
    student = bd.bidensify(torch.fx.symbolic_trace(Small().eval())).eval()
    assert "replaces the residual add" in next(x.reason for x in student.bidensify_plan.binary if x.path == "b")
    assert "relu" not in student.code
    with torch.no_grad():
        by_hand = student.head(student.b(student.a(student.get_submodule("activation_1")(student.stem(X)))))
        assert torch.allclose(student(X), by_hand, atol=1e-5)


def test_two_graphs_that_differ_stay_as_they_are() -> None:
    student = bd.bidensify(extractor(Small(), ["b", "head"]))
    assert any("its graphs for training and for evaluation differ" in note for note in student.bidensify_plan.notes)
    student.train()(X)
    assert len(list(binary_layers(student))) == 2


def test_a_deep_copy_still_has_its_plan(tmp_path: Any) -> None:
    student = copy.deepcopy(bd.bidensify(torch.fx.symbolic_trace(Small().eval())))
    bd.save_pretrained(bd.pack(student), tmp_path)
    bd.from_pretrained(tmp_path, torch.fx.symbolic_trace(Small().eval()))(X)
