"""Packed networks under OpenVINO: convert to its IR, the extension in C++ (cpp/), run an IR without torch (program.py)."""
