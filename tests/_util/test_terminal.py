"""Standard output belongs to what bidensify prints."""

import subprocess
import sys

import pytest

from bidensify._util.terminal import off_standard_output

# What C holds in its buffer is written when the process ends, or when the stream is flushed: both must go where it was meant.
PROGRAM = """
import ctypes, sys
from bidensify._util.terminal import off_standard_output

c = ctypes.CDLL(None)
c.puts(b"ours from C")
print("ours")
for drop in (False, True):
    with off_standard_output(drop=drop):
        c.puts(b"theirs from C, dropped" if drop else b"theirs from C")
        print("theirs, dropped" if drop else "theirs")
print("ours again")
c.puts(b"ours from C again")
"""


def test_what_others_print_goes_elsewhere_from_c_too() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert sorted(done.stdout.splitlines()) == ["ours", "ours again", "ours from C", "ours from C again"]
    assert sorted(done.stderr.splitlines()) == ["theirs", "theirs from C"]


def test_streams_without_a_file_and_errors_leave_it_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="theirs"), off_standard_output():
        print("aside")
        raise ValueError("theirs")
    print("ours")
    read = capsys.readouterr()
    assert (read.out, read.err) == ("ours\n", "aside\n")
