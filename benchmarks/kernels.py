"""Times packed layers and networks beside float and int8 ones, interleaved, and writes JSON.

    python benchmarks/kernels.py --out layers.json
    python benchmarks/kernels.py --act-bits 1 2 --only 256-  # both bits of activations beside float
    python benchmarks/kernels.py --network smp:UPerNet/tu-convnext_tiny --options '{"classes": 19}' --int8 --memory --out net.json

int8 columns appear where openvino with nncf, or onnxruntime with onnx and onnxscript, are installed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

# glibc is told to keep freed memory: otherwise whichever variant runs next pays the page faults of the one before.
KEEP = {
    "MALLOC_TOP_PAD_": str(256 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 30),
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", help="name for bidensify.models.build_model; layers without it")
    parser.add_argument("--options", default="{}", help="JSON of the network's options")
    parser.add_argument("--size", type=int, nargs=2, default=(512, 512), metavar=("H", "W"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--kernels", nargs="+")
    parser.add_argument("--only", nargs="+", help="layers whose name contains one of these")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--latent", action="store_true")
    parser.add_argument("--int8", action="store_true")
    parser.add_argument("--int8-folder", type=Path, help="keeps the quantized networks for the next run")
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument(
        "--idle", action="store_true", help="only rounds in which other programs left the machine alone count"
    )
    parser.add_argument("--act-bits", type=int, nargs="+", default=[1], choices=[1, 2], help="of layers: 1, 2 or both")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if any(os.environ.get(name) != value for name, value in KEEP.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **KEEP})

    import torch
    from rich.console import Console

    from bidensify._util.files import atomic_write
    from bidensify.bench.cases import CASES
    from bidensify.bench.result import render
    from bidensify.bench.run import run_bench
    from bidensify.models import build_model

    torch.manual_seed(0)
    options = json.loads(arguments.options)
    network = build_model(arguments.network, **options).eval() if arguments.network else None
    cases = [case for case in CASES if not arguments.only or any(part in case.name for part in arguments.only)]
    result = run_bench(
        network,
        name=arguments.network or "layers",
        spec=arguments.network,
        options=options,
        cases=cases,
        size=tuple(arguments.size),
        threads=arguments.threads,
        kernels=arguments.kernels,
        seconds=arguments.seconds,
        compiled=arguments.compiled,
        latent=arguments.latent,
        int8=arguments.int8,
        int8_folder=arguments.int8_folder,
        bfloat16=arguments.bfloat16,
        idle=arguments.idle,
        memory=arguments.memory,
        act_bits=arguments.act_bits,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    )
    Console(width=200).print(render(result))
    if arguments.out is not None:
        with atomic_write(arguments.out) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
