"""transformers: ``from_pretrained(quantization_config=BidensifyConfig(...))``, ``save_pretrained``, and loading it again.

A float checkpoint is loaded first and rewritten then, exactly as ``bidensify(model)`` does: layers that the checkpoint
lacks are initialised by the model's own rules, and a block's trace is proven on real values. A checkpoint of a rewritten
or packed model is rebuilt from the plan in its ``config.json`` while the model is still on the meta device, so that
transformers loads its tensors as it loads any (shards, dtype, device_map); no data and no forward pass.

Importing this module registers the quantizer "bidensify"; ``import bidensify`` sees to it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bidensify._util.listeners import listen
from bidensify.config import BidensifyConfig
from bidensify.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from torch import nn

    from bidensify.rewrite.plan.schema import Plan

__all__ = ["NAME", "BidensifyQuantizer", "StoredBidensify"]

NAME = "bidensify"
STORED_VERSION = 1
_STORED = ("plan", "layers", "float_dtype")
FLOAT_DTYPES = ("float32", "bfloat16", "float16")


class StoredBidensify(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``config.json`` holds as "quantization_config".

    Attributes:
        config: how to rewrite a float checkpoint; what the plan was made under where there is one.
        plan: ``Plan.to_dict()`` without default values, or None before the model is rewritten.
        layers: path -> meta data of each packed layer, or None while the model is latent.
        float_dtype: name of the dtype in which a packed model runs what is not binary, or None.
    """

    def __init__(
        self,
        config: BidensifyConfig | None = None,
        plan: Mapping[str, Any] | None = None,
        layers: Mapping[str, Any] | None = None,
        float_dtype: str | None = None,
    ) -> None:
        self.quant_method = NAME
        self.config = BidensifyConfig() if config is None else config
        self.plan = plan
        self.layers = layers
        self.float_dtype = float_dtype

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From ``config.json``, or from a dictionary with ``BidensifyConfig``'s fields beside "quant_method".

        Raises:
            FormatError: a stored version that this release does not read, or a part of another kind.
            ConfigError: an unknown field of the configuration.
        """
        data = dict(config_dict)
        data.pop("quant_method", None)
        version = data.pop("stored_version", STORED_VERSION)
        if version != STORED_VERSION:
            raise FormatError(
                f"config.json: quantization_config has stored_version={version!r}; this release reads {STORED_VERSION}: "
                "update bidensify"
            )
        stored = {key: data.pop(key) for key in _STORED if data.get(key) is not None}
        for key in ("plan", "layers"):
            if not isinstance(stored.get(key, {}), Mapping):
                raise FormatError(
                    f"config.json: quantization_config's {key!r} is a {type(stored[key]).__name__}, not an object; save "
                    "the model again"
                )
        if stored.get("float_dtype") not in (None, *FLOAT_DTYPES):
            raise FormatError(
                f"config.json: quantization_config has float_dtype={str(stored['float_dtype'])[:40]!r}, must be one of "
                f"{', '.join(FLOAT_DTYPES)}; save the model again"
            )
        fields = data.pop("config", data if "plan" not in stored else stored["plan"].get("config", {}))
        result = cls(BidensifyConfig.from_dict(fields), **stored)
        return (result, kwargs) if return_unused_kwargs else result

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        result: dict[str, Any] = {"quant_method": NAME, "stored_version": STORED_VERSION}
        if self.plan is None:
            return {**result, "config": self.config.to_dict()}
        return result | {key: copy.deepcopy(value) for key in _STORED if (value := getattr(self, key)) is not None}

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def __repr__(self) -> str:
        binary = sum(layer.get("action") == "binary" for layer in (self.plan or {}).get("layers", ()))
        state = "not applied yet" if self.plan is None else f"{binary} {'packed' if self.layers else 'latent'} layers"
        return f"{type(self).__name__}({self.config!r}, {state})"


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
        model.config.quantization_config = _stored(model)
        # Names of the layers' own tensors are none of the model's: its patterns, made for published checkpoints, would
        # rename some of them ("norm." to "layernorm."), not always back.
        model._weight_conversions = []
        if getattr(model, "hf_quantizer", None) is not None:
            model.hf_quantizer.quantization_config = model.config.quantization_config


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
        apply_plan(model, Plan.from_dict(stored.plan))
        if stored.layers is not None:
            empty_packed(model, stored.layers, "config.json")
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

    lacking = [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, (BinaryLayer, PackedLayer))
        for name, value in module.state_dict(keep_vars=True).items()
        # What stays on the meta device is offloaded: it is read from disk when it is used.
        if value.device.type != "meta" and not getattr(value, "_is_hf_initialized", False)
    ]
    if lacking:
        raise FormatError(
            f"the checkpoint of {type(model).__name__} lacks {len(lacking)} tensors of binary layers, the first "
            f"{lacking[0]!r}; it is not whole, or its config.json is of another checkpoint: save the model again"
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
