"""Record one run of a network as a ``torch.fx.Graph``: module calls by path, functions between them, shapes.

Running and recording captures every network that runs; a symbolic trace of the whole captures a third of them.
Nothing of the recording stays on the model: no hook, buffer or constant; flags and the RNG state are put back.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from bidensify.errors import PlanError
from bidensify.rewrite.inputs import candidate_inputs, describe_inputs

__all__ = ["Call", "Event", "Record", "TensorSpec", "frozen_flags", "record", "scope_of"]

Scope = tuple[tuple[str, int], ...]

_ACTIVATION_NAMES = re.compile(
    r"^(?:Fast|Quick|New|ClippedG|GELUT|)"
    r"(ReLU6?|LeakyReLU|PReLU|RReLU|SiLU|Swish|GELU|Hardswish|HardSwish|Mish|HardMish|ELU|CELU|SELU|Softplus|"
    r"Sigmoid|Hardsigmoid|HardSigmoid|Tanh|Hardtanh|Softmax|Softmax2d)"
    r"(?:Me|Jit|JitMe|Activation|Tanh)*$",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that was seen."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Event:
    """One step that a module's own ``forward`` made: a child's call, or a function that gave a tensor.

    Attributes:
        kind: "module" or "function".
        name: the child's path, or the function's plain name ("add" for add, add_, __iadd__).
        node: the graph's node (None for a child that is itself a block).
    """

    kind: str
    name: str
    node: fx.Node | None


@dataclass
class Call:
    """One call of a block: its arguments with tensors replaced by ``TensorSpec``, and what its forward did."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    events: list[Event] = field(default_factory=list)


@dataclass
class Record:
    """What one run did.

    Attributes:
        graph: nodes call_module (target: path), call_function, get_attr (a parameter or buffer used directly),
            placeholder (inputs and constants), output. ``meta``: "spec" (TensorSpec or None), "scope" (the stack of
            enclosing blocks with call numbers), "event" (position in the innermost block's events).
        calls: block path -> its calls.
        modules: path -> module, each module once under its first path.
        aliases: first path -> every other path of the same module.
        inputs: the example inputs as text.
        output: the output's structure with TensorSpecs in it.
    """

    graph: fx.Graph
    calls: dict[str, list[Call]]
    modules: dict[str, nn.Module]
    aliases: dict[str, list[str]]
    inputs: Any
    inputs_text: str
    output: Any
    fake: bool

    def module_nodes(self) -> dict[str, list[fx.Node]]:
        """Path -> the nodes of its calls, in order."""
        result: dict[str, list[fx.Node]] = {}
        for node in self.graph.nodes:
            if node.op == "call_module":
                result.setdefault(node.target, []).append(node)
        return result


def scope_of(node: fx.Node) -> Scope:
    """The stack of enclosing (block path, call number), innermost last."""
    return cast(Scope, node.meta["scope"])


def plain_name(function: Any) -> str:
    """A function's name without what marks it as in-place or as an operator: __iadd__, add_ and add are "add"."""
    name = getattr(function, "__name__", str(function))
    if name == "__get__":
        name = getattr(getattr(function, "__self__", None), "__name__", name)
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
        if name[:1] in "ir" and name[1:] in ("add", "sub", "mul", "truediv", "matmul", "pow", "and", "or"):
            name = name[1:]
    return name.rstrip("_") or name


def is_leaf(module: nn.Module) -> bool:
    """Whether a module's call is one node: torch's own layers, their subclasses, activations, scripted modules."""
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    if isinstance(module, torch.jit.ScriptModule):
        return True
    if type(module).__module__.startswith("torch.nn."):
        return not isinstance(module, (nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder)) or bool(
            module._parameters
        )
    leaf_bases = (
        nn.modules.conv._ConvNd,
        nn.Linear,
        nn.modules.batchnorm._NormBase,
        nn.LayerNorm,
        nn.GroupNorm,
        nn.Embedding,
        nn.Identity,
    )
    if isinstance(module, leaf_bases):
        return True
    if any(cls.__module__ == "torch.nn.modules.activation" for cls in type(module).__mro__):
        return True
    name = type(module).__name__
    if name.startswith(("FrozenBatchNorm", "DropPath", "StochasticDepth", "LayerScale")) or name.endswith("DropPath"):
        return True
    return _ACTIVATION_NAMES.match(name) is not None and not any(True for _ in module.parameters())


@contextlib.contextmanager
def frozen_flags(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without calling ``train()`` (which a model may have overridden), flags put back at the end."""
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        module.training = False
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []

    def visit(item: Any) -> None:
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, Mapping):
            for each in item.values():
                visit(each)
        elif isinstance(item, (tuple, list)):
            for each in item:
                visit(each)

    visit(value)
    return found


def specs(value: Any) -> Any:
    """``value`` with every tensor replaced by its ``TensorSpec``; mappings become dicts."""
    if isinstance(value, Tensor):
        return TensorSpec(tuple(value.shape), value.dtype)
    if isinstance(value, Mapping):
        return {key: specs(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(specs(item) for item in value)
    if isinstance(value, list):
        return [specs(item) for item in value]
    return value


class _Recorder(TorchFunctionMode):
    """Writes the graph: functions through the mode, module calls through ``Module.__call__``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.attributes = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        self.nodes: dict[int, fx.Node] = {}
        # ids are only unique among living tensors, so every tensor that was seen is kept until the end.
        self.alive: list[Tensor] = []
        self.scope: list[tuple[str, int]] = []
        self.calls: dict[str, list[Call]] = {}
        self.leaf_depth = 0

    def _finish(self, node: fx.Node, spec: Any) -> fx.Node:
        node.meta["spec"] = spec if isinstance(spec, TensorSpec) else None
        node.meta["scope"] = tuple(self.scope)
        return node

    def bind(self, tensor: Tensor, node: fx.Node) -> None:
        self.alive.append(tensor)
        self.nodes[id(tensor)] = node

    def placeholder(self, tensor: Tensor, name: str) -> fx.Node:
        node = self._finish(self.graph.placeholder(name), specs(tensor))
        self.bind(tensor, node)
        return node

    def node_of(self, tensor: Tensor) -> fx.Node:
        if id(tensor) in self.nodes:
            return self.nodes[id(tensor)]
        if id(tensor) in self.attributes:
            node = self.graph.create_node("get_attr", self.attributes[id(tensor)], (), {})
        else:
            node = self.graph.create_node("placeholder", "constant", (), {})
        self._finish(node, specs(tensor))
        self.bind(tensor, node)
        return node

    def _args(self, value: Any) -> Any:
        return map_aggregate(value, lambda item: self.node_of(item) if isinstance(item, Tensor) else item)

    def _event(self, kind: str, name: str, node: fx.Node | None) -> None:
        if not self.scope:
            return
        path, number = self.scope[-1]
        events = self.calls[path][number].events
        if node is not None:
            node.meta["event"] = len(events)
        events.append(Event(kind, name, node))

    def _bind_result(self, node: fx.Node, result: Any) -> None:
        if isinstance(result, Tensor):
            self.bind(result, node)
            return
        for position, tensor in enumerate(_tensors(result)):
            item = self.graph.create_node("call_function", _item, (node, position), {})
            self.bind(tensor, self._finish(item, specs(tensor)))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if self.leaf_depth:
            return func(*args, **options)
        name = plain_name(func)
        arguments, keywords = self._args(tuple(args)), self._args(options)
        result = func(*args, **options)
        if name == "setitem":
            node = self._finish(self.graph.create_node("call_function", func, arguments, keywords), specs(args[0]))
            self.bind(args[0], node)
            self._event("function", name, node)
        elif _tensors(result):
            node = self._finish(self.graph.create_node("call_function", func, arguments, keywords), specs(result))
            self._bind_result(node, result)
            self._event("function", name, node)
        return result

    def call(self, original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        path = self.paths.get(id(module))
        if self.leaf_depth or path is None:
            return original(module, *args, **kwargs)
        if is_leaf(module):
            # Reading a tensor's shape is a torch function too: the bookkeeping must not record itself.
            self.leaf_depth += 1
            try:
                arguments, keywords = self._args(args), self._args(dict(kwargs))
                result = original(module, *args, **kwargs)
                node = self._finish(self.graph.create_node("call_module", path, arguments, keywords), specs(result))
                self._bind_result(node, result)
                self._event("module", path, node)
            finally:
                self.leaf_depth -= 1
            return result
        self._event("module", path, None)
        calls = self.calls.setdefault(path, [])
        self.leaf_depth += 1
        calls.append(Call(specs(args), specs(dict(kwargs))))
        self.leaf_depth -= 1
        self.scope.append((path, len(calls) - 1))
        try:
            return original(module, *args, **kwargs)
        finally:
            self.scope.pop()


def _item(values: Any, position: int) -> Any:
    """The ``position``-th tensor of a function's or layer's results."""
    return _tensors(values)[position]


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Recorder, Any]:
    recorder = _Recorder(model)
    for number, tensor in enumerate(_tensors([args, kwargs])):
        recorder.placeholder(tensor, f"input_{number}")
    original = nn.Module.__call__

    def patched(module: nn.Module, *a: Any, **k: Any) -> Any:
        return recorder.call(original, module, a, k)

    nn.Module.__call__ = patched  # type: ignore[method-assign]
    try:
        with recorder:
            output = model(*args, **kwargs)
    finally:
        nn.Module.__call__ = original  # type: ignore[method-assign]
    outputs = [recorder.node_of(tensor) for tensor in _tensors(output)]
    node = recorder.graph.output(tuple(outputs))
    node.meta.update(spec=None, scope=())
    return recorder, output


def _copy_to(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return map_aggregate(value, lambda item: function(item) if isinstance(item, Tensor) else item)


def record(model: nn.Module, example_inputs: Any = None) -> Record:
    """Runs ``model`` once in evaluation mode and writes down what it did.

    Fake tensors carry the run where the model allows it, so that it costs no arithmetic; a model that looks at values
    is run on small real tensors instead.

    Args:
        model: any module; it is left as it was.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments; by default they are
            derived from the model (channels of its first convolution, sizes that divide).

    Raises:
        PlanError: no example input ran; the message quotes what was tried and each error.
    """
    failures: list[str] = []
    for args, kwargs in candidate_inputs(model, example_inputs):
        for fake in (True, False):
            try:
                with torch.no_grad(), frozen_flags(model), torch.random.fork_rng():
                    if fake:
                        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
                            fake_args = _copy_to(args, mode.from_tensor)
                            fake_kwargs = _copy_to(kwargs, mode.from_tensor)
                            recorder, output = _run(model, tuple(fake_args), dict(fake_kwargs))
                    else:
                        recorder, output = _run(model, args, kwargs)
            except Exception as error:
                text = str(error).strip().splitlines()
                failures.append(
                    f"{describe_inputs(args, kwargs)}{' (fake)' if fake else ''}: {type(error).__name__}: "
                    f"{text[0][:200] if text else ''}"
                )
                continue
            modules = dict(model.named_modules())
            first = {id(module): path for path, module in modules.items()}
            aliases: dict[str, list[str]] = {}
            for path, module in model.named_modules(remove_duplicate=False):
                if first[id(module)] != path:
                    aliases.setdefault(first[id(module)], []).append(path)
            return Record(
                graph=recorder.graph,
                calls=recorder.calls,
                modules=modules,
                aliases=aliases,
                inputs=(args, kwargs),
                inputs_text=describe_inputs(args, kwargs),
                output=specs(output),
                fake=fake,
            )
    raise PlanError(
        f"{type(model).__name__} did not run on any example input, so there is nothing to rewrite; pass "
        "example_inputs= (a tensor, a tuple or a dict). Tried:\n  " + "\n  ".join(failures[-6:])
    )
