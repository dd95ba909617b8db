"""Packed networks under ExecuTorch: lower to a .pte, build the C++ runtime (cpp/), run a .pte without torch (program.py)."""
