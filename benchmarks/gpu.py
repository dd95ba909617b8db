"""Packed, latent and float networks on one GPU: time, memory, agreement, and the training step.

    python benchmarks/gpu.py --out gpu.json
    python benchmarks/gpu.py --device cpu --networks demo:unet --size 64 --batches 1 --train-size 32 48 --train-batch 2

There are no 1-bit kernels for CUDA: packed layers unpack their bits there and run a float convolution over -1 and +1, so this
measures what that costs, not what bits could gain. The variants of a network take turns within each round, so that whatever
else slows the machine slows all; times are medians over rounds, between CUDA events. A captured variant is replayed as a CUDA
graph: its time is the GPU's alone, without the launches of Python. Memory is torch.cuda's peak during one call above what was
allocated before it, and the network's own tensors. ``margins`` says how far convolutions over -1 and +1 stray from integers
before they are rounded: past 0.5 a packed layer would be wrong.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bidensify
from bidensify._util.machine import cpu_name
from bidensify.models import build_model

Call = Callable[[], Any]
MIB = 2**20


def settle(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(call: Call, device: torch.device) -> float:
    """Of one call, on the device's own clock where it has one."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    settle(device)
    first.record()
    call()
    last.record()
    settle(device)
    return first.elapsed_time(last)


def in_turns(
    calls: dict[str, Call], device: torch.device, seconds: float, warmup: int = 3
) -> dict[str, dict[str, Any]]:
    """Median, quartiles and fastest of each call, in rounds of all of them until ``seconds`` are over."""
    for call in calls.values():
        for _ in range(warmup):
            call()
    settle(device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    start = time.perf_counter()
    while time.perf_counter() - start < seconds or len(next(iter(times.values()))) < 3:
        for name, call in calls.items():
            times[name].append(milliseconds(call, device))
    found = {}
    for name, values in times.items():
        ordered = sorted(values)
        quartiles = [ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]]
        found[name] = {
            "ms": statistics.median(ordered),
            "quartiles": quartiles,
            "fastest": ordered[0],
            "rounds": len(ordered),
        }
    return found


def peak(call: Call, device: torch.device) -> float | None:
    """MiB that one call takes at most above what was allocated before it."""
    if device.type != "cuda":
        return None
    settle(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    settle(device)
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def busy(call: Call, device: torch.device) -> dict[str, float]:
    """Milliseconds that the GPU's kernels take in one call, and how many there are: what is left of a call is waiting."""
    if device.type != "cuda":
        return {}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        settle(device)
    kernels = [event for event in profile.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]
    total = sum(event.self_device_time_total for event in kernels) / 1e3
    return {"busy_ms": total, "kernels": sum(event.count for event in kernels)}


def own(model: nn.Module) -> float:
    """MiB of a network's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]) / MIB


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether convolutions may round their operands to 10 bits; torch allows it by default."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, allow_tf32=allowed):
        yield


def logits(output: Any) -> Tensor:
    """The tensor of class scores in whatever the network gives."""
    return output["out"] if isinstance(output, dict) else output


def built(source: str) -> nn.Module:
    """A network with random weights."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"classes": 19, "encoder_weights": None} if source.startswith("smp:") else {}
    return build_model(source, **options).eval()


def captured(model: nn.Module, x: Tensor) -> Call | None:
    """The network as a CUDA graph, or None where it cannot be captured."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                model(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(x)
    except RuntimeError as error:
        print(f"not captured: {str(error).splitlines()[0]}")
        return None
    return graph.replay


def inference(source: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per batch size and variant."""
    device = torch.device(arguments.device)
    model = built(source).to(device, memory_format=torch.channels_last)
    example = torch.randn(2, 3, arguments.size, arguments.size, generator=torch.Generator().manual_seed(1))
    started = time.perf_counter()
    student = bidensify.bidensify(model)
    bidensify.calibrate(student, [example.to(device, memory_format=torch.channels_last)])
    student.eval().to(memory_format=torch.channels_last)
    packed = bidensify.pack(student)
    half = bidensify.pack(student, float_dtype=torch.bfloat16)
    settle(device)
    print(f"{source}: rewritten, calibrated and packed in {time.perf_counter() - started:.1f} s")
    rows = []
    for batch in arguments.batches:
        generator = torch.Generator().manual_seed(2)
        x = torch.randn(batch, 3, arguments.size, arguments.size, generator=generator)
        x = x.to(device, memory_format=torch.channels_last)

        def strict(x: Tensor = x) -> Any:
            with tf32(False):
                return model(x)

        def default(x: Tensor = x) -> Any:
            with tf32(True):
                return model(x)

        def half_float(x: Tensor = x) -> Any:
            with torch.autocast(device.type, torch.bfloat16):
                return model(x)

        calls: dict[str, Call] = {
            "float fp32": strict,
            "float tf32 (torch's default)": default,
            "float bf16 autocast": half_float,
            "latent": lambda x=x: student(x),
            "packed": lambda x=x: packed(x),
            "packed, float rest bf16": lambda x=x: half(x),
        }
        networks = dict(zip(calls, (model, model, model, student, packed, half)))
        with torch.inference_mode():
            memory = {name: peak(call, device) for name, call in calls.items()}
            # A second time: the first call of a network also makes what is kept.
            memory = {name: peak(call, device) for name, call in calls.items()}
            latent, bits = logits(student(x)), logits(packed(x))
            agreement = {
                "equal": bool(torch.equal(latent, bits)),
                "same_class": float((latent.argmax(1) == bits.argmax(1)).float().mean()),
                "same_class_bf16": float((logits(half(x)).argmax(1) == bits.argmax(1)).float().mean()),
            }
            del latent, bits
            if device.type == "cuda":
                for name, network in (("float tf32", model), ("packed", packed), ("packed, float rest bf16", half)):
                    replay = captured(network, x)
                    if replay is not None:
                        calls[f"{name}, captured"] = replay
            times = in_turns(calls, device, arguments.seconds)
            used = {name: busy(call, device) for name, call in calls.items()}
        for name, found in times.items():
            rows.append(
                {
                    "network": source,
                    "batch": batch,
                    "variant": name,
                    **found,
                    **used[name],
                    "peak_mib": memory.get(name),
                    "own_mib": own(networks[name]) if name in networks else None,
                    **(agreement if name == "packed" else {}),
                }
            )
            held = "" if memory.get(name) is None else f"  peak {memory[name]:8.1f} MiB, {used[name]}"
            print(f"  batch {batch}  {name:32s} {found['ms']:9.3f} ms{held}", flush=True)
        print(f"  packed and latent: {agreement}", flush=True)
        del calls
    return rows


def training(source: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Forward, cross-entropy, backward and AdamW of the float network and of its student."""
    device = torch.device(arguments.device)
    full = built(source)
    pair = {"float": full.train(), "student": bidensify.bidensify(full).train()}
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(arguments.train_batch, 3, *arguments.train_size, generator=generator)
    x = x.to(device, memory_format=torch.channels_last)
    target = torch.randint(0, 5, (arguments.train_batch, *arguments.train_size), generator=generator).to(device)
    calls: dict[str, Call] = {}
    memory: dict[str, Any] = {}
    for name, model in pair.items():
        model.to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

        def step(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            with torch.autocast(device.type, torch.bfloat16):
                loss = F.cross_entropy(logits(model(x)).float(), target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()

        step()
        memory[name] = peak(step, device)
        calls[name] = step
    times = in_turns(calls, device, arguments.seconds)
    used = {name: busy(call, device) for name, call in calls.items()}
    rows = []
    for name, found in times.items():
        rows.append(
            {"network": source, "batch": arguments.train_batch, "size": list(arguments.train_size), "variant": name}
            | {**found, **used[name], "peak_mib": memory[name], "own_mib": own(pair[name])}
        )
        held = "" if memory[name] is None else f"  peak {memory[name]:8.1f} MiB, {used[name]}"
        print(f"{source} training {name:8s} {found['ms']:9.3f} ms{held}", flush=True)
    return rows


def margins(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Largest distance of convolution sums over -1 and +1 from integers, and from the right ones, by setting."""
    device = torch.device(arguments.device)
    rows = []
    for channels, out, kernel, size in ((64, 64, 3, 64), (512, 512, 3, 16), (512, 64, 3, 16), (128, 128, 7, 20)):
        generator = torch.Generator().manual_seed(channels)
        bits = (torch.randint(0, 2, (2, channels, size, size), generator=generator) * 2 - 1).float()
        signs = (torch.randint(0, 2, (out, channels, kernel, kernel), generator=generator) * 2 - 1).float()
        # The largest sums that there are, in the first channel of the first image.
        signs[0] = 1
        bits[0] = 1
        if device.type == "cpu":
            bits, signs, out = bits[:, :16], signs[:8, :16], 8
        want = F.conv2d(bits.double(), signs.double(), padding=kernel // 2)
        for memory in (torch.contiguous_format, torch.channels_last):
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                for allowed in (False, True) if dtype == torch.float32 else (True,):
                    for benchmark in (False, True):
                        x = bits.to(device, dtype, memory_format=memory)
                        w = signs.to(device, dtype, memory_format=memory)
                        with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, allow_tf32=allowed):
                            y = F.conv2d(x, w, padding=kernel // 2).double().cpu()
                        rows.append(
                            {
                                "channels": channels,
                                "out": out,
                                "kernel": kernel,
                                "memory": str(memory).removeprefix("torch."),
                                "dtype": str(dtype).removeprefix("torch."),
                                "tf32": allowed,
                                "benchmark": benchmark,
                                "from_integers": float((y - y.round()).abs().max()),
                                "from_the_sum": float((y - want).abs().max()),
                            }
                        )
    worst = max((row for row in rows if row["dtype"] == "float32"), key=lambda row: row["from_the_sum"])
    print(f"float32 convolutions over -1 and +1, farthest from the sum: {worst}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--networks", nargs="*", default=["smp:Unet/resnet34", "smp:UPerNet/tu-convnext_tiny"])
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--train-networks", nargs="*", help="by default the first of --networks")
    parser.add_argument("--train-size", type=int, nargs=2, default=(352, 480), metavar=("H", "W"))
    parser.add_argument("--train-batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing, for each network and batch size")
    parser.add_argument("--out", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    cuda = arguments.device.startswith("cuda")
    results: dict[str, Any] = {
        "device": torch.cuda.get_device_name(arguments.device) if cuda else cpu_name(),
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "size": arguments.size,
        "inference": [],
        "training": [],
        "margins": [],
    }

    def save() -> None:
        # Each part is kept as soon as it is there.
        if arguments.out is not None:
            arguments.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")

    results["margins"] = margins(arguments)
    save()
    trained = arguments.networks[:1] if arguments.train_networks is None else arguments.train_networks
    for source in trained:
        results["training"] += training(source, arguments)
        save()
    for source in arguments.networks:
        results["inference"] += inference(source, arguments)
        save()
    print(f"{results['device']}, torch {results['torch']}, cuDNN {results['cudnn']}")


if __name__ == "__main__":
    main()
