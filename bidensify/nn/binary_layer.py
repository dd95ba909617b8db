"""What makes a convolution or a linear layer binary: a mixin that goes before its actual class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from bidensify._util.modes import quiet
from bidensify.exact import latent
from bidensify.kernels import autograd
from bidensify.kernels import training_ops as ops
from bidensify.kernels.dense import supports
from bidensify.kernels.recompute import Recomputed
from bidensify.nn.bypass import Bypass
from bidensify.nn.contract import ActivationBinarizer, FrozenLayer
from bidensify.nn.native import convolve, countable, fusible_norm
from bidensify.nn.torch_tools import SeenWeight, asked_by_name, one_step, refuse_script, traced
from bidensify.nn.used_weight import UsedWeight, parametrized, used_weight
from bidensify.nn.weight import WeightBinarizer

__all__ = ["BinaryLayer", "binary_layers", "make_binary", "set_binarization", "state_of"]


class BinaryLayer(nn.Module):
    """Mixin of every binary layer: y = activation(norm(layer(binarizer(x), binarized weight)) + bypass(x)).

    With ``activation_first`` it is y = activation(norm(layer(...))) + bypass(x).

    It stands before an ``nn.Conv2d``, ``nn.ConvTranspose2d`` or ``nn.Linear`` (or any subclass) in the class's bases.
    The latent weight stays the parameter named "weight" (state_dict, optimizers); reading ``.weight`` gives the
    binarized tensor, so that a subclass's own ``forward`` computes with it, and changing that in place changes the latent
    weight (``torch_tools.SeenWeight``). A layer that makes its weight (weight
    standardisation, a parametrization, a hook) reads its latent weight as ever, and what it made is binarized where it
    enters the convolution; its parameters and their names stay.

    Attributes:
        binarizer: turns the input into two values (``ActivationBinarizer``).
        weight_binarizer: turns the latent weight into two values per output channel (``WeightBinarizer``).
        norm: BatchNorm over the output channels (or a norm that says what it is, ``folded``), or None.
        bypass: the full-precision signal (``Bypass``), or None where a residual add outside supplies it.
        activation: what follows (Identity where the network's own activation does).
        activation_first: the bypass joins behind the activation.
        binarize_weights: False computes with the latent weight (the stage that binarizes activations alone).
        method: name of the method that made the layer.
        makes_weight: whether the layer's own code makes the weight that it convolves with.
    """

    binarizer: ActivationBinarizer
    weight_binarizer: WeightBinarizer
    norm: nn.Module | None
    bypass: Bypass | None
    activation: nn.Module
    binarize_weights: bool
    method: str
    makes_weight: bool = False
    activation_first: bool = False

    def install(
        self,
        *,
        binarizer: ActivationBinarizer,
        weight_binarizer: WeightBinarizer,
        norm: nn.Module | None,
        bypass: Bypass | None,
        activation: nn.Module | None = None,
        method: str = "bidense",
        makes_weight: bool = False,
        activation_first: bool = False,
    ) -> None:
        """Gives the layer its parts; until then it is the float layer that it was."""
        self.binarizer = binarizer
        self.weight_binarizer = weight_binarizer
        self.norm = norm
        self.bypass = bypass
        self.activation = nn.Identity() if activation is None else activation
        self.method = method
        self.makes_weight = makes_weight
        self.activation_first = activation_first
        self.binarize_weights = True

    @property
    def latent_weight(self) -> Tensor:
        """The float tensor behind the binary weight: a parameter, unless a parametrization or a hook makes it of others."""
        weight = self._parameters.get("weight")
        if weight is not None:
            return weight
        if parametrized(self):
            return cast(Tensor, self.parametrizations["weight"]())  # type: ignore[operator,index]
        # torch's weight_norm and its like set a plain attribute.
        if "weight" not in self.__dict__:
            raise AttributeError("weight")
        return cast(Tensor, self.__dict__["weight"])

    def latent_parameters(self) -> list[nn.Parameter]:
        """The parameters that the binary weight is made of."""
        if self._parameters.get("weight") is not None:
            return [cast(nn.Parameter, self._parameters["weight"])]
        made_of = ("weight_", "parametrizations.weight.")
        return [value for name, value in self.named_parameters() if name.startswith(made_of)]

    def _get_weight(self) -> Tensor:
        weight = self.latent_weight
        # A layer under construction (or one whose weights are not binarized yet) computes with the latent weight.
        if not self.__dict__.get("binarize_weights", False) or self.makes_weight or asked_by_name():
            return weight
        if not torch.compiler.is_compiling() and (signs := latent.signs_in_use(self)) is not None:
            return signs
        recomputed: Recomputed | None = self.__dict__.get("_recomputed")
        binarizer = self.weight_binarizer
        if not self.__dict__.get("_computing", False) and not torch.compiler.is_compiling():
            return SeenWeight.of(weight, binarizer(weight))
        if recomputed is None or not quiet(binarizer) or not binarizer.native(weight):
            return cast(Tensor, binarizer(weight))
        binary, scale = autograd.binarize_rows(
            weight, scaled=binarizer.scaled, ste_scaled=binarizer.ste_scaled, owned=self.plain_forward()
        )
        recomputed.add(binary, source := weight.detach(), lambda: ops.weight_again(source, scale))
        return binary

    def _set_weight(self, value: Tensor | None) -> None:
        if value is None or isinstance(value, nn.Parameter):
            self.register_parameter("weight", value)
        elif parametrized(self):
            super(BinaryLayer, type(self)).weight.fset(self, value)  # type: ignore[misc]
        else:
            self.__dict__["weight"] = value

    weight = property(_get_weight, _set_weight, lambda self: self.__dict__.pop("weight"))
    __prepare_scriptable__ = refuse_script

    def binary_weight(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(±1 tensor in the latent weight's shape, scale (C_out,), offset (C_out,) or None); see ``WeightBinarizer.codes``."""
        weight = used_weight(self, super().forward) if self.makes_weight else self.latent_weight
        return self.weight_binarizer.codes(weight.detach())

    def conv_only(self, a: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The bare layer of the class below, on an input that is binarized already: C_in -> C_out channels."""
        if not self.makes_weight and torch.compiler.is_compiling():
            return self.bare_forward(a, *args, **kwargs)
        if not self.makes_weight:
            self.__dict__["_computing"] = True
            try:
                return self.bare_forward(a, *args, **kwargs)
            finally:
                self.__dict__.pop("_computing", None)
        with UsedWeight(self.weight_binarizer if self.binarize_weights else nn.Identity()):
            return self.bare_forward(a, *args, **kwargs)

    def bare_forward(self, a: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The forward of the class below, as it is."""
        return cast(Tensor, super().forward(a, *args, **kwargs))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if traced(x):
            return one_step(self, x, *args, **kwargs)
        if not torch.compiler.is_compiling() and not _any_global_hook():
            y = latent.evaluate(self, x, args, kwargs)
            if y is not None:
                return y
            if supports(x):
                return self._fused_forward(x, *args, **kwargs)
        y = self.binarizer.weigh(x, self.conv_only(self.binarizer(x), *args, **kwargs), self)
        side = None if self.bypass is None else self.bypass(x, y.shape[-2:] if self.bypass.dim == 1 else None)
        return self._finish(y, side)

    def _finish(self, y: Tensor, side: Tensor | None) -> Tensor:
        """activation(norm(y) + side), or activation(norm(y)) + side."""
        if self.norm is not None:
            y = self.norm(y)
        if side is not None and not self.activation_first:
            y = y + side.to(y.dtype)
        y = cast(Tensor, self.activation(y))
        return y if side is None or not self.activation_first else y + side.to(y.dtype)

    def plain_forward(self) -> bool:
        """Whether ``conv_only`` is torch's own, which uses its input and weight once and hands their gradients on."""
        function = getattr(super().forward, "__func__", None)
        inner = getattr(type(self), "_conv_forward", None)
        return function in _TORCH_FORWARDS and inner in (None, nn.Conv2d._conv_forward)

    def _fused_forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``forward`` with whichever parts the training kernels know; the others are called as they are."""
        binarizer, bypass, dim = self.binarizer, self.bypass, self.binarizer.dim
        recomputed = Recomputed()
        split = None
        counts = not args and not kwargs and not binarizer.calibrating and countable(self, x)
        if quiet(binarizer) and binarizer.enabled and not binarizer.calibrating and x.dim() > 1:
            known = bypass is not None and type(bypass).forward is Bypass.forward and quiet(bypass)
            groups = min(bypass.out_channels, binarizer.channels) if bypass is not None and known else 0
            if x.shape[dim] == binarizer.channels:
                split = binarizer.split(x, groups, self.plain_forward(), signs=not counts)
        if split is None:
            a = binarizer(x)
        else:
            a = split.binary
            recomputed.add(a, split.source, split.remake)
        self.__dict__["_recomputed"] = recomputed
        try:
            with recomputed.hooks():
                y = convolve(self, a, split) if counts else None
                if y is None:
                    y = binarizer.weigh(x, self.conv_only(a, *args, **kwargs), self)
        finally:
            self.__dict__.pop("_recomputed", None)
            recomputed.forget()
        del a
        side = None
        if bypass is not None:
            size = y.shape[-2:] if bypass.dim == 1 else None
            passed = None if split is None else split.passed
            side = bypass(x, size) if passed is None else bypass.after_fusion_down(passed, size)
        return self._fused_finish(y, side, dim)

    def _fused_finish(self, y: Tensor, side: Tensor | None, dim: int) -> Tensor:
        """``_finish`` in one pass where a training kernel does it."""
        if side is not None and side.shape != y.shape:
            raise RuntimeError(f"bypass gives shape {tuple(side.shape)}, the layer {tuple(y.shape)}")
        late, side = (side, None) if self.activation_first else (None, side)
        norm, activation = self.norm, self.activation
        ready = supports(y)
        if norm is not None and not (ready and fusible_norm(norm, y, dim)):
            y, norm = norm(y), None
            ready = supports(y)
        parameters = None
        if ready and quiet(activation) and getattr(activation, "dim", dim) == dim:
            said = getattr(activation, "fused", None)
            parameters = said() if callable(said) else None
            if parameters is not None and len(parameters[0]) != y.shape[dim]:
                parameters = None
        if norm is not None or parameters is not None:
            y = autograd.post(y, side, cast(Any, norm), parameters, dim)
        elif side is not None:
            y = y + side.to(y.dtype)
        y = y if parameters is not None else cast(Tensor, activation(y))
        return y if late is None else y + late.to(y.dtype)

    def __reduce_ex__(self, protocol: Any) -> Any:
        base = type(self).__dict__.get("_made_from")
        if base is None:
            return super().__reduce_ex__(protocol)
        # A class that says how it is pickled (parametrized ones refuse) is asked, as if it were not binary.
        getstate = getattr(self, "__getstate__", None)
        return _rebuild, (base,), self.__dict__ if getstate is None else getstate()


_any_global_hook: Callable[[], bool] = nn.modules.module._has_any_global_hook
_TORCH_FORWARDS = (nn.Conv2d.forward, nn.ConvTranspose2d.forward, nn.Linear.forward)
_made: dict[type[nn.Module], type[nn.Module]] = {}


def make_binary(base: type[nn.Module]) -> type[nn.Module]:
    """The class with ``BinaryLayer`` before ``base``; the same object for the same ``base``."""
    if base not in _made:
        made = type(
            f"Binary{base.__name__}",
            (BinaryLayer, base),
            {"_made_from": base, "__module__": base.__module__, "__doc__": f"A 1-bit {base.__name__}."},
        )
        if base.__module__ == parametrize.__name__:
            # torch makes a class for each parametrized module: kept here it would live for ever.
            return made
        _made[base] = made
    return _made[base]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    made = make_binary(base)
    return made.__new__(made)


def binary_layers(model: nn.Module) -> Iterator[tuple[str, BinaryLayer]]:
    """(path, layer) of every binary layer, each once, in ``named_modules`` order."""
    for path, module in model.named_modules():
        if isinstance(module, BinaryLayer):
            yield path, module


def set_binarization(model: nn.Module, *, activations: bool, weights: bool) -> None:
    """Switches binarization of activations and of weights on or off in every binary layer.

    The stages of training: (True, False), then (True, True). (False, False) computes in float with the latent weights.
    """
    for _, layer in binary_layers(model):
        layer.binarizer.enabled = activations
        layer.binarize_weights = weights


def state_of(module: nn.Module) -> str:
    """ "packed" where a module is or holds a frozen layer, else "latent" where it is or holds a binary one, else "float"."""
    state = "float"
    for each in module.modules():
        if isinstance(each, FrozenLayer):
            return "packed"
        if isinstance(each, BinaryLayer):
            state = "latent"
    return state
