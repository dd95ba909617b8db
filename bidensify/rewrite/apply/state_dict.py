"""A full-precision state_dict of the original network loads into the rewritten one."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from bidensify._util.seeding import seeded
from bidensify.config import BidensifyConfig
from bidensify.nn import BinaryLayer
from bidensify.rewrite.apply.start import start
from bidensify.rewrite.plan.entries import LayerPlan
from bidensify.rewrite.weights import shares_weight

__all__ = ["StateDictAdapter", "inside"]

_PARTS = ("binarizer", "weight_binarizer", "norm", "bypass", "activation")
# torch's BatchNorm takes a state_dict without it.
_OPTIONAL = "num_batches_tracked"


def inside(path: str, name: str) -> str:
    """The key of a module's tensor; ``path`` is "" of the network itself."""
    return f"{path}.{name}" if path else name


class StateDictAdapter:
    """Lets a full-precision state_dict of the original network load into the rewritten one.

    What the rewrite makes of the original's values (a norm times its LayerScale, a new norm and an activation's offset, a learned
    scale) is made again of those that are loaded. A key of the original that the state_dict lacks is missing, also where the
    rewritten network no longer has it.

    Attributes:
        renamed: key of the original -> key of the rewritten network, or None for a value that it no longer holds.
        added: keys that the rewrite added; an original state_dict has none of them, and those that nothing of the original makes
            keep their values.
        layers: the binary layers.
        config: the plan's.
        slopes: key of an RPReLU's slope -> the original's key of the PReLU's that it starts from.
        sources: layer path -> the original's keys that its parts start from.
    """

    def __init__(
        self,
        renamed: Mapping[str, str | None],
        added: list[str],
        layers: list[LayerPlan],
        config: BidensifyConfig,
        original: Iterable[str],
        slopes: Mapping[str, str],
    ) -> None:
        self.slopes = dict(slopes)
        self.renamed = dict(renamed)
        self.added = list(added)
        self.layers = list(layers)
        self.config = config
        keys = sorted(original)
        self.sources = {layer.path: [key for key in keys if _feeds(key, layer)] for layer in layers}

    def __call__(
        self,
        module: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        """The pre-hook of ``load_state_dict``; it changes torch's own shallow copy of the dict."""
        if any(prefix + key in state_dict for key in self.added):
            return
        modules, own = dict(module.named_modules()), module.state_dict()
        # A packed network has other keys, and where the rewrite added none an original state_dict is known by nothing.
        added = [key for key in self.added if key in own]
        made: dict[str, Tensor] = {}
        for layer in self.layers if added else ():
            binary = modules.get(layer.path)
            values = {key: state_dict[prefix + key] for key in self.sources[layer.path] if prefix + key in state_dict}
            if not isinstance(binary, BinaryLayer) or not values:
                continue
            wrong = [key for key, value in values.items() if not self._fits(key, value, layer, own)]
            if layer.layer_scale in wrong:
                shape = tuple(values[layer.layer_scale].shape)
                errors.append(
                    f"size mismatch for {prefix}{layer.layer_scale}: shape {shape} in the state_dict, which must be "
                    f"{layer.out_channels} values, one for each output channel of {layer.path}"
                )
            if not wrong and len(values) == len(self.sources[layer.path]):
                draw = not shares_weight(binary, modules.values())
                made.update(_made(layer, binary, values, self.config, draw))
            elif layer.layer_scale is not None:
                # Of a part of its values nothing can be made: the others are reported as missing.
                kept = [inside(layer.path, f"norm.{name}") for name in ("weight", "bias")]
                made.update({key: own[key] for key in kept if key in own})
        for slope, source in self.slopes.items():
            value = state_dict.get(prefix + source)
            if isinstance(value, Tensor) and slope in own and value.numel() in (1, own[slope].numel()):
                made[slope] = value.reshape(-1).expand(own[slope].shape).clone()
        for old, new in self.renamed.items():
            if prefix + old in state_dict:
                value = state_dict.pop(prefix + old)
                if new is not None:
                    state_dict[prefix + new] = value
            elif added and not old.endswith(_OPTIONAL):
                missing.append(prefix + old)
        state_dict.update({prefix + key: value for key, value in made.items() if key in own})
        for key in added:
            state_dict.setdefault(prefix + key, own[key])

    def _fits(self, key: str, value: Any, layer: LayerPlan, own: Mapping[str, Tensor]) -> bool:
        """Whether a value has the size that the layer takes; torch itself reports those that the network still holds."""
        if not isinstance(value, Tensor):
            return False
        if key == layer.layer_scale:
            return value.numel() == layer.out_channels
        held = own.get(self.renamed.get(key, key) or "")
        return held is None or held.shape == value.shape


def _is_own(key: str, layer: LayerPlan) -> bool:
    return not layer.path or key.startswith(f"{layer.path}.")


def _feeds(key: str, layer: LayerPlan) -> bool:
    """Whether a layer's parts start from what the original has under ``key``."""
    of_norm = layer.norm is not None and key in (f"{layer.norm}.weight", f"{layer.norm}.bias")
    of_slope = layer.slope_from is not None and key in (layer.slope_from, f"{layer.slope_from}.weight")
    return of_norm or of_slope or key == layer.layer_scale or _is_own(key, layer)


def _made(
    layer: LayerPlan, binary: BinaryLayer, values: Mapping[str, Tensor], config: BidensifyConfig, draw: bool
) -> dict[str, Tensor]:
    """key of the rewritten network -> what ``start`` makes of the original's values."""
    like = binary.latent_parameters()[0]

    def own(value: Tensor) -> Tensor:
        """A tensor of its own, where the layer is; a layer on the meta device takes it as it is."""
        value = value.detach()
        if like.is_meta:
            return value.clone()
        return value.to(device=like.device, dtype=like.dtype if value.is_floating_point() else value.dtype, copy=True)

    base = type(binary).__dict__["_made_from"]
    twin: nn.Module = base.__new__(base)
    twin.__dict__.update(binary.__dict__)
    children = {name: child for name, child in binary._modules.items() if name not in _PARTS}
    twin.__dict__.update(
        _parameters=dict(binary._parameters), _buffers=dict(binary._buffers), _modules=copy.deepcopy(children)
    )
    # Of a network that is one layer, what is called here is among them.
    twin.__dict__.update(_load_state_dict_pre_hooks=OrderedDict(), _load_state_dict_post_hooks=OrderedDict())
    start_of_name = len(inside(layer.path, ""))
    tensors = {key[start_of_name:]: own(value) for key, value in values.items() if _is_own(key, layer)}
    if "bias" in tensors:
        # The layer's new norm has it.
        twin._parameters["bias"] = nn.Parameter(tensors["bias"], requires_grad=False)
    twin.load_state_dict(tensors, strict=False, assign=True)
    norm: nn.Module | None = None
    if layer.norm is not None:
        norm = nn.BatchNorm2d(layer.out_channels, affine=False)
        for name in ("weight", "bias"):
            found = values.get(f"{layer.norm}.{name}")
            norm._parameters[name] = None if found is None else nn.Parameter(own(found), requires_grad=False)
    gamma = None if layer.layer_scale is None else own(values[layer.layer_scale])
    slope: Tensor | None = None
    if layer.slope_from is not None:
        slope = own(values.get(layer.slope_from, values.get(f"{layer.slope_from}.weight")))  # type: ignore[arg-type]
    with seeded(0):
        begun = start(layer, twin, norm, gamma, config, draw=draw, slope=slope)
    made: dict[str, Tensor] = {}
    if begun.norm is not None and (layer.norm is None or gamma is not None):
        made |= {f"norm.{name}": value for name, value in begun.norm._parameters.items() if value is not None}
    if begun.activation is not None:
        made |= {f"activation.{name}": value for name, value in begun.activation.state_dict().items()}
    made |= {f"weight_binarizer.{name}": value for name, value in begun.parts.weight_binarizer.state_dict().items()}
    if (weight := twin._parameters.get("weight")) is not None:
        made["weight"] = weight
    return {inside(layer.path, name): value.detach() for name, value in made.items()}
