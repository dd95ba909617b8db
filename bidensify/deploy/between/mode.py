"""The mode that is active while a packed model runs: which operations wait (``deferred``), and what makes them real."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode_temporarily
from torch.utils._pytree import tree_leaves, tree_map

from bidensify.deploy.between import sums
from bidensify.deploy.between.deferred import Deferred, add, concatenate, interpolate, made
from bidensify.deploy.between.placed import PLACED, placed

__all__ = ["defer_concatenations", "only_deferring", "unwatched"]

Result = TypeVar("Result")

_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
_ADDED = sums.ADDITIONS | sums.SUMS | {torch.stack}
# Everything else runs as it is, where nothing waits.
_KNOWN = frozenset((*_CONCATENATIONS, *_ADDED, *PLACED, F.interpolate, sums.POST))
# They read no value and write none; neither do the getters of properties (`__get__`).
_LOOKS = frozenset(
    ("size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "__len__")
)


class _Mode(TorchFunctionMode):
    """Active while a packed model runs."""

    def __init__(self) -> None:
        super().__init__()
        self.live: list[weakref.ref[Deferred]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.live and func not in _KNOWN:
            return func(*args, **kwargs)
        if func in _CONCATENATIONS or func is F.interpolate:
            result = (interpolate if func is F.interpolate else concatenate)(func, args, kwargs)
            if result is not None:
                self.live.append(weakref.ref(result))
                return result
        elif (summed := self._summed(func, args, kwargs)) is not None:
            return summed
        elif self.live and not _only_looks(func):
            self._settle(func, args, kwargs)
            args, kwargs = tree_map(made, args), tree_map(made, kwargs)
        plain = placed(func, args, kwargs)
        return func(*args, **kwargs) if plain is None else plain

    def _summed(self, func: Any, args: Any, kwargs: Any) -> Tensor | None:
        """What a sum, or the activation behind one, gives; None where ``func`` is none or not of dense tensors."""
        if func is sums.POST and args and type(args[0]) is Deferred:
            terms, activation = args[0].terms, sums.activation_of(args, kwargs)
            found = None if terms is None or activation is None else sums.add_up(args[0].shape, terms, activation)
            args[0].consumed = args[0].consumed or found is not None
            return found
        result = add(func, args, kwargs) if func in _ADDED else None
        if result is not None:
            self.live.append(weakref.ref(result))
        return result

    def _settle(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Nothing may happen between a concatenation and its use that could change the parts: what waits is made before
        any other operation, and what a packed layer has used already before any that could write in place.
        """
        writes = _may_write(func, args, kwargs)
        kept = []
        for reference in self.live:
            deferred = reference()
            if deferred is None or not deferred.waits:
                continue
            if writes or not deferred.consumed:
                deferred.make()
            else:
                kept.append(reference)
        self.live = kept


@lru_cache(maxsize=1024)
def _only_looks(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__get__" or name in _LOOKS


def _may_write(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "_")
    private = name.startswith("__") and name.endswith("__")
    in_place = (
        name.startswith("__i") or name in ("__set__", "__setitem__", "__delitem__") if private else name.endswith("_")
    )
    return bool(in_place or _asks_in_place(func, args) or kwargs.get("inplace") or kwargs.get("out") is not None)


def _asks_in_place(func: Any, args: Any) -> bool:
    """Whether a functional form is given its `inplace` argument by position."""
    if getattr(func, "__module__", "") != F.__name__:
        return False
    names = getattr(getattr(func, "__code__", None), "co_varnames", ())
    return "inplace" in names[: len(args)] and bool(args[names.index("inplace")])


def only_deferring() -> bool:
    """Whether no ``TorchFunctionMode`` is active but, perhaps, the one of this module."""
    active = torch._C._len_torch_function_stack()
    return active == 0 or (active == 1 and type(torch._C._get_function_stack_at(0)) is _Mode)


def unwatched(function: Callable[..., Result], *args: Any) -> Result:
    """Calls what reads plain tensors and writes to none: each of its small operations would cost as much again under the mode."""
    if torch.compiler.is_compiling() or not isinstance(_get_current_function_mode(), _Mode):  # type: ignore[no-untyped-call]
        return function(*args)
    with _pop_mode_temporarily():
        return function(*args)


class _Stack(threading.local):
    def __init__(self) -> None:
        self.calls: list[tuple[nn.Module, _Mode | None]] = []


_stack = _Stack()


def _on_cpu(model: nn.Module) -> bool:
    """Whether kernels can read parts: a mode costs each operation of the model some time, in vain elsewhere."""
    first = next(model.buffers(), None)
    return first is None or first.device.type == "cpu"


class _Enter:
    def __call__(self, module: nn.Module, args: Any) -> None:
        if torch.compiler.is_compiling():
            return
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        # Who watches functions from outside (a recorder, a counter) is to see every one of them.
        watched = torch._C._len_torch_function_stack() > 0
        idle = torch.is_grad_enabled() or torch._C._get_tracing_state() is not None or transformed or watched
        mode = None if idle or any(outer for _, outer in _stack.calls) or not _on_cpu(module) else _Mode()
        _stack.calls.append((module, mode))
        if mode is not None:
            mode.__enter__()  # type: ignore[no-untyped-call]


class _Leave:
    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        # After an exception in another hook, _Enter may not have run.
        if torch.compiler.is_compiling() or not _stack.calls or _stack.calls[-1][0] is not module:
            return None
        _, mode = _stack.calls.pop()
        if mode is None:
            return None
        mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]
        left = [deferred for reference in mode.live if (deferred := reference()) is not None]
        if not left or output is None:
            return None
        for deferred in left:
            # A module may keep it, and nobody watches any longer what its parts become.
            deferred.make()
        return _all_made(output, set())


def _all_made(value: Any, seen: set[int]) -> Any:
    """``value`` with plain tensors in place of deferred ones, in dataclasses that torch does not look into in place."""

    def one(leaf: Any) -> Any:
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type) and id(leaf) not in seen:
            seen.add(id(leaf))
            for field in dataclasses.fields(leaf):
                held = getattr(leaf, field.name, None)
                new = _all_made(held, seen)
                if any(type(each) is Deferred for each in tree_leaves(held)):
                    try:
                        setattr(leaf, field.name, new)
                    except dataclasses.FrozenInstanceError:
                        object.__setattr__(leaf, field.name, new)
        return made(leaf)

    return tree_map(one, value)


def defer_concatenations(model: nn.Module) -> nn.Module:
    """Lets the packed layers of ``model`` read concatenations in parts, in place; see the module."""
    model.register_forward_pre_hook(_Enter())
    # Also after an exception: the mode must not outlive the call.
    model.register_forward_hook(_Leave(), always_call=True)
    return model
