"""Concatenations, nearest-neighbour upsamplings and sums that are never made: what uses them reads their parts where they lie.

A decoder's ``torch.cat([upsampled, skip], 1)`` is often the largest tensor of a network, and a packed layer keeps nothing of
it but one bit per value. While a packed model runs without gradients, ``torch.cat`` over channels and ``F.interpolate`` by a
power of two give a ``Deferred`` in place of a tensor. A packed layer takes it apart and computes the same bits from its
parts. For anything else it is a tensor like others: the first operation that is not a packed layer makes it. A sum waits for one
operation: another sum, or the RPReLU behind it, which then take one pass together (``sums``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bidensify.deploy.between import sums
from bidensify.deploy.between.sums import Part
from bidensify.kernels import memory

__all__ = ["Deferred", "Part", "add", "concatenate", "interpolate", "made", "parts_of"]

_DTYPES = (torch.float32, torch.bfloat16)


class Deferred(Tensor):
    """(N, C, H, W) in parts; makes itself a plain tensor as soon as anything but a packed layer uses it.

    Attributes:
        kind: "channels", parts side by side; "sum", parts that are added; or "stack", tensors on a dimension before the others,
            (T, N, C, H, W).
    """

    kind: str
    _parts: tuple[Part, ...]
    _recipe: Callable[[], Tensor] | None
    _made: Tensor | None
    consumed: bool
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls: type[Deferred],
        shape: tuple[int, ...],
        parts: tuple[Part, ...],
        recipe: Callable[[], Tensor],
        kind: str = "channels",
    ) -> Deferred:
        *outer, c, h, w = shape
        like = parts[0].x
        dense = (h * w * c, 1, w * c, c)
        strides = dense if len(outer) == 1 else (outer[1] * h * w * c, c * h * w, h * w, w, 1)
        self: Deferred = Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=like.dtype, device=like.device
        )
        self.kind = kind
        self._parts, self._recipe, self._made, self.consumed = parts, recipe, None, False
        return self

    @property
    def parts(self) -> tuple[Part, ...] | None:
        """What its channels consist of, or None once it was made."""
        return self._parts if self._made is None and self.kind == "channels" else None

    @property
    def terms(self) -> tuple[Part, ...] | None:
        """What is added up to it, or None once it was made."""
        return self._parts if self._made is None and self.kind == "sum" else None

    @property
    def waits(self) -> bool:
        """Whether it was not made yet."""
        return self._made is None

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


def _through(name: str) -> Callable[..., Any]:
    def method(self: Deferred, *args: Any, **kwargs: Any) -> Any:
        return getattr(self.make(), name)(*args, **kwargs)

    return method


# They reach for memory past torch's dispatcher.
for _name in (
    "numpy", "tolist", "data_ptr", "untyped_storage", "share_memory_", "__dlpack__", "__deepcopy__", "__reduce_ex__",
):  # fmt: skip
    setattr(Deferred, _name, _through(_name))


def made(value: Any) -> Any:
    """A deferred tensor as a plain one; anything else as it is."""
    return value.make() if type(value) is Deferred else value


def parts_of(value: Any) -> tuple[Part, ...] | None:
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


def _terms_of(value: Any) -> tuple[Part, ...] | None:
    """What a term of a sum is a sum of itself, in float32, or None where kernels could not add it."""
    if type(value) is Deferred and value.terms is not None:
        return value.terms
    found = parts_of(value) if type(value) is not Deferred or value.kind == "channels" else None
    return found if found is not None and len(found) == 1 and found[0].x.dtype == torch.float32 else None


def add(func: Any, args: Any, kwargs: Any) -> Deferred | None:
    """A sum that waits, of tensors or of a stack; a stack of what may be summed; or None."""
    if func in sums.SUMS:
        stack = sums.terms_of_sum(args, kwargs)
        if type(stack) is not Deferred or stack.kind != "stack" or not stack.waits:
            return None
        stack.consumed = True
        return _waiting(tuple(stack.shape[1:]), stack._parts)
    tensors = sums.terms_of_stack(args, kwargs) if func is torch.stack else sums.terms_of_add(args, kwargs)
    found = [_terms_of(tensor) for tensor in tensors or ()]
    # A sum on the right would be added before what is on its left.
    if not found or found[0] is None or any(terms is None or len(terms) != 1 for terms in found[1:]):
        return None
    assert tensors is not None
    shape = tuple(tensors[0].shape)
    if any(tuple(tensor.shape) != shape for tensor in tensors) or not memory.takes(shape, torch.float32):
        return None
    parts = tuple(part for terms in found for part in terms or ())
    if func is not torch.stack:
        return _waiting(shape, parts)
    if len(parts) != len(tensors) or any(part.up != 1 for part in parts):
        return None
    return Deferred((len(parts), *shape), parts, lambda: func(*args, **kwargs), "stack")


def _waiting(shape: tuple[int, ...], parts: tuple[Part, ...]) -> Deferred:
    return Deferred(shape, parts, lambda: _add_up(shape, parts), "sum")


def _add_up(shape: tuple[int, ...], parts: tuple[Part, ...]) -> Tensor:
    found = sums.add_up(shape, parts)
    if found is not None:
        return found
    whole = [part.x if part.up == 1 else F.interpolate(part.x, scale_factor=part.up, mode="nearest") for part in parts]
    return reduce(torch.add, whole)


def _plain(value: Any) -> bool:
    return type(value) is Tensor and value.dim() == 4 and value.device.type == "cpu" and value.is_contiguous()


def concatenate(func: Any, args: Any, kwargs: Any) -> Deferred | None:
    tensors = args[0] if args else kwargs.get("tensors")
    dim = args[1] if len(args) > 1 else kwargs.get("dim", kwargs.get("axis", 0))
    if not isinstance(tensors, list | tuple) or dim not in (1, -3) or kwargs.get("out") is not None:
        return None
    found = [parts_of(tensor) for tensor in tensors]
    if not any(found):
        return None
    parts: list[Part] = []
    for tensor, known in zip(tensors, found, strict=True):
        # One in another order (the pooled branch of an ASPP) is copied, not all of them.
        known = known or parts_of(memory.channels_last(tensor) if _plain(tensor) else None)
        if known is None:
            return None
        parts.extend(known)
    n, _, h, w = tensors[0].shape
    if any(t.shape[0] != n or t.shape[2:] != (h, w) or t.dtype != tensors[0].dtype for t in tensors):
        return None
    shape = (n, sum(t.shape[1] for t in tensors), h, w)
    return Deferred(shape, tuple(parts), lambda: func(*args, **kwargs))


def interpolate(func: Any, args: Any, kwargs: Any) -> Deferred | None:
    names = ("input", "size", "scale_factor", "mode")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    # A mode is given every argument of the function, the defaults among them.
    others = ("align_corners", "recompute_scale_factor", "antialias")
    if len(args) > len(names) or given.get("mode", "nearest") != "nearest" or any(kwargs.get(key) for key in others):
        return None
    x = given["input"]
    found = parts_of(x)
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
