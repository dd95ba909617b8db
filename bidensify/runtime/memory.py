"""Peak resident memory of inference, each variant in a process of its own."""

from __future__ import annotations

import copy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

import bidensify
from bidensify.runtime.pack import pack

__all__ = ["peak_memory"]

_CHILD = """
import ctypes, gc, sys, torch
from pathlib import Path
kind, spec, folder, height, width, threads = sys.argv[1:7]
torch.set_num_threads(int(threads))
import bidensify
from bidensify.models import build_model
if kind in ("float", "baseline"):
    from safetensors.torch import load_model
    model = build_model(spec, **{options!r})
    load_model(model, folder)
    model = model.eval().to(memory_format=torch.channels_last)
else:
    model = bidensify.from_pretrained(folder, build_model(spec, **{options!r}))
if kind == "baseline":
    model = torch.nn.Identity()
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
Path("/proc/self/clear_refs").write_text("5")
with torch.inference_mode():
    x = torch.randn(1, 3, int(height), int(width)).contiguous(memory_format=torch.channels_last)
    model(x)
    model(x)
print("peak", peak())
"""


def peak_memory(network: nn.Module, spec: str, size: tuple[int, int], threads: int, **options: Any) -> dict[str, float]:
    """Peak resident MiB of an inference: "baseline" (the libraries alone), "float", "packed", "packed bfloat16".

    Each in a fresh process that has loaded its network before the peak is counted. Linux; elsewhere empty.
    """
    if not Path("/proc/self/clear_refs").exists():
        return {}
    from safetensors.torch import save_model

    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        save_model(network, f"{folder}/float.safetensors")
        student = bidensify.bidensify(copy.deepcopy(network).eval()).eval()
        places = dict.fromkeys(("baseline", "float"), f"{folder}/float.safetensors")
        for key, dtype in (("packed", None), ("packed bfloat16", torch.bfloat16)):
            places[key] = f"{folder}/{key.replace(' ', '_')}"
            bidensify.save_pretrained(pack(student, float_dtype=dtype), places[key])
        code = _CHILD.replace("{options!r}", repr(options))
        for key, place in places.items():
            command = [sys.executable, "-c", code, key.split()[0], spec, place, *map(str, size), str(threads)]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            found = [line for line in result.stdout.splitlines() if line.startswith("peak")]
            if result.returncode or not found:
                raise RuntimeError(f"the memory run of {key} failed: {result.stderr[-2000:]}")
            peaks[key] = float(found[-1].split()[1])
    return peaks
