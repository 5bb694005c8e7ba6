"""Fakes of mamba-ssm's and causal-conv1d's functions that check arguments as the real ones do."""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch.nn import functional as F

from model.kernels import mamba_ssm
from tests.model.cases import naive_conv, naive_scan


@contextmanager
def fake_mamba_ssm() -> Iterator[None]:
    """Run the `mamba_ssm` backend on the fakes."""
    with mock.patch.object(mamba_ssm, "_public_functions", lambda: (fake_conv, fake_scan)):
        yield


class DropGradient(torch.autograd.Function):
    """Identity with a zero gradient, as mamba-ssm treats the last state of its scan."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros_like(grad)


def fake_scan(
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
    """selective_scan_fn of mamba-ssm 2.3.2: tensors [b, d, l], no document boundaries.

    Checks types as its C++ does.
    """
    assert delta_softplus and all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in (u, delta, B, C))
    assert {x.dtype for x in (delta, B, C, *([] if z is None else [z]))} == {u.dtype}
    # the real one has no fp64; the fake also accepts fp32 parameters with fp64 inputs
    dtype = torch.promote_types(u.dtype, torch.float32)
    assert {x.dtype for x in (A, D, delta_bias) if x is not None} <= {torch.float32, dtype}
    u_, dt, B, C = (x.transpose(1, 2).to(dtype) for x in (u, delta, B, C))
    # without z, cancel the gate of naive_scan: silu(64) = 64
    gate = torch.full_like(u_, 64.0) if z is None else z.transpose(1, 2).to(dtype)
    D = torch.zeros_like(A[:, 0]) if D is None else D
    y, last_state = naive_scan(u_, dt, A, B, C, D, gate, delta_bias)
    y = y / 64 if z is None else y
    y = y.transpose(1, 2).to(u.dtype)
    return (y, DropGradient.apply(last_state)) if return_last_state else y


def fake_conv(x, weight, bias, seq_idx, activation):
    """causal_conv1d_fn 1.7: x [b, d, l], seq_idx [b, l] numbers the documents."""
    assert activation == "silu" and x.stride(1) == 1 and weight.dtype == bias.dtype
    assert all(size % 8 == 0 for size in (x.shape[1], x.stride(0), x.stride(2)))
    doc_starts = None
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32
        doc_starts = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    dtype = torch.promote_types(x.dtype, torch.float32)
    out = naive_conv(x.transpose(1, 2).to(dtype), weight.to(dtype), bias.to(dtype), doc_starts)
    return out.transpose(1, 2).to(x.dtype)
