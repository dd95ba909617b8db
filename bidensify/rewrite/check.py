"""After a conversion: is each planned layer hit as recorded, does a second size run, is the output's structure kept?"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode
from torch.fx.node import map_aggregate

from bidensify.errors import CheckError
from bidensify.nn import BinaryLayer
from bidensify.nn.weight import copy_model
from bidensify.rewrite.leaves import frozen_flags
from bidensify.rewrite.plan import Plan
from bidensify.rewrite.recorded import Record, specs

__all__ = ["check"]


class _Counting:
    """Counts the calls of binary layers by their path, without a hook on the model."""

    def __init__(self, model: nn.Module) -> None:
        self.paths = {id(module): path for path, module in model.named_modules() if isinstance(module, BinaryLayer)}
        self.hits: Counter[str] = Counter()

    def __enter__(self) -> _Counting:
        self.original = original = nn.Module.__call__
        paths, hits = self.paths, self.hits

        def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            path = paths.get(id(module))
            if path is not None:
                hits[path] += 1
            return original(module, *args, **kwargs)

        nn.Module.__call__ = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *unused: Any) -> None:
        nn.Module.__call__ = self.original  # type: ignore[method-assign]


def _forward(model: nn.Module, args: Any, kwargs: Any, fake: bool) -> Any:
    with torch.no_grad(), frozen_flags(model), torch.random.fork_rng():
        if not fake:
            return specs(model(*args, **kwargs))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:

            def to_fake(item: Any) -> Any:
                return mode.from_tensor(item) if isinstance(item, Tensor) else item

            return specs(model(*map_aggregate(args, to_fake), **map_aggregate(kwargs, to_fake)))


def _resized(value: Any, rows: int) -> Any:
    def one(item: Any) -> Any:
        if isinstance(item, Tensor) and item.dim() == 4:
            return torch.cat([item, item], -1)[:rows]
        return item

    return map_aggregate(value, one)


def check(model: nn.Module, plan: Plan, record: Record, original: Any = None) -> None:
    """Checks a rewritten model against the record of the original.

    Args:
        model: the rewritten network.
        plan: its plan.
        record: of the original network.
        original: the output's structure on an input of twice the width and one image, or None if the original does not
            run on such an input.

    Raises:
        CheckError: what the rewrite did not keep, where.
    """
    args, kwargs = record.inputs
    with _Counting(model) as counting:
        try:
            output = _forward(model, args, kwargs, record.fake)
        except Exception as error:
            raise CheckError(
                f"the rewritten {plan.model_class} does not run on {plan.inputs}: {type(error).__name__}: {error}"
            ) from error
    for layer in plan.binary:
        if counting.hits[layer.path] != layer.calls:
            raise CheckError(
                f"{layer.path}: called {counting.hits[layer.path]} times after the rewrite, {layer.calls} times "
                "before; keep it by a rule"
            )
    if output != record.output:
        raise CheckError(
            f"the rewritten {plan.model_class} gives {output}, the original {record.output}, on {plan.inputs}"
        )
    if original is not None:
        other = _forward(model, _resized(args, 1), _resized(kwargs, 1), record.fake)
        if other != original:
            raise CheckError(
                f"on one image of twice the width the rewritten {plan.model_class} gives {other}, the original "
                f"{original}"
            )
    _check_copy(model, plan)


def second_size(model: nn.Module, record: Record) -> Any:
    """The output's structure on one image of twice the width, or None where the model takes no such input."""
    args, kwargs = record.inputs
    try:
        return _forward(model, _resized(args, 1), _resized(kwargs, 1), record.fake)
    except Exception:
        return None


def _check_copy(model: nn.Module, plan: Plan) -> None:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with FakeCopyMode(mode):
        twin = copy_model(model)
    if set(twin.state_dict()) != set(model.state_dict()):
        raise CheckError(f"a deepcopy of the rewritten {plan.model_class} has another state_dict")
    layers = {path for path, module in twin.named_modules() if isinstance(module, BinaryLayer)}
    if layers != {path for path, module in model.named_modules() if isinstance(module, BinaryLayer)}:
        raise CheckError(f"a deepcopy of the rewritten {plan.model_class} has other binary layers")
