"""A layer in int8: its weight and its input are rounded where they enter the convolution, and all else is float."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from bidensify.nn.int8.rounding import Int8
from bidensify.nn.torch_tools import one_step, traced
from bidensify.nn.used_weight import UsedWeight

__all__ = ["Int8Layer", "int8_layers", "make_int8"]


class Int8Layer(nn.Module):
    """Mixin of every int8 layer, before an ``nn.Conv2d``, ``nn.ConvTranspose2d`` or ``nn.Linear`` or any subclass of one: the
    same layer on a rounded input and a rounded weight. Its parameters are those of the float layer, and so are their names.

    Attributes:
        int8: the rounding; None computes in float.
    """

    int8: Int8 | None

    def install_int8(self) -> None:
        """Gives the layer its rounding; until then it is the float layer that it was."""
        reference = next(p for p in self.parameters() if p.is_floating_point())
        transposed = isinstance(self, nn.modules.conv._ConvTransposeNd)
        self.int8 = Int8(transposed, int(getattr(self, "groups", 1))).to(reference.device).train(self.training)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if traced(x):
            return one_step(self, x, *args, **kwargs)
        if self.int8 is None:
            return cast(Tensor, super().forward(x, *args, **kwargs))
        with UsedWeight(self.int8.weight):
            return cast(Tensor, super().forward(self.int8(x), *args, **kwargs))

    def __reduce_ex__(self, protocol: Any) -> Any:
        base = type(self).__dict__.get("_int8_from")
        if base is None:
            return super().__reduce_ex__(protocol)
        getstate = getattr(self, "__getstate__", None)
        return _rebuild, (base,), self.__dict__ if getstate is None else getstate()


_made: dict[type[nn.Module], type[nn.Module]] = {}


def make_int8(base: type[nn.Module]) -> type[nn.Module]:
    """The class with ``Int8Layer`` before ``base``; the same object for the same ``base``."""
    if base not in _made:
        made = type(
            f"Int8{base.__name__}",
            (Int8Layer, base),
            {"_int8_from": base, "__module__": base.__module__, "__doc__": f"An int8 {base.__name__}."},
        )
        if base.__module__ == parametrize.__name__:
            return made  # of one module alone, as torch's own classes of parametrized modules are
        _made[base] = made
    return _made[base]


def _rebuild(base: type[nn.Module]) -> nn.Module:
    made = make_int8(base)
    return made.__new__(made)


def int8_layers(model: nn.Module) -> list[tuple[str, Int8Layer]]:
    """(path, layer) of every int8 layer."""
    return [(path, module) for path, module in model.named_modules() if isinstance(module, Int8Layer)]
