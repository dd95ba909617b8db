"""Run or trace a model and leave it as it was: what it, or the code it is made of, remembers of it is taken back.

Models cache: a rotary table on the module, a relative position index behind ``functools.lru_cache``. Filled by a run on
fake tensors or by a trace, such a cache would break the next real run. They also install hooks on themselves at their
first run.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor

__all__ = ["clear_fake_caches", "restored", "same_random_state"]

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)


def _fill(container: Any, content: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(content)


def _items(container: Any) -> list[int]:
    values = list(container.items()) if isinstance(container, dict) else list(container)
    return [id(item) for pair in values for item in (pair if isinstance(pair, tuple) else (pair,))]


def _unreal(value: Any, depth: int = 3) -> bool:
    if isinstance(value, (FakeTensor, fx.Proxy)):
        return True
    if depth == 0 or not isinstance(value, (dict, list, tuple)):
        return False
    return any(_unreal(item, depth - 1) for item in (value.values() if isinstance(value, dict) else value))


def clear_fake_caches() -> None:
    """Clears each ``functools.lru_cache`` (of anybody's code but torch's) that holds a fake tensor or a trace's proxy."""
    # A cache behind a decorator of a library's own is reachable by no name, but it refers to its type. (Every object that
    # the collector knows, asked in Python, takes twice as long: half a second of each rewrite where there are millions.)
    kind = functools._lru_cache_wrapper
    caches = [item for item in gc.get_referrers(kind) if type(item) is kind]
    for cache in caches:
        module = str(getattr(cache, "__module__", ""))
        if module.partition(".")[0] != "torch" and any(map(_unreal, gc.get_referents(cache))):
            cache.cache_clear()


def same_random_state(model: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Puts the generators of the CPU and of the CUDA devices that ``model`` is on back at the end.

    Those of other devices are not asked: that alone would take memory on each of them.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return torch.random.fork_rng({tensor.device for tensor in tensors if tensor.device.type == "cuda"})


@contextlib.contextmanager
def restored(model: nn.Module, *, fake: bool = False) -> Iterator[Callable[[], list[str]]]:
    """Puts back every attribute of every module, the containers among them and the buffers, when the run is over.

    Args:
        model: what runs inside.
        fake: whether it runs on fake tensors; caches outside the model that hold any are cleared then, and torch's log
            of a run that fails is kept quiet, since a failure is an answer here.

    Yields:
        A function that names the attributes of ``model`` itself that have changed so far.
    """
    modules = list(model.modules())
    before = [dict(module.__dict__) for module in modules]
    inside = [(value, value.copy()) for state in before for value in state.values() if type(value) in _CONTAINERS]
    buffers = [
        (buffer, buffer._version, buffer.clone())
        for module in modules
        for buffer in module._buffers.values()
        if buffer is not None and not buffer.is_inference()
    ]
    contents = {id(value): _items(content) for value, content in inside}

    def changed() -> list[str]:
        names = []
        for name, value in model.__dict__.items():
            same = name in before[0] and before[0][name] is value
            if not same or (id(value) in contents and contents[id(value)] != _items(value)):
                names.append(name)
        return sorted(names)

    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    if fake:
        log.setLevel(logging.CRITICAL)
    try:
        yield changed
    finally:
        log.setLevel(level)
        for module, state in zip(modules, before):
            _fill(module.__dict__, state)
        for container, content in inside:
            _fill(container, content)
        for buffer, version, values in buffers:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(values)
        if fake:
            clear_fake_caches()
