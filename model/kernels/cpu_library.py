"""Compiles the C++ kernels at first use, for the widest vectors of the processor, and loads them.

*_cpu.cpp need g++ (or CXX) and no torch headers. The library is cached by sources, flags and
compiler in $XDG_CACHE_HOME/falcon_mamba (default ~/.cache).
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
HEADERS, SOURCES = ["mamba_cpu.h"], ["scan_cpu.cpp", "conv_cpu.cpp", "rows_cpu.cpp"]
FLAGS = [
    "-O3",
    "-std=c++17",
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fopenmp",
    "-shared",
    "-fPIC",
]
INSTRUCTION_SETS = {  # name -> compiler flags
    "avx512": ["-DW=16", "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma"],
    "avx2": ["-DW=8", "-mavx2", "-mfma"],
    "portable": ["-DW=4"],
}
VECTOR_WIDTHS = {"avx512": 16, "avx2": 8, "portable": 4}  # in floats


def unavailable_reason() -> str | None:
    """Why the CPU kernels cannot be used here, with the fix; None when they can."""
    if shutil.which(_compiler()[0]) is None:
        return "no C++ compiler found: install one (apt-get install g++) or set CXX"
    try:
        load_library(instruction_set())
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return (
            "the C++ kernels cannot be built (set CXX to another compiler, XDG_CACHE_HOME to a "
            f"writable folder): {error}"
        )
    return None


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


@functools.cache
def instruction_set() -> str:
    """The widest instruction set of INSTRUCTION_SETS that this processor has."""
    try:
        cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "portable"
    flag_lines = (line.split(":")[1].split() for line in cpuinfo if line.startswith("flags"))
    flags = set(next(flag_lines, []))
    if {"avx512f", "avx512dq", "avx512vl", "avx512bw"} <= flags:
        return "avx512"
    return "avx2" if {"avx2", "fma"} <= flags else "portable"


@functools.cache
def load_library(instructions: str) -> ctypes.CDLL:
    """Load the library of an instruction set; compile it if it is not cached."""
    compiler = _compiler()
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, check=True
    ).stdout
    command = [*compiler, *FLAGS, *INSTRUCTION_SETS[instructions]]
    texts = [(FOLDER / name).read_text(encoding="utf-8") for name in HEADERS + SOURCES]
    key = hashlib.sha256(
        "\n".join([*texts, *command, version, platform.machine()]).encode()
    ).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "falcon_mamba"
    target = cache / f"mamba_cpu-{instructions}-{key[:16]}.so"
    if not target.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        # ranks, on several machines too, may compile at once: each renames its own temporary file
        handle, temporary = tempfile.mkstemp(dir=cache, suffix=".part")
        os.close(handle)
        sources = [str(FOLDER / name) for name in SOURCES]
        result = subprocess.run(
            [*command, *sources, "-o", temporary], capture_output=True, text=True
        )
        if result.returncode:
            os.unlink(temporary)
            raise RuntimeError(f"compiling {', '.join(SOURCES)} failed:\n{result.stderr}")
        os.chmod(temporary, 0o755)
        os.replace(temporary, target)
    return ctypes.CDLL(str(target))
