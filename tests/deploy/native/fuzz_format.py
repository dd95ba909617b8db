"""Mutated packed files: each is refused with FormatError, or loads and runs. Nothing crashes.

Half of the mutations change bytes; the other half change the header's fields and renew its hashes, so that they reach
everything behind the hash: the specs, the shapes, the kernels' arguments.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bidensify.deploy import PackedConv2d, PackedConvTranspose2d, PackedLinear, pack, read_packed, write_packed
from bidensify.deploy.backends import available_kernels
from bidensify.deploy.format import HEADER, TENSORS
from bidensify.deploy.freeze import empty_from_meta
from bidensify.errors import BidensifyError, FormatError
from bidensify.nn import BiDenseConv2d, BiDenseConvTranspose2d, BiDenseLinear

CLASSES = {"PackedConv2d": PackedConv2d, "PackedConvTranspose2d": PackedConvTranspose2d, "PackedLinear": PackedLinear}
NUMBERS = [
    0,
    1,
    -1,
    2,
    3,
    7,
    16,
    31,
    32,
    33,
    64,
    255,
    4096,
    1 << 20,
    1 << 31,
    1 << 63,
    1 << 70,
    0.5,
    True,
    None,
    "8",
    [],
    {},
]


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        BiDenseConv2d(16, 24, 3, 2, 1),
        BiDenseConv2d(24, 24, 5, padding=2, groups=24, act_bits=2),
        BiDenseConvTranspose2d(24, 16, 2, 2),
        BiDenseConv2d(16, 16, 3, padding=1, act_bits=2),
        nn.Sequential(BiDenseLinear(16, 20)),
    ).eval()


def mutate_json(value: Any, choose: random.Random) -> Any:
    """One random field changed, removed or repeated."""
    if isinstance(value, dict) and value and choose.random() < 0.85:
        key = choose.choice(sorted(value))
        if choose.random() < 0.08:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: mutate_json(value[key], choose)}
    if isinstance(value, list) and value and choose.random() < 0.85:
        at = choose.randrange(len(value))
        if choose.random() < 0.1:
            return value[:at] + value[at + 1 :]
        return [mutate_json(v, choose) if i == at else v for i, v in enumerate(value)]
    if isinstance(value, bool) and choose.random() < 0.7:
        return not value
    if isinstance(value, int) and choose.random() < 0.5:
        return value + choose.choice([-1, 1, 2, -2])
    if isinstance(value, str) and value and choose.random() < 0.3:
        return value[:-1] if choose.random() < 0.5 else choose.choice(["conv", "linear", "conv_transpose", value * 2])
    return choose.choice(NUMBERS)


def mutate_bytes(whole: bytes, choose: random.Random) -> bytes:
    data = bytearray(whole)
    for _ in range(choose.randint(1, 5)):
        if not data:
            break
        at = choose.randrange(len(data))
        action = choose.randrange(4)
        if action == 0:
            data[at] ^= 1 << choose.randrange(8)
        elif action == 1:
            del data[at : at + choose.randint(1, 200)]
        elif action == 2:
            data[at:at] = choose.randbytes(choose.randint(1, 32))
        else:
            del data[at:]
    return bytes(data)


def renew(folder: Path, header: Any) -> None:
    """Valid hashes over whatever the files hold now."""
    if isinstance(header, dict):
        raw = (folder / TENSORS).read_bytes()
        if isinstance(header.get("tensors"), dict):
            header["tensors"] = {**header["tensors"], "bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
        header.pop("sha256", None)
        text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        header["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (folder / HEADER).write_text(json.dumps(header), encoding="utf-8")


def use(folder: Path) -> None:
    """Loads the folder and runs every layer in it on a small input."""
    header, tensors = read_packed(folder)
    for path, meta in header["layers"].items():
        layer = empty_from_meta(meta, name=path)
        prefix = f"{path}."
        layer.load_state_dict({key: tensors[prefix + key] for key in ("bits", "side")})
        spec = layer.spec
        if spec.in_channels > 4096 or max(spec.kernel + spec.dilation + spec.stride) > 64:
            continue
        size = (1, 3, spec.in_channels) if spec.kind == "linear" else (1, spec.in_channels, 7, 6)
        with torch.no_grad():
            layer(torch.randn(size))


def main(count: int, seed: int) -> int:
    choose = random.Random(seed)
    refused = ran = 0
    with tempfile.TemporaryDirectory() as place:
        folder = write_packed(Path(place) / "net", pack(model()), {"layers": []}, {})
        originals = {name: (folder / name).read_bytes() for name in (HEADER, TENSORS)}
        use(folder)
        for i in range(count):
            kind = i % 4
            for name, whole in originals.items():
                (folder / name).write_bytes(whole)
            if kind == 0:
                name = choose.choice([HEADER, TENSORS])
                (folder / name).write_bytes(mutate_bytes(originals[name], choose))
            elif kind == 1:
                # A damaged safetensors file under a hash that fits it.
                (folder / TENSORS).write_bytes(mutate_bytes(originals[TENSORS], choose))
                renew(folder, json.loads(originals[HEADER]))
            else:
                header = json.loads(originals[HEADER])
                for _ in range(choose.randint(1, 3)):
                    # Mostly the layers: that is what kernels are given.
                    if choose.random() < 0.8 and isinstance(header, dict) and isinstance(header.get("layers"), dict):
                        header["layers"] = mutate_json(header["layers"], choose)
                    else:
                        header = mutate_json(header, choose)
                renew(folder, header)
            try:
                use(folder)
                ran += 1
            except FormatError:
                refused += 1
            except BidensifyError:
                # A layer that is sound by itself but not on this small input.
                ran += 1
    print(f"{count} mutated files: {refused} refused, {ran} sound and run on {available_kernels()[0]}")
    return 0 if refused and ran else 1


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 10_000, int(sys.argv[2]) if len(sys.argv) > 2 else 0))
