"""Backend on the public CUDA kernels: the scan of mamba-ssm and causal-conv1d.

`mamba_inner_fn` is not used: it norms dt after dt_proj and passes no gradient through the norms of
dt, B and C.

mamba-ssm's Mamba-1 scan has no document boundaries. This backend inserts a reset step before every
first token of a document: dt so large that every state decays to zero, and zero input. The reset is
exact, forward and backward. It lengthens all sequences of the batch by the largest number of
boundaries in one of them. causal-conv1d takes document boundaries directly.

mamba-ssm's scan takes no initial state either. d_state steps before the sequence set it, one state
per step: dt so small that nothing decays, and the state divided by dt as input. Such calls compute
in fp32 throughout.
"""

import importlib.util
from importlib.metadata import version
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
# doc_starts -> its version, padded token positions, padded length
POSITIONS_CACHE: WeakIdKeyDictionary = WeakIdKeyDictionary()
# dt of a reset step: softplus leaves it, and exp(-dt) is 0 for every state that decays at all
RESET_DT = 1e6
HOLD_DT = -1e6  # dt of a step after the last token: softplus gives 0, the state does not change
# dt + dt_bias of a step that sets an initial state: softplus gives 1e-12, and exp(-1e-12) is 1
SHORT_DT = -27.6


def unavailable_reason() -> str | None:
    """Why these kernels cannot be used here, with the fix; None when they can."""
    # look for the extensions, not the packages: mamba-ssm installs without its Mamba-1 extension
    # unless MAMBA_KEEP_CUDA_BUILD is set
    for extension in ("selective_scan_cuda", "causal_conv1d_cuda"):
        if importlib.util.find_spec(extension) is None:
            return f"no {extension}: {INSTALL}"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return None


def library_version() -> str:
    """Versions of the two packages."""
    return ", ".join(f"{name} {version(name)}" for name in ("mamba-ssm", "causal-conv1d"))


def _public_functions() -> tuple[Any, Any]:
    """causal_conv1d_fn and selective_scan_fn."""
    from causal_conv1d import causal_conv1d_fn
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return causal_conv1d_fn, selective_scan_fn


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, doc_starts: Tensor | None = None
) -> Tensor:
    """See model.kernels.reference.causal_conv1d."""
    conv, _ = _public_functions()
    seq_idx = None if doc_starts is None else doc_starts.cumsum(1, dtype=torch.int32)
    pad = -x.shape[2] % 8  # causal_conv1d_fn needs a multiple of 8 channels
    # weight and bias keep their own type, which may be fp32 where x is bf16
    weight, bias = (F.pad(weight, (0, 0, 0, pad)), F.pad(bias.to(weight.dtype), (0, pad)))
    padded = F.pad(x, (0, pad)) if pad else x
    out = conv(padded.transpose(1, 2), weight, bias, seq_idx=seq_idx, activation="silu")
    return out.transpose(1, 2)[..., : x.shape[2]]


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
    dtype, positions = u.dtype, None
    # convert dt_bias once: _initial_state_steps relies on two of its gradients cancelling
    A, D, dt_bias = (A.float(), D.float(), dt_bias.float())
    if state is not None:
        u, dt, B, C, z = (x.float() for x in (u, dt, B, C, z))
    if doc_starts is not None:
        positions, length = _padded_positions(doc_starts)
        u, B, C, z = (_scatter_tokens(x, positions, length) for x in (u, B, C, z))
        dt_fill = _inserted_dt(positions, length)
        dt = _scatter_tokens(dt, positions, length, fill=dt_fill)
    if state is not None:
        before = _initial_state_steps(state.float(), dt_bias)
        u, dt, B, C, z = (torch.cat(pair, 1) for pair in zip(before, (u, dt, B, C, z), strict=True))
    _, scan = _public_functions()
    u, dt, B, C, z = (x.transpose(1, 2).contiguous() for x in (u, dt, B, C, z))
    y, last_state = scan(
        u, dt, A, B, C, D, z=z, delta_bias=dt_bias, delta_softplus=True, return_last_state=True
    )
    last_state = LastState.apply(last_state.detach(), u, dt, A, B, dt_bias)
    y = y.transpose(1, 2).to(dtype)
    if state is not None:
        y = y[:, state.shape[2] :]
    if positions is not None:
        y = y.gather(1, positions.unsqueeze(-1).expand(-1, -1, y.shape[2]))
    return y, last_state


class LastState(torch.autograd.Function):
    """Adds the gradient of the last state [b, d, n], which mamba-ssm's backward drops.

    The backward costs a second scan and runs only when the last state has a gradient.
    """

    @staticmethod
    def forward(ctx: Any, last_state: Tensor, *inputs: Tensor) -> Tensor:
        """Save the scan's inputs: u, dt [b, d, l], A [d, n], B [b, n, l], dt_bias [d]."""
        ctx.save_for_backward(*inputs)
        return last_state.view_as(last_state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlast_state: Tensor) -> tuple[Tensor | None, ...]:
        """Rerun the scan in dlast_state's type; n more steps output the state as their y."""
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        _, scan = _public_functions()
        with torch.enable_grad():
            u, dt, A, B, dt_bias = (x.to(dlast_state.dtype) for x in inputs)
            batch, n, length = B.shape
            u, B = (F.pad(x, (0, n)) for x in (u, B))
            dt = F.pad(dt, (0, n), value=HOLD_DT)
            C = F.pad(torch.eye(n, dtype=B.dtype, device=B.device), (length, 0)).repeat(batch, 1, 1)
            y = scan(u, dt, A, B, C, None, delta_bias=dt_bias, delta_softplus=True)
            return None, *torch.autograd.grad(y[..., length:], inputs, dlast_state)


def _initial_state_steps(state: Tensor, dt_bias: Tensor) -> list[Tensor]:
    """u, dt, B, C, z of n steps that set the state to [b, d, n]; their y is 0."""
    batch, d, n = state.shape
    dt = (SHORT_DT - dt_bias).detach()
    # the gradients of dt_bias through the scan and through u cancel: these steps add none
    softplus_dt = F.softplus(dt + dt_bias)
    u = (state / softplus_dt.unsqueeze(-1)).transpose(1, 2)
    zeros = state.new_zeros(batch, n, n)
    B = torch.eye(n, dtype=state.dtype, device=state.device).expand(batch, n, n)
    return [u, dt.expand(batch, n, d), B, zeros, state.new_zeros(batch, n, d)]


def _padded_positions(doc_starts: Tensor) -> tuple[Tensor, int]:
    """Positions [b, l] of tokens after a reset step is inserted per document, and the new length.

    Reading the length waits for the device, so the result is cached per doc_starts: all layers of a
    step share it.
    """
    cached = POSITIONS_CACHE.get(doc_starts)
    if cached is None or cached[0] != doc_starts._version:
        inserted = doc_starts.cumsum(1)
        positions = torch.arange(doc_starts.shape[1], device=doc_starts.device) + inserted
        length = doc_starts.shape[1] + int(inserted[:, -1].max())
        cached = POSITIONS_CACHE[doc_starts] = (doc_starts._version, positions, length)
    return cached[1:]


def _inserted_dt(positions: Tensor, length: int) -> Tensor:
    """dt [b, length, 1] of inserted steps: RESET_DT before a document, HOLD_DT after the end."""
    after_end = torch.arange(length, device=positions.device) > positions[:, -1:]
    return torch.where(after_end, HOLD_DT, RESET_DT).unsqueeze(-1)


def _scatter_tokens(
    x: Tensor, positions: Tensor, length: int, fill: Tensor | None = None
) -> Tensor:
    """Scatter x [b, l, c] to positions [b, l] of [b, length, c]; elsewhere `fill`, or zeros."""
    out = x.new_zeros(x.shape[0], length, x.shape[2])
    if fill is not None:
        out = out + fill.to(x.dtype)
    return out.scatter(1, positions.unsqueeze(-1).expand(-1, -1, x.shape[2]), x)
