"""What torch's own tools ask of a module that is not torch's: tracing (torch.fx), parameters by name, TorchScript."""

from __future__ import annotations

import sys
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.fx import Proxy
from torch.nn.utils import parametrize, prune

from bidensify.errors import ConfigError

__all__ = ["asked_by_name", "one_step", "refuse_script", "traced"]

_BY_NAME = nn.Module.get_parameter.__code__
# They would put what they make of the binarized weight in place of the latent one.
_APPLY: Any = prune.BasePruningMethod.apply
_REFUSED = {
    parametrize.register_parametrization.__code__: "parametrize before the rewrite, which binarizes what is made",
    _APPLY.__func__.__code__: "a bit has no zero; prune before the rewrite, which then keeps the layer",
}


def traced(x: Any) -> bool:
    """Whether torch.fx traces the code that handles ``x``: then a part is one step of the graph, as torch's own layers are."""
    return isinstance(x, Proxy)


def one_step(module: nn.Module, x: Any, *args: Any, **kwargs: Any) -> Tensor:
    """The call of ``module`` as one step of the graph that ``x`` belongs to."""
    path = x.tracer.path_of_module(module)
    return cast(Tensor, x.tracer.create_proxy("call_module", path, (x, *args), kwargs))


def asked_by_name() -> bool:
    """Whether the caller's caller is ``nn.Module.get_parameter``, which wants the parameter of that name.

    Raises:
        ConfigError: it is a function of torch that would exchange the weight of a binary layer.
    """
    if torch.compiler.is_compiling():
        return False
    code = sys._getframe(2).f_code
    if code in _REFUSED:
        raise ConfigError(f"the weight of a binary layer cannot be parametrized or pruned: {_REFUSED[code]}")
    return code is _BY_NAME


def refuse_script(module: nn.Module) -> NoReturn:
    """For ``__prepare_scriptable__``.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        f"torch.jit.script cannot compile {type(module).__name__}, which chooses its kernels as it runs; use torch.jit.trace, or "
        "bidensify.export (torch.export, ONNX)"
    )
