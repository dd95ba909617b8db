"""What a weight's offset costs a packed layer: the sum of the binarized activations under each window.

    python benchmarks/offsets.py --threads 1

Both layers run in turn in one process; prints the median of the ratios with / without.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from torch import Tensor

from bidensify.deploy.freeze import freeze
from bidensify.nn import BiDenseConv2d, WeightBinarizer

SHAPES = ((256, 64, 3), (512, 16, 3), (64, 128, 3), (256, 64, 1))


class Offset(WeightBinarizer):
    """AdaBin's two values per output channel."""

    def codes(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        rows = self.rows(weight.detach())
        offset = rows.mean(1)
        scale = (rows - offset[:, None]).square().mean(1).sqrt()
        signs = torch.where(weight.detach() >= self.like(offset, weight), 1.0, -1.0)
        return signs, scale, offset


def main() -> None:
    """Times the shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=80)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for channels, size, kernel in SHAPES:
        layer = BiDenseConv2d(channels, channels, kernel, padding=kernel // 2).eval()
        plain = freeze(layer)
        layer.weight_binarizer = Offset()
        offset = freeze(layer)
        x = torch.randn(1, channels, size, size).contiguous(memory_format=torch.channels_last)
        ratios, times = [], []
        with torch.inference_mode():
            for number in range(arguments.rounds + 3):
                start = time.perf_counter()
                plain(x)
                middle = time.perf_counter()
                offset(x)
                end = time.perf_counter()
                if number >= 3:
                    ratios.append((end - middle) / (middle - start))
                    times.append(middle - start)
        name = f"{kernel}x{kernel} {channels}->{channels} at {size}x{size}"
        print(f"{name}: {statistics.median(ratios):.3f} of {1e3 * statistics.median(times):.2f} ms")


if __name__ == "__main__":
    main()
