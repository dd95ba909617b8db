"""Timing of packed layers and networks beside float ones: ratios from interleaved runs in one process.

All variants of one case run in turn, many times, on the same input; a ratio is a ratio of medians. Machines drift, so
numbers of different runs are not compared.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

import bidensify
from bidensify.bench.cases import CASES, Case
from bidensify.bench.int8 import installed_runtimes, open_int8, quantize_int8
from bidensify.bench.memory import peak_memory
from bidensify.bench.profile import profile as profile_layers
from bidensify.bench.profile import table as profile_table
from bidensify.bench.timing import interleave, machine
from bidensify.bench.timing import threads as torch_threads
from bidensify.deploy.backends import available_kernels, choose_backend
from bidensify.deploy.freeze import freeze
from bidensify.deploy.pack import pack
from bidensify.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

__all__ = ["Row", "render", "run_bench"]


@dataclass
class Row:
    """Medians in milliseconds of one case on one number of threads."""

    case: str
    threads: int
    milliseconds: dict[str, float]
    rounds: int
    others: float | None = None
    target: float | None = None
    memory: dict[str, dict[str, float]] = field(default_factory=dict)
    profile: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def ratio(self, variant: str, base: str = "float") -> float:
        """How many times faster than ``base``."""
        return self.milliseconds[base] / self.milliseconds[variant]


def run_bench(
    network: nn.Module | None = None,
    *,
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
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Times layers, or a whole network, in every variant that was asked for.

    Args:
        network: a full-precision network; None times the layers in ``cases``.
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
    if profile and network is None:
        raise ConfigError("a profile says which layers of a network take its time: give a network")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        made = _variants(network, name, cases or CASES, size, chosen, latent, bfloat16)
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
                        progress(_line(row))
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
                    options=options,
                    variants=wanted,
                    int8=int8,
                    int8_folder=int8_folder or Path(temporary) if int8 else None,
                )
    return {"machine": machine(), "rows": [asdict(row) for row in rows]}


@dataclass
class _Made:
    """A case with everything that is timed of it."""

    title: str
    target: float | None
    floats: nn.Module
    x: Tensor
    calls: dict[str, Callable[[], Any]]
    modules: dict[str, nn.Module] = field(default_factory=dict)


def _variants(
    network: nn.Module | None,
    name: str,
    cases: Sequence[Case],
    size: tuple[int, int],
    kernels: Sequence[str],
    latent: bool,
    bfloat16: bool,
) -> list[_Made]:
    if network is None:
        return [_layer(case, kernels, latent, bfloat16) for case in cases]
    floats = copy.deepcopy(network).eval().to(memory_format=torch.channels_last)
    student = bidensify.bidensify(copy.deepcopy(network).eval()).eval()
    modules: dict[str, nn.Module] = {"float": floats}
    if latent:
        modules["latent"] = student
    for kernel in kernels:
        modules[kernel] = pack(student, kernel=kernel)
    if bfloat16:
        for kernel in kernels:
            modules[f"{kernel} bfloat16"] = pack(student, kernel=kernel, float_dtype=torch.bfloat16)
    x = torch.randn(1, 3, *size).contiguous(memory_format=torch.channels_last)
    return [_Made(name, None, floats, x, {key: partial(module, x) for key, module in modules.items()}, modules)]


def _layer(case: Case, kernels: Sequence[str], latent: bool, bfloat16: bool) -> _Made:
    floats, layer = case.build()
    x = case.input()
    calls: dict[str, Callable[[], Any]] = {"float": partial(floats, x)}
    if latent:
        calls["latent"] = partial(layer, x)
    for kernel in kernels:
        packed = freeze(layer, kernel)  # type: ignore[arg-type]
        calls[kernel] = partial(packed, x)
        if bfloat16:
            calls[f"{kernel} bfloat16"] = partial(packed, x.to(torch.bfloat16))
    return _Made(case.name, case.target, floats, x, calls)


def _folder(root: Path, case: _Made, network: nn.Module | None) -> Path:
    """One per layer; a network has the folder to itself."""
    if network is not None:
        return root
    return root / "".join(letter if letter.isalnum() else "_" for letter in case.title)


def _line(row: Row) -> str:
    parts = [f"{key} {value:.3f} ms" for key, value in row.milliseconds.items()]
    busy = "" if row.others is None else f" (other programs: {row.others:.2f} cores)"
    return f"{row.case}, {row.threads} thread(s): " + ", ".join(parts) + busy


def render(result: dict[str, Any]) -> RenderableType:
    """Rich tables: a line per case, threads and variant with its time and how many times faster than float; memory; profiles."""
    from rich.console import Group
    from rich.table import Table

    rows = [Row(**row) for row in result["rows"]]
    table = Table(title=f"{result['machine']['processor']}, torch {result['machine']['torch']}")
    for column in ("case", "threads", "variant", "ms", "faster than float"):
        table.add_column(column, justify="left" if column in ("case", "variant") else "right")
    for row in rows:
        for number, (variant, milliseconds) in enumerate(row.milliseconds.items()):
            known = variant != "float" and "float" in row.milliseconds
            case = (row.case, str(row.threads)) if number == 0 else ("", "")
            table.add_row(
                *case, variant, f"{milliseconds:.3f}", f"{row.ratio(variant):.2f}x" if known else "",
                end_section=number == len(row.milliseconds) - 1,
            )  # fmt: skip
    tables = [table]
    if any(row.memory for row in rows):
        tables.append(_peaks(rows))
    for row in rows:
        tables += [profile_table(row.case, row.threads, variant, shares) for variant, shares in row.profile.items()]
    return Group(*tables)


def _peaks(rows: Sequence[Row]) -> Table:
    from rich.table import Table

    peaks = Table(
        title="Peak resident memory of inference (MiB); libraries are the same process without a network; faults: of pages"
    )
    for column in ("case", "threads", "variant", "peak", "libraries", "above them", "of float", "faults/run"):
        peaks.add_column(column, justify="left" if column in ("case", "variant") else "right")
    for row in rows:
        above = {key: value["peak"] - value["libraries"] for key, value in row.memory.items()}
        for key, value in row.memory.items():
            share = f"{above[key] / above['float']:.2f}" if above.get("float") else ""
            cells = [
                f"{value['peak']:.0f}",
                f"{value['libraries']:.0f}",
                f"{above[key]:.0f}",
                share,
                f"{value['faults']:.0f}",
            ]
            peaks.add_row(row.case, str(row.threads), key, *cells)
    return peaks
