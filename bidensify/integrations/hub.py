"""huggingface_hub's ``PyTorchModelHubMixin`` (segmentation_models.pytorch and others): ``save_pretrained`` and back.

Its classes save their constructor's arguments in ``config.json`` and their tensors beside it, and load them without being
strict. A rewritten network's ``config.json`` holds its plan too, and loading replays it; its first argument that is a name is
marked, so that nobody knows that name where bidensify is not imported ("Wrong encoder name `bidensify:resnet18`").
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from bidensify._util.files import atomic_write
from bidensify.errors import FormatError, PlanError

__all__ = ["MARK", "STORED"]

MARK = "bidensify:"
# With an underscore in front, so that model cards do not print it.
STORED = "_bidensify"
_CONFIG = "config.json"
_FLOAT_DTYPES = ("float32", "bfloat16", "float16")

_save = PyTorchModelHubMixin._save_pretrained
_load = PyTorchModelHubMixin._from_pretrained.__func__
_LOADERS = {name: getattr(PyTorchModelHubMixin, name).__func__ for name in ("_load_as_safetensor", "_load_as_pickle")}


def _stored(model: nn.Module) -> dict[str, Any]:
    from bidensify.deploy.layers import packed_layers

    stored: dict[str, Any] = {"plan": model.bidensify_plan.to_dict(compact=True)}  # type: ignore[operator,union-attr]
    packed = {path: layer.meta() for path, layer in packed_layers(model).items()}
    if packed:
        dtype = getattr(model, "_bidensify_float_dtype", None)
        stored |= {"layers": packed, "float_dtype": str(dtype).rpartition(".")[2] if dtype else None}
    return stored


@functools.wraps(_save)
def _save_pretrained(self: Any, save_directory: Path) -> None:
    _save(self, save_directory)
    if isinstance(self, nn.Module) and hasattr(self, "bidensify_plan"):
        config: Any = self._hub_mixin_config or {}
        config = dict(config) if isinstance(config, dict) else dataclasses.asdict(config)
        name = next(
            (key for key in cast(Any, self)._hub_mixin_init_parameters if isinstance(config.get(key), str)), None
        )
        if name is not None:
            config[name] = f"{MARK}{config[name]}"
        config[STORED] = _stored(self)
        with atomic_write(Path(save_directory) / _CONFIG) as temporary:
            temporary.write_text(json.dumps(config, sort_keys=True, indent=2), encoding="utf-8")


@functools.wraps(_load)
def _from_pretrained(cls: Any, **kwargs: Any) -> Any:
    kwargs.pop(STORED, None)
    plain = {key: value.removeprefix(MARK) if isinstance(value, str) else value for key, value in kwargs.items()}
    return _load(cls, **plain)


def _stored_in(folder: Path) -> Mapping[str, Any] | None:
    """What a folder's ``config.json`` says of a rewrite, or None.

    Raises:
        FormatError: it is damaged.
    """
    path = folder / _CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise FormatError(f"{path} is not whole JSON ({error}); save the model again") from error
    stored = config.get(STORED) if isinstance(config, dict) else None
    if stored is None:
        return None
    if not isinstance(stored, dict) or not isinstance(stored.get("plan"), dict):
        raise FormatError(f"{path}: {STORED!r} holds no plan; save the model again")
    if not isinstance(stored.get("layers", {}), dict) or stored.get("float_dtype") not in (None, *_FLOAT_DTYPES):
        raise FormatError(f"{path}: {STORED!r} has damaged 'layers' or 'float_dtype'; save the model again")
    return stored


def _rebuilt(model: nn.Module, stored: Mapping[str, Any], where: str) -> nn.Module:
    from bidensify.deploy.pretrained import empty_packed
    from bidensify.rewrite.apply.model import apply_plan
    from bidensify.rewrite.plan.schema import Plan

    try:
        model = apply_plan(model, Plan.from_dict(stored["plan"]))
    except PlanError as error:
        raise FormatError(f"{where}: {error}") from error
    return empty_packed(model, stored["layers"], where) if "layers" in stored else model


def _finished(model: nn.Module, stored: Mapping[str, Any]) -> nn.Module:
    if "layers" not in stored:
        return model
    import torch

    from bidensify.deploy.pack import set_float_dtype, settle

    settle(model)
    dtype = stored.get("float_dtype")
    return model if dtype is None else set_float_dtype(model, getattr(torch, dtype))


def _loader(name: str) -> Any:
    original = _LOADERS[name]

    @functools.wraps(original)
    def load(cls: Any, model: Any, model_file: Any, map_location: str, strict: bool) -> Any:
        folder = Path(model_file).parent
        stored = _stored_in(folder)
        if stored is None:
            return original(cls, model, model_file, map_location, strict)
        model = _rebuilt(model, stored, str(folder / _CONFIG))
        try:
            return _finished(original(cls, model, model_file, map_location, True), stored)
        except RuntimeError as error:
            text = " ".join(str(error).split())[:400]
            raise FormatError(f"{model_file} is damaged or of another model: {text}") from error

    return classmethod(load)


PyTorchModelHubMixin._save_pretrained = _save_pretrained
PyTorchModelHubMixin._from_pretrained = classmethod(cast(Any, _from_pretrained))
for _name in _LOADERS:
    setattr(PyTorchModelHubMixin, _name, _loader(_name))
del _name
