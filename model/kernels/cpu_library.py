"""Compiles the C++ kernels at first use, for the widest vectors of the processor, and loads them.

*_cpu.cpp need g++ (or CXX) and no torch headers. The library is cached by sources, flags and
compiler in $XDG_CACHE_HOME/falcon_mamba (default ~/.cache). A cached file ends in the SHA-256 of
the library before it; the loader ignores what follows the library. Before it is loaded, that hash,
its owner and its permissions are checked, and those of its folder.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import signal
import stat
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from core.files import is_private, remove_stale_temp_files, write_atomic

logger = logging.getLogger(__name__)

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
COMPILE_SECONDS = 600  # takes about ten; a compiler without an answer would hold up every rank
HASH_BYTES = 64  # of SHA-256 in hexadecimal, at the end of a cached file


def unavailable_reason() -> str | None:
    """Why the CPU kernels cannot be used here, with the fix; None when they can."""
    try:
        compiler()
    except RuntimeError as error:
        return f"{error}; a run on CPUs takes three times as long without"
    try:
        load_library(instruction_set())
    except (RuntimeError, OSError) as error:
        return (
            "the C++ kernels cannot be built (set CXX to another compiler, TMPDIR and "
            f"XDG_CACHE_HOME to folders with space): {error}"
        )
    return None


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
    """Load the library of an instruction set; compile it if no sound copy is cached.

    Raises RuntimeError or OSError in one line if that fails.
    """
    name = f"mamba_cpu-{instructions}-{library_key(instructions)[:16]}.so"
    folder = _cache_folder()
    descriptor = _open_cached(folder, name) if folder is not None else None
    if descriptor is None:
        descriptor = _build(instructions, folder, name)
    # the loader opens what was hashed; it knows libraries by path, so the descriptor stays open
    return ctypes.CDLL(f"/proc/self/fd/{descriptor}")


@functools.cache
def library_key(instructions: str) -> str:
    """SHA-256 of all that decides a library: sources, flags, compiler version, architecture."""
    texts = [(FOLDER / name).read_text(encoding="utf-8") for name in HEADERS + SOURCES]
    words = compiler()
    version = _run([*words, "--version"])
    command = [*words, *FLAGS, *INSTRUCTION_SETS[instructions]]
    return hashlib.sha256(
        "\n".join([*texts, *command, version, platform.machine()]).encode()
    ).hexdigest()


def compiler() -> list[str]:
    """The words of CXX, or g++; raises RuntimeError if there is no such command."""
    setting = os.environ.get("CXX", "").strip() or "g++"
    try:
        words = shlex.split(setting)
    except ValueError as error:
        raise RuntimeError(f"CXX is {setting!r}: {error}") from error
    if shutil.which(words[0]) is None:
        raise RuntimeError(
            f"no C++ compiler {words[0]}: install one (apt-get install g++) or set CXX"
        )
    return words


def _run(command: list[str]) -> str:
    """Output of a compiler; raises RuntimeError with the line of its error.

    Its helpers are in its process group, so that none survives a compiler that is given up.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        process_group=0,
    )
    try:
        output, messages = process.communicate(timeout=COMPILE_SECONDS)
    except BaseException as error:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            raise RuntimeError(f"{command[0]} did not end in {COMPILE_SECONDS} s") from error
        raise
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        raise RuntimeError(f"{command[0]} was killed by {name}: is there enough memory?")
    if process.returncode:
        raise RuntimeError(f"{command[0]}: {_error_line(messages)}")
    return output


def _error_line(messages: str) -> str:
    """The first line of a compiler's messages that names an error, else the last line."""
    lines = [line.strip() for line in messages.splitlines() if line.strip()]
    named = (line for line in lines if re.search(r"error|No space left|Killed", line))
    return next(named, lines[-1] if lines else "it failed without a message")


def _build(instructions: str, folder: Path | None, name: str) -> int:
    """Compile a library into the cache; returns an open descriptor of it, or of a private copy.

    Ranks, on several machines too, may do so at once: each compiles in a folder of its own.
    """
    # a temporary folder on a network may keep the name of an open file
    with tempfile.TemporaryDirectory(prefix="falcon_mamba-", ignore_cleanup_errors=True) as temp:
        output = Path(temp) / name
        sources = [str(FOLDER / source) for source in SOURCES]
        flags = [*FLAGS, *INSTRUCTION_SETS[instructions]]
        _run([*compiler(), *flags, *sources, "-o", str(output)])
        if folder is not None:
            content = output.read_bytes()
            digest = hashlib.sha256(content).hexdigest().encode()
            try:
                remove_stale_temp_files(folder)
                write_atomic(folder / name, lambda file: _write_private(file, content + digest))
            except OSError as error:
                logger.warning(
                    f"the compiled kernels cannot be kept in {folder} ({error}), each process "
                    "compiles them: set XDG_CACHE_HOME to a writable folder"
                )
            else:
                if (descriptor := _open_cached(folder, name)) is not None:
                    return descriptor
        return os.open(output, os.O_RDONLY | os.O_CLOEXEC)


def _write_private(file: BinaryIO, content: bytes) -> None:
    """Write a file that only its owner may change, whatever the umask."""
    os.fchmod(file.fileno(), 0o644)
    file.write(content)


def _cache_folder() -> Path | None:
    """Folder of compiled libraries, made if missing; None, with a warning, if it is not safe."""
    problem: object
    try:
        folder = _cache_home() / "falcon_mamba"
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.lstat()
        if stat.S_ISDIR(status.st_mode) and is_private(status):
            return folder
        problem = f"{folder} is a link, another user's or writable by others"
    except (OSError, RuntimeError) as error:
        problem = error
    logger.warning(
        f"no cache of compiled kernels ({problem}), each process compiles them: set "
        "XDG_CACHE_HOME to a folder that only you can write"
    )
    return None


def _cache_home() -> Path:
    """$XDG_CACHE_HOME, which counts only as an absolute path, else ~/.cache.

    Raises RuntimeError if the user has no home.
    """
    configured = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if configured.is_absolute():
        return configured
    home = Path.home()
    if not home.is_absolute():
        raise RuntimeError(f"HOME is {str(home)!r}")
    return home / ".cache"


def _open_cached(folder: Path, name: str) -> int | None:
    """Open a cached library; None unless it is ours and whole. Follows no link in the cache."""
    try:
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        cache = os.open(folder, flags | os.O_DIRECTORY)
        try:
            ours = is_private(os.fstat(cache))
            descriptor = os.open(name, flags | os.O_NONBLOCK, dir_fd=cache)
        finally:
            os.close(cache)
    except OSError:
        return None
    status = os.fstat(descriptor)
    if ours and stat.S_ISREG(status.st_mode) and is_private(status):
        with suppress(OSError), open(descriptor, "rb", closefd=False) as file:
            content = file.read()
            digest = hashlib.sha256(content[:-HASH_BYTES]).hexdigest().encode()
            if digest == content[-HASH_BYTES:]:
                return descriptor
    os.close(descriptor)
    return None
