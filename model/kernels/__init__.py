"""One interface to the model's expensive operations, several implementations, chosen once per run and said aloud."""

from model.config import Backend
from model.kernels import cpu, reference
from model.kernels.interface import Kernels
from model.kernels.ops import register


class MissingBackend(ValueError):
    """A backend was asked for that cannot run here; the message says how to get it."""


REFERENCE = Kernels("reference", reference.causal_conv1d, reference.selective_scan)
CPU = register(cpu, "cpu", "cpu")


def load(backend: Backend, device: str) -> Kernels:
    """The kernels of a backend for "cpu" or "cuda"; raises MissingBackend with the fix when it cannot run there."""
    if backend is Backend.auto:
        backend = Backend.cpu if device == "cpu" and cpu.missing() is None else Backend.reference
    if backend is Backend.reference:
        return REFERENCE
    if device != "cpu":
        raise MissingBackend("parallel.kernels is cpu, but the run's device is cuda: choose auto")
    if (why := cpu.missing()) is not None:
        raise MissingBackend(f"parallel.kernels is cpu, but there is {why}")
    return CPU
