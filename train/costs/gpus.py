"""Datasheet figures of GPUs: peaks for MFU, and what a plan compares."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Datasheet figures of one GPU."""

    name: str
    device_names: tuple[str, ...]  # torch.cuda.get_device_name of models with this bf16 peak
    flops: float  # dense bf16 FLOP/s
    bandwidth: float  # of memory, bytes/s
    memory_gib: float
    special_functions: float  # per second: SMs x 16 x boost clock


A100_NAMES = (
    "NVIDIA A100-SXM4-40GB",
    "NVIDIA A100-SXM4-80GB",
    "NVIDIA A100-PCIE-40GB",
    "NVIDIA A100 80GB PCIe",
)
GPUS = (
    Gpu("A100 80GB", A100_NAMES, 312e12, 2.039e12, 80, 108 * 16 * 1.41e9),
    Gpu("H100 SXM", ("NVIDIA H100 80GB HBM3",), 989.5e12, 3.35e12, 80, 132 * 16 * 1.98e9),
    Gpu("H200", ("NVIDIA H200",), 989.5e12, 4.8e12, 141, 132 * 16 * 1.98e9),
    Gpu("B200", ("NVIDIA B200",), 2250e12, 8.0e12, 180, 148 * 16 * 1.85e9),
)


def bf16_peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a GPU by torch's name for it; None for one that is not listed."""
    return next((gpu.flops for gpu in GPUS if device_name in gpu.device_names), None)
