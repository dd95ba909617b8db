"""Tests work on tensors too small to share between threads, also in the processes that they start."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
