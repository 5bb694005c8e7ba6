"""Stand-ins for mamba-ssm's and causal-conv1d's functions, which take nothing that the real ones
would refuse.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch.nn import functional as F

from model.kernels import mamba_ssm
from tests.model.cases import naive_conv, naive_scan


@contextmanager
def fake_mamba_ssm() -> Iterator[None]:
    """The backend `mamba_ssm` on the stand-ins."""
    with mock.patch.object(mamba_ssm, "_public_functions", lambda: (public_conv, public_scan)):
        yield


class Ungraded(torch.autograd.Function):
    """A tensor that looks differentiable and loses its gradient, as the last state of mamba-ssm's
    scan does.
    """

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros_like(grad)


def public_scan(
    u,
    delta,
    A,
    B,
    C,
    D=None,
    z=None,
    delta_bias=None,
    delta_softplus=False,
    return_last_state=False,
):
    """selective_scan_fn of mamba-ssm 2.3.2: channels before time, no boundaries, types as its C++
    checks them.
    """
    assert delta_softplus and all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (u, delta, B, C))
    assert {x.dtype for x in (delta, B, C, *([] if z is None else [z]))} == {u.dtype}
    # it knows no fp64: there its fp32 stands for both
    wide = torch.promote_types(u.dtype, torch.float32)
    assert {x.dtype for x in (A, D, delta_bias) if x is not None} <= {torch.float32, wide}
    rows = [x.transpose(1, 2).to(wide) for x in (u, delta, B, C)]
    # the formula's gate: silu(64)
    gate = torch.full_like(rows[0], 64.0) if z is None else z.transpose(1, 2).to(wide)
    y, last = naive_scan(
        *rows[:2], A, *rows[2:], torch.zeros_like(A[:, 0]) if D is None else D, gate, delta_bias
    )
    y = y / 64 if z is None else y
    y = y.transpose(1, 2).to(u.dtype)
    return (y, Ungraded.apply(last)) if return_last_state else y


def public_conv(x, weight, bias, seq_idx, activation):
    """causal_conv1d_fn 1.7: channels before time, documents by number."""
    assert activation == "silu" and x.stride(1) == 1 and weight.dtype == bias.dtype
    assert all(size % 8 == 0 for size in (x.shape[1], x.stride(0), x.stride(2)))
    doc_starts = None
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32
        doc_starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    wide = torch.promote_types(x.dtype, torch.float32)
    return (
        naive_conv(x.transpose(1, 2).to(wide), weight.to(wide), bias.to(wide), doc_starts)
        .transpose(1, 2)
        .to(x.dtype)
    )
