"""Around loading: import order, no bidensify at all, pipelines, the Trainer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bidensify as bd
from bidensify.deploy import packed_layers
from bidensify.nn import BinaryLayer

transformers = pytest.importorskip("transformers")
from zoo.transformers import MODELS  # noqa: E402

SEGFORMER = "transformers:SemanticSegmentation/SegformerForSemanticSegmentation"
GLPN = "transformers:DepthEstimation/GLPNForDepthEstimation"


def latent(key: str) -> nn.Module:
    torch.manual_seed(0)
    student = bd.bidensify(MODELS[key]())
    bd.calibrate(student, [torch.randn(2, 3, 64, 64)])
    return student.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("latent")
    latent(SEGFORMER).save_pretrained(place)
    return place


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "warning"}
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment)


LOAD = "model = transformers.AutoModelForSemanticSegmentation.from_pretrained({folder!r}); "
COUNT = "print(sum('Binary' in type(m).__name__ for m in model.modules()))"


@pytest.mark.parametrize(
    "imports",
    [
        "import sys, bidensify; assert 'transformers' not in sys.modules; import transformers; ",
        "import transformers; transformers.AutoModelForSemanticSegmentation; import bidensify; ",
    ],
)
def test_either_order_of_imports_registers(imports: str, folder: Path) -> None:
    done = python(imports + LOAD.format(folder=str(folder)) + COUNT)
    assert int(done.stdout) == len(latent(SEGFORMER).bidensify_plan.binary)
    assert "MISSING" not in done.stderr
    assert "Unknown quantization" not in done.stderr


def test_what_the_user_sees_without_bidensify(folder: Path) -> None:
    done = python("import transformers; " + LOAD.format(folder=str(folder)) + COUNT)
    # transformers goes on with a float network, whose weights are those of another: it says so three times over.
    assert int(done.stdout) == 0
    assert "Unknown quantization type, got bidensify" in done.stderr
    assert "MISSING" in done.stderr
    assert "UNEXPECTED" in done.stderr
    assert "binarizer" in done.stderr


def test_an_integration_that_fails_does_not_break_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    from bidensify.integrations import hook

    monkeypatch.setitem(hook._INTEGRATIONS, "transformers.quantizers.auto", "bidensify.integrations.no_such_module")
    with pytest.warns(UserWarning, match="could not register with the installed transformers"):
        hook._register("transformers.quantizers.auto")


def test_registering_twice_changes_nothing() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

    from bidensify.integrations.hook import register
    from bidensify.integrations.transformers import BidensifyQuantizer, StoredBidensify

    finders = list(sys.meta_path)
    register()
    assert AUTO_QUANTIZER_MAPPING["bidensify"] is BidensifyQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["bidensify"] is StoredBidensify
    assert sys.meta_path == finders


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("source", ["model", "folder"])
@pytest.mark.parametrize(
    ("task", "key", "processor"),
    [("image-segmentation", SEGFORMER, "SegformerImageProcessor"), ("depth-estimation", GLPN, "GLPNImageProcessor")],
)
def test_pipeline(task: str, key: str, processor: str, source: str, packed: bool, tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    model = bd.pack(latent(key)) if packed else latent(key)
    settings = {"size": {"height": 64, "width": 64}} if task == "image-segmentation" else {"size_divisor": 32}
    tool = getattr(transformers, processor)(**settings)
    if source == "folder":
        model.save_pretrained(tmp_path)
        tool.save_pretrained(tmp_path)
        pipe = transformers.pipeline(task, model=str(tmp_path))
    else:
        pipe = transformers.pipeline(task, model=model, image_processor=tool)
    assert bool(packed_layers(pipe.model)) is packed
    y, x = np.mgrid[:96, :128]
    image = image_module.fromarray(np.stack([x * 2, y * 2, (x + y) % 256], -1).astype(np.uint8))
    result: Any = pipe(image)
    pixels = tool(images=image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(pixels)
    if task == "image-segmentation":
        wanted = nn.functional.interpolate(output.logits, size=(96, 128), mode="bilinear", align_corners=False)
        classes = wanted.argmax(1)[0].unique().tolist()
        assert sorted(item["label"] for item in result) == sorted(model.config.id2label[c] for c in classes)
        assert sum(np.asarray(item["mask"]).astype(bool).sum() for item in result) == 96 * 128
    else:
        assert result["depth"].size == (128, 96)
        assert result["predicted_depth"].shape == (96, 128)
        assert torch.isfinite(result["predicted_depth"]).all()


class Scenes(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Two classes, told apart by the sign of the first channel."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        pixels = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": pixels, "labels": (pixels[0] > 0).long()}


def trainer(model: nn.Module, tmp_path: Path) -> Any:
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=4, num_train_epochs=1, learning_rate=1e-3, report_to=[],
        use_cpu=True, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    return transformers.Trainer(model=model, args=arguments, train_dataset=Scenes())


def test_trainer_trains_a_latent_model_and_saves_it(folder: Path, tmp_path: Path) -> None:
    model = transformers.AutoModelForSemanticSegmentation.from_pretrained(folder)
    before = {
        name: layer.latent_weight.clone() for name, layer in model.named_modules() if isinstance(layer, BinaryLayer)
    }
    run = trainer(model, tmp_path)
    assert run.train().global_step == 2
    changed = [not torch.equal(before[name], model.get_submodule(name).latent_weight) for name in before]
    assert all(changed)
    run.save_model(str(tmp_path / "trained"))
    again = transformers.AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "trained")
    for name, value in model.state_dict().items():
        assert torch.equal(value.cpu(), again.state_dict()[name]), name


def test_trainer_refuses_a_packed_model(tmp_path: Path) -> None:
    bd.pack(latent(SEGFORMER)).save_pretrained(tmp_path)
    model = transformers.AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        trainer(model, tmp_path)
