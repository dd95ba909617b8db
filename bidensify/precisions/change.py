"""One unit in another precision, for a while: in the full-precision network, or in the student."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bidensify.nn import BinaryLayer
from bidensify.nn.calibration import normalized_by
from bidensify.precisions.findings import Unit
from bidensify.precisions.precision import Branch

__all__ = ["Change", "InStudent", "InTeacher", "observe"]

# (2, C): mean and variance per channel.
Moments = Tensor


class Change:
    """A unit in a precision.

    Attributes:
        unit: what is changed.
        precision: its name.
        network: the module whose layers change.
    """

    def __init__(self, unit: Unit, precision: str, network: nn.Module) -> None:
        self.unit, self.precision, self.network = unit, precision, network

    @property
    def name(self) -> str:
        """Unit and precision."""
        return f"{self.unit.name}={self.precision}"

    @contextmanager
    def counting(self) -> Iterator[None]:
        """The change, for a batch of calibration images: normalized by the batch, whose moments are counted."""
        raise NotImplementedError

    @contextmanager
    def made(self) -> Iterator[None]:
        """The change, normalized by the means of the moments that were counted."""
        raise NotImplementedError


class InStudent(Change):
    """Layers of a student in float: latent weights and inputs as they are, norms with statistics of their own."""

    def __init__(self, unit: Unit, precision: str, network: nn.Module) -> None:
        super().__init__(unit, precision, network)
        modules = [network.get_submodule(path) for path in unit.layers]
        self.layers = [module for module in modules if isinstance(module, BinaryLayer)]
        norms = [layer.norm for layer in self.layers]
        self.norms = [norm for norm in norms if isinstance(norm, _BatchNorm) and norm.track_running_stats]
        self.sums: dict[_BatchNorm, Moments] = {}
        self.calls: Counter[_BatchNorm] = Counter()

    @contextmanager
    def _float(self) -> Iterator[None]:
        before = [(layer, layer.binarizer.enabled, layer.binarize_weights) for layer in self.layers]
        values = [(norm, norm.training, norm.momentum, _held(norm)) for norm in self.norms]
        try:
            for layer in self.layers:
                layer.binarizer.enabled = layer.binarize_weights = False
            yield
        finally:
            for layer, enabled, weights in before:
                layer.binarizer.enabled, layer.binarize_weights = enabled, weights
            for norm, training, momentum, held in values:
                norm.training, norm.momentum = training, momentum
                _set(norm, held)

    @contextmanager
    def counting(self) -> Iterator[None]:
        def note(norm: _BatchNorm, args: tuple[Tensor, ...], output: Any) -> None:
            found = normalized_by(norm, args[0])
            self.sums[norm] = self.sums[norm] + found if norm in self.sums else found
            self.calls[norm] += 1

        with ExitStack() as stack:
            stack.enter_context(self._float())
            for norm in self.norms:
                stack.callback(norm.register_forward_hook(note).remove)
                norm.training, norm.momentum = True, 1.0
            yield

    @contextmanager
    def made(self) -> Iterator[None]:
        with self._float():
            for norm, moments in self.sums.items():
                _set(norm, list(moments / self.calls[norm]))
            yield


def _held(norm: _BatchNorm) -> list[Tensor]:
    held = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    return [value.clone() for value in held if value is not None]


def _set(norm: _BatchNorm, values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for held, value in zip((norm.running_mean, norm.running_var, norm.num_batches_tracked), values):
            assert held is not None
            held.copy_(value)


class InTeacher(Change):
    """Layers of the full-precision network in another precision, each channel brought to the mean and variance that the float
    layer gives it, as the norm behind it would."""

    def __init__(
        self,
        unit: Unit,
        precision: str,
        network: nn.Module,
        branches: Mapping[str, Branch],
        targets: Mapping[str, Moments],
    ) -> None:
        super().__init__(unit, precision, network)
        self.parts = [(network.get_submodule(path), branches[path], targets[path]) for path in unit.layers]
        self.sums: dict[nn.Module, Moments] = {}
        self.calls: Counter[nn.Module] = Counter()

    @contextmanager
    def _replaced(self, count: bool) -> Iterator[None]:
        def forward_of(module: nn.Module, branch: Branch, target: Moments) -> Any:
            def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                y = branch(x, *args, **kwargs)
                if count:
                    found = moments_of(y, branch.dim)
                    self.sums[module] = self.sums[module] + found if module in self.sums else found
                    self.calls[module] += 1
                else:
                    found = self.sums[module] / self.calls[module]
                return _moved(y, found, target, branch.dim)

            return forward

        try:
            for module, branch, target in self.parts:
                module.__dict__["forward"] = forward_of(module, branch, target)
            yield
        finally:
            for module, _, _ in self.parts:
                module.__dict__.pop("forward", None)

    @contextmanager
    def counting(self) -> Iterator[None]:
        with self._replaced(True):
            yield

    @contextmanager
    def made(self) -> Iterator[None]:
        with self._replaced(False):
            yield


def moments_of(y: Tensor, dim: int) -> Moments:
    """Mean and variance per channel, (2, C), of ``y`` with its channels in ``dim``."""
    values = y.movedim(dim, 0).flatten(1)
    return torch.stack([values.mean(1), values.var(1, unbiased=False)])


def _moved(y: Tensor, found: Moments, target: Moments, dim: int) -> Tensor:
    """``y`` with each channel's moments brought from ``found`` to ``target``; a channel that is constant gets the mean."""
    scale = (target[1] / found[1].clamp(min=1e-12)).sqrt()
    shape = [1] * y.dim()
    shape[dim] = -1
    return y * scale.reshape(shape) + (target[0] - found[0] * scale).reshape(shape)


@contextmanager
def observe(network: nn.Module, branches: Mapping[str, Mapping[str, Branch]]) -> Iterator[dict[str, Moments]]:
    """Calibrates branches while the full-precision network runs on batches within the block.

    Args:
        network: the full-precision network.
        branches: of each precision by path.

    Yields:
        Path -> the moments of the float layer's result, averaged over its calls; complete when the block ends.
    """
    targets: dict[str, Moments] = {}
    calls: Counter[str] = Counter()
    of_layer: dict[str, list[Branch]] = {}
    for some in branches.values():
        for path, branch in some.items():
            of_layer.setdefault(path, []).append(branch)

    def hook_of(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            for branch in of_layer[path]:
                branch.observe(args[0])
            found = moments_of(output, of_layer[path][0].dim)
            targets[path] = targets[path] + found if path in targets else found
            calls[path] += 1

        return hook

    with ExitStack() as stack:
        for path, several in of_layer.items():
            for branch in several:
                branch.begin()
                stack.callback(branch.end)
            stack.callback(network.get_submodule(path).register_forward_hook(hook_of(path)).remove)
        yield targets
    for path, count in calls.items():
        targets[path] /= count
