"""A backend's raw functions as torch operators with fake and autograd rules.

torch.compile, the meta device and activation recompute then see opaque operators with known shapes.
The specification of each is model/kernels/reference.py; gradients are computed by the backend, not
by autograd. Registered by hand, since torch.library.custom_op adds some 0.2 ms to each forward and
backward of the scan.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.kernels.interface import Kernels, LossRows, RmsNorm

LIBRARIES: list[torch.library.Library] = []  # operators live as long as these do
INPUTS = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor z, Tensor dt_bias, "
    "Tensor? doc_starts, Tensor? state"
)


def register(backend: Any, name: str, device: str) -> Kernels:
    """Register `falcon_<name>::...` for a module's {scan,conv,norm}_{forward,backward} and loss."""
    space = Space(name, device)
    scan = _register_scan(backend, space)

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
        _refuse_empty(u)
        y, last, _ = scan(u, dt, A, B, C, D, z, dt_bias, doc_starts, state, torch.is_grad_enabled())
        return y, last

    return Kernels(
        name,
        _register_conv(backend, space),
        selective_scan,
        _register_norm(backend, space),
        _register_loss(backend, space),
    )


class Space:
    """The operators of one backend."""

    def __init__(self, name: str, device: str) -> None:
        self.library = torch.library.Library(f"falcon_{name}", "DEF")
        self.device = device.upper()
        LIBRARIES.append(self.library)

    def define(self, schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
        """An operator that runs on the device, and on fake tensors."""
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
                else below(operator, *arguments)
            )

        self.library.impl(operator._schema.name.split("::")[1], run, "Autograd")


def below(operator: Any, *arguments: Any) -> Any:
    """The operator itself, without its gradient rule."""
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*arguments)


def _refuse_empty(x: Tensor) -> None:
    if x.numel() == 0:
        raise ValueError(f"a batch of shape {tuple(x.shape)} has no tokens: leave it out")


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _register_scan(backend: Any, space: Space) -> Any:
    """`keep`: write the states that the backward starts from; not needed without gradients."""

    def room(u: Tensor, A: Tensor, keep: bool) -> Tensor:
        kept: Tensor = backend.kept_like(u, A) if keep else u.new_empty(0, dtype=torch.float32)
        return kept

    def run(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        *inputs, doc_starts, state, keep = arguments
        kept = room(inputs[0], inputs[2], keep)
        y, last = backend.scan_forward(inputs, doc_starts, state, kept if keep else None)
        return y, last, kept

    def fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        u, A = arguments[0], arguments[2]
        last = u.new_empty(u.shape[0], u.shape[2], A.shape[1], dtype=torch.float32)
        return _like(u), last, room(u, A, arguments[10])

    def fake_backward(*arguments: Any) -> list[Tensor]:
        inputs, state = arguments[:8], arguments[9]
        return [_like(x) for x in inputs] + [
            inputs[0].new_empty(0, dtype=torch.float32) if state is None else _like(state)
        ]

    forward = space.define(
        f"selective_scan({INPUTS}, bool keep) -> (Tensor, Tensor, Tensor)", run, fake
    )
    backward = space.define(
        f"selective_scan_backward({INPUTS}, Tensor kept, Tensor dy, Tensor? dlast) -> Tensor[]",
        lambda *x: backend.scan_backward(x[:8], *x[8:]),
        fake_backward,
    )

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
            y, last, kept = below(forward, *arguments)
            ctx.save_for_backward(*arguments[:10], kept)
            ctx.mark_non_differentiable(kept)
            ctx.set_materialize_grads(False)
            return y, last, kept

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            saved, (dy, dlast, _) = ctx.saved_tensors, grads
            *gradients, first = backward(
                *saved, torch.zeros_like(saved[0]) if dy is None else dy, dlast
            )
            return *gradients, None, None if saved[9] is None else first, None

    space.differentiate(forward, Scan)
    return forward


def _register_conv(backend: Any, space: Space) -> Callable[..., Tensor]:
    arguments = "Tensor x, Tensor weight, Tensor bias, Tensor? doc_starts"
    forward = space.define(
        f"causal_conv1d({arguments}) -> Tensor", backend.conv_forward, lambda x, *_: _like(x)
    )
    backward = space.define(
        f"causal_conv1d_backward({arguments}, Tensor dout) -> Tensor[]",
        backend.conv_backward,
        lambda x, weight, bias, *_: [_like(t) for t in (x, weight, bias)],
    )

    class Conv(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Tensor:
            ctx.save_for_backward(*arguments)
            out: Tensor = below(forward, *arguments)
            return out

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            return *backward(*ctx.saved_tensors, *grads), None

    space.differentiate(forward, Conv)

    def causal_conv1d(
        x: Tensor, weight: Tensor, bias: Tensor, doc_starts: Tensor | None = None
    ) -> Tensor:
        _refuse_empty(x)
        result: Tensor = forward(x, weight, bias, doc_starts)
        return result

    return causal_conv1d


def _register_norm(backend: Any, space: Space) -> RmsNorm:
    forward = space.define(
        "rms_norm(Tensor x, Tensor? weight, float eps, int[] parts, ScalarType dtype) -> "
        "(Tensor, Tensor)",
        backend.norm_forward,
        lambda x, weight, eps, parts, dtype: (
            x.new_empty(x.shape, dtype=dtype),
            x.new_empty(*x.shape[:-1], len(parts), dtype=torch.float32),
        ),
    )
    backward = space.define(
        "rms_norm_backward(Tensor x, Tensor? weight, int[] parts, Tensor scales, Tensor dout) -> "
        "(Tensor, Tensor)",
        backend.norm_backward,
        lambda x, weight, *_: (
            _like(x),
            x.new_empty(0, dtype=torch.float32) if weight is None else _like(weight),
        ),
    )

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
            x, weight, _, ctx.parts, _ = arguments
            out, scales = below(forward, *arguments)
            ctx.save_for_backward(x, weight, scales)
            ctx.mark_non_differentiable(scales)
            return out, scales

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            x, weight, scales = ctx.saved_tensors
            dx, dweight = backward(x, weight, ctx.parts, scales, grads[0])
            return dx, None if weight is None else dweight, None, None, None

    space.differentiate(forward, Norm)

    def rms_norm(
        x: Tensor,
        weight: Tensor | None,
        eps: float,
        parts: list[int] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        parts = parts or [x.shape[-1]]
        if sum(parts) != x.shape[-1] or (weight is not None and len(parts) > 1):
            raise ValueError(
                f"parts {parts} must add up to the {x.shape[-1]} features of a row, and have no "
                "weight when several"
            )
        _refuse_empty(x)
        result: Tensor = forward(x, weight, eps, parts, dtype or x.dtype)[0]
        return result

    return rms_norm


def _register_loss(backend: Any, space: Space) -> LossRows:
    statistics = space.define(
        "loss_statistics(Tensor logits, Tensor labels) -> Tensor",
        backend.loss_statistics,
        lambda logits, labels: logits.new_empty(3, logits.shape[0], dtype=torch.float32),
    )
    gradient = space.define(
        "loss_gradient(Tensor(a!) logits, Tensor labels, Tensor log_sums, Tensor dloss, Tensor "
        "dlog_sum) -> ()",
        backend.loss_gradient,
        lambda *_: None,
    )

    class Rows:
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

    return Rows()
