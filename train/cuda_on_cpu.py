"""torch.cuda as megatron-core's distributed optimizer asks for it, answered by the CPU.

It replaces names of torch.cuda and maps `device="cuda"` to the CPU: for the dry run and for tests, where no GPU is. No
training goes this way (tests/test_architecture.py).
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

CPU = torch.device("cpu")


class Stream:
    """Does nothing, at once."""

    def __getattr__(self, name: str) -> Any:
        """Any method, which takes anything."""
        return lambda *args, **kwargs: None


class OnCpu(TorchFunctionMode):
    """Tensors asked for on CUDA lie on the CPU, and say that they are CUDA's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """See class."""
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = CPU
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.", 1)
        return result


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
    with patch.multiple(torch.cuda, **answers), OnCpu():
        yield
