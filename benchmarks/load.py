"""Size and loading time of packed networks: ``bidensify.from_pretrained(folder, base)``, beyond building the base.

    python benchmarks/load.py                                # the table
    python benchmarks/load.py --output figures.json          # and the figures as JSON

One thread, a process of its own for each network, after one load of a small network (imports are not counted) and with the
file in the page cache.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from children import in_child

from bidensify._util.machine import cpu_name

SOURCES = ("smp:UPerNet/tu-convnext_tiny", "smp:Unet/resnet34")
OPTIONS = {"encoder_weights": None, "classes": 19}
ROUNDS = 5


def measure(source: str) -> dict[str, Any]:
    """Saves and loads one network in this process."""
    import bidensify as bd
    from bidensify.deploy.layers import packed_layers
    from bidensify.models import build_model
    from bidensify.models.unet import unet

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        small = Path(folder) / "small"
        bd.save_pretrained(bd.pack(bd.bidensify(unet())), small)
        bd.from_pretrained(small, unet())
        base = build_model(source, **OPTIONS)
        student = bd.bidensify(base).eval()
        binary = sum(layer.latent_weight.numel() for _, layer in bd.nn.binary_layers(student))
        packed = bd.pack(student)
        rest = sum(p.numel() for p in packed.parameters())
        rest += sum(layer.side.numel() for layer in packed_layers(packed).values())
        bd.save_pretrained(packed, Path(folder) / "net")
        size = (Path(folder) / "net" / "model.safetensors").stat().st_size
        seconds = []
        for _ in range(ROUNDS):
            again = build_model(source, **OPTIONS)
            start = time.perf_counter()
            bd.from_pretrained(Path(folder) / "net", again)
            seconds.append(time.perf_counter() - start)
    float_size = sum(t.numel() * t.element_size() for t in base.state_dict().values())
    return {
        "network": source,
        "bytes": size,
        "of_bound": round(size / (binary / 8 + 4 * rest), 4),
        "smaller_than_float": round(float_size / size, 1),
        "load_seconds": [round(value, 3) for value in seconds],
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", default=list(SOURCES), help=f"by default {', '.join(SOURCES)}")
    parser.add_argument("--output", type=Path, help="JSON")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(options.sources[0])))
        return
    rows = []
    for source in options.sources:
        rows.append(in_child(__file__, source))
    figures = {"processor": cpu_name(), "torch": torch.__version__, "rows": rows}
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    print("| network | bytes | of its bound | smaller than float | load, s (median) |\n|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['network']} | {row['bytes']:,} | {row['of_bound']} | {row['smaller_than_float']} | "
            f"{median(row['load_seconds']):.2f} |"
        )


if __name__ == "__main__":
    main()
