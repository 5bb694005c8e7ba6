"""The public CUDA kernels, mamba-ssm's scan and causal-conv1d, composed so that they are this
model.

`mamba_inner_fn` is never used: it norms dt after dt_proj and passes no gradient through the norms
of dt, B and C. The public Mamba-1 scan knows no document boundaries. Here a separating step is put
before every first token of a document: with dt so large that every state decays to zero and with
nothing coming in, it is an exact reset, forward and backward. It makes rows longer by the largest
number of boundaries in one of them. The convolution takes boundaries as they are.

Nor does the public scan take a first state. Here d_state steps before the row bring it in, one
state each: of so short a time that nothing decays, with an input that is the state over that time.
Such calls compute in fp32 throughout.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

INSTALL = (
    "MAMBA_KEEP_CUDA_BUILD=TRUE TORCH_CUDA_ARCH_LIST=9.0 pip install --no-build-isolation "
    "mamba-ssm==2.3.2.post1 causal-conv1d==1.7.0"
)
KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()  # starts -> its version, places and length
# dt of a separating step, after softplus the same: exp(-dt) is 0 for every state that decays at all
FORGET = 1e6
HOLD = -1e6  # dt of a step behind a row's end: softplus gives 0, the state stays
# dt plus its bias of a step that brings a state in: softplus gives 1e-12, and exp(-1e-12) is 1
SHORT = -27.6


def missing() -> str | None:
    """Why these kernels cannot be used here, with the fix; None when they can."""
    # mamba-ssm installs without its Mamba-1 extension unless MAMBA_KEEP_CUDA_BUILD is set: ask for
    # the extensions
    for extension in ("selective_scan_cuda", "causal_conv1d_cuda"):
        if importlib.util.find_spec(extension) is None:
            return f"no {extension}: {INSTALL}"
    if not torch.cuda.is_available():
        return "no GPU that torch sees"
    return None


def _functions() -> tuple[Any, Any]:
    from causal_conv1d import causal_conv1d_fn
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return causal_conv1d_fn, selective_scan_fn


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, doc_starts: Tensor | None = None
) -> Tensor:
    """See model.kernels.reference.causal_conv1d."""
    conv, _ = _functions()
    documents = None if doc_starts is None else doc_starts.cumsum(1, dtype=torch.int32)
    pad = -x.shape[2] % 8  # the public kernel wants multiples of 8 channels
    # not in x's type: they may be fp32
    weight, bias = (F.pad(weight, (0, 0, 0, pad)), F.pad(bias.to(weight.dtype), (0, pad)))
    rows = F.pad(x, (0, pad)) if pad else x
    out = conv(rows.transpose(1, 2), weight, bias, seq_idx=documents, activation="silu").transpose(
        1, 2
    )
    return out[..., : x.shape[2]]


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
    """See model.kernels.reference.selective_scan."""
    places, dtype = None, u.dtype
    # once: two gradients of the bias cancel (_bring_in)
    A, D, dt_bias = (A.float(), D.float(), dt_bias.float())
    if state is not None:
        u, dt, B, C, z = (x.float() for x in (u, dt, B, C, z))
    if doc_starts is not None:
        places, length = _places(doc_starts)
        u, B, C, z = (_spread(x, places, length) for x in (u, B, C, z))
        dt = _spread(dt, places, length, empty=_empty_steps(doc_starts, places, length))
    if state is not None:
        before = _bring_in(state.float(), dt_bias)
        u, dt, B, C, z = (torch.cat(pair, 1) for pair in zip(before, (u, dt, B, C, z), strict=True))
    _, scan = _functions()
    u, dt, B, C, z = (x.transpose(1, 2).contiguous() for x in (u, dt, B, C, z))
    y, last = scan(
        u, dt, A, B, C, D, z=z, delta_bias=dt_bias, delta_softplus=True, return_last_state=True
    )
    last = LastState.apply(last.detach(), u, dt, A, B, dt_bias)
    y = y.transpose(1, 2).to(dtype)
    if state is not None:
        y = y[:, state.shape[2] :]
    return y if places is None else y.gather(
        1, places.unsqueeze(-1).expand(-1, -1, y.shape[2])
    ), last


class LastState(torch.autograd.Function):
    """Last state [b, d, n] of a scan with its gradient, computed only when it is needed."""

    @staticmethod
    def forward(ctx: Any, last: Tensor, *inputs: Tensor) -> Tensor:
        """Save the scan's inputs: u, dt [b, d, l], A [d, n], B [b, n, l] and dt's bias [d]."""
        ctx.save_for_backward(*inputs)
        return last.view_as(last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlast: Tensor) -> tuple[Tensor | None, ...]:
        """Rerun the scan in dlast's type with n more steps whose y is the state; backpropagate."""
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        _, scan = _functions()
        with torch.enable_grad():
            u, dt, A, B, bias = (x.to(dlast.dtype) for x in inputs)
            batch, n, length = B.shape
            u, B = (F.pad(x, (0, n)) for x in (u, B))
            dt = F.pad(dt, (0, n), value=HOLD)
            C = F.pad(torch.eye(n, dtype=B.dtype, device=B.device), (length, 0)).repeat(batch, 1, 1)
            y = scan(u, dt, A, B, C, None, delta_bias=bias, delta_softplus=True)
            return None, *torch.autograd.grad(y[..., length:], inputs, dlast)


def _bring_in(state: Tensor, dt_bias: Tensor) -> list[Tensor]:
    """u, dt, B, C, z of steps that set the state to [b, d, n]; their y is 0."""
    batch, d, n = state.shape
    dt = (SHORT - dt_bias).detach()
    # depends on the bias, which the input cancels: no gradient reaches it from here
    time = F.softplus(dt + dt_bias)
    u = (state / time.unsqueeze(-1)).transpose(1, 2)
    zeros = state.new_zeros(batch, n, n)
    B = torch.eye(n, dtype=state.dtype, device=state.device).expand(batch, n, n)
    return [u, dt.expand(batch, n, d), B, zeros, state.new_zeros(batch, n, d)]


def _places(doc_starts: Tensor) -> tuple[Tensor, int]:
    """Where each token goes when every first token has a separating step before it: [b, l], and the
    new length.

    The length waits for the device: all layers of a step, which have the same `starts`, take one
    answer.
    """
    known = KNOWN.get(doc_starts)
    if known is None or known[0] != doc_starts._version:
        shift = doc_starts.cumsum(1)
        places = torch.arange(doc_starts.shape[1], device=doc_starts.device) + shift
        known = KNOWN[doc_starts] = (
            doc_starts._version,
            places,
            doc_starts.shape[1] + int(shift[:, -1].max()),
        )
    return known[1:]


def _empty_steps(doc_starts: Tensor, places: Tensor, length: int) -> Tensor:
    """dt [b, length, 1] of steps without a token: FORGET before first tokens, HOLD after a row."""
    behind = torch.arange(length, device=doc_starts.device) > places[:, -1:]
    return torch.where(behind, HOLD, FORGET).unsqueeze(-1)


def _spread(x: Tensor, places: Tensor, length: int, empty: Tensor | None = None) -> Tensor:
    """Put x [b, l, c] at its places in [b, length, c]; fill the rest with `empty` (zeros)."""
    out = x.new_zeros(x.shape[0], length, x.shape[2])
    if empty is not None:
        out = out + empty.to(x.dtype)
    return out.scatter(1, places.unsqueeze(-1).expand(-1, -1, x.shape[2]), x)
