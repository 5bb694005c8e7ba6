"""The rate a device multiplies matrices at: the denominator of MFU where the config gives no peak."""

import time

import torch

from train.config import Cluster, Precision

SIZE = {"cpu": 1024, "cuda": 8192}  # a smaller product does not fill a GPU, and would flatter the utilisation
REPEATS = 8


def peak_flops(cluster: Cluster, precision: Precision, device: torch.device) -> float:
    """FLOP/s of one rank: the config's datasheet value, or else the best of a few square matrix products."""
    if cluster.peak_tflops is not None:
        return cluster.peak_tflops * 1e12
    dtype = torch.bfloat16 if precision is Precision.bf16 else torch.float32
    size = SIZE[device.type]
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def memory_gib(device: torch.device) -> float:
    """Most memory this rank has held so far: allocated on the GPU, or resident in the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
