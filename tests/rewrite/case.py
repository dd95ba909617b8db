"""A network with its rewritten form, and comparisons of outputs and states."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import bidensify as bd
from bidensify.nn import binary_layers
from bidensify.rewrite import Plan
from bidensify.rewrite.record.recorded import tensors_in

__all__ = ["Case", "check_mixed_signs", "same", "same_state"]


class Case:
    """A network, its rewritten form and example inputs.

    Args:
        model: the full-precision network.
        inputs: positional arguments with tensors of batch 2.
        config: what the rewrite is told.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], config: bd.BidensifyConfig | None = None) -> None:
        self.model, self.inputs, self.config = model, inputs, config
        self.flags = [module.training for module in model.modules()]
        before = {key: value.clone() for key, value in model.state_dict().items()}
        attributes = {path: set(vars(module)) for path, module in model.named_modules()}
        state = torch.get_rng_state()
        self.student = self.convert()
        assert torch.equal(state, torch.get_rng_state()), "the global RNG has moved"
        assert self.flags == [module.training for module in model.modules()], "the model's flags have changed"
        assert attributes == {path: set(vars(module)) for path, module in model.named_modules()}, "attributes changed"
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]), f"the original's {key} has changed"
        plan = self.student.bidensify_plan
        assert isinstance(plan, Plan)
        self.plan = plan

    def convert(self, model: nn.Module | None = None) -> nn.Module:
        """A rewrite of the case's network, or of another of its kind."""
        return bd.bidensify(model or self.model, self.config, example_inputs=self.inputs)

    def run(self, model: nn.Module) -> list[Tensor]:
        """All output tensors in evaluation mode, in float64, where no sign flips because values lie elsewhere in memory."""
        model = copy.deepcopy(model).eval().double()
        with torch.no_grad():
            return tensors_in(model(*self.wide()))

    def wide(self) -> tuple[Any, ...]:
        """The inputs in float64."""
        return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in self.inputs)


def same(a: list[Tensor], b: list[Tensor], what: str, tolerance: float = 1e-9) -> None:
    assert len(a) == len(b), f"{what}: {len(a)} tensors against {len(b)}"
    for number, (x, y) in enumerate(zip(a, b)):
        assert x.shape == y.shape, f"{what}: tensor {number} has shape {tuple(x.shape)}, was {tuple(y.shape)}"
        if x.is_floating_point():
            gap = (x - y).norm() / y.norm().clamp(min=1e-12)
            assert gap <= tolerance, f"{what}: tensor {number} differs by {gap.item():.3g} of its norm"
        else:
            assert torch.equal(x, y), f"{what}: tensor {number} differs"


def same_state(a: nn.Module, b: nn.Module, what: str) -> None:
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right), f"{what}: other keys"
    for key, value in left.items():
        assert torch.equal(value, right[key]), f"{what}: another {key}"


def check_mixed_signs(student: nn.Module, x: Tensor) -> None:
    """Calibrated on ``x``, every channel of every binary layer has both signs on it."""
    bd.calibrate(student, [x])
    shares: dict[str, Tensor] = {}
    for path, layer in binary_layers(student):
        layer.binarizer.register_forward_hook(
            lambda m, args, out, path=path: shares.update({path: (out > 0).float().mean((0, 2, 3))})
        )
    with torch.no_grad():
        student.train()(x)
    assert shares
    for path, share in shares.items():
        assert (share > 0.05).all(), path
        assert (share < 0.95).all(), path
