"""The device of a rank: which it is, what it has, its speed, and how a CPU keeps its memory."""

import ctypes
import os
import platform
import resource
import time

import psutil
import torch

from core.errors import InputError
from train.config import Cluster, Device, EngineKind, Parallel, Precision

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT_BYTES = 2**30
# a smaller product does not fill a GPU, and would flatter the utilisation
SIZE = {"cpu": 1024, "cuda": 8192}
REPEATS = 8


def present_device(wanted: Device) -> str:
    """The device that a rank gets on this machine, "cuda" or "cpu"."""
    return "cuda" if wanted is not Device.cpu and torch.cuda.is_available() else "cpu"


def check_device(wanted: Device, present: str, parallel: Parallel) -> None:
    """Raise InputError if the GPU asked for is absent (no silent fallback) or the CPU is unfit."""
    if present == "cpu" and parallel.engine is EngineKind.megatron:
        device = " cluster.device=cpu" if wanted is Device.cuda else ""
        raise InputError(
            "parallel.engine is megatron, which works on GPUs alone, and this rank has none: set "
            f"parallel.engine=deepspeed{device}"
        )
    if wanted is Device.cuda and present != "cuda":
        raise InputError(
            "cluster.device is cuda, but torch sees no GPU; set cluster.device=auto or cpu"
        )


def available(device: str) -> int:
    """Bytes of device memory: one GPU's total, or a CPU machine's free memory for all ranks."""
    if device == "cuda":
        return int(
            torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))).total_memory
        )
    return int(psutil.virtual_memory().available)


def keep_freed() -> None:
    """Have glibc, where it is the C library, keep what tensors free for the next ones.

    Else it gives large blocks back and takes their pages again zeroed: 7,500 page faults and 4 to
    10 % of the time of a step of the demo. The process stays as large as it once was.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        if not mallopt(M_MMAP_THRESHOLD, KEPT_BYTES):  # glibc before 2.35 takes no more than this
            mallopt(M_MMAP_THRESHOLD, 32 * 2**20)


def peak_flops(cluster: Cluster, precision: Precision, device: torch.device) -> float:
    """FLOP/s of one rank: the config's datasheet value, or the best of a few matrix products."""
    if cluster.peak_tflops is not None:
        return cluster.peak_tflops * 1e12
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    size = SIZE[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    # what a busy machine takes from a CPU is no part of its peak
    clock = time.perf_counter if device.type == "cuda" else time.thread_time
    for _ in range(REPEATS):
        start = clock()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, clock() - start)
    return 2 * size**3 / best


def memory_gib(device: torch.device) -> float:
    """Most memory this rank has held so far: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
