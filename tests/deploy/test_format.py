"""The packed files: round trip, size, refusals, and a fuzz of both files (native/fuzz_format.py runs it at length)."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import settle
from safetensors.torch import load_file, save_file
from torch import nn

from bidensify.deploy import PackedConv2d, PackedConvTranspose2d, PackedLinear, pack, read_packed, write_packed
from bidensify.deploy.backends import available_kernels
from bidensify.deploy.format import HEADER, TENSORS
from bidensify.deploy.freeze import empty_from_meta, freeze
from bidensify.errors import FormatError
from bidensify.nn import BiDenseConv2d, BiDenseConvTranspose2d, BiDenseLinear


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        BiDenseConv2d(16, 24, 3, 2, 1),
        BiDenseConvTranspose2d(24, 16, 2, 2),
        nn.Conv2d(16, 4, 1),
    )
    return settle(layers)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_packed(tmp_path / "net", pack(network()), {"layers": []}, {"fingerprint": "f", "note": "café"})


def test_round_trip(folder: Path) -> None:
    packed = pack(network())
    header, tensors = read_packed(folder)
    assert header["format_version"] == 1
    assert header["plan"] == {"layers": []}
    assert header["extra"] == {"fingerprint": "f", "note": "café"}
    rebuilt = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        *(freeze(settle(BiDenseConv2d(1, 1, 1))) for _ in range(2)),
        nn.Conv2d(16, 4, 1),
    )
    for path, meta in header["layers"].items():
        rebuilt[int(path)] = empty_from_meta(meta)
    rebuilt.load_state_dict(tensors, assign=True)
    rebuilt.eval().to(memory_format=torch.channels_last)
    x = torch.randn(1, 3, 10, 12)
    with torch.no_grad():
        assert torch.equal(rebuilt(x), packed(x))
    # Nothing half-written stays behind.
    assert sorted(p.name for p in folder.iterdir()) == [HEADER, TENSORS]


def test_tied_tensors_are_stored_once_and_come_back(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": settle(BiDenseLinear(64, 64)), "stem": nn.Linear(64, 64)})
    model["b"] = model["a"]
    model["head"] = nn.Linear(64, 64)
    model["head"].weight = model["stem"].weight
    packed = pack(model)
    header, tensors = read_packed(write_packed(tmp_path, packed))
    assert header["aliases"] == {"b.bits": "a.bits", "b.side": "a.side", "head.weight": "stem.weight"}
    assert set(tensors) == set(packed.state_dict())
    assert torch.equal(tensors["head.weight"], packed["stem"].weight)


def test_the_file_is_as_small_as_its_bits(tmp_path: Path) -> None:
    model = settle(nn.Sequential(*(BiDenseConv2d(128, 128, 3, padding=1) for _ in range(6))))
    binary = sum(layer.latent_weight.numel() for layer in model)
    rest = sum(p.numel() for p in model.parameters()) - binary
    rest += sum(b.numel() for name, b in model.named_buffers() if "num_batches" not in name)
    write_packed(tmp_path, pack(model))
    assert (tmp_path / TENSORS).stat().st_size <= 1.02 * (binary / 8 + 4 * rest)


def test_only_packed_models_are_written(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no packed layer"):
        write_packed(tmp_path, network())


def test_two_planes_are_a_file_of_version_2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = settle(BiDenseConv2d(20, 24, 3, 2, 1, act_bits=2))
    packed = nn.Sequential(freeze(layer), freeze(settle(BiDenseConv2d(24, 8, 1))))
    write_packed(tmp_path, packed)
    header, tensors = read_packed(tmp_path)
    assert header["format_version"] == 2
    assert [meta["spec"].get("planes", 1) for meta in header["layers"].values()] == [2, 1]
    again = nn.Sequential(*(empty_from_meta(meta) for meta in header["layers"].values()))
    again.load_state_dict(tensors)
    x = torch.randn(2, 20, 9, 8)
    with torch.no_grad():
        assert torch.equal(again(x), packed(x))
    rehash(tmp_path, _set("format_version", value=1))
    with pytest.raises(FormatError, match="planes=2 in a file of version 1"):
        read_packed(tmp_path)


VERSION_1 = Path(__file__).parent / "data" / "version_1"
CLASSES = {cls.__name__: cls for cls in (PackedConv2d, PackedConvTranspose2d, PackedLinear)}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kernel", available_kernels())
def test_a_file_of_version_1_gives_its_stored_output(kernel: str, threads: int) -> None:
    """Written once, by an earlier state and on another machine: bits, not just values, must come back."""
    header, tensors = read_packed(VERSION_1)
    assert header["format_version"] == 1
    layers = {path: empty_from_meta(meta, kernel=kernel) for path, meta in header["layers"].items()}
    for path, layer in layers.items():
        layer.load_state_dict({key: tensors[f"{path}.{key}"] for key in ("bits", "side")})
    expected = load_file(VERSION_1 / "expected.safetensors")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        with torch.no_grad():
            x = expected["input"]
            for path in ("strided", "depthwise", "grouped", "up"):
                x = layers[path](x)
            y = layers["tokens"](x.permute(0, 2, 3, 1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(y, expected["output"])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the process's maps are not readable here")
def test_tensors_are_mapped_not_read(folder: Path) -> None:
    _, tensors = read_packed(folder)
    (start, end) = next(
        [int(part, 16) for part in line.split()[0].split("-")]
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(folder / TENSORS))
    )
    assert all(start <= tensor.data_ptr() < end for tensor in tensors.values())


def rehash(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edits the header and gives it a valid hash, as somebody who wants to deceive would."""
    header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
    change(header)
    header.pop("sha256", None)
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    header["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / HEADER).write_text(json.dumps(header), encoding="utf-8")


def _set(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(header: dict[str, Any]) -> None:
        for key in path[:-1]:
            header = header[key]
        header[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("format_version", value=3), "format_version='3'.*reads \\[1, 2\\]"),
        (_set("format_version", value=True), "format_version"),
        (_set("format_version", value=[1]), "format_version"),
        (_set("format", value="onnx"), "not a bidensify header"),
        (_set("layers", value={}), "'layers' is empty"),
        (_set("layers", value=[]), "'layers' must be an object"),
        (_set("layers", "1", "type", value="PackedPool"), "'type' must be one of"),
        (_set("layers", "1", "type", value={}), "'type' must be one of"),
        (_set("layers", "1", "type", value="PackedLinear"), "PackedLinear"),
        (_set("layers", "1", "spec", "in_channels", value=17), "'1.bits' has shape"),
        (_set("layers", "1", "spec", "in_channels", value=-1), "in_channels=-1"),
        (_set("layers", "1", "spec", "groups", value=5), "groups=5"),
        (_set("layers", "1", "spec", "stride", value=[1 << 40, 1]), "stride"),
        (_set("layers", "1", "spec", "slope", value=False), "'1.side' has shape"),
        (_set("layers", "1", "spec", "slope", value=1), "slope"),
        (_set("layers", "9", value={"type": "PackedConv2d", "spec": {}}), "missing"),
        (_set("aliases", value={"x": "nothing"}), "alias"),
        (_set("aliases", value={"1.bits": "1.bits"}), "alias"),
        (_set("aliases", value={"x": 3}), "aliases"),
        (_set("float_dtype", value="float8"), "float_dtype"),
        (_set("plan", value=[]), "plan"),
        (_set("tensors", "file", value="../secret"), "secret"),
        (_set("tensors", "bytes", value=None), "truncated or replaced"),
        (_set("tensors", "sha256", value="0"), "hash"),
    ],
)
def test_deceitful_headers_are_refused(folder: Path, change: Callable[[dict[str, Any]], None], words: str) -> None:
    rehash(folder, change)
    with pytest.raises(FormatError, match=words):
        read_packed(folder)


@pytest.mark.parametrize("name", ["1.side", "1.bits"])
def test_tensors_of_another_type_are_refused(folder: Path, name: str) -> None:
    """Of the right shape, in a whole file with valid hashes."""
    tensors = {key: value.clone() for key, value in load_file(folder / TENSORS).items()}
    tensors[name] = tensors[name].to(torch.int16)
    save_file(tensors, folder / TENSORS)
    whole = (folder / TENSORS).read_bytes()
    record = {"file": TENSORS, "bytes": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    rehash(folder, _set("tensors", value=record))
    with pytest.raises(FormatError, match=f"'{name}' has shape .* and dtype torch.int16, the layer needs"):
        read_packed(folder)


def test_edited_truncated_and_missing_files(folder: Path) -> None:
    whole = (folder / TENSORS).read_bytes()
    header = (folder / HEADER).read_bytes()
    (folder / TENSORS).write_bytes(whole[:-1])
    with pytest.raises(FormatError, match="truncated or replaced"):
        read_packed(folder)
    (folder / TENSORS).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(FormatError, match="edited or damaged"):
        read_packed(folder)
    (folder / TENSORS).unlink()
    with pytest.raises(FormatError, match="cannot be read"):
        read_packed(folder)
    (folder / TENSORS).write_bytes(whole)
    for damaged, words in (
        (header[:-2], "not JSON"),
        (b"", "0 bytes"),
        (b"[1]", "not a bidensify header"),
        (b'{"format": NaN}', "NaN"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (header.replace(b'"note"', b'"nota"'), "does not match its own hash"),
    ):
        (folder / HEADER).write_bytes(damaged)
        with pytest.raises(FormatError, match=words):
            read_packed(folder)
    (folder / HEADER).unlink()
    with pytest.raises(FormatError, match="cannot be read"):
        read_packed(folder)


def test_mutated_files_are_refused_or_unchanged(folder: Path) -> None:
    generator = random.Random(0)
    want = read_packed(folder)
    for _ in range(150):
        path = folder / generator.choice([HEADER, TENSORS])
        whole = path.read_bytes()
        mutated = bytearray(whole)
        for _ in range(generator.randint(1, 4)):
            at = generator.randrange(len(mutated))
            action = generator.randrange(3)
            if action == 0:
                mutated[at] ^= 1 << generator.randrange(8)
            elif action == 1:
                del mutated[at : at + generator.randint(1, 64)]
            else:
                mutated[at:at] = generator.randbytes(generator.randint(1, 16))
            if not mutated:
                break
        path.write_bytes(mutated)
        try:
            header, tensors = read_packed(folder)
        except FormatError:
            pass
        else:
            # A blank more in the JSON changes nothing that it says.
            assert header == want[0]
            assert all(torch.equal(tensors[name], want[1][name]) for name in want[1])
        path.write_bytes(whole)
