"""The memory of this machine: what a run finds, and how it is kept."""

import ctypes
import os
import platform

import psutil
import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
KEPT_BYTES = 2**30


def available(device: str) -> int:
    """Bytes that this machine's device has: of one GPU in all, or free for all ranks of a CPU machine."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))).total_memory)
    return int(psutil.virtual_memory().available)


def keep_freed() -> None:
    """Have glibc, where it is the C library, keep what tensors free for the next ones.

    Else it gives large blocks back and takes their pages again zeroed: 7,500 page faults and 4 to 10 % of the time of a
    step of the demo. The process stays as large as it once was.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
        if not mallopt(M_MMAP_THRESHOLD, KEPT_BYTES):  # glibc before 2.35 takes no more than this
            mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
