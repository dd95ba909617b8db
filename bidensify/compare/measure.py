"""What the networks of a comparison cost and how good the full-precision forms are: OPs, bytes, milliseconds, metrics."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bidensify.bench.int8 import OneByOne, installed_runtimes, open_int8, quantize_int8
from bidensify.bench.timing import interleave
from bidensify.bench.timing import threads as torch_threads
from bidensify.compare.matrix import Matrix
from bidensify.compare.results import Cell, Point
from bidensify.costs.summary import summary
from bidensify.deploy.pack import pack, set_float_dtype
from bidensify.errors import BidensifyError

if TYPE_CHECKING:
    from bidensify.data import DenseDataset
    from bidensify.tasks import Task

__all__ = ["Network", "binary_networks", "float_networks", "timed"]

_INT8 = "openvino int8"
_CALIBRATION = 64


@dataclass
class Network:
    """A network of the comparison, and its point on the plots; ``call`` runs it on one image where it can be timed."""

    point: Point
    model: nn.Module
    latent: nn.Module | None = None
    call: Callable[[Tensor], Any] | None = None


class _Bfloat16(nn.Module):
    """A network that computes in bfloat16, from and to float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = set_float_dtype(copy.deepcopy(model), torch.bfloat16)

    def forward(self, x: Tensor) -> Any:
        """As the network's own."""
        return self.model(x)


def float_networks(
    matrix: Matrix, task: Task, val: DenseDataset, threads: int, say: Callable[[str], None]
) -> list[Network]:
    """The teacher in float, in bfloat16, and in int8 (OpenVINO's post-training quantization) where that is installed.

    Empty where the comparison has no teacher of its own.
    """
    from bidensify.train import evaluate, load_run

    folder = matrix.teacher_folder
    if folder is None or not (folder / "recipe.yaml").is_file():
        return []
    recipe = matrix.recipe
    # The recipe of this comparison made the folder, or it was given as its teacher.
    model = load_run(folder, trust=True)[0].to(memory_format=torch.channels_last)
    x = val[0]["image"][None]
    counted = summary(model, tuple(x.shape[1:]))
    found = [
        Network(
            Point(name="float", kind="float", ops=counted.total("ops"), bytes=counted.file_bytes), model, call=model
        )
    ]
    low = _Bfloat16(model)
    size = sum(2 * value.numel() for value in model.state_dict().values())
    found.append(Network(Point(name="bf16", kind="float", ops=counted.total("ops"), bytes=size), low, call=low))
    batch = recipe.data.eval_batch_size or recipe.data.batch_size
    views = recipe.views()
    measure = partial(
        evaluate, task=task, dataset=val, batch_size=batch, workers=recipe.data.workers, precision=recipe.precision,
        channels_last=recipe.channels_last, views=views,
    )  # fmt: skip
    for network in found:
        network.point = network.point.model_copy(update={"metrics": measure(network.model)})
    if _INT8 not in installed_runtimes():
        say("int8: openvino and nncf are not installed, so that point is left out (pip install openvino nncf)")
        return found
    try:
        network = _int8(matrix, model, x, threads)
        if views.window is not None or views.scales != (1.0,):
            say("int8: it takes images of one size, so that it has no metrics under evaluate.window or evaluate.scales")
            return [*found, network]
        network.point = network.point.model_copy(update={"metrics": measure(network.model)})
    except Exception as error:
        say(f"int8: OpenVINO cannot take this network ({type(error).__name__}: {str(error)[:200]}); left out")
        return found
    return [*found, network]


def _int8(matrix: Matrix, model: nn.Module, x: Tensor, threads: int) -> Network:
    folder: Path = matrix.out / "int8"
    samples = matrix.recipe.calibration_images((x.shape[-2], x.shape[-1]), _CALIBRATION)
    file = quantize_int8(_INT8, copy.deepcopy(model).to(memory_format=torch.contiguous_format), x, folder, samples)
    network = OneByOne(lambda image: open_int8(_INT8, file, image, threads), x.shape)
    size = sum(part.stat().st_size for part in (file, file.with_suffix(".bin")) if part.is_file())
    note = "OpenVINO post-training quantization"
    return Network(Point(name="int8", kind="float", bytes=size, note=note), network, call=lambda _: network.call())


def binary_networks(matrix: Matrix, cells: list[Cell], x: Tensor) -> list[Network]:
    """The first finished run of each method, latent, and packed where the method can be packed.

    Args:
        matrix: whose cells they are.
        cells: all of them.
        x: one image (1, C, H, W).
    """
    from bidensify.train import load_run

    found = []
    for method in matrix.methods:
        done = next((cell for cell in cells if cell.method == method and cell.state == "done"), None)
        if done is None:
            continue
        latent = load_run(matrix.out / done.folder, trust=True)[0]
        counted = summary(latent, tuple(x.shape[1:]))
        point = Point(name=method, kind="binary", metrics=done.metrics, ops=counted.total("ops"))
        try:
            packed = pack(latent)
        except BidensifyError as error:
            note = f"not packed: {str(error)[:300]}"
            found.append(Network(point.model_copy(update={"note": note}), latent, latent))
            continue
        point = point.model_copy(update={"bytes": summary(packed, tuple(x.shape[1:])).file_bytes})
        found.append(Network(point, packed, latent, call=packed))
    return found


def timed(networks: list[Network], x: Tensor, seconds: float, threads: int) -> None:
    """Times the networks on one image, all in turn in one process, and notes the medians in their points."""
    x = x.contiguous(memory_format=torch.channels_last)
    calls: dict[str, Callable[[], Any]] = {
        network.point.name: partial(network.call, x) for network in networks if network.call is not None
    }
    if not calls:
        return
    with torch_threads(threads), torch.inference_mode():
        timing = interleave(calls, seconds=seconds)
    for network in networks:
        found = timing.milliseconds.get(network.point.name)
        network.point = network.point.model_copy(update={"milliseconds": found})
