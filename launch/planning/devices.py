"""Datasheet figures of the GPUs that a plan compares."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Datasheet figures of one GPU."""

    name: str
    flops: float  # dense bf16 FLOP/s
    bandwidth: float  # of memory, bytes/s
    memory_gib: float
    special_functions: float  # per second: SMs x 16 x boost clock


GPUS = (
    Gpu("A100 80GB", 312e12, 2.039e12, 80, 108 * 16 * 1.41e9),
    Gpu("H100 SXM", 989.5e12, 3.35e12, 80, 132 * 16 * 1.98e9),
    Gpu("H200", 989.5e12, 4.8e12, 141, 132 * 16 * 1.98e9),
    Gpu("B200", 2250e12, 8.0e12, 180, 148 * 16 * 1.85e9),
)
