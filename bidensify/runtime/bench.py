"""Timing of packed layers and networks beside float ones: ratios from interleaved runs in one process.

All variants of one case run in turn, many times, on the same input; a ratio is a ratio of medians. Machines drift, so
numbers of different runs are not compared.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

import bidensify
from bidensify.errors import ConfigError
from bidensify.nn import BiDenseConv2d, BiDenseConvTranspose2d, BiDenseLinear
from bidensify.runtime import native
from bidensify.runtime.memory import peak_memory
from bidensify.runtime.pack import pack
from bidensify.runtime.packed import PackedLayer

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["CASES", "Case", "Row", "interleave", "machine", "render", "run_bench"]


@dataclass(frozen=True)
class Case:
    """A layer and its input.

    Args:
        name: what tables call it.
        kind: "conv", "conv_transpose" or "linear".
        shape: of the input, (N, C, H, W) or (N, tokens, C).
        out_channels: C_out.
        kernel, stride, padding, groups: as in torch.
        target: ratio to float that the project aims at with the machine's fastest kernel, or None.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    out_channels: int
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    groups: int = 1
    target: float | None = None

    def build(self) -> tuple[nn.Module, nn.Module]:
        """(float layer + BatchNorm + ReLU, latent BiDense layer), both in evaluation mode."""
        out, k, s, p, g = self.out_channels, self.kernel, self.stride, self.padding, self.groups
        if self.kind == "linear":
            channels = self.shape[-1]
            # BatchNorm over tokens folds into a linear layer, so the float side is given it for nothing.
            return nn.Sequential(nn.Linear(channels, out), nn.ReLU()).eval(), BiDenseLinear(channels, out).eval()
        channels = self.shape[1]
        body: nn.Module
        latent: nn.Module
        if self.kind == "conv_transpose":
            body = nn.ConvTranspose2d(channels, out, k, s, p, groups=g, bias=False)
            latent = BiDenseConvTranspose2d(channels, out, k, s, p, groups=g)
        else:
            body = nn.Conv2d(channels, out, k, s, p, groups=g, bias=False)
            latent = BiDenseConv2d(channels, out, k, s, p, groups=g)
        floats = nn.Sequential(body, nn.BatchNorm2d(out), nn.ReLU()).eval()
        return floats.to(memory_format=torch.channels_last), latent.eval()

    def input(self) -> Tensor:
        """A random input, channels_last."""
        x = torch.randn(self.shape)
        return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


CASES: tuple[Case, ...] = (
    Case("3x3 256->256 at 64x64", "conv", (1, 256, 64, 64), 256, 3, 1, 1, target=10),
    Case("3x3 64->64 at 128x128", "conv", (1, 64, 128, 128), 64, 3, 1, 1, target=7),
    Case("3x3 512->512 at 16x16", "conv", (1, 512, 16, 16), 512, 3, 1, 1, target=8),
    Case("1x1 256->256 at 64x64", "conv", (1, 256, 64, 64), 256, target=5),
    Case("7x7 depthwise 96 at 128x128", "conv", (1, 96, 128, 128), 96, 7, 1, 3, 96, target=1.5),
    Case("transposed 2x2/2 256->128 at 32x32", "conv_transpose", (1, 256, 32, 32), 128, 2, 2, target=4),
    Case("linear 4096x384->1536", "linear", (1, 4096, 384), 1536, target=4),
    Case("3x3/2 128->256 at 64x64", "conv", (1, 128, 64, 64), 256, 3, 2, 1),
)


@dataclass
class Row:
    """Medians in milliseconds of one case on one number of threads."""

    case: str
    threads: int
    milliseconds: dict[str, float]
    runs: int
    target: float | None = None
    peak_mib: dict[str, float] = field(default_factory=dict)

    def ratio(self, variant: str, base: str = "float") -> float:
        """How many times faster than ``base``."""
        return self.milliseconds[base] / self.milliseconds[variant]


def machine() -> dict[str, Any]:
    """What ran: processor, cores, versions, kernels."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        fields = dict(line.split(":", 1) for line in lines[:30] if ":" in line)
        found = {key.strip(): value.strip() for key, value in fields.items()}
        name = found.get("model name", name)
        if "cpu family" in found:
            name += f" (family {found['cpu family']}, model {found.get('model', '?')})"
    return {
        "processor": name,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "bidensify": bidensify.__version__,
        "kernels": list(native.available_kernels()),
    }


@contextlib.contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def interleave(
    variants: dict[str, Callable[[], Any]], *, seconds: float = 2.0, least: int = 5
) -> tuple[dict[str, float], int]:
    """Median milliseconds of each variant, run in turn.

    Args:
        variants: name -> what to time.
        seconds: how long to go on, all variants together.
        least: rounds at least.

    Returns:
        (name -> milliseconds, rounds).
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
        call()
    gc.collect()
    gc.disable()
    try:
        end, rounds = time.perf_counter() + seconds, 0
        while rounds < least or time.perf_counter() < end:
            for name, call in variants.items():
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
            rounds += 1
    finally:
        gc.enable()
    return {name: statistics.median(values) * 1e3 for name, values in times.items()}, rounds


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
    bfloat16: bool = True,
    memory: bool = False,
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
        bfloat16: the packed network with its float rest in bfloat16 too (networks only).
        memory: peak resident memory of one inference, each variant in a process of its own (networks only, Linux).
        progress: called with a line per finished case.

    Returns:
        {"machine": ..., "rows": [...]}, JSON-able; ``render`` makes a table of it.

    Raises:
        ConfigError: an unknown kernel, or a thread count below one.
    """
    available = [kernel for kernel in native.available_kernels() if kernel != "reference"] or ["reference"]
    chosen = list(kernels) if kernels is not None else available
    for kernel in chosen:
        native.tier(kernel)
    if not threads or min(threads) < 1:
        raise ConfigError(f"threads={list(threads)} must be one or more numbers from 1 up")
    rows: list[Row] = []
    for number in threads:
        with _threads(number), torch.no_grad():
            if network is None:
                made = [(c.name, c.target, c.input(), _layer_variants(c, chosen, latent)) for c in cases or CASES]
            else:
                made = [(name, None, _image(size), _network_variants(network, size, chosen, latent, bfloat16))]
            for title, target, x, modules in made:
                if compiled:
                    modules["float compiled"] = _compiled(modules["float"])
                calls: dict[str, Callable[[], Any]] = {key: partial(module, x) for key, module in modules.items()}
                if int8:
                    from bidensify.runtime.int8 import int8_variants

                    calls.update(int8_variants(modules["float"], x, number))
                medians, rounds = interleave(calls, seconds=seconds)
                row = Row(title, number, medians, rounds, target)
                if memory and network is not None and spec is not None:
                    row.peak_mib = peak_memory(network, spec, size, number, **(options or {}))
                rows.append(row)
                if progress is not None:
                    progress(_line(row))
    return {"machine": machine(), "rows": [asdict(row) for row in rows]}


def _line(row: Row) -> str:
    parts = [f"{key} {value:.3f} ms" for key, value in row.milliseconds.items()]
    return f"{row.case}, {row.threads} thread(s): " + ", ".join(parts)


def _image(size: tuple[int, int]) -> Tensor:
    return torch.randn(1, 3, *size).contiguous(memory_format=torch.channels_last)


def _compiled(module: nn.Module) -> nn.Module:
    return cast(nn.Module, torch.compile(module))


def _layer_variants(case: Case, kernels: Sequence[str], latent: bool) -> dict[str, nn.Module]:
    floats, layer = case.build()
    variants: dict[str, nn.Module] = {"float": floats}
    if latent:
        variants["latent"] = layer
    for kernel in kernels:
        variants[kernel] = PackedLayer.from_layer(layer, kernel=kernel)  # type: ignore[arg-type]
    return variants


def _network_variants(
    network: nn.Module, size: tuple[int, int], kernels: Sequence[str], latent: bool, bfloat16: bool
) -> dict[str, nn.Module]:
    floats = copy.deepcopy(network).eval().to(memory_format=torch.channels_last)
    student = network if _is_binary(network) else bidensify.bidensify(copy.deepcopy(network).eval())
    student.eval()
    variants: dict[str, nn.Module] = {} if student is network else {"float": floats}
    if latent or student is network:
        variants["latent"] = student
    if student is network:
        variants = {"float": floats, **variants}
    for kernel in kernels:
        variants[kernel] = pack(student, kernel=kernel)
    if bfloat16:
        variants[f"{kernels[0]} bfloat16"] = pack(student, kernel=kernels[0], float_dtype=torch.bfloat16)
    return variants


def _is_binary(network: nn.Module) -> bool:
    from bidensify.nn import binary_layers

    return next(iter(binary_layers(network)), None) is not None


def render(result: dict[str, Any]) -> Table:
    """A rich table: milliseconds and, in brackets, how many times faster than float."""
    from rich.table import Table

    rows = [Row(**row) for row in result["rows"]]
    columns = list(dict.fromkeys(key for row in rows for key in row.milliseconds))
    table = Table(title=f"{result['machine']['processor']}, torch {result['machine']['torch']}")
    table.add_column("case")
    table.add_column("threads", justify="right")
    for column in columns:
        table.add_column(f"{column} (ms)", justify="right")
    for row in rows:
        cells = []
        for column in columns:
            if column not in row.milliseconds:
                cells.append("")
                continue
            ratio = "" if column == "float" or "float" not in row.milliseconds else f" ({row.ratio(column):.2f}x)"
            cells.append(f"{row.milliseconds[column]:.3f}{ratio}")
        table.add_row(row.case, str(row.threads), *cells)
    return table
