"""After a conversion: is each planned layer hit as recorded, does a second size run, is the output's structure kept?"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate

from bidensify._util.modes import evaluation_flags
from bidensify.errors import CheckError
from bidensify.nn import BinaryLayer
from bidensify.nn.used_weight import copy_model
from bidensify.rewrite.plan.schema import Plan
from bidensify.rewrite.record.recorded import Record, TensorSpec, specs, tensors_in
from bidensify.rewrite.record.restore import restored, same_random_state

__all__ = ["check", "on_other_values", "second_size"]


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
    with torch.no_grad(), restored(model, fake=fake), evaluation_flags(model), same_random_state(model):
        if not fake:
            return specs(model(*args, **kwargs))
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:

            def to_fake(item: Any) -> Any:
                return mode.from_tensor(item) if isinstance(item, Tensor) else item

            return specs(model(*map_aggregate(args, to_fake), **map_aggregate(kwargs, to_fake)))


def _other(record: Record, wider: bool) -> tuple[Any, Any]:
    """The record's inputs for one sample, images at twice the width or as they are."""
    args, kwargs = record.inputs
    images = [item for item in tensors_in([args, kwargs]) if item.dim() >= 4]
    batch = images[0].shape[0] if images else 0

    def one(item: Any) -> Any:
        if not isinstance(item, Tensor) or item.dim() == 0 or item.shape[0] != batch:
            return item
        return torch.cat([item, item], -1)[:1] if wider and item.dim() >= 4 else item[:1]

    return map_aggregate(args, one), map_aggregate(kwargs, one)


def _same(got: Any, wanted: Any, varying: Any) -> bool:
    """Whether two outputs have one structure, and the sizes that the float network gave in both of its runs.

    Args:
        got, wanted: structures with ``TensorSpec`` in them.
        varying: what the float network gave on other values.
    """
    if isinstance(wanted, TensorSpec) and isinstance(got, TensorSpec) and isinstance(varying, TensorSpec):
        if got.dtype != wanted.dtype or len(got.shape) != len(wanted.shape) or len(varying.shape) != len(wanted.shape):
            return False
        return all(a == b or b != c for a, b, c in zip(got.shape, wanted.shape, varying.shape))
    if type(got) is not type(wanted) or type(varying) is not type(wanted):
        return False
    if isinstance(wanted, dict):
        return list(got) == list(wanted) and all(_same(got[key], wanted[key], varying.get(key)) for key in wanted)
    if isinstance(wanted, (list, tuple)):
        if len(got) != len(wanted) or len(varying) != len(wanted):
            return len(varying) != len(wanted)
        return all(map(_same, got, wanted, varying))
    return bool(got == wanted) or bool(varying != wanted)


def on_other_values(model: nn.Module, record: Record) -> Any:
    """The structure of the float network's output on other values of the recorded sizes, another one where any is found.

    What differs depends on the data (detections, keypoints), and no check can ask it of the rewritten network.
    """

    def changed(item: Any, turn: int) -> Any:
        if not isinstance(item, Tensor) or not item.is_floating_point() or item.dim() < 3:
            return item
        return item.flip(-1) * 0.5**turn + 0.05 * turn

    args, kwargs = record.inputs
    for turn in range(3):
        change = functools.partial(changed, turn=turn)
        found = _forward(model, map_aggregate(args, change), map_aggregate(kwargs, change), record.fake)
        if found != record.output:
            return found
    return record.output


def check(
    model: nn.Module,
    plan: Plan,
    record: Record,
    original: tuple[bool, Any] | None = None,
    rerun: Callable[[], Any] | None = None,
) -> None:
    """Checks a rewritten model against the record of the original.

    Args:
        model: the rewritten network.
        plan: its plan.
        record: of the original network.
        original: what ``second_size`` gave for the original.
        rerun: gives ``on_other_values`` of the original, where there is one still.

    Raises:
        CheckError: what the rewrite did not keep, where.
    """
    args, kwargs = record.inputs
    with _Counting(model) as counting:
        output = _run(model, args, kwargs, record, plan, plan.inputs)
    for layer in plan.binary:
        if counting.hits[layer.path] != layer.calls:
            raise CheckError(
                f"{layer.path}: called {counting.hits[layer.path]} times after the rewrite, {layer.calls} times "
                "before; keep it by a rule"
            )
    varying = record.output
    if output != record.output:
        varying = rerun() if rerun is not None else record.output
        _compare(output, record.output, varying, plan, plan.inputs)
    if original is not None:
        wider, wanted = original
        where = f"one image{' of twice the width' if wider else ''}"
        other = _run(model, *_other(record, wider), record, plan, where)
        # Where sizes depend on the data they do so at every size.
        _compare(other, wanted, wanted if varying == record.output else varying, plan, where)
    _check_copy(model, plan)


def _run(model: nn.Module, args: Any, kwargs: Any, record: Record, plan: Plan, where: str) -> Any:
    try:
        return _forward(model, args, kwargs, record.fake)
    except Exception as error:
        raise CheckError(
            f"the rewritten {plan.model_class} does not run on {where}: {type(error).__name__}: {error}"
        ) from error


def _compare(got: Any, wanted: Any, varying: Any, plan: Plan, where: str) -> None:
    if got != wanted and not _same(got, wanted, varying):
        raise CheckError(
            f"the rewritten {plan.model_class} gives {got}, the original {wanted}, on {where}; if these sizes depend on the "
            "data and should differ, convert with verify=False"
        )


def second_size(model: nn.Module, record: Record) -> tuple[bool, Any] | None:
    """(twice as wide?, the output's structure) on one image, or None where the model takes no such input.

    A network of a fixed input size is run on one image of that size.
    """
    for wider in (True, False):
        try:
            return wider, _forward(model, *_other(record, wider), record.fake)
        except Exception:
            continue
    return None


def _check_copy(model: nn.Module, plan: Plan) -> None:
    # The tensors are shared, so that the copy costs no memory: what is in question is the structure.
    twin = copy_model(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    if set(twin.state_dict()) != set(model.state_dict()):
        raise CheckError(f"a deepcopy of the rewritten {plan.model_class} has another state_dict")
    layers = {path for path, module in twin.named_modules() if isinstance(module, BinaryLayer)}
    if layers != {path for path, module in model.named_modules() if isinstance(module, BinaryLayer)}:
        raise CheckError(f"a deepcopy of the rewritten {plan.model_class} has other binary layers")
