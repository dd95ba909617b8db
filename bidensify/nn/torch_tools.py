"""What torch's own tools ask of a module that is not torch's: tracing (torch.fx), parameters by name, TorchScript."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils import parametrize, prune
from torch.nn.utils._named_member_accessor import NamedMemberAccessor
from torch.nn.utils.weight_norm import WeightNorm

from bidensify.errors import ConfigError

__all__ = ["SeenWeight", "asked_by_name", "one_step", "refuse_script", "traced", "unseen"]

Result = TypeVar("Result")

# What reads a parameter by its name to put the same values elsewhere.
_BY_NAME = (
    nn.Module.get_parameter.__code__,
    nn.utils.convert_conv2d_weight_memory_format.__code__,
    inspect.unwrap(cast(Any, WeightNorm.apply)).__code__,
    parametrize.transfer_parametrizations_and_params.__code__,
    NamedMemberAccessor.get_tensor.__code__,
)
# They would put what they make of the binarized weight in place of the latent one.
_APPLY: Any = prune.BasePruningMethod.apply
_REFUSED = {
    parametrize.register_parametrization.__code__: "parametrize before the rewrite, which binarizes what is made",
    _APPLY.__func__.__code__: "a bit has no zero; prune before the rewrite, which then keeps the layer",
}
# What belongs to the parameter, not to the values that a layer computes with; and what gives another look at both.
_OF_PARAMETER = ("data", "grad", "requires_grad")
_VIEWS = (
    "__getitem__",
    "detach",
    "flatten",
    "narrow",
    "permute",
    "reshape",
    "select",
    "t",
    "transpose",
    "view",
    "view_as",
)


def traced(x: Any) -> bool:
    """Whether torch.fx traces the code that handles ``x``: then a part is one step of the graph, as torch's own layers are."""
    return isinstance(x, Proxy)


def one_step(module: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The call of ``module`` as one step of the graph that ``x`` belongs to."""
    path = x.tracer.path_of_module(module)
    return cast(Tensor, x.tracer.create_proxy("call_module", path, (x, *args), kwargs))


def unseen(look: Callable[..., Result], *args: Any) -> Result:
    """Calls what only looks at properties of tensors: each look costs a mode that watches torch's functions (a packed network
    runs under one) as much as a small operation, and tells it nothing."""
    if torch.compiler.is_compiling():
        return look(*args)
    with torch._C.DisableTorchFunction():
        return look(*args)


def asked_by_name() -> bool:
    """Whether the caller's caller wants the parameter of that name, as ``nn.Module.get_parameter`` does.

    Raises:
        ConfigError: it is a function of torch that would exchange the weight of a binary layer.
    """
    if torch.compiler.is_compiling():
        return False
    caller = sys._getframe(2)
    code = caller.f_code
    if code in _REFUSED:
        raise ConfigError(f"the weight of a binary layer cannot be parametrized or pruned: {_REFUSED[code]}")
    # FSDP puts views of its flat parameters in the place of those that it finds by their names.
    return code in _BY_NAME or str(caller.f_globals.get("__name__")).startswith("torch.distributed.")


class SeenWeight(Tensor):
    """What ``layer.weight`` of a binary layer gives outside its forward: the binarized values.

    It is the latent weight that is changed in place (``nn.init``, ``copy_``, ``w[mask] = 0``), and that has ``.data``,
    ``.grad`` and ``.requires_grad``: initialisations, manual loads and averages of others work on what is stored.
    """

    _latent: Tensor

    @classmethod
    def of(cls, latent: Tensor, values: Tensor) -> Tensor:
        """``values``, with ``latent`` behind them; of a tensor of another library's class as they are."""
        if type(values) is not Tensor:
            return values
        seen = values.as_subclass(cls)
        seen._latent = latent
        return seen

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[Any],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            stored = getattr(getattr(func, "__self__", None), "__name__", "") in _OF_PARAMETER
        else:
            stored = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        with torch._C.DisableTorchFunctionSubclass():
            latent = args[0]._latent if args and isinstance(args[0], SeenWeight) else None
            if stored and latent is not None:
                return func(latent, *args[1:], **kwargs)
            if stored and isinstance(kwargs.get("tensor"), SeenWeight):  # as torch.nn.init hands it on
                return func(**{**kwargs, "tensor": kwargs["tensor"]._latent})
            result = func(*args, **kwargs)
            return (
                cls.of(func(latent, *args[1:], **kwargs), result) if latent is not None and name in _VIEWS else result
            )

    def __reduce_ex__(self, protocol: Any) -> Any:
        return cast(Any, self.detach().as_subclass(Tensor)).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.detach().as_subclass(Tensor).clone()


def refuse_script(module: nn.Module) -> NoReturn:
    """For ``__prepare_scriptable__``.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        f"torch.jit.script cannot compile {type(module).__name__}, which chooses its kernels as it runs; use torch.jit.trace, or "
        "bidensify.export (torch.export, ONNX)"
    )
