"""torch.cuda as megatron-core's distributed optimizer asks for it, answered by the CPU.

It replaces names of torch.cuda, has `device="cuda"` of torch.tensor and torch.zeros mean the CPU,
and every tensor say that it is CUDA's: for the dry run and for tests, where no GPU is. No training
goes this way (tests/test_architecture.py).
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
    """Does nothing, at once."""

    def __getattr__(self, name: str) -> Any:
        """Any method, which takes anything."""
        return lambda *args, **kwargs: None


def on_cpu(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function that makes a tensor, which lies on the CPU where CUDA is asked for."""

    def made(*args: Any, **kwargs: Any) -> Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        return make(*args, **kwargs)

    return made


def kind(of: Callable[..., Any]) -> Callable[..., Any]:
    """Tensor.type, which says of every tensor that it is CUDA's."""

    def of_cuda(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = of(tensor, *args, **kwargs)  # of a fake tensor it comes here twice
        return (
            re.sub(r"^torch\.(?!cuda)", "torch.cuda.", result)
            if isinstance(result, str)
            else result
        )

    return of_cuda


@contextmanager
def cuda_on_cpu() -> Iterator[None]:
    """Within it megatron-core's distributed optimizer works on a CPU's tensors and groups."""
    answers: dict[str, Any] = {
        "current_device": lambda: CPU,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "current_stream": lambda *_: Stream(),
        "default_stream": lambda *_: Stream(),
        "Stream": lambda *args, **kwargs: Stream(),
        "Event": lambda *args, **kwargs: Stream(),
        "stream": lambda *_: nullcontext(),
    }
    # no torch function mode: torch leaves it while a backward runs, which would compile recomputed
    # blocks once more
    made: dict[str, Any] = {name: on_cpu(getattr(torch, name)) for name in ("tensor", "zeros")}
    with (
        patch.multiple(torch.cuda, **answers),
        patch.multiple(torch, **made),
        patch.object(torch.Tensor, "type", kind(torch.Tensor.type)),
    ):
        yield
