"""``bidensify.plan`` and ``bidensify.bidensify``."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch
from torch import nn

from bidensify._util.wrappers import unwrap
from bidensify.config import BidensifyConfig
from bidensify.errors import ConfigError, PlanError
from bidensify.methods import get_method
from bidensify.nn import BinaryLayer, FrozenLayer, Int8Layer
from bidensify.nn.used_weight import copy_model
from bidensify.rewrite.apply.model import apply_plan
from bidensify.rewrite.check import check, on_other_values, second_size
from bidensify.rewrite.plan.make import make_plan
from bidensify.rewrite.plan.schema import Plan
from bidensify.rewrite.record.recorder import record

__all__ = ["bidensify", "plan"]


def _config(config: BidensifyConfig | None, method: str | None) -> BidensifyConfig:
    if config is None:
        config = BidensifyConfig()
    if not isinstance(config, BidensifyConfig):
        raise ConfigError(f"config={config!r} must be a BidensifyConfig (BidensifyConfig.from_dict reads a mapping)")
    if method is not None:
        config = dataclasses.replace(config, method=method)
    get_method(config.method)
    return config


def _refuse(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise PlanError(f"{type(model).__name__} is no nn.Module; give the network")
    if type(model).__name__ == "OptimizedModule":
        raise PlanError("the network is compiled: convert the network itself, then compile the result")
    if isinstance(model, torch.jit.ScriptModule):
        raise PlanError("the network is scripted: convert the network that it was made from")
    for path, module in model.named_modules():
        if any(nn.parameter.is_lazy(parameter) for parameter in module.parameters(recurse=False)):
            raise PlanError(
                f"{path}: {type(module).__name__} does not know its channels yet; run the network once, then convert it"
            )
    for path, module in model.named_modules():
        if isinstance(module, BinaryLayer):
            raise PlanError(f"{path}: the network is binary already; give the full-precision one")
        if isinstance(module, Int8Layer):
            raise PlanError(f"{path}: the network is rounded to int8 already; give the full-precision one")
        if isinstance(module, FrozenLayer):
            raise PlanError(f"{path}: the network is packed already; give the full-precision one")
        if any(parameter.is_meta for parameter in module.parameters(recurse=False)):
            raise PlanError(
                f"{path}: its parameters are on the meta device, and a rewrite starts from the network's weights; load "
                "them first (from_pretrained needs none: it replays a stored plan)"
            )


def plan(model: nn.Module, config: BidensifyConfig | None = None, *, example_inputs: Any = None) -> Plan:
    """What ``bidensify`` would do: every layer, its action and the reason. The model is left as it is.

    Args:
        model: any network with convolutions.
        config: what to do; defaults to ``BidensifyConfig()``.
        example_inputs: a tensor, a tuple or a dict; by default derived from the model.

    Returns:
        A ``Plan``; ``print`` shows it as a table, ``.to_dict()`` gives JSON-able data.

    Raises:
        PlanError: the network does not run, has no convolution, or nothing would change.
        ConfigError: an unknown method, or a rule that matches nothing.
    """
    config = _config(config, None)
    _refuse(model)
    model = unwrap(model)
    return make_plan(record(model, example_inputs), model, config)


def bidensify(
    model: nn.Module,
    config: BidensifyConfig | None = None,
    *,
    method: str | None = None,
    example_inputs: Any = None,
    inplace: bool = False,
    verify: bool = True,
) -> nn.Module:
    """Rewrites a network: binary layers where convolutions were, with the full-precision signal kept.

    The network keeps its class, attributes, forward signature and hooks; ``.bidensify_plan`` says what was done. Before
    training, ``bidensify.calibrate`` (``finetune`` calls it) sets thresholds and BatchNorm statistics.

    Args:
        model: the full-precision network; of DataParallel and of a moving average what is inside.
        config: what to do; defaults to ``BidensifyConfig()``.
        method: overrides ``config.method``.
        example_inputs: a tensor, a tuple or a dict; by default derived from the model.
        inplace: rewrite ``model`` itself instead of a deep copy.
        verify: check the result (each layer is hit as recorded, a second input size runs, the output's structure, a
            deep copy); cheap.

    Raises:
        PlanError, ConfigError: see ``plan``.
        CheckError: the result does not keep what a rewrite guarantees.
    """
    config = _config(config, method)
    _refuse(model)
    model = unwrap(model)
    recorded = record(model, example_inputs)
    planned = make_plan(recorded, model, config)
    expected = second_size(model, recorded) if verify else None
    result = apply_plan(model if inplace else copy_model(model), planned)
    if verify:
        rerun = None if inplace else functools.partial(on_other_values, model, recorded)
        check(result, planned, recorded, expected, rerun)
    return result
