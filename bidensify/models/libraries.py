"""The libraries that recipes name networks of; each is imported only when a name asks for it."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from torch import nn

from bidensify._util.names import near
from bidensify.errors import ConfigError, MissingExtraError
from bidensify.models.build import check_options, register_source

# Options that fetch weights or hand over code; see register_source.
_TIMM = ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir")
_TRANSFORMERS = (
    "trust_remote_code", "code_revision", "auto_map", "attn_implementation", "experts_implementation",
    "use_pretrained_backbone", "quantization_config", "use_kernels", "kernel_config",
)  # fmt: skip


def _library(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f"{name} is not installed, and this model comes from it; install it with: pip install 'bidensify[{extra}]'"
        ) from error


@register_source("demo")
def demo(name: str, **options: Any) -> nn.Module:
    """``demo:unet``."""
    from bidensify.models.unet import unet

    if name != "unet":
        raise ConfigError(f"model 'demo:{name}': the demo has one network, demo:unet")
    check_options(f"demo:{name}", unet, options)
    return unet(**options)


@register_source("paper")
def paper(name: str, **options: Any) -> nn.Module:
    """``paper:upernet_convnext_tiny`` and ``paper:dpt_dinov2_small``: the networks of BiDense's tables, from nothing."""
    from bidensify.models.dpt import DPT
    from bidensify.models.upernet import UPerNet

    known: dict[str, Any] = {"upernet_convnext_tiny": UPerNet, "dpt_dinov2_small": DPT}
    if name not in known:
        raise ConfigError(f"model 'paper:{name}': there is no such network{near(name, list(known))}")
    check_options(f"paper:{name}", known[name], options)
    model: nn.Module = known[name](**options)
    return model


@register_source("smp", fetching=("encoder_weights", *_TIMM))
def smp(name: str, **options: Any) -> nn.Module:
    """``smp:ARCHITECTURE/ENCODER`` of segmentation_models_pytorch, without pretrained weights unless asked."""
    library = _library("segmentation_models_pytorch", "smp")
    architecture, _, encoder = name.partition("/")
    known = {
        cls.__name__: cls for cls in vars(library).values() if isinstance(cls, type) and issubclass(cls, nn.Module)
    }
    if architecture not in known:
        raise ConfigError(
            f"model 'smp:{name}': segmentation_models_pytorch has no architecture {architecture!r} (write "
            f"smp:ARCHITECTURE/ENCODER, as smp:Unet/resnet34){near(architecture, sorted(known))}"
        )
    # Its own default downloads ImageNet weights; a network by name starts from nothing unless asked.
    options.setdefault("encoder_weights", None)
    if encoder:
        options["encoder_name"] = encoder
        encoders = library.encoders.get_encoder_names()
        if encoder not in encoders and not encoder.startswith("tu-"):
            raise ConfigError(
                f"model 'smp:{name}': segmentation_models_pytorch has no encoder {encoder!r} (any of timm's "
                f"goes as tu-NAME){near(encoder, encoders)}"
            )
    cls = known[architecture]
    # Its own encoders swallow what they do not know; timm's say so themselves.
    if not str(options.get("encoder_name", "")).startswith("tu-"):
        check_options(f"smp:{name}", cls, options)
    model: nn.Module = cls(**options)
    return model


@register_source("timm", fetching=_TIMM)
def timm(name: str, **options: Any) -> nn.Module:
    """``timm:NAME``: feature maps, without pretrained weights, unless the options say otherwise."""
    library = _library("timm", "timm")
    if name.split(".")[0] not in library.list_models():
        raise ConfigError(f"model 'timm:{name}': timm has no such model{near(name, library.list_models())}")
    options.setdefault("features_only", True)
    options.setdefault("pretrained", False)
    model: nn.Module = library.create_model(name, **options)
    return model


@register_source("torchvision", fetching=("weights", "weights_backbone"))
def torchvision(name: str, **options: Any) -> nn.Module:
    """``torchvision:NAME`` of torchvision.models, without pretrained weights unless asked."""
    library = _library("torchvision", "all")
    known = library.models.list_models()
    if name not in known:
        raise ConfigError(f"model 'torchvision:{name}': torchvision has no such model{near(name, known)}")
    options.setdefault("weights", None)
    if name in library.models.list_models(module=library.models.segmentation):
        options.setdefault("weights_backbone", None)
        # These builders take any keyword, and use none but those that they name.
        check_options(f"torchvision:{name}", library.models.get_model_builder(name), options)
    model: nn.Module = library.models.get_model(name, **options)
    return model


_AUTOS = (
    "AutoModelForSemanticSegmentation", "AutoModelForDepthEstimation", "AutoModelForUniversalSegmentation",
    "AutoModelForImageToImage",
)  # fmt: skip


def _class_for(library: Any, config: Any, auto: Any, name: str) -> Any:
    """The class that ``auto`` names, else the one that the configuration was saved of, else the first dense AutoModel."""
    if auto is not None:
        if not str(auto).startswith("AutoModel") or not hasattr(library, str(auto)):
            raise ConfigError(f"model 'transformers:{name}': auto={auto!r} is no AutoModel class of transformers")
        return getattr(library, str(auto))
    for saved in getattr(config, "architectures", None) or ():
        own = _network_class(library, saved)
        if own is not None and own.config_class is type(config):
            return own
    takes = [title for title in _AUTOS if type(config) in getattr(library, title)._model_mapping]
    return getattr(library, [*takes, "AutoModel"][0])


def _network_class(library: Any, name: Any) -> Any:
    """transformers' network class of that name, or None."""
    own = getattr(library, name, None) if isinstance(name, str) and name.isidentifier() else None
    is_network = isinstance(own, type) and issubclass(own, nn.Module) and getattr(own, "config_class", None) is not None
    return own if is_network else None


@register_source("transformers", fetching=_TRANSFORMERS)
def transformers(name: str, *, architecture_only: bool = False, auto: str | None = None, **options: Any) -> nn.Module:
    """``transformers:NAME``: a model type, a model class, a folder of saved weights, or what the hub has as OWNER/NAME.

    Args:
        name: "segformer", "SegformerForSemanticSegmentation", a folder, or "depth-anything/Depth-Anything-V2-Small-hf".
        architecture_only: of a folder or of the hub, take the configuration and leave the weights; nothing is fetched.
        auto: the AutoModel class to build with; by default the one for dense predictions.
        options: fields of the configuration.
    """
    library = _library("transformers", "transformers")
    here = Path(name).is_dir()
    if here or "/" in name:
        local = here or architecture_only
        if not architecture_only:
            try:
                config = library.AutoConfig.from_pretrained(name, local_files_only=local, trust_remote_code=False)
                cls = _class_for(library, config, auto, name)
                model: nn.Module = cls.from_pretrained(name, local_files_only=local, trust_remote_code=False, **options)
            except OSError as error:
                if here:
                    raise
                raise ConfigError(
                    f"model 'transformers:{name}': there is no such folder, and the hub does not give it "
                    f"({str(error).splitlines()[0][:200]}). Without a connection, copy the model's folder here and name that, "
                    "or build the network by its type and give weights_file=FILE"
                ) from error
            return model
        _plain(library.PreTrainedConfig.get_config_dict(name, local_files_only=True)[0], name)
        config = library.AutoConfig.from_pretrained(name, local_files_only=True, trust_remote_code=False, **options)
        if getattr(config, "use_pretrained_backbone", False):
            config.use_pretrained_backbone = False
        return _fresh(library, config, auto, name)
    own = _network_class(library, name)
    try:
        kind = own.config_class if own is not None else type(library.AutoConfig.for_model(name))
    except ValueError as error:
        raise ConfigError(
            f"model 'transformers:{name}': it is neither a folder of saved weights, a model type nor a model class of "
            f"transformers ({str(error).splitlines()[0][:200]})"
        ) from error
    # A configuration keeps whatever it is given, so a misspelt field would be one more that nobody reads.
    fields = kind().to_dict()
    check_options(f"transformers:{name}", kind, options, [*fields, *kind.attribute_map, "num_labels"])
    config = kind(**options)
    return own(config) if own is not None and auto is None else _fresh(library, config, auto, name)


def _fresh(library: Any, config: Any, auto: Any, name: str) -> nn.Module:
    cls = _class_for(library, config, auto, name)
    model: nn.Module = (
        cls.from_config(config, trust_remote_code=False) if cls.__name__.startswith("Auto") else cls(config)
    )
    return model


def _plain(config: Any, name: str) -> None:
    """Refuses a saved configuration that asks for kernels from the hub: they are code."""
    if isinstance(config, dict):
        for key, value in config.items():
            if str(key).endswith("_implementation") and "/" in str(value):
                raise ConfigError(
                    f"model 'transformers:{name}': its configuration has {key}: {value!r}, which is code from the hub; "
                    "take the field out of its config.json"
                )
            _plain(value, name)
    elif isinstance(config, list):
        for item in config:
            _plain(item, name)
