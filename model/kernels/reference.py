"""The specification in plain torch: what every other backend must equal, forward and backward.

Axes: b batch, l sequence, d channel (d_inner), n state (d_state), k taps (d_conv).
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# The scan works on [l, b, d, n] tensors, d_state times the size of its inputs, a chunk of time
# steps at a time.
# of one such tensor: 2 MB in fp32, small enough for caches and for malloc to use again
CHUNK_ELEMENTS = 2**19
# of a whole sequence; beyond it chunks keep their first state and are computed again
KEPT_ELEMENTS = 2**26


def computing_type(x: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64: what sums are taken in, whatever the inputs' type."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def product_type(x: Tensor) -> torch.dtype:
    """What matrix products of x are taken in: autocast's type where it is on, else its own."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else x.dtype


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    parts: list[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Root-mean-square norm over the last axis, or over each of its `parts` (sizes that add up to
    it) by itself.

    x [..., e], weight [e] or None. Computes in fp32 (fp64 for fp64). Returns [..., e] in `dtype`,
    by default the type of x.
    """
    wide = x.to(computing_type(x))
    pieces = [wide] if parts is None else wide.split(parts, -1)
    normed = [piece * torch.rsqrt(piece.square().mean(-1, keepdim=True) + eps) for piece in pieces]
    result = normed[0] if parts is None else torch.cat(normed, -1)
    return (result if weight is None else result * weight).to(dtype or x.dtype)


def loss_statistics(logits: Tensor, labels: Tensor) -> Tensor:
    """What the cross entropy of some tokens needs of a part of the vocabulary, in one pass.

    logits [t, v]; labels [t] relative to this part, outside [0, v) where another part holds the
    label. Returns [3, t] in the computing type: the label's logit (0 when it is not here), the
    largest logit, and the sum of exp(logit - largest).
    """
    wide = logits.to(computing_type(logits))
    here = (labels >= 0) & (labels < logits.shape[1])
    own = wide.gather(1, (labels * here)[:, None]).squeeze(1).masked_fill(~here, 0.0)
    top = wide.amax(1)
    return torch.stack([own, top, (wide - top[:, None]).exp_().sum(1)])


def loss_gradient(
    logits: Tensor, labels: Tensor, log_sums: Tensor, grad_loss: Tensor, grad_log_sum: Tensor
) -> Tensor:
    """Gradient of logits [t, v] in their type: (dloss + dlog_sum) softmax - dloss onehot; the rest
    is [t].

    labels as in loss_statistics; log_sums are of the whole vocabulary. May work in place of the
    logits.
    """
    grad = (
        (logits.to(log_sums.dtype) - log_sums[:, None])
        .exp_()
        .mul_((grad_loss + grad_log_sum)[:, None])
    )
    here = (labels >= 0) & (labels < logits.shape[1])
    grad.scatter_add_(1, (labels * here)[:, None], (-grad_loss * here)[:, None])
    return grad.to(logits.dtype)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, doc_starts: Tensor | None = None
) -> Tensor:
    """Depthwise causal convolution followed by SiLU.

    x [b, l, d], weight [d, k] with the newest tap last, bias [d]. starts [b, l] bool marks the
    first token of a document: taps never reach behind it. Computes in fp32 (fp64 for fp64). Returns
    [b, l, d] in the type of x.
    """
    length, taps, dtype = x.shape[1], weight.shape[1], x.dtype
    x, weight, bias = (t.to(computing_type(x)) for t in (x, weight, bias))
    out = bias + weight[:, -1] * x
    visible = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    for back in range(1, min(taps, length)):
        past = F.pad(x[:, :-back], (0, 0, back, 0))
        if doc_starts is not None:
            # a tap `back` tokens behind is visible while none of the tokens from here back to it
            # opens a document
            opened = F.pad(doc_starts[:, : length - back + 1], (back - 1, 0))
            visible = visible & ~opened
            past = past * visible.unsqueeze(-1)
        out = out + weight[:, -1 - back] * past
    return F.silu(out).to(dtype)


class LinearRecurrence(torch.autograd.Function):
    """h_t = a_t * h_(t-1) + x_t on axis 0; the backward is the adjoint, linear in length."""

    @staticmethod
    def forward(ctx: FunctionCtx, a: Tensor, x: Tensor, first: Tensor) -> Tensor:
        """a, x [l, ...], first [...] the state before t = 0; returns every h [l, ...]."""
        h = torch.empty_like(x)
        state = first
        for t in range(x.shape[0]):
            state = torch.addcmul(x[t], a[t], state, out=h[t])
        ctx.save_for_backward(a, h, first)
        return h

    @staticmethod
    def backward(ctx: FunctionCtx, grad_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Adjoint: g_t = dh_t + a_(t+1) g_(t+1); dx = g, da_t = g_t h_(t-1), dfirst = a_0 g_0."""
        a, h, first = ctx.saved_tensors  # type: ignore[attr-defined]
        g = torch.empty_like(grad_h)
        g[-1] = grad_h[-1]
        for t in range(grad_h.shape[0] - 2, -1, -1):
            torch.addcmul(grad_h[t], a[t + 1], g[t + 1], out=g[t])
        grad_a = torch.empty_like(g)
        torch.mul(g[1:], h[:-1], out=grad_a[1:])
        torch.mul(g[0], first, out=grad_a[0])
        return grad_a, g, a[0] * g[0]


def _scan_chunk(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, keep: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Scan a time-first chunk: u, dt [l, b, d]; B, C [l, b, n]; keep [l, b]; state [b, d, n]."""
    decay = torch.exp(dt.unsqueeze(-1) * A)
    if keep is not None:
        decay = decay * keep[:, :, None, None]
    h = LinearRecurrence.apply(decay, (dt * u).unsqueeze(-1) * B.unsqueeze(2), state)
    return (h @ C.unsqueeze(-1)).squeeze(-1), h[-1]


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
    """Selective state space with gate (arXiv 2312.00752, section 3; Euler for B, zero-order hold
    for A).

    dt_t = softplus(dt_t + dt_bias); s_t = exp(dt_t A) s_(t-1) + dt_t B_t u_t; y_t = (<s_t, C_t> + D
    u_t) SiLU(z_t). u, dt, z [b, l, d]; A [d, n]; B, C [b, l, n]; D, dt_bias [d]; starts [b, l]
    bool: the state, which must be finite, is forgotten before such a token; state [b, d, n]
    precedes the first token (zeros when None). Computes in fp32 (fp64 for fp64). Returns y [b, l,
    d] in the type of u, and the state after the last token in the computing type.
    """
    with torch.autocast(u.device.type, enabled=False):
        wide = computing_type(u)
        u_, dt_, A, B, C, D, dt_bias = (x.to(wide) for x in (u, dt, A, B, C, D, dt_bias))
        dt_ = F.softplus(dt_ + dt_bias)
        keep = None if doc_starts is None else (~doc_starts).to(wide)
        if state is None:
            state = u_.new_zeros(u.shape[0], u.shape[2], A.shape[1])
        chunk = max(1, CHUNK_ELEMENTS // state.numel())
        recompute = u.shape[1] * state.numel() > KEPT_ELEMENTS and torch.is_grad_enabled()
        steps = [x.transpose(0, 1).split(chunk) for x in (u_, dt_, B, C)]
        keeps = [None] * len(steps[0]) if keep is None else keep.transpose(0, 1).split(chunk)
        outputs = []
        for u_c, dt_c, B_c, C_c, keep_c in zip(*steps, keeps, strict=True):
            if recompute:
                y, state = checkpoint(
                    _scan_chunk, u_c, dt_c, A, B_c, C_c, keep_c, state, use_reentrant=False
                )
            else:
                y, state = _scan_chunk(u_c, dt_c, A, B_c, C_c, keep_c, state)
            outputs.append(y)
        y = torch.cat(outputs).transpose(0, 1) + D * u_
        return (y * F.silu(z.to(wide))).to(u.dtype), state
