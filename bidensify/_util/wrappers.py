"""Wrappers that people put around a network; what is rewritten, trained, saved or loaded is the network itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bidensify.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["unwrap"]

# Class name -> attribute that holds the network. By name, since none of these libraries has to be there: torch.compile,
# torch's two data-parallel wrappers, torch's and timm's moving averages.
_INSIDE = {
    "OptimizedModule": "_orig_mod",
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "ModelEma": "ema",
    "ModelEmaV2": "module",
    "ModelEmaV3": "module",
}
_REFUSED = {
    "FullyShardedDataParallel": "its parameters are flattened and spread over processes; give the network before that",
    "FSDPModule": "its parameters are spread over processes; give the network before fully_shard was called",
    "ScriptModule": "a scripted network has no Python forward left; give the network that it was scripted from",
}


def unwrap(model: nn.Module, what: str = "the network") -> nn.Module:
    """Returns the network inside ``torch.compile``, DataParallel, DistributedDataParallel and moving averages.

    Args:
        model: a network, wrapped any number of times, or not.
        what: how an error calls it.

    Raises:
        ConfigError: a wrapper that changes the parameters themselves (FSDP), or a scripted network.
    """
    while True:
        names = [cls.__name__ for cls in type(model).__mro__]
        refused = next((name for name in names if name in _REFUSED), None)
        if refused is not None:
            raise ConfigError(f"{what} is a {refused}: {_REFUSED[refused]}")
        inside = next((getattr(model, _INSIDE[name], None) for name in names if name in _INSIDE), None)
        if inside is None:
            return model
        model = inside
