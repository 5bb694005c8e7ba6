"""One interface to the expensive operations; each run chooses a backend once and logs it."""

from typing import Any

from model.config import Backend
from model.kernels import cpu, cuda, mamba_ssm, reference
from model.kernels.interface import Kernels
from model.kernels.ops import register


class MissingBackend(ValueError):
    """A backend was asked for that cannot run here; the message says how to get it."""


REFERENCE = Kernels(
    "reference", reference.causal_conv1d, reference.selective_scan, reference.rms_norm, reference
)
CPU = register(cpu, "cpu", "cpu")
CUDA = register(cuda, "cuda", "cuda")
MAMBA_SSM = Kernels(
    "mamba_ssm", mamba_ssm.causal_conv1d, mamba_ssm.selective_scan, reference.rms_norm, reference
)

# per device, fastest first; the order on GPUs is by design (docs/design/kernels.md: not measured
# yet)
BACKENDS: dict[str, list[tuple[Backend, Any, Kernels]]] = {
    "cpu": [(Backend.cpu, cpu, CPU)],
    "cuda": [(Backend.cuda, cuda, CUDA), (Backend.mamba_ssm, mamba_ssm, MAMBA_SSM)],
}


def load(backend: Backend, device: str) -> Kernels:
    """Kernels for device "cpu" or "cuda"; raises MissingBackend, with the fix, if unavailable."""
    offered = BACKENDS[device]
    if backend is Backend.auto:
        return next(
            (kernels for _, module, kernels in offered if module.missing() is None), REFERENCE
        )
    if backend is Backend.reference:
        return REFERENCE
    for name, module, kernels in offered:
        if name is backend:
            if (why := module.missing()) is not None:
                raise MissingBackend(f"compute.kernels is {backend.value}, but there is {why}")
            return kernels
    raise MissingBackend(
        f"compute.kernels is {backend.value}, but the run's device is {device}: choose auto"
    )


def skipped_kernels(taken: Kernels, device: str) -> list[str]:
    """Faster backends of a device that were not taken, one line each: reason and fix."""
    lines = []
    for name, module, kernels in BACKENDS[device]:
        if kernels is taken:
            break
        why = module.missing()
        lines.append(
            f"{name.value}: "
            + (f"it is here, compute.kernels={name.value} takes it" if why is None else why)
        )
    return lines
