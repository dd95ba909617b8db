"""Record one run of a network as a ``torch.fx.Graph``: module calls by path, functions between them, shapes.

Running and recording captures every network that runs; a symbolic trace of the whole captures a third of them.
Nothing of the recording stays on the model: no hook, buffer or constant; flags and the RNG state are put back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate
from torch.overrides import TorchFunctionMode

from bidensify._util.modes import evaluation_flags
from bidensify.errors import PlanError
from bidensify.exact.latent import WEIGHTED_FUNCTIONS, weight_argument
from bidensify.rewrite.kinds import is_activation, is_layer
from bidensify.rewrite.record.inputs import candidate_inputs, describe_inputs
from bidensify.rewrite.record.leaves import is_leaf
from bidensify.rewrite.record.recorded import Call, Event, Record, TensorSpec, plain_name, specs, tensors_in
from bidensify.rewrite.record.restore import restored, same_random_state

__all__ = ["record"]

# Four images of 128×128, what two of a pair of frames have.
_LIGHT_PIXELS = 4 * 128 * 128


class _Recorder(TorchFunctionMode):
    """Writes the graph: functions through the mode, module calls through ``Module.__call__``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.graph = fx.Graph()
        self.paths = {id(module): path for path, module in model.named_modules()}
        self.attributes = {id(tensor): name for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
        # A hook (weight_norm, prune) sets its layer's weight anew at each call.
        self.layers = {path: module for path, module in model.named_modules() if is_layer(module)}
        self.nodes: dict[int, fx.Node] = {}
        # ids are only unique among living tensors, so every tensor that was seen is kept until the end.
        self.alive: list[Tensor] = []
        # Id of what an activation in place gave -> id of what it wrote into, and the other way round with its node.
        self.aliases: dict[int, int] = {}
        self.overwritten: dict[int, tuple[int, fx.Node]] = {}
        self.scope: list[tuple[str, int]] = []
        self.calls: dict[str, list[Call]] = {}
        self.leaf_depth = 0
        self.leaf: nn.Module | None = None
        self.weights: dict[str, list[bool]] = {}
        self.attributes_set: set[tuple[str, str]] = set()

    def _finish(self, node: fx.Node, spec: Any) -> fx.Node:
        node.meta["spec"] = spec if isinstance(spec, TensorSpec) else None
        node.meta["scope"] = tuple(self.scope)
        return node

    def bind(self, tensor: Tensor, node: fx.Node) -> None:
        self.alive.append(tensor)
        self.nodes[self._identity(tensor)] = node

    def _identity(self, tensor: Tensor) -> int:
        return self.aliases.get(id(tensor), id(tensor))

    def placeholder(self, tensor: Tensor, name: str) -> fx.Node:
        node = self._finish(self.graph.placeholder(name), specs(tensor))
        self.bind(tensor, node)
        return node

    def node_of(self, tensor: Tensor) -> fx.Node:
        if self._identity(tensor) in self.nodes:
            return self.nodes[self._identity(tensor)]
        name = self.attributes.get(id(tensor)) or next(
            (f"{path}.weight" for path, layer in self.layers.items() if vars(layer).get("weight") is tensor), None
        )
        if name is not None:
            node = self.graph.create_node("get_attr", name, (), {})
        else:
            node = self.graph.create_node("placeholder", "constant", (), {})
        self._finish(node, specs(tensor))
        self.bind(tensor, node)
        return node

    def _args(self, value: Any) -> Any:
        return map_aggregate(value, lambda item: self.node_of(item) if isinstance(item, Tensor) else item)

    def reads(self, value: Any) -> Any:
        """The arguments of a step as nodes. Reading what an activation overwrote in place, not what it gave, marks it."""
        for tensor in tensors_in(value):
            number = id(tensor)
            while number in self.overwritten:
                number, node = self.overwritten[number]
                node.meta["read_again"] = True
        return self._args(value)

    def _apart(self, what: nn.Module | str, args: tuple[Any, ...], node: fx.Node, result: Any) -> Any:
        """What an activation in place gives, as a tensor of its own on the same memory: who reads which can be told then."""
        if not args or result is not args[0] or not isinstance(result, Tensor) or not is_activation(what):
            return result
        given = result.detach()
        self.alive.append(given)
        self.aliases[id(given)] = self._identity(result)
        self.overwritten[id(result)] = (id(given), node)
        return given

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
        for position, tensor in enumerate(tensors_in(result)):
            item = self.graph.create_node("call_function", _item, (node, position), {})
            self.bind(tensor, self._finish(item, specs(tensor)))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if self.leaf_depth:
            if self.leaf is not None and func in WEIGHTED_FUNCTIONS:
                own = weight_argument(args, options) is self.leaf._parameters.get("weight")
                self.weights.setdefault(self.paths[id(self.leaf)], []).append(own)
            return func(*args, **options)
        name = plain_name(func)
        # Before the call, which may write into its arguments.
        arguments, keywords = self._args(tuple(args)), self._args(options)
        result = func(*args, **options)
        if name == "setitem" or tensors_in(result):
            self.reads([args, options])
        if name == "setitem":
            node = self._finish(self.graph.create_node("call_function", func, arguments, keywords), specs(args[0]))
            self.bind(args[0], node)
            self._event("function", name, node)
        elif tensors_in(result):
            node = self._finish(self.graph.create_node("call_function", func, arguments, keywords), specs(result))
            self._bind_result(node, result)
            self._event("function", name, node)
            result = self._apart(name, args, node, result)
        return result

    def call(self, original: Callable[..., Any], module: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
        path = self.paths.get(id(module))
        if self.leaf_depth or path is None:
            return original(module, *args, **kwargs)
        if is_leaf(module):
            # Reading a tensor's shape is a torch function too: the bookkeeping must not record itself.
            self.leaf_depth += 1
            try:
                arguments, keywords = self.reads(args), self.reads(dict(kwargs))
                self.leaf = module
                try:
                    result = original(module, *args, **kwargs)
                finally:
                    self.leaf = None
                node = self._finish(self.graph.create_node("call_module", path, arguments, keywords), specs(result))
                self._bind_result(node, result)
                self._event("module", path, node)
                result = self._apart(module, args, node, result)
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
    return tensors_in(values)[position]


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[_Recorder, Any]:
    recorder = _Recorder(model)
    for number, tensor in enumerate(tensors_in([args, kwargs])):
        recorder.placeholder(tensor, f"input_{number}")
    call, set_attribute = nn.Module.__call__, nn.Module.__setattr__

    def patched_call(module: nn.Module, *a: Any, **k: Any) -> Any:
        return recorder.call(call, module, a, k)

    def patched_set(module: nn.Module, name: str, value: Any) -> None:
        recorder.attributes_set.add((recorder.paths.get(id(module), ""), name))
        set_attribute(module, name, value)

    nn.Module.__call__, nn.Module.__setattr__ = patched_call, patched_set  # type: ignore[method-assign,assignment]
    try:
        with recorder:
            output = model(*args, **kwargs)
    finally:
        nn.Module.__call__, nn.Module.__setattr__ = call, set_attribute  # type: ignore[method-assign]
    outputs = recorder.reads(tensors_in(output))
    node = recorder.graph.output(tuple(outputs))
    node.meta.update(spec=None, scope=())
    return recorder, output


def _copy_to(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    return map_aggregate(value, lambda item: function(item) if isinstance(item, Tensor) else item)


def _heavy(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a run on fake tensors is the cheaper one: large inputs, or a network without values."""
    if any(parameter.device.type == "meta" for parameter in model.parameters()):
        return True
    pixels = sum(item.numel() // item.shape[1] for item in tensors_in([args, kwargs]) if item.dim() == 4)
    return pixels > _LIGHT_PIXELS


def _recorded_run(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], fake: bool, *, training: bool = False
) -> tuple[_Recorder, Any]:
    """Runs on real or on fake tensors; nothing of it stays on the model."""
    with torch.no_grad(), restored(model, fake=fake), evaluation_flags(model), same_random_state(model):
        for module in model.modules():
            # Layers, norms and dropouts alone stay as they are: it is the code between them that is asked.
            module.training = training and not is_leaf(module)
        if not fake:
            return _run(model, args, kwargs)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            return _run(model, tuple(_copy_to(args, mode.from_tensor)), dict(_copy_to(kwargs, mode.from_tensor)))


def record(model: nn.Module, example_inputs: Any = None) -> Record:
    """Runs ``model`` once in evaluation mode and writes down what it did.

    Small inputs run for real, which takes less time than the bookkeeping of fake tensors; larger ones, and networks on
    the meta device, run on fake tensors, which cost no arithmetic. Where one way fails the other is tried.

    Args:
        model: any module; it is left as it was.
        example_inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments; by default they are
            derived from the model (channels of its first convolution, sizes that divide).

    Raises:
        PlanError: no example input ran; the message quotes what was tried and each error.
    """
    failures: list[str] = []
    for args, kwargs in candidate_inputs(model, example_inputs):
        for fake in (True, False) if _heavy(model, args, kwargs) else (False, True):
            try:
                recorder, output = _recorded_run(model, args, kwargs, fake)
            except Exception as error:
                text = str(error).strip().splitlines()
                failures.append(
                    f"{describe_inputs(args, kwargs)}{' (fake)' if fake else ''}: {type(error).__name__}: "
                    f"{text[0][:200] if text else ''}"
                )
                continue

            def in_training(args: tuple[Any, ...] = args, kwargs: dict[str, Any] = kwargs) -> fx.Graph:
                return _recorded_run(model, args, kwargs, fake=True, training=True)[0].graph

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
                weights=recorder.weights,
                attributes_set=frozenset(recorder.attributes_set),
                aliases=aliases,
                in_training=in_training,
                inputs=(args, kwargs),
                inputs_text=describe_inputs(args, kwargs),
                output=specs(output),
                fake=fake,
                given=example_inputs is not None,
            )
    raise PlanError(
        f"{type(model).__name__} did not run on any example input, so there is nothing to rewrite; pass "
        "example_inputs= (a tensor, a tuple or a dict). Tried:\n  " + "\n  ".join(failures[-6:])
    )
