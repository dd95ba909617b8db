"""CONTRIBUTING's examples run, and do what they say."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch
from torch import nn

import bidensify as bd
from bidensify.losses import LOSSES, Outputs

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def example(title: str) -> dict[str, object]:
    """Runs the code below a heading."""
    section = TEXT[TEXT.index(f"## {title}\n") :].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    assert len(blocks) == 1
    names: dict[str, object] = {"__name__": "contributing"}
    exec(compile(blocks[0], f"CONTRIBUTING.md, {title}", "exec"), names)
    return names


def test_a_method_trains_and_packs_to_the_same_bits() -> None:
    example("Add a method")
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.ConvTranspose2d(16, 8, 2, 2), nn.ReLU(),
        nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    student = bd.bidensify(net, method="shifted")
    x = torch.randn(2, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    bd.calibrate(student, [x])
    student.train()
    student(x).square().mean().backward()
    layers = [module for _, module in bd.nn.binary_layers(student)]
    assert len(layers) == 2
    assert all(float(layer.latent_weight.grad.abs().sum()) > 0 for layer in layers)
    assert all(layer.binary_weight()[2] is not None for layer in layers)
    student.eval().to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(bd.pack(student)(x), student(x))


def test_a_loss_is_what_it_says() -> None:
    example("Add a loss")

    class Task:
        def logits(self, outputs: torch.Tensor) -> torch.Tensor:
            return outputs

    student, teacher = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    term = LOSSES._known["logits-l2"](weight=0.5)
    value = term.value(Outputs(student, teacher), {}, Task())  # type: ignore[arg-type]
    torch.testing.assert_close(value, torch.nn.functional.mse_loss(student, teacher))


def test_a_data_set_gives_samples() -> None:
    from bidensify.data.registry import build_dataset

    example("Add a data set")
    data = build_dataset("stripes", "train", length=3)
    assert len(data) == 3
    assert data[1]["mask"].unique().tolist() == [0, 1]
    assert torch.equal(data[1]["image"][0] > 0, data[1]["mask"] == 1)


def test_a_librarys_models_are_built_by_name() -> None:
    from bidensify.models import build_model

    example("Add a library's models")
    net = build_model("mine:tiny", classes=5)
    assert net(torch.zeros(1, 3, 8, 8)).shape == (1, 5, 8, 8)
    assert len(bd.plan(net).binary) == 1


def test_a_kernel_runs_packed_layers() -> None:
    example("Add a kernel")
    layer = bd.nn.BiDenseConv2d(8, 8, 3, padding=1).eval()
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        assert torch.equal(bd.pack(layer, kernel="plain_torch")(x), bd.pack(layer, kernel="reference")(x))


def test_files_and_links_that_are_named_exist() -> None:
    for name in (
        *re.findall(r"\]\((?!http)([^)#]+)\)", TEXT),
        *re.findall(r"`((?:bidensify|tests|benchmarks)/[\w/.]+)`", TEXT),
    ):
        assert (ROOT / name).exists(), name
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:tests|bidensify)/[\w/.]+)`", page):
        assert (ROOT / name).exists(), name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in re.findall(r"`((?:rewrite|deploy|kernels|exact)/[\w/.]+)`", page):
            assert (ROOT / "bidensify" / name).exists(), name
