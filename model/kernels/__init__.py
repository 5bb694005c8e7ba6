"""Kernel backends behind one interface; each run chooses a backend once and logs it."""

from collections.abc import Callable
from typing import Any

import torch

from model.config import Backend
from model.kernels import cpu, cpu_library, cuda, cuda_library, mamba_ssm, reference
from model.kernels.interface import Kernels
from model.kernels.ops import register


class MissingBackend(ValueError):
    """The chosen backend cannot run here; the message says how to install it."""


REFERENCE = Kernels(
    "reference", reference.causal_conv1d, reference.selective_scan, reference.rms_norm, reference
)
CPU = register(cpu, "cpu", "cpu")
CUDA = register(cuda, "cuda", "cuda")
MAMBA_SSM = Kernels(
    "mamba_ssm", mamba_ssm.causal_conv1d, mamba_ssm.selective_scan, reference.rms_norm, reference
)

# per device, fastest first; the order on GPUs is estimated, not measured (docs/design/kernels.md)
BACKENDS: dict[str, list[tuple[Backend, Any, Kernels]]] = {
    "cpu": [(Backend.cpu, cpu, CPU)],
    "cuda": [(Backend.cuda, cuda, CUDA), (Backend.mamba_ssm, mamba_ssm, MAMBA_SSM)],
}


def load(backend: Backend, device: str) -> Kernels:
    """Kernels for a type of device; raises MissingBackend, with the fix, if unavailable."""
    backends = BACKENDS.get(device, [])
    if backend is Backend.auto:
        return next(
            (kernels for _, module, kernels in backends if module.unavailable_reason() is None),
            REFERENCE,
        )
    if backend is Backend.reference:
        return REFERENCE
    for name, module, kernels in backends:
        if name is backend:
            if (reason := module.unavailable_reason()) is not None:
                raise MissingBackend(f"compute.kernels={backend.value} is unavailable: {reason}")
            return kernels
    raise MissingBackend(
        f"compute.kernels={backend.value} does not run on {device}: set compute.kernels=auto"
    )


def skipped_kernels(chosen: Kernels, device: str) -> list[str]:
    """Backends faster than the chosen one, one line each: why it was skipped and the fix."""
    lines = []
    for name, module, kernels in BACKENDS[device]:
        if kernels is chosen:
            break
        reason = module.unavailable_reason()
        if reason is None:
            reason = f"it is available: set compute.kernels={name.value}"
        lines.append(f"{name.value}: {reason}")
    return lines


def identity(kernels: Kernels, device: str) -> dict[str, str]:
    """What decides the last bits of a backend's results on this machine, to compare over ranks.

    `backend`; `library`: a hash or version of its code, flags and compiler; `instructions`: of the
    processor, with the set that torch uses, or the architecture of this process's GPU.
    """
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        instructions = f"sm_{major}{minor}"
    else:
        instructions = (
            f"{cpu_library.instruction_set()}, torch {torch.backends.cpu.get_cpu_capability()}"
        )
    versions: dict[str, Callable[[], str]] = {
        "cpu": lambda: cpu_library.library_key(cpu_library.instruction_set()),
        "cuda": cuda_library.library_version,
        "mamba_ssm": mamba_ssm.library_version,
        "reference": lambda: f"torch {torch.__version__}",
    }
    return {
        "backend": kernels.name,
        "library": versions[kernels.name](),
        "instructions": instructions,
    }
