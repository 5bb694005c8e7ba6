"""Launches CUDA kernels on a CPU emulator: the same sources, called by the same host code."""

import ctypes
import functools
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.kernels import cuda_library

FOLDER = Path(__file__).parent
FALLING = False  # whether the threads of a block run to a barrier in falling order


@functools.cache
def library(source: str, bf16: int) -> ctypes.CDLL:
    """Compile and load an emulated source, once per process."""
    target = Path(tempfile.mkdtemp()) / f"{source}-{bf16}.so"
    flags = [
        "-O2",
        "-std=c++17",
        "-shared",
        "-fPIC",
        f"-DBF16={bf16}",
        f"-I{cuda_library.FOLDER}",
        f"-I{FOLDER}",
    ]
    subprocess.run(
        ["g++", *flags, str((FOLDER / source).with_suffix(".cpp")), "-o", str(target)], check=True
    )
    return ctypes.CDLL(str(target))


def launch(
    source: str,
    name: str,
    dtype: torch.dtype,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    arguments: Any,
) -> None:
    """Replacement of model.kernels.cuda_library.launch."""
    values = [
        ctypes.c_void_p(cuda_library.address(x)) if x is None or isinstance(x, Tensor) else x
        for x in arguments
    ]
    pointers = (ctypes.c_void_p * len(values))(
        *(ctypes.cast(ctypes.pointer(v), ctypes.c_void_p) for v in values)
    )
    emulate = library(source, cuda_library.DTYPES[dtype]).emulate
    assert emulate(name.encode(), *grid, threads, int(FALLING), pointers) == 0
