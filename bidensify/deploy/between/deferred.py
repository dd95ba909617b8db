"""Concatenations and nearest-neighbour upsamplings that are never made: a packed layer reads their parts where they lie.

A decoder's ``torch.cat([upsampled, skip], 1)`` is often the largest tensor of a network, and a packed layer keeps nothing of
it but one bit per value. While a packed model runs without gradients, ``torch.cat`` over channels and ``F.interpolate`` by a
power of two give a ``Deferred`` in place of a tensor. A packed layer takes it apart and computes the same bits from its
parts. For anything else it is a tensor like others: the first operation that is not a packed layer makes it.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from bidensify.deploy.between.placed import placed

__all__ = ["Deferred", "Part", "defer_concatenations", "made", "only_deferring"]

_DTYPES = (torch.float32, torch.bfloat16)
_CONCATENATIONS = (torch.cat, torch.concat, torch.concatenate)
# They read no value and write none; neither do the getters of properties (`__get__`).
_LOOKS = frozenset(
    ("size", "dim", "ndimension", "numel", "nelement", "stride", "is_contiguous", "is_floating_point", "__len__")
)


@dataclass(frozen=True)
class Part:
    """Some channels of a deferred tensor: ``x`` (N, C, H / up, W / up), channels_last, each pixel standing for up x up."""

    x: Tensor
    up: int


class Deferred(Tensor):
    """(N, C, H, W) in parts; makes itself a plain tensor as soon as anything but a packed layer uses it."""

    _parts: tuple[Part, ...]
    _recipe: Callable[[], Tensor] | None
    _made: Tensor | None
    consumed: bool
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[Deferred], shape: tuple[int, int, int, int], parts: tuple[Part, ...], recipe: Callable[[], Tensor]
    ) -> Deferred:
        _, c, h, w = shape
        like = parts[0].x
        self: Deferred = Tensor._make_wrapper_subclass(
            cls, shape, strides=(h * w * c, 1, w * c, c), dtype=like.dtype, device=like.device
        )
        self._parts, self._recipe, self._made, self.consumed = parts, recipe, None, False
        return self

    @property
    def parts(self) -> tuple[Part, ...] | None:
        """What it consists of, or None once it was made."""
        return self._parts if self._made is None else None

    def make(self) -> Tensor:
        """The plain tensor, made at the first call."""
        if self._made is None:
            assert self._recipe is not None
            with torch._C.DisableTorchFunction():
                self._made = self._recipe()
            self._recipe, self._parts = None, ()
        return self._made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return func(*tree_map(made, args), **tree_map(made, kwargs or {}))


def made(value: Any) -> Any:
    """A deferred tensor as a plain one; anything else as it is."""
    return value.make() if type(value) is Deferred else value


class _Mode(TorchFunctionMode):
    """Active while a packed model runs."""

    def __init__(self) -> None:
        super().__init__()
        self.live: list[weakref.ref[Deferred]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _CONCATENATIONS or func is F.interpolate:
            result = (_interpolate if func is F.interpolate else _concatenate)(func, args, kwargs)
            if result is not None:
                self.live.append(weakref.ref(result))
                return result
        elif self.live and not _only_looks(func):
            self._settle(func, kwargs)
            args, kwargs = tree_map(made, args), tree_map(made, kwargs)
        plain = placed(func, args, kwargs)
        return func(*args, **kwargs) if plain is None else plain

    def _settle(self, func: Any, kwargs: dict[str, Any]) -> None:
        """Nothing may happen between a concatenation and its use that could change the parts: what waits is made before
        any other operation, and what a packed layer has used already before any that could write in place.
        """
        writes = _may_write(func, kwargs)
        kept = []
        for reference in self.live:
            deferred = reference()
            if deferred is None or deferred.parts is None:
                continue
            if writes or not deferred.consumed:
                deferred.make()
            else:
                kept.append(reference)
        self.live = kept


def _only_looks(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__get__" or name in _LOOKS


def _may_write(func: Any, kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "_")
    private = name.startswith("__") and name.endswith("__")
    in_place = (
        name.startswith("__i") or name in ("__set__", "__setitem__", "__delitem__") if private else name.endswith("_")
    )
    # Functional forms with an `inplace` argument may be given it by position.
    functional = getattr(func, "__module__", "") == F.__name__ and "inplace" in getattr(
        getattr(func, "__code__", None), "co_varnames", ()
    )
    return bool(in_place or functional or kwargs.get("inplace") or kwargs.get("out") is not None)


def _parts_of(value: Any) -> tuple[Part, ...] | None:
    """What a tensor consists of, or None where kernels could not read it."""
    if type(value) is Deferred:
        if value.parts is not None:
            return value.parts
        value = value.make()
    if type(value) not in (Tensor, nn.Parameter) or value.dim() != 4 or value.device.type != "cpu":
        return None
    if value.dtype not in _DTYPES or not value.numel() or not value.is_contiguous(memory_format=torch.channels_last):
        return None
    return (Part(value, 1),)


def _concatenate(func: Any, args: Any, kwargs: Any) -> Deferred | None:
    tensors = args[0] if args else kwargs.get("tensors")
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    if not isinstance(tensors, list | tuple) or dim not in (1, -3) or kwargs.get("out") is not None:
        return None
    parts: list[Part] = []
    for tensor in tensors:
        found = _parts_of(tensor)
        if found is None:
            return None
        parts.extend(found)
    n, _, h, w = tensors[0].shape
    if any(t.shape[0] != n or t.shape[2:] != (h, w) or t.dtype != tensors[0].dtype for t in tensors):
        return None
    shape = (n, sum(t.shape[1] for t in tensors), h, w)
    return Deferred(shape, tuple(parts), lambda: func(*args, **kwargs))


def _interpolate(func: Any, args: Any, kwargs: Any) -> Deferred | None:
    names = ("input", "size", "scale_factor", "mode")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    # A mode is given every argument of the function, the defaults among them.
    others = ("align_corners", "recompute_scale_factor", "antialias")
    if len(args) > len(names) or given.get("mode", "nearest") != "nearest" or any(kwargs.get(key) for key in others):
        return None
    x = given["input"]
    found = _parts_of(x)
    if found is None:
        return None
    n, c, h, w = x.shape
    up = _factor(given.get("size"), given.get("scale_factor"), h, w)
    if up is None:
        return None
    parts = tuple(Part(part.x, part.up * up) for part in found)
    return Deferred((n, c, h * up, w * up), parts, lambda: func(*args, **kwargs))


def _factor(size: Any, scale: Any, h: int, w: int) -> int | None:
    """The power of two by which height and width grow, or None. Only there is every rounding of indices exact."""
    if (size is None) == (scale is None):
        return None
    if size is not None:
        height, width = (size, size) if isinstance(size, int) else tuple(size) if len(size) == 2 else (0, 0)
        factors = {height / h, width / w}
    else:
        factors = {float(value) for value in scale} if isinstance(scale, list | tuple) else {float(scale)}
    factor = factors.pop()
    whole = int(factor)
    return whole if not factors and whole == factor and whole > 1 and whole & (whole - 1) == 0 else None


def only_deferring() -> bool:
    """Whether no ``TorchFunctionMode`` is active but, perhaps, the one of this module."""
    active = torch._C._len_torch_function_stack()
    return active == 0 or (active == 1 and type(torch._C._get_function_stack_at(0)) is _Mode)


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
        idle = torch.is_grad_enabled() or torch._C._get_tracing_state() is not None or transformed
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
        if any(reference() is not None for reference in mode.live):
            return tree_map(made, output)
        return None


def defer_concatenations(model: nn.Module) -> nn.Module:
    """Lets the packed layers of ``model`` read concatenations in parts, in place; see the module."""
    model.register_forward_pre_hook(_Enter())
    # Also after an exception: the mode must not outlive the call.
    model.register_forward_hook(_Leave(), always_call=True)
    return model
