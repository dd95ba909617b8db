"""Things by name: a registry that classes and functions put themselves into, and whose options are their signatures'."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar, cast

from bidensify.errors import ConfigError

__all__ = ["Registry"]

T = TypeVar("T", bound=Callable[..., Any])
F = TypeVar("F", bound=Callable[..., Any])


class Registry(Generic[T]):
    """Factories of one kind by name.

    Args:
        kind: what one of them is, in messages: "data set".
        decorator: what registers one, in messages: "bidensify.register_data_set".
        given: parameters that a caller gives by itself and that are no options.
    """

    def __init__(self, kind: str, decorator: str, *, given: tuple[str, ...] = ()) -> None:
        self.kind, self.decorator, self.given = kind, decorator, given
        self._known: dict[str, T] = {}

    def register(self, name: str) -> Callable[[F], F]:
        """Returns a decorator that registers a factory under ``name``.

        A name that is known already goes to the newer factory, with a warning: a notebook's cell may run twice.

        Raises:
            ConfigError: the name is no text, or what is decorated cannot be called.
        """
        if not isinstance(name, str) or not name:
            raise ConfigError(
                f"{self.decorator}: {name!r} cannot be a {self.kind}'s name; give a text that is not empty"
            )

        def register(factory: F) -> F:
            if not callable(factory):
                raise ConfigError(f"{self.decorator}({name!r}): {factory!r} must be a class or a function")
            if name in self._known and self._known[name] is not factory:
                old, new = (f"{item.__module__}.{item.__qualname__}" for item in (self._known[name], factory))
                message = f"the {self.kind} {name!r} is registered again: {new} takes over from {old}"
                warnings.warn(message, UserWarning, stacklevel=2)
            self._known[name] = cast(T, factory)
            return factory

        return register

    def names(self) -> list[str]:
        """Returns the registered names, sorted."""
        return sorted(self._known)

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __getitem__(self, name: str) -> T:
        """Returns the factory called ``name``.

        Raises:
            ConfigError: there is none.
        """
        if name not in self._known:
            raise ConfigError(
                f"there is no {self.kind} {name!r}; use one of {', '.join(self.names())}, or register yours with "
                f"{self.decorator}"
            )
        return self._known[name]

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """Returns the options of a factory: the parameters of its signature that can be given by name.

        Raises:
            ConfigError: there is no such factory.
        """
        parameters = inspect.signature(self[name]).parameters.values()
        kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return {p.name: p for p in parameters if p.kind in kinds and p.name not in self.given}

    def make(self, name: str, options: Mapping[str, Any], *args: Any, **given: Any) -> Any:
        """Calls a factory with ``args``, ``given`` and ``options``.

        Raises:
            ConfigError: there is no such factory or option, or an option without a default is missing.
        """
        factory, known = self[name], self.options(name)
        takes_all = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(factory).parameters.values())
        unknown = sorted(set(options) - set(known))
        if unknown and not takes_all:
            raise ConfigError(
                f"the {self.kind} {name!r} has no option {', '.join(unknown)}; its options are {', '.join(known)}"
            )
        missing = [key for key, p in known.items() if p.default is p.empty and key not in options]
        if missing:
            raise ConfigError(
                f"the {self.kind} {name!r} needs the option {', '.join(missing)}; given were {sorted(options)}"
            )
        return factory(*args, **given, **options)
