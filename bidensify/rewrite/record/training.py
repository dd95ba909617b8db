"""What code that runs in training alone calls beside what evaluation does: auxiliary heads, deep supervision."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from types import CodeType, FunctionType

from torch import fx, nn

__all__ = ["more_in_training"]


def _codes(module: nn.Module) -> Iterator[CodeType]:
    """The code of a module's own class, and of those that it is made of, down to torch's."""
    for cls in type(module).__mro__:
        if not cls.__module__.startswith("torch."):
            yield from (inspect.unwrap(item).__code__ for item in vars(cls).values() if isinstance(item, FunctionType))


def more_in_training(model: nn.Module, found: fx.Graph, run: Callable[[], fx.Graph]) -> dict[str, int]:
    """path -> how many more (below 0: fewer) calls of a module a run in training mode makes, of those that differ.

    Args:
        model: what was recorded; where none of its code reads ``training`` there is no second run.
        found: the record of its evaluation.
        run: records it in training mode, on fake tensors: code that trains may change parameters in place (a momentum
            encoder's).
    """
    if not any("training" in code.co_names for module in model.modules() for code in _codes(module)):
        return {}
    try:
        graph = run()
    except Exception:
        # Code that wants labels while it trains, say: there is nothing to compare then.
        return {}
    counts = [Counter(str(n.target) for n in each.nodes if n.op == "call_module") for each in (graph, found)]
    difference = {path: counts[0][path] - counts[1][path] for path in counts[0] | counts[1]}
    return {path: number for path, number in difference.items() if number}
