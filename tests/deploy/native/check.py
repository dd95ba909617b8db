"""Kernels outside Python: ``python tests/deploy/native/check.py [asan] [neon] [fuzz] [operator]``.

* asan: builds the library and a replay program with AddressSanitizer and UndefinedBehaviorSanitizer and replays random
  layers recorded from the reference path through every tier of this processor.
* neon: cross-compiles both for aarch64 and replays the same layers under qemu-user. Needs g++-12-aarch64-linux-gnu and
  qemu-user (Debian: apt-get install g++-12-aarch64-linux-gnu qemu-user). Speed is not measured.
* fuzz: loads 10 000 mutated packed files, running what loads on the sanitized kernels.
* operator: replays random calls of the deployed operator (bidensify/deploy/runtimes/cpp) with both sanitizers on every kernel,
  then 10 000 calls with mutated arguments; neon replays the same calls.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[2] / "bidensify" / "kernels" / "csrc" / "packed"
DEPLOYED = HERE.parents[2] / "bidensify" / "deploy" / "runtimes" / "cpp"
CASES, CALLS = 400, 300
FLAGS = [
    "-std=c++17",
    "-O2",
    "-g",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fwrapv",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-fPIC",
]
SANITIZE = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
# Everything but what is built for one instruction set.
COMMON = sorted(
    file.stem for file in SOURCES.glob("*.cpp") if file.stem[:6] != "inner_" or file.stem == "inner_portable"
)
X86 = {
    "inner_avx2": ["-mavx2", "-mfma", "-mbmi2", "-mpopcnt"],
    "inner_avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512vl",
        "-mavx512dq",
        "-mavx512vpopcntdq",
        "-mfma",
        "-mbmi2",
        "-w",
    ],
}


def say(*command: str | Path, **options: object) -> None:
    """Runs a command, or ends the program."""
    result = subprocess.run([str(part) for part in command], check=False, **options)  # type: ignore[call-overload]
    if result.returncode:
        sys.exit(f"failed ({result.returncode}): {' '.join(str(part) for part in command)}")


def objects(
    folder: Path, compiler: str, flags: list[str], tiers: dict[str, list[str]], defines: list[str]
) -> list[Path]:
    """Compiles the library's files, as many at once as there are processors."""
    made = {name: folder / f"{name}.o" for name in [*COMMON, *tiers]}

    def compiled(name: str) -> int:
        options = [*FLAGS, *flags, *tiers.get(name, []), *defines, "-c", SOURCES / f"{name}.cpp", "-o", made[name]]
        return subprocess.run([compiler, *map(str, options)], check=False).returncode

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failed = [name for name, code in zip(made, pool.map(compiled, made), strict=True) if code]
    if failed:
        sys.exit(f"{compiler} failed on {failed}")
    return list(made.values())


@cache
def record(folder: Path) -> Path:
    """Writes the cases; they come from the reference path."""
    sys.path.insert(0, str(HERE))
    from cases import write_cases

    path = folder / "cases.bin"
    write_cases(path, CASES)
    return path


@cache
def record_calls(folder: Path) -> Path:
    """Writes calls of the operator."""
    sys.path.insert(0, str(HERE))
    from operator_cases import write_operator_cases

    path = folder / "calls.bin"
    write_operator_cases(path, CALLS)
    return path


def operator_program(folder: Path, compiler: str, flags: list[str], made: list[Path]) -> Path:
    """Builds ``operator.cpp`` with the deployed operator's own files, over kernels that are compiled already."""
    program = folder / f"operator_{compiler}"
    own = [DEPLOYED / "call.cpp", DEPLOYED / "spec.cpp", HERE / "operator.cpp"]
    say(compiler, *FLAGS, *flags, f"-I{SOURCES}", f"-I{DEPLOYED}", *own, *made, "-o", program, "-pthread")
    return program


@cache
def sanitized(folder: Path) -> list[Path]:
    """The library's files with both sanitizers; compiled once for all checks."""
    x86 = os.uname().machine in ("x86_64", "amd64")
    tiers = X86 if x86 else {"inner_neon": []}
    defines = ["-DBD_WITH_AVX2", "-DBD_WITH_AVX512"] if x86 else ["-DBD_WITH_NEON"]
    return objects(folder, os.environ.get("CXX", "g++"), SANITIZE, tiers, defines)


def asan(folder: Path) -> None:
    """See above."""
    compiler = os.environ.get("CXX", "g++")
    made = sanitized(folder)
    program = folder / "replay_asan"
    say(compiler, *FLAGS, *SANITIZE, f"-I{SOURCES}", HERE / "replay.cpp", *made, "-o", program, "-pthread")
    # The pool's threads live as long as the process.
    say(program, record(folder), env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"})


def fuzz(folder: Path, count: int = 10_000) -> None:
    """See above."""
    compiler = os.environ.get("CXX", "g++")
    library = folder / "libbidensify_kernels.so"
    say(compiler, "-shared", *SANITIZE, *sanitized(folder), "-o", library, "-pthread")
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    environment = {
        **os.environ,
        "LD_PRELOAD": str(Path(runtime.stdout.strip()).resolve()),
        "ASAN_OPTIONS": "detect_leaks=0",
        "BIDENSIFY_LIBRARY": str(library),
    }
    # Each share has its own seed; one thread each, since the processors are shared out already.
    shares = os.cpu_count() or 1
    environment["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, str(HERE / "fuzz_format.py"), str(-(-count // shares))]
    running = [subprocess.Popen([*command, str(seed)], env=environment) for seed in range(shares)]
    codes = [process.wait() for process in running]
    if any(codes):
        sys.exit(f"fuzz: the shares ended with {codes}")


def operator(folder: Path, count: int = 10_000) -> None:
    """See above."""
    compiler = os.environ.get("CXX", "g++")
    program = operator_program(folder, compiler, SANITIZE, sanitized(folder))
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1"}
    say(program, record_calls(folder), str(count), env=environment)


def neon(folder: Path) -> None:
    """See above."""
    compiler = next(
        (name for name in ("aarch64-linux-gnu-g++-12", "aarch64-linux-gnu-g++") if shutil.which(name)), None
    )
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if compiler is None or emulator is None:
        sys.exit(
            "neon: needs g++-12-aarch64-linux-gnu and qemu-user (apt-get install g++-12-aarch64-linux-gnu qemu-user)"
        )
    place = folder / "aarch64"
    place.mkdir()
    made = objects(place, compiler, ["-O3"], {"inner_neon": []}, ["-DBD_WITH_NEON"])
    program = folder / "replay_neon"
    say(compiler, *FLAGS, f"-I{SOURCES}", HERE / "replay.cpp", *made, "-o", program, "-static", "-pthread")
    say(emulator, program, record(folder))
    say(emulator, operator_program(place, compiler, ["-static"], made), record_calls(folder), "0")


def main(names: list[str]) -> None:
    """Runs the named checks, all of them by default."""
    known = {"asan": asan, "neon": neon, "fuzz": fuzz, "operator": operator}
    unknown = sorted(set(names) - set(known))
    if unknown:
        sys.exit(f"unknown checks {unknown}; there are {sorted(known)}")
    with tempfile.TemporaryDirectory() as place:
        for name in names or list(known):
            start = time.monotonic()
            known[name](Path(place))
            print(f"{name}: passed in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
