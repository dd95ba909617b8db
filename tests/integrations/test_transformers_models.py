"""Every dense-prediction class of transformers, as it is: converted, run, trained one step, saved; no help from the user."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bidensify as bd
from bidensify.nn import BinaryLayer
from bidensify.rewrite.record.inputs import candidate_inputs
from bidensify.rewrite.record.recorder import record

transformers = pytest.importorskip("transformers")
pytest.importorskip("scipy", reason="transformers builds its mask losses with scipy")
from zoo.signal import joined_signals  # noqa: E402
from zoo.transformers import MODELS, UNAVAILABLE  # noqa: E402

AUTOS = {
    "SemanticSegmentation": "MODEL_FOR_SEMANTIC_SEGMENTATION_MAPPING_NAMES",
    "DepthEstimation": "MODEL_FOR_DEPTH_ESTIMATION_MAPPING_NAMES",
    "ImageToImage": "MODEL_FOR_IMAGE_TO_IMAGE_MAPPING_NAMES",
    "UniversalSegmentation": "MODEL_FOR_UNIVERSAL_SEGMENTATION_MAPPING_NAMES",
}


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors(item)


def structure(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return type(value), {key: structure(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value), [structure(item) for item in value]
    return value


def trained(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by name after one training step's forward and backward."""
    model.train()
    model.zero_grad()
    sum(item.float().square().mean() for item in tensors(model(**inputs)) if item.requires_grad).backward()  # type: ignore[union-attr]
    model.eval()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def test_every_class_of_the_four_auto_models_is_here() -> None:
    names = transformers.models.auto.modeling_auto
    for auto, mapping in AUTOS.items():
        listed = {key.split("/")[1].split("@")[0] for key in [*MODELS, *UNAVAILABLE] if f":{auto}/" in key}
        assert set(getattr(names, mapping).values()) <= listed, auto


@pytest.mark.parametrize("key", MODELS)
def test_converts_unchanged(key: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS[key]().eval()
    student = bd.bidensify(model)
    plan = student.bidensify_plan
    assert isinstance(student, type(model))
    assert plan.binary
    assert plan.binary_mac_share(eligible_only=True) >= 0.9
    assert all(layer.reason for layer in plan.kept)

    _, inputs = next(iter(candidate_inputs(model)))
    with torch.no_grad():
        before, after = model(**inputs), student(**inputs)
    assert structure(after) == structure(before)
    assert all(torch.isfinite(item).all() for item in tensors(after) if item.is_floating_point())

    wanted, got = trained(model, inputs), trained(student, inputs)
    layers = {name: layer for name, layer in student.named_modules() if isinstance(layer, BinaryLayer)}
    assert set(layers) == {layer.path for layer in plan.binary}
    for name in layers:
        # A layer that the loss did not reach before (an auxiliary head) is not reached now.
        assert (f"{name}.weight" in got) == (f"{name}.weight" in wanted), name
        if f"{name}.weight" in got:
            assert torch.isfinite(got[f"{name}.weight"]).all(), name

    student.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [type(model).__name__]
    auto = getattr(transformers, f"AutoModelFor{key.split(':')[1].split('/')[0]}")
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    assert type(again).__name__ == type(model).__name__
    state = student.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())
    with torch.no_grad():
        for got, wanted_output in zip(tensors(again(**inputs)), tensors(student(**inputs))):
            torch.testing.assert_close(got, wanted_output, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "key",
    [
        "transformers:DepthEstimation/ZoeDepthForDepthEstimation",
        "transformers:ImageToImage/Swin2SRForImageSuperResolution",
        "transformers:SemanticSegmentation/UperNetForSemanticSegmentation@swin",
        "transformers:UniversalSegmentation/Mask2FormerForUniversalSegmentation",
        "transformers:UniversalSegmentation/OneFormerForUniversalSegmentation",
    ],
)
def test_all_linear_layers(key: str) -> None:
    """linear="all": windows that are shifted, norms behind a block's last layer, attention that says where it looks."""
    torch.manual_seed(0)
    model = MODELS[key]().eval()
    student = bd.bidensify(model, bd.BidensifyConfig(linear="all"))
    plan = student.bidensify_plan
    binary = {layer.path.rpartition(".")[2] for layer in plan.binary if layer.kind == "linear"}
    assert binary

    kept = {layer.path.rpartition(".")[2]: layer.reason for layer in plan.kept}
    if any(name.endswith("sampling_offsets") for name, _ in model.named_modules()):
        assert kept["sampling_offsets"] == "says where to sample"
        assert kept["attention_weights"] == "gate"
        assert not binary & {"sampling_offsets", "attention_weights"}
    tables = [layer for layer in plan.layers if "position_bias_mlp" in layer.path]
    assert all(layer.reason == "on constants alone, such as a table of positions" for layer in tables)

    counts = joined_signals(record(student))
    assert set(counts) == {layer.path for layer in plan.binary}
    assert {path: each for path, each in counts.items() if each not in ([1], [])} == {}

    _, inputs = next(iter(candidate_inputs(model)))
    with torch.no_grad():
        before, after = student(**inputs), bd.pack(student)(**inputs)
    assert structure(after) == structure(before)
    assert all(torch.isfinite(item).all() for item in tensors(after) if item.is_floating_point())
