"""Replaces torch.cuda on a CPU for megatron-core's distributed optimizer.

Streams and events do nothing, torch.tensor and torch.zeros with `device="cuda"` create CPU tensors,
and Tensor.type reports a CUDA type. Training never uses this (tests/test_architecture.py checks).
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

CPU = torch.device("cpu")


class Stream:
    """A stream or event whose methods do nothing."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def redirect_to_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Wrap a tensor factory so that device="cuda" means the CPU."""

    def wrapped(*args: Any, **kwargs: Any) -> Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        return factory(*args, **kwargs)

    return wrapped


def report_cuda_type(tensor_type: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap Tensor.type so that it reports a CUDA type for every tensor."""

    def wrapped(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(tensor, *args, **kwargs)  # called twice for a fake tensor
        if not isinstance(result, str):
            return result
        return re.sub(r"^torch\.(?!cuda)", "torch.cuda.", result)

    return wrapped


@contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """Run megatron-core's distributed optimizer on CPU tensors and groups."""
    cuda_functions: dict[str, Any] = {
        "current_device": lambda: CPU,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "current_stream": lambda *_: Stream(),
        "default_stream": lambda *_: Stream(),
        "Stream": lambda *args, **kwargs: Stream(),
        "Event": lambda *args, **kwargs: Stream(),
        "stream": lambda *_: nullcontext(),
    }
    # not a TorchFunctionMode: torch leaves it during a backward, which would compile recomputed
    # blocks once more
    factories: dict[str, Any] = {
        name: redirect_to_cpu(getattr(torch, name)) for name in ("tensor", "zeros")
    }
    with (
        patch.multiple(torch.cuda, **cuda_functions),
        patch.multiple(torch, **factories),
        patch.object(torch.Tensor, "type", report_cuda_type(torch.Tensor.type)),
    ):
        yield
