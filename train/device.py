"""The device of a rank: CPU or GPU, its memory, its peak FLOP/s, and the allocator of a CPU."""

import ctypes
import os
import platform
import resource
from contextlib import suppress
from pathlib import Path

import psutil
import torch

from core.errors import InputError
from core.launcher import check_gpus
from train.config import Cluster, Device, EngineKind, Parallel, Precision
from train.costs.gpus import bf16_peak_flops

# of malloc.h
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
THRESHOLD_BYTES = 2**30
CGROUPS = Path("/sys/fs/cgroup")
# address space of threads and of libraries that load later; a tiny run needs 1.3 to 1.8 GiB
ADDRESSES = 7 * 2**28


def select_device(requested: Device) -> str:
    """Return the device type of a rank on this machine, "cuda" or "cpu"."""
    return "cuda" if requested is not Device.cpu and torch.cuda.is_available() else "cpu"


def check_device(requested: Device, selected: str, parallel: Parallel) -> None:
    """Raise InputError if this rank's GPU is missing or the engine does not support a CPU."""
    if selected == "cpu" and parallel.engine is EngineKind.megatron:
        device = " cluster.device=cpu" if requested is Device.cuda else ""
        raise InputError(
            "parallel.engine=megatron needs GPUs, and this rank has none: set "
            f"parallel.engine=deepspeed{device}"
        )
    if requested is Device.cuda and selected != "cuda":
        raise InputError(
            "cluster.device=cuda, but torch sees no GPU: set cluster.device=auto or cpu"
        )


def check_local_rank(selected: str) -> None:
    """Raise InputError if this node has more ranks than GPUs."""
    if selected == "cuda":
        check_gpus(torch.cuda.device_count())


def available_bytes(device: str) -> int:
    """Return this rank's GPU memory, or the free memory that all ranks of a CPU machine share.

    Limits count, too: of this process (ulimit -v) and of its control groups, as in a container.
    Raises InputError where the first leaves no room for what every start loads.
    """
    if device == "cuda":
        return int(
            torch.cuda.get_device_properties(int(os.environ.get("LOCAL_RANK", "0"))).total_memory
        )
    free = [psutil.virtual_memory().available, *free_of_cgroups()]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:  # of each process
        left = limit - psutil.Process().memory_info().vms - ADDRESSES
        if left < 0:
            raise InputError(
                f"ulimit -v leaves a process {(left + ADDRESSES) / 2**30:.2f} GiB of addresses, "
                f"libraries and threads need {ADDRESSES / 2**30:g}: raise it (ulimit -v unlimited)"
            )
        free.append(left * int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    return int(min(free))


def free_of_cgroups(root: Path = CGROUPS, process: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes that the memory limits of this process's control groups leave, versions 1 and 2.

    A limit of any enclosing group counts. Cached files count as free, since the kernel drops them.
    What cannot be read limits nothing.
    """
    free = []
    with suppress(OSError):
        for line in process.read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            mount = root / "memory" if controllers else root
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
            limit_name, used_name = names if controllers else ("memory.max", "memory.current")
            inner = mount / group.strip("/")
            for folder in (inner, *inner.parents[: len(inner.relative_to(mount).parts)]):
                with suppress(OSError, ValueError, KeyError):  # "max": no limit
                    limit = int((folder / limit_name).read_text(encoding="ascii"))
                    used = int((folder / used_name).read_text(encoding="ascii"))
                    stat = (folder / "memory.stat").read_text(encoding="ascii").split()
                    sizes = dict(zip(stat[::2], map(int, stat[1::2]), strict=True))
                    prefix = "total_" if controllers else ""
                    used -= sizes[f"{prefix}inactive_file"] + sizes[f"{prefix}active_file"]
                    free.append(max(0, limit - used))
    return free


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks for later tensors, where it is the C library.

    By default it returns large blocks to the system and gets zeroed pages for the next: 7,500 page
    faults and 4 to 10 % of the time of a step of the demo. The process never shrinks.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, THRESHOLD_BYTES)
        if not mallopt(M_MMAP_THRESHOLD, THRESHOLD_BYTES):
            mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the maximum before glibc 2.35


def peak_flops(cluster: Cluster, precision: Precision, device: torch.device) -> float | None:
    """Peak FLOP/s of one rank: cluster.peak_tflops, else the datasheet of a known GPU in bf16.

    None where neither says it, as on a CPU: the run then has no MFU.
    """
    if cluster.peak_tflops is not None:
        return cluster.peak_tflops * 1e12
    if device.type == "cpu" or precision is not Precision.bf16:
        return None
    return bf16_peak_flops(torch.cuda.get_device_name(device))


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this rank so far: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
