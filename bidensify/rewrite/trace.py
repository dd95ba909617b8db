"""Trace the code of one block alone (``torch.fx``); its children stay calls."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from torch import fx, nn

from bidensify.rewrite.recorded import Call, TensorSpec
from bidensify.rewrite.untouched import untouched

__all__ = ["NotTraceable", "bind", "trace_once"]


class NotTraceable(Exception):
    """Why a block keeps its code."""


class _BlockTracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def bind(block: nn.Module, calls: Sequence[Call]) -> tuple[list[str], dict[str, Any]]:
    """Parameter names that vary (tensors, numbers) and those fixed at one value over all calls."""
    signature = inspect.signature(type(block).forward)
    varying: list[str] = []
    constants: dict[str, Any] = {}
    for number, call in enumerate(calls):
        bound = signature.bind(block, *call.args, **call.kwargs)
        for name, parameter in list(signature.parameters.items())[1:]:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                if name in bound.arguments:
                    raise NotTraceable(f"its forward takes *{name}")
                continue
            if parameter.kind is parameter.POSITIONAL_ONLY:
                raise NotTraceable(f"its argument {name} is positional-only")
            value = bound.arguments.get(name, parameter.default)
            varies = isinstance(value, TensorSpec) or (
                name in bound.arguments and isinstance(value, (int, float)) and not isinstance(value, bool)
            )
            if not varies and not (value is None or isinstance(value, (bool, str, int, float))):
                raise NotTraceable(f"its argument {name} is a {type(value).__name__}")
            if number == 0:
                if varies:
                    varying.append(name)
                else:
                    constants[name] = value
            elif varies != (name in varying) or (not varies and constants[name] != value):
                raise NotTraceable(f"its argument {name} is sometimes {value!r} and sometimes not")
    return varying, constants


@contextlib.contextmanager
def _narrow_forward(block: nn.Module, varying: list[str], constants: dict[str, Any]) -> Iterator[None]:
    """For the time of a trace the block's forward takes the varying arguments alone."""
    cls = type(block)
    passed = ", ".join(f"{name}={name}" for name in varying)
    namespace: dict[str, Any] = {"_forward": cls.forward, "_constants": constants}
    # The names come from the live signature, so they are identifiers.
    exec(f"def forward(self, {', '.join(varying)}):\n    return _forward(self, {passed}, **_constants)\n", namespace)
    block.__class__ = type(cls.__name__, (cls,), {"forward": namespace["forward"], "__module__": cls.__module__})
    try:
        yield
    finally:
        block.__class__ = cls


def trace_once(block: nn.Module, training: bool, varying: list[str], constants: dict[str, Any]) -> fx.Graph:
    """The graph of the block's code in the given mode; the block is left as it was.

    Raises:
        NotTraceable: the code makes constant tensors or sets attributes, which a graph does not hold.
    """
    flag = block.training
    # Before the snapshot, so that the mode does not count as a change of the block's own.
    block.training = training
    try:
        with untouched(block) as changed, _narrow_forward(block, varying, constants):
            graph = _BlockTracer(autowrap_functions=()).trace(block)
            names = changed()
    finally:
        block.training = flag
    if names:
        raise NotTraceable(f"its forward makes constant tensors or sets attributes ({', '.join(names)})")
    return graph
