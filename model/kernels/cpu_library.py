"""The C++ kernels as a library: compiled once per machine at first use, for the widest vectors that
the processor has.

*_cpu.cpp need g++ (or CXX) and nothing of torch. The library is cached by sources, flags and
compiler under $XDG_CACHE_HOME/falcon_mamba (default ~/.cache).
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
PATHS = {  # instruction set -> its flags
    "avx512": ["-DW=16", "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma"],
    "avx2": ["-DW=8", "-mavx2", "-mfma"],
    "portable": ["-DW=4"],
}
WIDTHS = {"avx512": 16, "avx2": 8, "portable": 4}  # floats of a vector


def missing() -> str | None:
    """Why the CPU kernels cannot be used here, with the fix; None when they can."""
    if shutil.which(_compiler()[0]) is None:
        return "no C++ compiler: install one (apt-get install g++), or name yours in CXX"
    try:
        library(instruction_set())
    except (RuntimeError, OSError, subprocess.CalledProcessError) as error:
        return (
            "a C++ compiler that failed (name another in CXX, a writable cache in "
            f"XDG_CACHE_HOME): {error}"
        )
    return None


def _compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "g++"))


@functools.cache
def instruction_set() -> str:
    """The widest path that this processor runs."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "portable"
    flags = set(
        next(
            (line.split(":")[1].split() for line in text.splitlines() if line.startswith("flags")),
            [],
        )
    )
    if {"avx512f", "avx512dq", "avx512vl", "avx512bw"} <= flags:
        return "avx512"
    return "avx2" if {"avx2", "fma"} <= flags else "portable"


@functools.cache
def library(path: str) -> ctypes.CDLL:
    """Load the library of an instruction set; compile it into the cache if it is missing."""
    compiler = _compiler()
    version = subprocess.run(
        [*compiler, "--version"], capture_output=True, text=True, check=True
    ).stdout
    command = [*compiler, *FLAGS, *PATHS[path]]
    texts = [(FOLDER / name).read_text(encoding="utf-8") for name in HEADERS + SOURCES]
    key = hashlib.sha256(
        "\n".join([*texts, *command, version, platform.machine()]).encode()
    ).hexdigest()
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "falcon_mamba"
    target = home / f"mamba_cpu-{path}-{key[:16]}.so"
    if not target.is_file():
        home.mkdir(parents=True, exist_ok=True)
        # ranks, on several machines perhaps, may compile at once; each renames a file of its own
        # into place
        handle, part = tempfile.mkstemp(dir=home, suffix=".part")
        os.close(handle)
        sources = [str(FOLDER / name) for name in SOURCES]
        result = subprocess.run([*command, *sources, "-o", part], capture_output=True, text=True)
        if result.returncode:
            os.unlink(part)
            raise RuntimeError(f"compiling {', '.join(SOURCES)} failed:\n{result.stderr}")
        os.chmod(part, 0o755)
        os.replace(part, target)
    return ctypes.CDLL(str(target))
