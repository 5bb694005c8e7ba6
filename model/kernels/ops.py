"""A backend's raw functions as torch operators with fake and autograd rules.

torch.compile, the meta device and activation recompute then see one opaque operator with known shapes. The
specification of both is model/kernels/reference.py; gradients are computed by the backend, not by autograd.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from model.kernels import reference
from model.kernels.interface import Kernels


def register(backend: Any, name: str, device: str) -> Kernels:
    """Operators `falcon_<name>::...` over a module with scan_forward, scan_backward, conv_forward and conv_backward."""
    scan = _register_scan(backend, f"falcon_{name}", device)
    conv = _register_conv(backend, f"falcon_{name}", device)

    def selective_scan(
        u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor,
        starts: Tensor | None = None, state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        y, last, _ = scan([u, dt, A, B, C, D, z, dt_bias], starts, state)
        return y, last

    return Kernels(name, conv, selective_scan, reference.rms_norm, reference)


def _register_scan(backend: Any, space: str, device: str) -> Callable[..., Any]:
    @torch.library.custom_op(f"{space}::selective_scan", mutates_args=(), device_types=device)
    def forward(inputs: list[Tensor], starts: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        return backend.scan_forward(inputs, starts, state)

    @forward.register_fake
    def _(inputs: list[Tensor], starts: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        u, A = inputs[0], inputs[2]
        last = u.new_empty(u.shape[0], u.shape[2], A.shape[1], dtype=torch.float32)
        return torch.empty_like(u, memory_format=torch.contiguous_format), last, backend.kept_like(u, A)

    @torch.library.custom_op(f"{space}::selective_scan_backward", mutates_args=(), device_types=device)
    def backward(
        inputs: list[Tensor], starts: Tensor | None, state: Tensor | None, kept: Tensor, dy: Tensor, dlast: Tensor
    ) -> list[Tensor]:
        return backend.scan_backward(inputs, starts, state, kept, dy, dlast)

    @backward.register_fake
    def _(
        inputs: list[Tensor], starts: Tensor | None, state: Tensor | None, kept: Tensor, dy: Tensor, dlast: Tensor
    ) -> list[Tensor]:
        first = dlast.new_empty(dlast.shape, dtype=torch.float32 if state is None else state.dtype)
        return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs] + [first]

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        tensors, starts, state = inputs
        ctx.save_for_backward(*tensors, starts, state, output[2])

    def differentiate(ctx: Any, dy: Tensor, dlast: Tensor, _: Tensor) -> tuple[Any, ...]:
        *tensors, starts, state, kept = ctx.saved_tensors
        *gradients, first = backward(tensors, starts, state, kept, dy, dlast)
        return list(gradients), None, None if state is None else first

    forward.register_autograd(differentiate, setup_context=keep)
    return forward


def _register_conv(backend: Any, space: str, device: str) -> Callable[..., Any]:
    @torch.library.custom_op(f"{space}::causal_conv1d", mutates_args=(), device_types=device)
    def forward(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None = None) -> Tensor:
        return backend.conv_forward(x, weight, bias, starts)

    @forward.register_fake
    def _(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None = None) -> Tensor:
        return torch.empty_like(x, memory_format=torch.contiguous_format)

    @torch.library.custom_op(f"{space}::causal_conv1d_backward", mutates_args=(), device_types=device)
    def backward(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None, dout: Tensor) -> list[Tensor]:
        return backend.conv_backward(x, weight, bias, starts, dout)

    @backward.register_fake
    def _(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None, dout: Tensor) -> list[Tensor]:
        return [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight, bias)]

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def differentiate(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        return (*backward(*ctx.saved_tensors, dout), None)

    forward.register_autograd(differentiate, setup_context=keep)
    return forward
