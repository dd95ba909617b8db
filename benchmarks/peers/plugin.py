"""The pytest plugin of ``peers.py``: selects tests, rewrites every network that a test makes, writes one line a test."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

SETTINGS = json.loads(os.environ["BIDENSIFY_PEERS"])
PROJECT, REWRITTEN = SETTINGS["project"], SETTINGS["rewritten"]
ONLY = None if SETTINGS["only"] is None else set(SETTINGS["only"])
SECONDS = 1200
SMP_ENCODERS = (
    "resnet18",
    "mobilenet_v2",
    "efficientnet-b0",
    "vgg11_bn",
    "densenet121",
    "mit_b0",
    "timm-mobilenetv3_small_075",
)
SMP_ENCODERS += (
    "timm-gernet_s",
    "timm-regnetx_002",
    "mobileone_s0",
    "tu-resnet34",
    "xception",
    "dpn68",
    "timm-skresnet18",
)
TIMM_NETWORKS = (
    "coat_lite_tiny convnext_atto convnextv2_atto cspdarknet53 densenet121 dla46_c edgenext_xx_small "
    "efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientnet_lite0 efficientvit_b0 "
    "efficientvit_m0 ese_vovnet19b_slim fasternet_t0 fastvit_t8 fbnetc_100 ghostnet_050 ghostnetv2_100 "
    "hardcorenas_a hgnetv2_b0 hrnet_w18_small inception_next_atto lcnet_050 levit_128s mambaout_femto mixnet_s "
    "mobilenetv2_050 mobilenetv3_small_050 mobilenetv4_conv_small mobileone_s0 mobilevit_xxs mobilevitv2_050 "
    "poolformer_s12 pvt_v2_b0 regnety_002 repghostnet_050 repvit_m0_9 resnet18 resnetv2_18 rexnet_100 "
    "seresnext26t_32x4d shvit_s1 starnet_s1 swiftformer_xs "
)
TIMM_TESTS = ("forward", "backward", "forward_features", "forward_intermediates", "forward_intermediates_features")
TIMM_TESTS += ("forward_fx", "backward_fx")

_inside = 0
_untouched: list[str] = []


@contextlib.contextmanager
def _building() -> Iterator[None]:
    """Networks made inside are parts of another, or are rewritten by a stored plan."""
    global _inside
    _inside += 1
    try:
        yield
    finally:
        _inside -= 1


def _rewrite(model: nn.Module) -> None:
    from bidensify import bidensify
    from bidensify.errors import PlanError

    if torch.empty(0).is_meta or any(parameter.is_meta for parameter in model.parameters()):
        _untouched.append("on the meta device")
        return
    try:
        bidensify(model, inplace=True)
    except PlanError as error:
        if "would change nothing" not in str(error):
            raise
        _untouched.append(str(error))


def _after_init(cls: type[nn.Module]) -> None:
    """Every new object of ``cls`` is rewritten as soon as its constructor is done, unless it is a part of another."""
    original = cls.__init__

    @functools.wraps(original)
    def __init__(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        with _building():
            original(self, *args, **kwargs)
        if not _inside and type(self) is cls:
            _rewrite(self)

    cls.__init__ = __init__  # type: ignore[method-assign]


def _after_call(function: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> nn.Module:
        with _building():
            model = function(*args, **kwargs)
        if not _inside:
            _rewrite(model)
        return model

    return called


def _wrap_smp() -> None:
    import segmentation_models_pytorch as smp

    for cls in (
        smp.Unet,
        smp.UnetPlusPlus,
        smp.MAnet,
        smp.Linknet,
        smp.FPN,
        smp.PSPNet,
        smp.DeepLabV3,
        smp.DeepLabV3Plus,
        smp.PAN,
    ):
        _after_init(cls)
    smp.encoders.get_encoder = _after_call(smp.encoders.get_encoder)


def _wrap_timm() -> None:
    import timm

    timm.create_model = _after_call(timm.create_model)


def _wrap_transformers() -> None:
    from transformers import PreTrainedModel

    original = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        with _building():
            return original(cls, *args, **kwargs)

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if REWRITTEN:
        {"smp": _wrap_smp, "timm": _wrap_timm, "transformers": _wrap_transformers}[PROJECT]()


def _selected(name: str) -> bool:
    if ONLY is not None:
        return name in ONLY
    if PROJECT == "smp":
        encoder = re.search(r"test_(?:forward|dilation)\[(.*)\]", name)
        return encoder is None or any(f"-{e}-" in f"-{encoder.group(1)}-" for e in SMP_ENCODERS)
    if PROJECT == "timm":
        parts = re.search(r"::test_model_(\w+)\[\d+-(.*)\]$", name)
        return parts is not None and parts.group(1) in TIMM_TESTS and parts.group(2) in TIMM_NETWORKS.split()
    return True


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if _selected(item.nodeid)]
    if REWRITTEN and PROJECT == "transformers":
        for cls in {c for item in items for c in getattr(item.cls, "all_model_classes", ())}:
            _after_init(cls)


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    torch.manual_seed(0)
    _untouched.clear()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(SECONDS)
    try:
        return (yield)
    finally:
        signal.alarm(0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    report = yield
    if report.when == "call" or report.outcome != "passed":
        error = "" if call.excinfo is None else f"{call.excinfo.typename}: {call.excinfo.value}"
        row = {"test": item.nodeid, "outcome": report.outcome, "error": error[:600]}
        if _untouched:
            row["untouched"] = _untouched[0][:200]
        with Path(SETTINGS["log"]).open("a") as file:
            file.write(json.dumps(row) + "\n")
        if report.outcome == "failed" and os.environ.get("BIDENSIFY_PEERS_SHOW"):
            print(report.longrepr, file=sys.stderr)
    return report
