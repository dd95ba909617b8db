"""Memory of outputs: tensors like others, disjoint, given back by their last view, and no fresh pages in a second run."""

from __future__ import annotations

import copy
import itertools
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import settle
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bidensify.deploy import pack, release_memory
from bidensify.kernels import memory
from bidensify.kernels.library import library as load_library
from bidensify.nn import BiDenseConv2d

library = load_library()
pytestmark = pytest.mark.skipif(
    library is None or sys.platform == "win32",
    reason="needs kernels, built from this checkout, and mmap",
)
SHAPE = (1, 64, 64, 64)


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before, _ = memory.kept()
    yield
    assert memory.kept()[0] == before


def live() -> int:
    return memory.kept()[0]


@pytest.mark.parametrize("shape", [SHAPE, (2, 3, 200, 201), (3, 1, 500, 40), (1, 70000, 1, 1), (2, 1, 1, 90000)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
@pytest.mark.parametrize("inference", [False, True])
def test_an_output_is_what_torch_would_make(
    shape: tuple[int, int, int, int], dtype: torch.dtype, inference: bool
) -> None:
    before = live()
    with torch.inference_mode(inference):
        got, want = memory.empty(shape, dtype), torch.empty(shape, dtype=dtype, memory_format=torch.channels_last)
    assert live() - before >= got.numel() * got.element_size()
    for name in ("shape", "dtype", "device", "layout", "requires_grad", "grad_fn", "is_leaf"):
        assert getattr(got, name) == getattr(want, name)
    assert type(got) is Tensor
    assert got.stride() == want.stride()
    assert got.is_inference() == want.is_inference()
    assert got.data_ptr() % 64 == 0
    assert got.untyped_storage().nbytes() == got.numel() * got.element_size()


def test_small_ones_and_other_types_are_torchs_own() -> None:
    before = live()
    kept = [
        memory.empty(shape, dtype)
        for shape, dtype in (
            ((1, 4, 8, 8), torch.float32),
            (SHAPE, torch.int32),
            ((0, 64, 64, 64), torch.float32),
        )
    ]
    assert live() == before
    assert [tuple(tensor.shape) for tensor in kept] == [(1, 4, 8, 8), SHAPE, (0, 64, 64, 64)]


def test_the_last_view_gives_the_memory_back() -> None:
    before = live()
    y = memory.empty(SHAPE, torch.float32).fill_(3)
    row, array = y[0, :, 2], y.numpy()
    assert live() > before
    del y, row
    assert live() > before
    assert (array == 3).all()
    del array
    assert live() == before


def test_copies_are_independent_and_tensors_do_what_tensors_do() -> None:
    y = memory.empty(SHAPE, torch.float32).fill_(1)
    for other in (copy.deepcopy(y), pickle.loads(pickle.dumps(y)), y.clone(), y.share_memory_().clone()):
        other.add_(1)
        assert (y == 1).all()
        assert (other == 2).all()
        assert other.stride() == y.stride()
    y = memory.empty(SHAPE, torch.float32).fill_(1).requires_grad_()
    (y * y).sum().backward()
    assert y.grad is not None
    assert (y.grad == 2).all()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), min_size=1, max_size=60), st.booleans())
def test_outputs_never_overlap(steps: list[tuple[int, int]], give_back: bool) -> None:
    held: dict[int, tuple[Tensor, int]] = {}
    for number, (slot, size) in enumerate(steps):
        held.pop(slot, None)
        held[slot] = (memory.empty((1, 64, 64 * size, 9), torch.float32).fill_(number), number)
        if give_back and number % 7 == 0:
            release_memory()
    ranges = sorted((y.data_ptr(), y.data_ptr() + 4 * y.numel()) for y, _ in held.values())
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(ranges))
    assert all((y == number).all() for y, number in held.values())


def test_larger_than_a_mapping() -> None:
    y = memory.empty((1, 64, 1024, 512), torch.float32)
    y[..., -1].fill_(2)
    assert (y[..., -1] == 2).all()


def test_threads_make_and_free_each_others_outputs() -> None:
    passed: list[tuple[Tensor, float]] = []
    wrong: list[float] = []

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for step in range(120):
            size = int(torch.randint(1, 30, (1,), generator=generator))
            value = float(1000 * seed + step)
            passed.append((memory.empty((1, 16, 64 * size, 17), torch.float32).fill_(value), value))
            if len(passed) > 12:
                y, expected = passed.pop(0)
                if not (y == expected).all():
                    wrong.append(expected)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_no_run_needs_any_more_goes_back() -> None:
    release_memory()
    large = memory.empty((1, 64, 1024, 1024), torch.float32)
    del large
    assert memory.kept()[1] >= 256 << 20
    for _ in range(1100):
        memory.empty(SHAPE, torch.float32)
    assert memory.kept()[1] < live() + (64 << 20)
    release_memory()
    assert memory.kept()[1] <= live() + (64 << 20)


FORK = """
import os, sys, threading
import torch
torch.set_num_threads(1)
from bidensify.kernels import memory
mine = memory.empty((1, 64, 64, 64), torch.float32).fill_(1)
stop = False
def work():
    while not stop:
        memory.empty((1, 64, 64, 64), torch.float32)
thread = threading.Thread(target=work)
thread.start()
for _ in range(20):
    child = os.fork()
    if not child:
        mine.fill_(2)
        memory.empty((1, 64, 64, 64), torch.float32).fill_(3)
        os._exit(0 if (mine == 2).all() else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (mine == 1).all()
stop = True
thread.join()
print("good")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_process_has_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "good", done.stderr


class Net(nn.Module):
    """A full-precision layer, four binary ones, an upsampling, a predictor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(*(BiDenseConv2d(16, 16, 3, padding=1) for _ in range(4)))
        self.last = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(F.interpolate(self.stem(x), scale_factor=2)))


def test_an_output_outlives_its_model() -> None:
    x = torch.randn(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        packed = pack(settle(nn.Sequential(BiDenseConv2d(3, 16, 3, padding=1))))
        y = packed(x)
        want = y.clone()
        del packed
        memory.empty(SHAPE, torch.float32).fill_(9)
    assert torch.equal(y, want)
    assert y.untyped_storage().nbytes() == 4 * y.numel()


def test_gradients_pass_around_packed_layers_as_before() -> None:
    packed = pack(settle(Net()))
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    y = packed(x)
    assert y.requires_grad
    with torch.no_grad():
        assert torch.equal(packed(x), y)


FAULTS = """
import resource, sys
sys.path[:0] = sys.argv[1:]
import torch
from test_memory import Net
from helpers import settle
from bidensify.deploy import pack
torch.set_num_threads(1)
packed = pack(settle(Net()))
x = torch.randn(1, 3, 256, 256).contiguous(memory_format=torch.channels_last)
def faults(runs):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    with torch.inference_mode():
        for _ in range(runs):
            y = packed.body(held)
            del y
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / runs
held = torch.randn(1, 16, 512, 512).contiguous(memory_format=torch.channels_last)
faults(2)
print(faults(5))
"""


def test_a_second_run_has_no_fresh_pages() -> None:
    command = [sys.executable, "-c", FAULTS, str(Path(__file__).parent), str(Path(__file__).parent / "shared")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    # An output is 16 MiB, 4096 pages.
    assert float(done.stdout) < 200
