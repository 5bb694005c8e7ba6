"""Compiles the CUDA kernels with NVRTC at first use and launches them on tensors' memory.

This needs `cuda-core` (NVIDIA's package, with NVRTC as a wheel), not nvcc; compiling takes about a
second per source and process.
"""

import functools
import hashlib
from collections.abc import Sequence
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # element type -> the macro BF16 of the sources


def compile_source(name: str, bf16: int, arch: str, log: Any = None) -> Any:
    """Compile a source for an architecture ("sm_90").

    ptxas writes the use of registers and spills to `log`.
    """
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        arch=arch,
        std="c++17",
        define_macro=[("BF16", str(bf16))],
        include_path=[str(FOLDER)],
        ptxas_options=["-v"],
    )
    return Program((FOLDER / name).read_text(encoding="utf-8"), "c++", options).compile(
        "cubin", logs=log
    )


def library_version() -> str:
    """SHA-256 of the sources and of what compiles them: this module and NVRTC."""
    sources = [*sorted(FOLDER.glob("*.cu*")), Path(__file__)]
    compilers = [version(package) for package in ("cuda-core", "cuda-bindings")]
    nvrtc = [each.version for each in distributions() if each.name.startswith("nvidia-cuda-nvrtc")]
    texts = [path.read_text(encoding="utf-8") for path in sources]
    return hashlib.sha256("\n".join([*texts, *compilers, *nvrtc]).encode()).hexdigest()


_compile_cached = functools.cache(compile_source)


@functools.cache
def _kernel(source: str, name: str, bf16: int, device: int, shared: int) -> Any:
    """Load a kernel on a device and raise its limit of dynamic shared memory."""
    from cuda.bindings import driver
    from cuda.core import Device

    Device(device).set_current()
    major, minor = torch.cuda.get_device_capability(device)
    kernel = _compile_cached(source, bf16, f"sm_{major}{minor}").get_kernel(name)
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (status,) = driver.cuKernelSetAttribute(attribute, shared, int(kernel.handle), device)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{name} needs {shared} bytes of shared memory per block: {status}")
    return kernel


@functools.cache
def _stream(handle: int, device: int) -> Any:
    """cuda-core stream of a handle; cached, since from_handle builds a class per call."""
    from cuda.core import Stream

    return Stream.from_handle(handle)


Arguments = Sequence[Any]  # tensors, None for a null pointer, and ctypes integers


def launch(
    source: str,
    name: str,
    dtype: torch.dtype,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    arguments: Arguments,
) -> None:
    """Run a kernel on the current stream of its first tensor's device."""
    from cuda.core import Device, LaunchConfig
    from cuda.core import launch as enqueue

    device = next(x for x in arguments if isinstance(x, Tensor)).device
    with torch.cuda.device(device):
        Device(device.index).set_current()  # an autograd thread may have no context yet
        kernel = _kernel(source, name, DTYPES[dtype], device.index, shared)
        stream = _stream(torch.cuda.current_stream(device).cuda_stream, device.index)
        enqueue(
            stream,
            LaunchConfig(grid=grid, block=threads, shmem_size=shared),
            kernel,
            *parameters(arguments),
        )


def parameters(arguments: Arguments) -> list[Any]:
    """Arguments as cuda-core takes them: addresses as integers, sizes as ctypes."""
    return [address(x) if x is None or isinstance(x, Tensor) else x for x in arguments]


def address(x: Tensor | None) -> int:
    """Address of a tensor's memory; 0 for None."""
    return 0 if x is None else x.data_ptr()
