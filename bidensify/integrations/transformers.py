"""transformers: ``from_pretrained(quantization_config=BidensifyConfig(...))``, ``save_pretrained``, and loading it again.

A float checkpoint is loaded first and rewritten then, exactly as ``bidensify(model)`` does: layers that the checkpoint
lacks are initialised by the model's own rules, and a block's trace is proven on real values. A checkpoint of a rewritten
or packed model is rebuilt from the plan in its ``config.json`` while the model is still on the meta device, so that
transformers loads its tensors as it loads any (shards, dtype, device_map); no data and no forward pass.

Importing this module registers the quantizer "bidensify"; ``import bidensify`` sees to it.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer

from bidensify._util.listeners import listen
from bidensify.config import BidensifyConfig
from bidensify.errors import ConfigError, FormatError
from bidensify.integrations.stored import NAME, StoredBidensify

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bidensify.rewrite.plan.schema import Plan

__all__ = ["NAME", "BidensifyQuantizer", "StoredBidensify"]


def _stored(model: nn.Module) -> StoredBidensify:
    """The stored form of a rewritten or packed model."""
    from bidensify.deploy.layers import packed_layers

    plan: Plan = model.bidensify_plan  # type: ignore[assignment]
    packed = {path: layer.meta() for path, layer in packed_layers(model).items()}
    dtype = getattr(model, "_bidensify_float_dtype", None)
    return StoredBidensify(
        plan.config, plan.to_dict(compact=True), packed or None, str(dtype).rpartition(".")[2] if dtype else None
    )


def _remember(model: nn.Module) -> None:
    """Puts the stored form into the configuration of a transformers model, so that ``save_pretrained`` writes it."""
    from transformers.modeling_utils import PreTrainedModel

    if isinstance(model, PreTrainedModel) and hasattr(model, "bidensify_plan"):
        _own_config(model).quantization_config = _stored(model)
        # Names of the layers' own tensors are none of the model's: its patterns, made for published checkpoints, would
        # rename some of them ("norm." to "layernorm."), not always back.
        for part in model.modules():
            if isinstance(part, PreTrainedModel):  # a base model is saved alone, too
                part._weight_conversions = []
        if getattr(model, "hf_quantizer", None) is not None:
            model.hf_quantizer.quantization_config = model.config.quantization_config


def _own_config(model: nn.Module) -> Any:
    """The model's configuration, now its own: a float model that was made of the same object is not rewritten with it."""
    shared = model.config
    own = copy.copy(shared)
    for module in model.modules():
        if module.__dict__.get("config") is shared:
            module.config = own
    return own


def _of_this_class(
    plan: Plan, layers: Mapping[str, Any] | None, model: nn.Module
) -> tuple[Plan, Mapping[str, Any] | None]:
    """Plan and packed layers for ``model``, also where the checkpoint is of its base model alone, or of one with a head.

    A head may build its base model without some layers (a last expansion, a pooler); transformers leaves their weights in the
    checkpoint, and so do we.
    """
    prefix = str(getattr(model, "base_model_prefix", ""))
    modules = dict(model.named_modules())
    known = [layer.path in modules for layer in plan.layers if layer.kind != "function"]
    if all(known) or not prefix:
        return plan, layers
    if prefix in modules:
        moved = plan.moved(prefix)
        if any(layer.path in modules for layer in moved.layers):
            moved = dataclasses.replace(
                moved,
                layers=[layer for layer in moved.layers if layer.path in modules or layer.kind == "function"],
                activations=[item for item in moved.activations if item.path in modules],
            )
        return moved, layers and {
            f"{prefix}.{path}": meta for path, meta in layers.items() if f"{prefix}.{path}" in modules
        }
    inside = {
        path.removeprefix(f"{prefix}."): meta for path, meta in (layers or {}).items() if path.startswith(f"{prefix}.")
    }
    return plan.moved(prefix, out=True), layers and inside


class BidensifyQuantizer(HfQuantizer):  # type: ignore[misc]
    """transformers' side of a rewrite: before and after ``from_pretrained`` loads the weights."""

    requires_calibration = False

    def __init__(self, quantization_config: StoredBidensify | BidensifyConfig, **kwargs: Any) -> None:
        if isinstance(quantization_config, BidensifyConfig):
            quantization_config = StoredBidensify(quantization_config)
        super().__init__(quantization_config, **kwargs)

    @property
    def _packed(self) -> bool:
        return self.quantization_config.layers is not None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuses what could not be done after the weights are read.

        Raises:
            ConfigError: an unknown method, or a plan given for a float checkpoint.
        """
        from bidensify.methods import get_method

        get_method(self.quantization_config.config.method)
        if self.pre_quantized and self.quantization_config.plan is None:
            raise FormatError(
                "config.json: quantization_config names bidensify but holds no plan, so the weights' layout is unknown; "
                "save the model again, or remove quantization_config from config.json if the weights are float"
            )

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Rebuilds a stored model's layers on the meta device."""
        if not self.pre_quantized:
            return model
        from bidensify.deploy.pretrained import empty_packed
        from bidensify.rewrite.apply.model import apply_plan
        from bidensify.rewrite.plan.schema import Plan

        stored = self.quantization_config
        plan, layers = _of_this_class(Plan.from_dict(stored.plan), stored.layers, model)
        apply_plan(model, plan)
        if layers is not None:
            empty_packed(model, layers, "config.json")
        _initialize_the_rest_alone(model)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """A stored model's tensors have the names that they had on the model."""
        return [] if self.pre_quantized else super().update_weight_conversions(weight_conversions, model)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Rewrites a float model, or finishes a stored one."""
        if not self.pre_quantized:
            _refuse_split(model)
            from bidensify.rewrite.api import bidensify

            return bidensify(model, self.quantization_config.config, inplace=True)
        _initialize_as_before(model)
        _refuse_missing(model)
        if type(model).__name__ == self.quantization_config.plan.get("model_class"):
            _tell_missing(model)
        if self._packed:
            _finish_packed(model, self.quantization_config.float_dtype)
        return model

    def is_serializable(self, **kwargs: Any) -> bool:
        """``save_pretrained`` writes latent weights or bits."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Latent weights train; bits do not."""
        return not self._packed

    @property
    def is_qat_trainable(self) -> bool:
        """Training a latent model is quantization-aware training, without adapters."""
        return not self._packed

    @property
    def is_compileable(self) -> bool:
        """``torch.compile`` works on both states."""
        return True


def _submodels(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(type(module), "_initialize_weights")]


def _initialize_the_rest_alone(model: nn.Module) -> None:
    """While the weights are loaded, modules whose tensors all come from the checkpoint are not initialised.

    A model's own rules expect layers as they were (a bias, a norm beside the convolution).
    """
    for submodel in _submodels(model):
        submodel.__dict__["_initialize_weights"] = _Rest(submodel._initialize_weights)  # type: ignore[arg-type]


def _initialize_as_before(model: nn.Module) -> None:
    for submodel in _submodels(model):
        submodel.__dict__.pop("_initialize_weights", None)


class _Rest:
    """Initialises a module by its model's rules if any tensor of it was not loaded."""

    def __init__(self, rules: Callable[..., None]) -> None:
        self.rules = rules

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        loaded = (getattr(value, "_is_hf_initialized", False) for value in [*module.parameters(), *module.buffers()])
        if not all(loaded):
            self.rules(module, *args, **kwargs)


def _refuse_split(model: nn.Module) -> None:
    places = {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    if len(places) > 1 or "disk" in places:
        raise ConfigError(
            f"device_map spreads {type(model).__name__} over {', '.join(sorted(places))}, and a float checkpoint is "
            "rewritten on one device; load it with device_map='cpu' (or one GPU), save_pretrained it, and load that with "
            "your device_map"
        )


def _refuse_missing(model: nn.Module) -> None:
    """A tensor of a binary layer that the checkpoint lacks would hold whatever was in memory."""
    from bidensify.deploy.layers import PackedLayer
    from bidensify.nn import BinaryLayer

    held = [
        (path, name, _comes_from_elsewhere(value))
        for path, module in model.named_modules()
        if isinstance(module, (BinaryLayer, PackedLayer))
        for name, value in module.state_dict(keep_vars=True).items()
    ]
    lacking = [f"{path}.{name}" for path, name, loaded in held if not loaded]
    if lacking and not any(loaded for _, name, loaded in held if name != "weight"):
        raise FormatError(
            f"the checkpoint of {type(model).__name__} holds none of what binary layers have, and its config.json says that it "
            "was rewritten: a full-precision model that was made from a rewritten one's config; take quantization_config "
            "out of config.json"
        )
    if lacking:
        raise FormatError(
            f"the checkpoint of {type(model).__name__} lacks {len(lacking)} tensors of binary layers, the first "
            f"{lacking[0]!r}; it is not whole, or its config.json is of another checkpoint: save the model again"
        )


def _comes_from_elsewhere(value: Tensor) -> bool:
    """Whether a tensor was loaded, or will be: what stays on the meta device is offloaded, and read when it is used."""
    return value.device.type == "meta" or bool(getattr(value, "_is_hf_initialized", False))


def _tell_missing(model: nn.Module) -> None:
    """Warns of full-precision tensors that were drawn, where the checkpoint is of this very class (a head is new elsewhere)."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    state = model.state_dict(keep_vars=True).items()
    drawn = [name for name, value in state if name not in tied and not _comes_from_elsewhere(value)]
    if drawn:
        warnings.warn(
            f"the checkpoint of {type(model).__name__} has no tensor of the right size for {len(drawn)} full-precision ones, the "
            f"first {drawn[0]!r}: they were drawn at random",
            stacklevel=2,
        )


def _finish_packed(model: nn.Module, float_dtype: str | None) -> None:
    import torch

    from bidensify.deploy.layers import packed_layers
    from bidensify.deploy.pack import set_float_dtype, settle

    for layer in packed_layers(model).values():
        layer.arrange()
    settle(model)
    if float_dtype is not None:
        set_float_dtype(model, getattr(torch, float_dtype))


if NAME not in AUTO_QUANTIZER_MAPPING:
    register_quantizer(NAME)(BidensifyQuantizer)
if NAME not in AUTO_QUANTIZATION_CONFIG_MAPPING:
    register_quantization_config(NAME)(StoredBidensify)
listen(_remember)
