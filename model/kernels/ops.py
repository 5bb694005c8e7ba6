"""Registers a backend's functions as torch operators with fake and autograd rules.

torch.compile, the meta device and activation recompute then see opaque operators with known shapes.
model/kernels/reference.py specifies each operator; the backend computes the gradients. They are not
registered with torch.library.custom_op, which adds some 0.2 ms to each forward and backward of the
scan.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.interface import Kernels, LossKernels, RmsNorm

LIBRARIES: list[torch.library.Library] = []  # operators exist as long as their library
INPUTS = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor z, Tensor dt_bias, "
    "Tensor? doc_starts, Tensor? state"
)


def register(backend: Any, name: str, device: str) -> Kernels:
    """Register the functions of a backend module as operators `falcon_<name>::...`."""
    library = OperatorLibrary(name, device)
    scan = _register_scan(backend, library)

    def selective_scan(
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor,
        dt_bias: Tensor,
        doc_starts: Tensor | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        _check_not_empty(u)
        save_states = torch.is_grad_enabled()
        y, last_state, _ = scan(u, dt, A, B, C, D, z, dt_bias, doc_starts, state, save_states)
        return y, last_state

    return Kernels(
        name,
        _register_conv(backend, library),
        selective_scan,
        _register_norm(backend, library),
        _register_loss(backend, library),
    )


class OperatorLibrary:
    """Torch operators of one backend."""

    def __init__(self, name: str, device: str) -> None:
        self.library = torch.library.Library(f"falcon_{name}", "DEF")
        self.device = device.upper()
        LIBRARIES.append(self.library)

    def define(self, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
        """Define an operator with its implementation on the device and on fake tensors."""
        name = schema.split("(")[0]
        self.library.define(schema)
        self.library.impl(name, run, self.device)
        torch.library.register_fake(f"{self.library.ns}::{name}", fake, lib=self.library)
        return getattr(getattr(torch.ops, self.library.ns), name).default

    def differentiate(self, operator: Any, function: type[torch.autograd.Function]) -> None:
        """Set an operator's autograd function; its forward calls the operator below autograd."""

        def run(*arguments: Any) -> Any:
            return (
                function.apply(*arguments)
                if torch.is_grad_enabled()
                else call_below_autograd(operator, *arguments)
            )

        self.library.impl(operator._schema.name.split("::")[1], run, "Autograd")


def call_below_autograd(operator: Any, *arguments: Any) -> Any:
    """Call an operator without its autograd rule."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def _check_not_empty(x: Tensor) -> None:
    if x.numel() == 0:
        raise ValueError(f"a batch of shape {tuple(x.shape)} has no tokens: skip it")


def _empty_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _register_scan(backend: Any, library: OperatorLibrary) -> Any:
    """Register the scan; save_states=False skips the chunk states, which only a backward reads."""

    def new_chunk_states(u: Tensor, A: Tensor, save_states: bool) -> Tensor:
        if not save_states:
            return u.new_empty(0, dtype=torch.float32)
        chunk_states: Tensor = backend.empty_chunk_states(u, A)
        return chunk_states

    def run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, doc_starts, state, save_states = arguments
        chunk_states = new_chunk_states(inputs[0], inputs[2], save_states)
        y, last_state = backend.scan_forward(
            inputs, doc_starts, state, chunk_states if save_states else None
        )
        return y, last_state, chunk_states

    def fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        u = arguments[0]
        A = arguments[2]
        save_states = arguments[10]
        last_state = u.new_empty(u.shape[0], u.shape[2], A.shape[1], dtype=torch.float32)
        return _empty_like(u), last_state, new_chunk_states(u, A, save_states)

    def fake_backward(*arguments: Any) -> list[Tensor]:
        inputs, state = arguments[:8], arguments[9]
        if state is None:
            state = inputs[0].new_empty(0, dtype=torch.float32)
        return [_empty_like(x) for x in (*inputs, state)]

    forward = library.define(
        f"selective_scan({INPUTS}, bool save_states) -> (Tensor, Tensor, Tensor)", run, fake
    )
    backward = library.define(
        f"selective_scan_backward({INPUTS}, Tensor chunk_states, Tensor dy, Tensor? dlast_state) "
        "-> Tensor[]",
        lambda *x: backend.scan_backward(x[:8], *x[8:]),
        fake_backward,
    )

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
            y, last_state, chunk_states = call_below_autograd(forward, *arguments)
            ctx.save_for_backward(*arguments[:10], chunk_states)
            ctx.mark_non_differentiable(chunk_states)
            ctx.set_materialize_grads(False)
            return y, last_state, chunk_states

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            dy, dlast_state, _ = grads
            saved = ctx.saved_tensors  # read once: recompute unpacks each saved tensor only once
            u, state = saved[0], saved[9]
            if dy is None:
                dy = torch.zeros_like(u)
            *gradients, dstate = backward(*saved, dy, dlast_state)
            return *gradients, None, None if state is None else dstate, None

    library.differentiate(forward, Scan)
    return forward


def _register_conv(backend: Any, library: OperatorLibrary) -> Callable[..., Tensor]:
    arguments = "Tensor x, Tensor weight, Tensor bias, Tensor? doc_starts"
    forward = library.define(
        f"causal_conv1d({arguments}) -> Tensor", backend.conv_forward, lambda x, *_: _empty_like(x)
    )
    backward = library.define(
        f"causal_conv1d_backward({arguments}, Tensor dout) -> Tensor[]",
        backend.conv_backward,
        lambda x, weight, bias, *_: [_empty_like(t) for t in (x, weight, bias)],
    )

    class Conv(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Tensor:
            ctx.save_for_backward(*arguments)
            out: Tensor = call_below_autograd(forward, *arguments)
            return out

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            return *backward(*ctx.saved_tensors, *grads), None

    library.differentiate(forward, Conv)

    def causal_conv1d(
        x: Tensor, weight: Tensor, bias: Tensor, doc_starts: Tensor | None = None
    ) -> Tensor:
        _check_not_empty(x)
        result: Tensor = forward(x, weight, bias, doc_starts)
        return result

    return causal_conv1d


def _register_norm(backend: Any, library: OperatorLibrary) -> RmsNorm:
    forward = library.define(
        "rms_norm(Tensor x, Tensor? weight, float eps, int[] split_sizes, ScalarType dtype) "
        "-> (Tensor, Tensor)",
        backend.norm_forward,
        lambda x, weight, eps, split_sizes, dtype: (
            x.new_empty(x.shape, dtype=dtype),
            x.new_empty(*x.shape[:-1], len(split_sizes), dtype=torch.float32),
        ),
    )
    backward = library.define(
        "rms_norm_backward(Tensor x, Tensor? weight, int[] split_sizes, Tensor scales, "
        "Tensor dout) -> (Tensor, Tensor)",
        backend.norm_backward,
        lambda x, weight, *_: (
            _empty_like(x),
            x.new_empty(0, dtype=torch.float32) if weight is None else _empty_like(weight),
        ),
    )

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
            x, weight, _, ctx.split_sizes, _ = arguments
            out, scales = call_below_autograd(forward, *arguments)
            ctx.save_for_backward(x, weight, scales)
            ctx.mark_non_differentiable(scales)
            return out, scales

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            x, weight, scales = ctx.saved_tensors
            dx, dweight = backward(x, weight, ctx.split_sizes, scales, grads[0])
            return dx, None if weight is None else dweight, None, None, None

    library.differentiate(forward, Norm)

    def rms_norm(
        x: Tensor,
        weight: Tensor | None,
        eps: float,
        split_sizes: list[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        split_sizes = split_sizes or [x.shape[-1]]
        if sum(split_sizes) != x.shape[-1]:
            raise ValueError(f"split_sizes {split_sizes} must add up to {x.shape[-1]} features")
        if weight is not None and len(split_sizes) > 1:
            raise ValueError("a norm of several splits takes no weight")
        _check_not_empty(x)
        result: Tensor = forward(x, weight, eps, split_sizes, dtype or x.dtype)[0]
        return result

    return rms_norm


def _register_loss(backend: Any, library: OperatorLibrary) -> LossKernels:
    statistics = library.define(
        "loss_statistics(Tensor logits, Tensor labels) -> Tensor",
        backend.loss_statistics,
        lambda logits, labels: logits.new_empty(3, logits.shape[0], dtype=torch.float32),
    )
    gradient = library.define(
        "loss_gradient(Tensor(a!) logits, Tensor labels, Tensor log_sums, Tensor dloss, Tensor "
        "dlog_sum) -> ()",
        backend.loss_gradient,
        lambda *_: None,
    )

    class Loss:
        @staticmethod
        def loss_statistics(logits: Tensor, labels: Tensor) -> Tensor:
            result: Tensor = statistics(logits, labels)
            return result

        @staticmethod
        def loss_gradient(
            logits: Tensor,
            labels: Tensor,
            log_sums: Tensor,
            grad_loss: Tensor,
            grad_log_sum: Tensor,
        ) -> Tensor:
            gradient(logits, labels, log_sums, grad_loss, grad_log_sum)
            return logits

    return Loss()
