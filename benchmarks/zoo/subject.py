"""A network with its rewritten form, and what checks compare of the two."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import bidensify as bd
from bidensify.rewrite import Plan
from bidensify.rewrite.record.recorder import record
from zoo.networks import Entry

__all__ = [
    "ABSENT",
    "PASS",
    "CheckFailed",
    "Subject",
    "close",
    "first_difference",
    "outputs_of",
    "require",
    "structure",
    "tensors",
]

PASS, ABSENT = "pass", "not in the original"


class CheckFailed(AssertionError):
    """What a check found."""


def require(condition: bool, message: str) -> None:
    """Raises ``CheckFailed`` with the message unless the condition holds."""
    if not condition:
        raise CheckFailed(message)


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in an output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for item in value.values() for t in tensors(item)]
    if isinstance(value, (tuple, list)):
        return [t for item in value for t in tensors(item)]
    return []


def structure(value: Any) -> Any:
    """An output with its tensors replaced by their shapes and dtypes, and its containers by their classes."""
    if isinstance(value, Tensor):
        return tuple(value.shape), str(value.dtype)
    if isinstance(value, Mapping):
        return type(value).__name__, {key: structure(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value).__name__, [structure(item) for item in value]
    return type(value).__name__


def first_difference(a: Any, b: Any) -> str:
    """Where two outputs' tensors differ in any bit, or an empty string."""
    left, right = tensors(a), tensors(b)
    if len(left) != len(right):
        return f"{len(left)} tensors against {len(right)}"
    for number, (x, y) in enumerate(zip(left, right)):
        if x.shape != y.shape or not torch.equal(torch.nan_to_num(x), torch.nan_to_num(y)):
            gap = (x - y).abs().max().item() if x.shape == y.shape else float("nan")
            return f"tensor {number} differs by up to {gap:.3g}"
    return ""


def close(a: Any, b: Any, tolerance: float) -> str:
    """Where two outputs' tensors differ by more than ``tolerance`` of their largest value, or an empty string."""
    for number, (x, y) in enumerate(zip(tensors(a), tensors(b), strict=True)):
        if x.is_floating_point() and x.numel():
            gap = (x - y).abs().max().item() / max(y.abs().max().item(), 1e-12)
            if not gap <= tolerance:
                return f"tensor {number} differs by {gap:.3g} of its largest value"
    return ""


class Subject:
    """A network, its rewritten form and example inputs; what the checks share."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        torch.manual_seed(0)
        self.model = entry.build().eval()
        if entry.inputs is None:
            self.args, self.kwargs = record(self.model).inputs
        else:
            self.args, self.kwargs = entry.inputs(2)
        self.expected = self.run(self.model)
        self.example = self.kwargs if self.kwargs else self.args
        self.student: nn.Module = nn.Identity()
        self.seconds = 0.0

    def run(self, model: nn.Module) -> Any:
        """The output on the example batch, without gradients."""
        with torch.no_grad():
            torch.manual_seed(0)
            return model(*self.args, **self.kwargs)

    def convert(self) -> None:
        """Rewrites a copy; processor seconds, since other work may share the machine."""
        start = time.process_time()
        self.student = bd.bidensify(self.model, example_inputs=self.example)
        self.seconds = time.process_time() - start

    @property
    def plan(self) -> Plan:
        plan = self.student.bidensify_plan
        assert isinstance(plan, Plan)
        return plan


@contextmanager
def outputs_of(model: nn.Module, paths: Mapping[int, str]) -> Iterator[dict[str, list[tuple[Any, Any]]]]:
    """path -> copies of (arguments, output) of each call of the modules with these ids, while the context lasts."""
    seen: dict[str, list[tuple[Any, Any]]] = {}

    def note(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            # A residual add in place writes into the layer's own output.
            copied = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
            seen.setdefault(path, []).append((copied, output.clone()))

        return hook

    hooks = [m.register_forward_hook(note(paths[id(m)])) for m in model.modules() if id(m) in paths]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
