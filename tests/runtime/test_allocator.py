"""Freed memory stays: a block of many pages is had again without page faults."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
from bidensify.runtime import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        blocks = [torch.ones(6 << 20) for _ in range(6)]  # 144 MiB, of which glibc gives back what lies at the heap's end
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

faults()
fresh = faults()
took = keep_freed_memory()
faults()
print(took, fresh, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's allocator alone has the settings")
def test_blocks_are_had_again_without_page_faults() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    took, fresh, kept = done.stdout.split()
    assert took == "True"
    assert int(fresh) > 40
    assert int(kept) < int(fresh) / 4
