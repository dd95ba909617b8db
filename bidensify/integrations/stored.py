"""What ``config.json`` of a rewritten transformers model holds as "quantization_config"."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from bidensify.config import BidensifyConfig
from bidensify.errors import FormatError

__all__ = ["NAME", "StoredBidensify"]

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

    def get(self, key: str, default: Any = None) -> Any:
        """As a mapping has it: transformers asks the configuration of a model that it did not load for "quant_method" so."""
        return getattr(self, key, default)

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
