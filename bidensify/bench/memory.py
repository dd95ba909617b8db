"""Peak resident memory of inference, each variant in a process of its own."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bidensify.bench.int8 import installed_runtimes, quantize_int8
from bidensify.bench.variants import packed_variant
from bidensify.deploy.pretrained import save_pretrained
from bidensify.rewrite.api import bidensify

__all__ = ["MEMORY_VARIANTS", "peak_memory"]

MEMORY_VARIANTS = ("float", "float compiled", "latent", "packed", "packed bfloat16")

# Arguments: variant, height, width, threads, folder, JSON of {"spec", "options"}. Prints the resident MiB with the libraries
# alone (the network gone, or not loaded yet), the highest during twelve inferences, and page faults per run of the last ten.
_CHILD = """
import ctypes, gc, json, resource, sys
from pathlib import Path
import torch
variant, height, width, threads, folder, built = sys.argv[1:7]
torch.set_num_threads(int(threads))
folder, built = Path(folder), json.loads(built)

def settle():
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:
        pass

def resident(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

x = torch.randn(1, 3, int(height), int(width)).contiguous(memory_format=torch.channels_last)
if variant.endswith("int8"):
    from bidensify.bench.int8 import int8_file, open_int8
    import importlib
    importlib.import_module(variant.split()[0])
    settle()
    libraries = resident("VmRSS")
    call = open_int8(variant, int8_file(variant, folder), x, int(threads))
else:
    import bidensify
    from bidensify.errors import FormatError
    from bidensify.models import build_model
    from safetensors.torch import load_model
    build = lambda: build_model(built["spec"], **built["options"]).eval()
    model = build()
    del model
    settle()
    libraries = resident("VmRSS")
    if variant.startswith("float"):
        model = build()
        load_model(model, folder / "float.safetensors")
        model = model.to(memory_format=torch.channels_last)
        if variant == "float compiled":
            model = torch.compile(model)
    else:
        folder = folder / variant.replace(" ", "_")
        model = None
        try:
            with torch.device("meta"):
                base = build()
            model = bidensify.from_pretrained(folder, base)
        except FormatError:
            pass
        # Tensors that a constructor computes and no file holds.
        if model is None or any(
            isinstance(value, torch.Tensor) and value.is_meta for part in model.modules() for value in vars(part).values()
        ):
            model = bidensify.from_pretrained(folder, build())
        model.eval()
        base = None
    call = lambda: model(x)
with torch.inference_mode():
    if variant == "float compiled":
        call()
    settle()
    Path("/proc/self/clear_refs").write_text("5")
    call()
    call()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        call()
    faults = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10
print("peak", libraries, resident("VmHWM"), faults)
"""


def peak_memory(
    network: nn.Module,
    spec: str,
    size: tuple[int, int],
    threads: int,
    *,
    student: nn.Module | None = None,
    options: dict[str, Any] | None = None,
    variants: Sequence[str] = ("float", "packed", "packed bfloat16"),
    int8: bool = False,
    int8_folder: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Peak resident MiB of a dozen inferences, each variant in a fresh process that has its network before the count starts.

    Args:
        network: the full-precision network.
        spec: its name for ``bidensify.models.build_model``.
        size: (H, W) of the input.
        threads: of the inference.
        student: the network rewritten, latent or packed already; default: it is rewritten here.
        options: what ``build_model`` was given.
        variants: out of ``MEMORY_VARIANTS``.
        int8: the int8 runtimes that are installed, too.
        int8_folder: of ``quantize_int8``; default a temporary one.

    Returns:
        variant -> {"peak": MiB, "libraries": MiB of the same process without a network, "faults": page faults
        per run, once two are done}. Linux; elsewhere empty.
    """
    import json

    if not Path("/proc/self/clear_refs").exists():
        return {}
    from safetensors.torch import save_model

    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_model(network, str(folder / "float.safetensors"))
        if student is None:
            student = bidensify(copy.deepcopy(network).eval()).eval()
        if "latent" in variants:
            save_pretrained(student, folder / "latent")
        for key, dtype in (("packed", None), ("packed bfloat16", torch.bfloat16)):
            if key in variants:
                save_pretrained(packed_variant(student, "auto", dtype), folder / key.replace(" ", "_"))
        places = dict.fromkeys(variants, folder)
        if int8:
            x = torch.randn(1, 3, *size)
            for key in installed_runtimes():
                places[key] = int8_folder or folder
                quantize_int8(key, network, x, places[key])
        del student
        built = json.dumps({"spec": spec, "options": options or {}})
        for key, place in places.items():
            command = [sys.executable, "-c", _CHILD, key, *map(str, size), str(threads), str(place), built]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = [line.split() for line in result.stdout.splitlines() if line.startswith("peak")]
            if result.returncode or not lines:
                raise RuntimeError(f"the memory run of {key} failed: {result.stderr[-2000:]}")
            found[key] = dict(zip(("libraries", "peak", "faults"), map(float, lines[-1][1:]), strict=True))
    return found
