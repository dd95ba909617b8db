"""Counts against torch's own counter, and against a count by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import bidensify as bd
from bidensify.costs.summary import summary
from bidensify.deploy.layers import packed_layers
from bidensify.errors import ConfigError, PlanError
from bidensify.methods import get_method
from bidensify.models import build_model

CONVOLUTIONAL = [name for name in bd.available_methods() if get_method(name).takes("conv2d")]
WITH_BITS = [(name, bits) for name in CONVOLUTIONAL for bits in get_method(name).act_bits]


class Attention(nn.Module):
    """Matrix products in functions, in torch's attention and in a layer of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.qkv = nn.Linear(16, 48)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.up = nn.ConvTranspose2d(16, 8, 2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        tokens = y.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).chunk(3, -1)
        mixed = (q @ k.transpose(1, 2)).softmax(-1) @ v
        mixed = mixed + torch.einsum("bnc,bmc->bnm", q, k) @ v
        mixed = mixed + F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        mixed = mixed + self.attention(mixed, mixed, mixed, need_weights=False)[0]
        return self.up(mixed.transpose(1, 2).view_as(y))


def counted(model: nn.Module, size: tuple[int, int, int]) -> int:
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # Of torch's fused attention on a CPU its counter knows nothing.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(torch.randn(1, *size))
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return int(counter.get_total_flops()) // 2


def networks() -> list[tuple[str, nn.Module]]:
    from bidensify.models.unet import unet

    found: list[tuple[str, nn.Module]] = [("unet", unet(width=8)), ("attention", Attention())]
    try:
        import segmentation_models_pytorch as smp
        import timm

        found.append(("fpn", smp.FPN("resnet18", encoder_weights=None)))
        found.append(("vit", timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2)))
    except ImportError:
        pass
    return found


@pytest.mark.parametrize(("name", "model"), networks(), ids=lambda value: value if isinstance(value, str) else "")
def test_float_macs_are_those_of_torchs_counter(name: str, model: nn.Module) -> None:
    result = summary(model, (3, 64, 64))
    assert result.state == "FLOAT"
    assert result.uncounted == ()
    assert result.total("float_macs") == counted(model, (3, 64, 64))
    assert result.total("float_params") == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(("method", "bits"), WITH_BITS)
def test_latent_and_packed_networks_do_the_work_of_the_original(method: str, bits: int) -> None:
    from bidensify.models.unet import unet

    model = unet(width=8)
    total = counted(model, (3, 64, 64))
    student = bd.bidensify(model, bd.BidensifyConfig(method=method, act_bits=bits)).eval()
    binary = sum(layer.latent_weight.numel() for _, layer in bd.nn.binary_layers(student))
    latent, packed = summary(student, (3, 64, 64)), summary(bd.pack(student), (3, 64, 64))
    assert (latent.state, packed.state) == ("LATENT", "PACKED")
    for result in (latent, packed):
        assert result.total("binary_macs") + result.total("float_macs") == total
        assert result.total("binary_params") == binary
        floats, ones = result.total("float_macs"), result.total("binary_macs")
        assert result.total("ops") == 2 * floats + 2 * ones * bits / 64 + result.total("elementwise")
    for name in ("binary_macs", "float_macs", "elementwise"):
        assert latent.total(name) == packed.total(name), name
    kept = sum(p.numel() for m in bd.pack(student).modules() for p in m._parameters.values() if p is not None)
    side = sum(layer.side.numel() for layer in packed_layers(bd.pack(student)).values())
    assert packed.total("float_params") == kept + side


class Tables(nn.Module):
    """Products with what is no activation: parameters, and what is made of them."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.flatten(2).transpose(1, 2)
        return y @ self.table @ self.table.t() + F.linear(y, self.table) + torch.einsum("bnc,cd->bnd", y, self.table)


def test_products_of_activations_are_told_from_layers() -> None:
    result = summary(Attention(), (3, 64, 64))
    # 256 tokens of 16 channels; each of the four attentions multiplies twice.
    assert result.total("product_macs") == 4 * 2 * 256 * 256 * 16
    assert "attention:" not in str(result)
    result = summary(Tables(), (8, 4, 4))
    assert (result.total("float_macs"), result.total("product_macs")) == (4 * 16 * 8 * 8, 0)


@pytest.mark.parametrize("method", ["bidense", "bibert", "bit", "bivit"])
def test_attention_stays_in_full_precision_and_the_summary_says_so(method: str) -> None:
    student = bd.bidensify(Attention(), bd.BidensifyConfig(method=method, linear="all")).eval()
    for network in (student, bd.pack(student)):
        result = summary(network, (3, 64, 64))
        products, whole = result.total("product_macs"), result.total("float_macs")
        line = (
            f"attention: its products of two activations stay in full precision, {products / 1e6:,.2f} of the "
            f"{whole / 1e6:,.2f} 32-bit MMACs"
        )
        assert products == 4 * 2 * 256 * 256 * 16
        assert line in result.notes()
        assert line in result.to_markdown()
        assert result.to_dict()["product_macs"] == products
    from bidensify.models.unet import unet

    assert "attention" not in str(summary(bd.bidensify(unet(width=8), method="bidense"), (3, 64, 64)))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.middle = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm(self.middle(self.first(x))))
        return self.last(y + 1)


def test_a_count_by_hand() -> None:
    student = bd.bidensify(Small())
    rows = {layer.path: layer for layer in summary(student, (3, 8, 8)).layers}
    middle = rows["middle"]
    assert middle.binary_macs == 4 * 4 * 8 * 4 * 9
    assert middle.binary_params == 8 * 4 * 9
    # k and b of 4 channels, one a, 8 biases and scales, BatchNorm's 8 and 8, RPReLU's 24 if it is inside.
    inside = 3 * 8 if not isinstance(student.middle.activation, nn.Identity) else 0
    assert middle.float_params == 4 + 4 + 1 + 8 + 8 + 8 + 8 + inside
    assert middle.elementwise == 4 * (8 * 8 * 4) + (4 * 4 * 8) * (2 + 1 + (3 if inside else 0))
    assert rows["first"].float_macs == 8 * 8 * 4 * 3 * 9
    assert rows["last"].ops == 2 * (4 * 4 * 2 * 8)
    assert middle.ops == 2 * middle.binary_macs / 64 + middle.elementwise
    assert middle.bytes == 8 * 4 * 9 / 8 + 4 * middle.float_params
    added = sum(row.elementwise for path, row in rows.items() if path not in ("first", "middle", "last"))
    assert added == 4 * 4 * 8 * (1 + (0 if inside else 3))


def test_batch_and_an_input_that_does_not_run() -> None:
    model = Small()
    assert summary(model, (5, 3, 8, 8)).to_dict() == summary(model, (3, 8, 8)).to_dict()
    with pytest.raises(PlanError, match="did not run"):
        summary(model, (4, 8, 8))


@pytest.mark.parametrize("size", [(8, 8), (3, -1, 8), (3, 8.0, 8), 8, "3x8x8"])
def test_sizes_that_are_none(size: object) -> None:
    with pytest.raises(ConfigError, match=r"input_size=.* must be positive integers, \(C, H, W\)"):
        summary(Small(), size)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="NoneType is no nn.Module"):
        summary(None, (3, 8, 8))  # type: ignore[arg-type]


def test_the_table_fits_eighty_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    counted = summary(bd.bidensify(build_model("demo:unet")), (3, 96, 128))
    lines = str(counted).splitlines()
    assert max(map(len, lines)) <= 80
    total = next(line for line in lines if line.strip().startswith("total")).split()
    assert total[1] == f"{counted.total('binary_params'):,.0f}"
    assert total[-2:] == [f"{counted.total('ops') / 1e6:.2f}", "100.0"]
    assert "kept because" not in str(counted)
    monkeypatch.setenv("COLUMNS", "140")
    assert "encoder.1.0.downsample.0" in str(counted)
    assert "kept because" in str(counted)


def test_the_table_has_a_total() -> None:
    text = str(summary(Small(), (3, 8, 8)))
    assert "total" in text
    assert "FLOAT, input 3×8×8" in text


@pytest.mark.parametrize(
    ("layer", "size", "macs", "params", "output"),
    [
        (nn.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), (4, 5, 7), 5 * 7 * 6 * 2 * 9, 6 * 2 * 9, (6, 5, 7)),
        (nn.Conv2d(4, 6, (1, 3), stride=2), (4, 8, 9), 4 * 4 * 6 * 4 * 3, 6 * 4 * 3 + 6, (6, 4, 4)),
        (nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=8, bias=False), (8, 6, 6), 36 * 8 * 9, 72, (8, 6, 6)),
        # Each input pixel meets every weight of its channel once.
        (nn.ConvTranspose2d(4, 6, 2, stride=2, bias=False), (4, 5, 7), 5 * 7 * 4 * 6 * 4, 4 * 6 * 4, (6, 10, 14)),
    ],
)
def test_layers_by_hand(
    layer: nn.Module, size: tuple[int, int, int], macs: int, params: int, output: tuple[int, ...]
) -> None:
    (row,) = summary(nn.Sequential(layer), size).layers
    assert (row.float_macs, row.float_params, row.output) == (macs, params, output)
    assert counted(nn.Sequential(layer), size) == macs
    assert (row.bytes, row.ops, row.elementwise) == (4 * params, 2 * macs, 0)


@pytest.mark.parametrize(("method", "bits"), WITH_BITS)
def test_what_the_file_weighs(method: str, bits: int, tmp_path: Path) -> None:
    student = bd.bidensify(build_model("demo:unet"), bd.BidensifyConfig(method=method, act_bits=bits)).eval()
    packed = bd.pack(student)
    bd.save_pretrained(packed, tmp_path)
    written = (tmp_path / "model.safetensors").stat().st_size
    for network in (student, packed):
        result = summary(network, (3, 64, 64))
        assert result.file_bytes == pytest.approx(written, rel=0.01)
        assert f"{result.file_bytes:,} bytes" in str(result)
    model = build_model("demo:unet")
    save_file(model.state_dict(), tmp_path / "float.safetensors")
    file_bytes = summary(model, (3, 64, 64)).file_bytes
    assert file_bytes == pytest.approx((tmp_path / "float.safetensors").stat().st_size, rel=0.01)


def test_markdown_and_json_say_what_the_table_says() -> None:
    result = summary(bd.bidensify(build_model("demo:unet", width=8)), (3, 32, 32))
    lines = [line for line in result.to_markdown().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert {len(row) for row in cells} == {11}
    data = json.loads(json.dumps(result.to_dict()))
    assert [row[0] for row in cells[2:-1]] == [row["path"] for row in data["layers"]]
    for row, layer in zip(cells[2:], data["layers"], strict=False):
        assert row[2] == "×".join(map(str, layer["output"]))
        assert row[5] == f"{layer['bytes']:,}"
        assert row[8] == f"{layer['ops'] / 1e6:,.2f}"
        assert row[9] == f"{100 * layer['ops'] / data['ops']:.1f}"
        assert row[10] == layer["kept"]
    assert cells[-1][5] == f"{data['bytes']:,}"
    assert sum(layer["ops"] for layer in data["layers"]) == pytest.approx(data["ops"])
    assert {layer["kept"] for layer in data["layers"] if layer["path"] in ("stem.0", "head")} == {
        "first layer on the image",
        "prediction layer",
    }
