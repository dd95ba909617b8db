"""Timing of packed layers and networks beside float ones: ratios from interleaved runs in one process.

All variants of one case run in turn, many times, on the same input; a ratio is a ratio of medians. Machines drift, so
numbers of different runs are not compared.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from bidensify._util.seeding import seeded
from bidensify.bench.cases import CASES, Case
from bidensify.bench.int8 import installed_runtimes, open_int8, quantize_int8
from bidensify.bench.memory import peak_memory
from bidensify.bench.profile import profile as profile_layers
from bidensify.bench.result import Row
from bidensify.bench.timing import interleave, machine
from bidensify.bench.timing import threads as torch_threads
from bidensify.bench.variants import Variants, variants
from bidensify.deploy.backends import available_kernels, choose_backend
from bidensify.deploy.layers import packed_layers
from bidensify.errors import ConfigError

__all__ = ["run_bench"]


def run_bench(
    network: nn.Module | None = None,
    *,
    student: nn.Module | None = None,
    name: str = "network",
    spec: str | None = None,
    options: dict[str, Any] | None = None,
    cases: Sequence[Case] | None = None,
    size: tuple[int, int] = (512, 512),
    threads: Sequence[int] = (1,),
    kernels: Sequence[str] | None = None,
    seconds: float = 2.0,
    compiled: bool = False,
    latent: bool = False,
    int8: bool = False,
    int8_folder: Path | None = None,
    bfloat16: bool = True,
    memory: bool = False,
    profile: bool = False,
    idle: bool = False,
    act_bits: Sequence[int] = (1,),
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Times layers, or a whole network, in every variant that was asked for.

    Args:
        network: a full-precision network; None times the layers in ``cases``.
        student: the network rewritten, latent or packed already; default: it is rewritten here.
        name: what tables call the network.
        spec: the network's name for ``bidensify.models.build_model``; needed for ``memory``.
        options: what ``build_model`` was given with it.
        cases: layers; default ``CASES``.
        size: (H, W) of the network's input.
        threads: numbers of threads, each measured by itself.
        kernels: packed kernels; default all that this machine has, without the reference.
        seconds: per case and number of threads.
        compiled: torch.compile of the float side too (needs a C++ compiler at run time).
        latent: the latent network too.
        int8: OpenVINO and ONNX Runtime int8 too, where they are installed.
        int8_folder: keeps the quantized networks and takes them from there the next time; default a temporary folder.
        bfloat16: packed with its float rest in bfloat16 too; layers: on a bfloat16 input.
        memory: peak resident memory and page faults, each variant in a process of its own (networks only, Linux).
        profile: where the time of each variant goes, by kind of layer (networks only).
        idle: see ``interleave``.
        act_bits: bits of an activation that single layers are timed with, each; of a network the first counts, where it is
            rewritten here.
        progress: called with a line per finished case.

    Returns:
        {"machine": ..., "rows": [...]}, JSON-able; ``render`` makes a table of it.

    Raises:
        ConfigError: an unknown kernel, a thread count below one, ``memory`` without a network that can be built by name, or
            ``profile`` without a network.
    """
    available = [kernel for kernel in available_kernels() if kernel != "reference"] or ["reference"]
    chosen = list(kernels) if kernels is not None else available
    for kernel in chosen:
        choose_backend(kernel)
    if not threads or min(threads) < 1:
        raise ConfigError(f"threads={list(threads)} must be one or more numbers from 1 up")
    if memory and (network is None or spec is None):
        raise ConfigError(
            "memory is measured in fresh processes, which build the network by name: give a network and spec="
        )
    if latent and student is not None and packed_layers(student):
        raise ConfigError(
            "the network is packed, its latent weights are gone: leave latent out, or give the run's folder"
        )
    if not act_bits or not set(act_bits) <= {1, 2} or (network is not None and len(act_bits) > 1):
        raise ConfigError(f"act_bits={list(act_bits)} must be of 1 and 2, and one of them for a network")
    if profile and network is None:
        raise ConfigError("a profile says which layers of a network take its time: give a network")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        # The same layers every time, so that int8 ones that lie in a folder are those of the run before.
        with seeded(0):
            made = variants(network, student, name, cases or CASES, size, chosen, latent, bfloat16, act_bits)
        if compiled:
            for case in made:
                case.calls["float compiled"] = partial(cast(nn.Module, torch.compile(case.floats)), case.x)
        files = {
            (case.title, key): quantize_int8(
                key, case.floats, case.x, _folder(int8_folder or Path(temporary), case, network)
            )
            for case in made
            for key in (installed_runtimes() if int8 else [])
        }
        for number in threads:
            with torch_threads(number), torch.inference_mode():
                for case in made:
                    calls = dict(case.calls)
                    for (title, key), file in files.items():
                        if title == case.title:
                            calls[key] = open_int8(key, file, case.x, number)
                    timing = interleave(calls, seconds=seconds, idle=idle)
                    row = Row(case.title, number, timing.milliseconds, timing.rounds, timing.others, case.target)
                    if profile:
                        row.profile = {
                            key: [asdict(share) for share in profile_layers(module, case.x)]
                            for key, module in case.modules.items()
                        }
                    rows.append(row)
                    if progress is not None:
                        progress(row.line())
                    del calls
        if memory and network is not None and spec is not None:
            wanted = ["float", *(["float compiled"] if compiled else []), *(["latent"] if latent else []), "packed"]
            wanted += ["packed bfloat16"] if bfloat16 else []
            for row in rows:
                row.memory = peak_memory(
                    network,
                    spec,
                    size,
                    row.threads,
                    student=student,
                    options=options,
                    variants=wanted,
                    int8=int8,
                    int8_folder=int8_folder or Path(temporary) if int8 else None,
                )
    return {"machine": machine(), "rows": [asdict(row) for row in rows]}


def _folder(root: Path, case: Variants, network: nn.Module | None) -> Path:
    """One per layer; a network has the folder to itself."""
    if network is not None:
        return root
    return root / "".join(letter if letter.isalnum() else "_" for letter in case.title)
