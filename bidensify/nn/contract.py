"""What a layer's parts say of themselves: the contract that training, evaluation, packing and kernels share.

A part is an activation binarizer, a weight binarizer, a norm, an activation or a bypass. Training uses its differentiable
``forward``; evaluation without gradients and packed layers use what it declares: ``codes``, ``stored``, ``folded``,
``exact``. A declaration is true of the class that makes it: a subclass that changes what was declared, and declares nothing
itself, has no declaration (``Declares``), so that nothing is ever evaluated as another network than was trained.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from bidensify.errors import ConfigError
from bidensify.nn.ste import threshold_levels, threshold_sign
from bidensify.nn.torch_tools import refuse_script

__all__ = ["ActivationBinarizer", "Declares", "FrozenLayer", "Split", "mixing_threshold", "set_progress"]

_CALIBRATION_SAMPLES = 4096
# Values of a channel that differ by less, relative to its largest, are one value summed in different orders.
_ROUNDING = 1e-6


def _undeclared(self: Any, *unused: Any, **also: Any) -> None:
    """Nothing is declared: the part is called."""
    return


class Declares:
    """A class whose methods named on the left of ``declarations`` describe those on the right.

    A subclass that defines one on the right and not the one on the left has the latter exchanged for one that gives None.
    """

    declarations: ClassVar[Mapping[str, tuple[str, ...]]] = {"folded": ("forward",)}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name, described in cls.declarations.items():
            if name not in cls.__dict__ and any(each in cls.__dict__ for each in described):
                setattr(cls, name, _undeclared)


class Split(NamedTuple):
    """What ``ActivationBinarizer.split`` gives.

    Attributes:
        binary: the binarized input.
        passed: the bypass's input, or None for ``groups=0``.
        source: what ``remake`` makes ``binary`` of, detached.
        remake: gives ``binary`` again, so that it need not be kept for the backward pass.
        codes: thresholds (N, C) and levels (N, 2) that ``binary`` is made with, where it is a stand-in without values; or None.
    """

    binary: Tensor
    passed: Tensor | None
    source: Tensor
    remake: Callable[[], Tensor]
    codes: tuple[Tensor, Tensor] | None = None


class FrozenLayer(nn.Module):
    """Base of layers that hold bits and cannot be trained (packed layers)."""

    __prepare_scriptable__ = refuse_script


def set_progress(model: nn.Module, fraction: float) -> None:
    """Tells every part that changes as training goes on how far it is.

    Args:
        model: a network with binary layers.
        fraction: 0 at the first step, 1 at the end.

    Raises:
        ConfigError: ``fraction`` is outside 0..1.
    """
    if not 0.0 <= fraction <= 1.0:
        raise ConfigError(f"set_progress: fraction={fraction!r} must be within 0 and 1")
    for module in model.modules():
        change = getattr(module, "set_progress", None)
        if callable(change):
            change(fraction)


def mixing_threshold(values: Tensor) -> Tensor:
    """Per-row thresholds that split each row's values as evenly as their ties allow.

    A threshold lies midway between two values of the row, so that rounding moves none of them across it.

    Args:
        values: (C, n).

    Returns:
        (C,): the cut nearest the row's middle; the value itself in a row of one value.
    """
    ordered = values.float().sort(dim=1).values
    count = ordered.shape[1]
    if count == 1:
        return ordered[:, 0]
    low, high = ordered[:, :-1], ordered[:, 1:]
    distinct = high - low > _ROUNDING * ordered.abs().amax(1, keepdim=True)
    distinct = torch.where(distinct.any(1, keepdim=True), distinct, high > low)
    above = torch.arange(count - 1, 0, -1, dtype=torch.int32, device=values.device)
    cut = torch.where(distinct, (2 * above - count).abs(), 2 * count).argmin(1, keepdim=True)
    start, end = low.gather(1, cut).squeeze(1), high.gather(1, cut).squeeze(1)
    middle = start + (end - start) / 2
    return torch.where(middle > start, middle, end)


class ActivationBinarizer(nn.Module):
    """Base of activation binarizers for (N, C, H, W) (``dim=1``) or (..., C) (``dim=-1``).

    A subclass says with ``codes`` which two values it gives and where the threshold between them lies:
    binarized x = high where x >= threshold, low elsewhere, times ``flips``. A packed layer needs no more than that. With two
    ``planes``, half = (high - low) / 2 is the step too: s1 = sign(x - threshold), s2 = sign(x - threshold - half * s1), and
    binarized x = (low + high) / 2 + half * (s1 + s2 / 2): four levels, one step apart. It may
    define ``binarize``, the differentiable forward, too; else that is ``codes`` behind the Bi-Real estimator. One that defines
    ``binarize`` alone trains and is not packable.

    Attributes:
        enabled: False passes the input through (the stage that trains with float activations).
        calibrating: True sets thresholds from what comes in, before they are used.
        planes: bit planes of the result, 1 or 2.
        work: elementwise operations per input element, as ``summary`` counts them.
        packable, unpackable_reason: whether ``pack`` takes it, and why not.
    """

    work: int = 1
    planes: int = 1
    packable: bool = True
    unpackable_reason: str = ""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = cls.__dict__
        changed = any(name in own for name in ("codes", "binarize", "forward", "_threshold", "_step"))
        for name in ("stored", "split", "flips"):
            if changed and name not in own:
                setattr(cls, name, _undeclared)
        if ("binarize" in own or "forward" in own) and "codes" not in own and "packable" not in own:
            cls.packable = False
            if "unpackable_reason" not in own:
                cls.unpackable_reason = (
                    f"{cls.__name__} has a forward of its own and does not say its codes(x) -> (threshold, low, high); define "
                    "them to pack"
                )
        elif "codes" in own and "packable" not in own:
            cls.packable, cls.unpackable_reason = True, ""
        if "weigh" in own and "packable" not in own:
            cls.packable = False
            cls.unpackable_reason = (
                f"{cls.__name__} weighs the layer's output by what it finds in the input (weigh), which packed layers "
                "do not"
            )

    def __init__(self, channels: int, dim: int = 1) -> None:
        super().__init__()
        if dim not in (1, -1):
            raise ValueError(f"{type(self).__name__}: dim={dim} must be 1 (channels first) or -1 (channels last)")
        self.channels = channels
        self.dim = dim
        self.enabled = True
        self.calibrating = False

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # Earlier releases had parameters without dimensions, which FSDP does not take.
        for name, parameter in self._parameters.items():
            value = state_dict.get(prefix + name)
            if parameter is not None and value is not None and parameter.shape == (1,) and value.dim() == 0:
                state_dict[prefix + name] = value.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(threshold, low, high), each broadcastable to ``x`` and in its dtype.

        A threshold per sample and channel at the finest, values per sample; anything finer can be trained, not packed.
        """
        raise NotImplementedError

    def stored(self) -> dict[str, Tensor] | None:
        """The codes as parameters that packed layers hold and kernels know, or None: this part is kept and asked.

        Among "k", "b" ((C,) each: threshold k * mean(x) + b), "a" (one element: values -+exp(a * (mean|x - threshold| - 1)),
        with two planes -+1.248 * exp(a) * mean|x - threshold|) and "levels" ((2,): low and high, constant); without "a" and
        "levels" the values are -1 and +1.
        """
        return None

    def flips(self) -> Tensor | None:
        """(C,) of -1 and +1 that each channel's two values are multiplied by, or None for +1; constant after training.

        Packed layers turn the channel's weight bits instead, which needs values -alpha and alpha and weights without an offset.
        """
        return None

    def split(self, x: Tensor, groups: int, owned: bool, signs: bool = True) -> Split | None:
        """``binarize`` and the bypass's view of ``x`` in one pass of a training kernel, or None where there is none for it.

        Args:
            x: the input.
            groups: 0; or C, which hands ``x`` on; or fewer, which gives ``fusion_down(x, groups)``.
            owned: nothing else will see the binarized input's gradient, which may be overwritten.
            signs: False, for an ``x`` in channels_last: codes will do, the binarized input need have no values.
        """
        return None

    def binarize(self, x: Tensor) -> Tensor:
        """The differentiable binarization of ``x``."""
        threshold, low, high = self.codes(x)
        levels = threshold_levels if self.planes == 2 else threshold_sign
        return levels(x, threshold, (high - low) / 2) + (high + low) / 2

    def weigh(self, x: Tensor, y: Tensor, layer: nn.Module) -> Tensor:
        """``y``, the bare layer's output for the input ``x``, times what cannot be said of the input; by default ``y``.

        A subclass with a ``weigh`` of its own trains and is not packable, unless it says ``packable``.
        """
        return y

    def calibrate(self, x: Tensor) -> None:
        """Sets thresholds from one batch of inputs; without thresholds there is nothing to set."""

    def begin_calibration(self) -> None:
        """Forgets earlier calibration batches and starts listening."""
        self.calibrating = True
        self._samples: Tensor | None = None
        self._thinned = 1

    def end_calibration(self) -> None:
        """Stops listening."""
        self.calibrating = False
        self._samples = None

    def set_progress(self, fraction: float) -> None:
        """Called as training goes on, with 0 at its first step and 1 at its end."""

    def _even_thresholds(self, x: Tensor, rest: Tensor | None = None) -> Tensor:
        """(C,) thresholds of ``x - rest`` that leave each channel with both signs, on all batches since calibration began."""
        moved = x.movedim(self.dim, 0).flatten(1)
        step = max(1, moved.shape[1] // _CALIBRATION_SAMPLES) * self._thinned
        values = moved[:, ::step].float()
        if rest is not None:
            values = values - rest.expand_as(x).movedim(self.dim, 0).flatten(1)[:, ::step].float()
        if self._samples is not None:
            values = torch.cat([self._samples, values], 1)
        while values.shape[1] > 2 * _CALIBRATION_SAMPLES:
            # Later calls are thinned as much, so that each weighs the same.
            values, self._thinned = values[:, ::2], 2 * self._thinned
        self._samples = values
        return mixing_threshold(values)

    def _spatial(self, x: Tensor) -> tuple[int, ...]:
        """The dimensions that statistics are taken over: all but the sample's and the channel's."""
        if self.dim == 1:
            return tuple(range(2, x.dim()))
        return tuple(range(1, x.dim() - 1))

    def _shaped(self, parameter: Tensor, x: Tensor) -> Tensor:
        """A parameter of (C,) elements, broadcastable to ``x``."""
        return parameter.reshape(-1) if self.dim == -1 else parameter.reshape(1, -1, *([1] * (x.dim() - 2)))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() < 2:
            raise ValueError(
                f"{type(self).__name__}: the input has shape {tuple(x.shape)}; statistics are per sample, so give a batch"
            )
        if x.shape[self.dim] != self.channels:
            raise ValueError(
                f"{type(self).__name__}: the input has {x.shape[self.dim]} channels on dimension {self.dim} (shape "
                f"{tuple(x.shape)}), the layer was made for {self.channels}"
            )
        if self.calibrating:
            with torch.no_grad():
                self.calibrate(x)
        return self.binarize(x) if self.enabled else x

    def extra_repr(self) -> str:
        planes = f", planes={self.planes}" if self.planes > 1 else ""
        return f"{self.channels}" + (", dim=-1" if self.dim == -1 else "") + planes
