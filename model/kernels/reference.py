"""The specification in plain torch: every other backend must equal it, forward and backward.

Axes: b batch, l sequence, d channel (d_inner), n state (d_state), k taps (d_conv).
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# The scan works on [l, b, d, n] tensors, d_state times the size of its inputs, one chunk of time
# steps at a time.
# elements of such a tensor: 2 MB in fp32, small enough for caches and for malloc to reuse
CHUNK_ELEMENTS = 2**19
# elements of a whole sequence; longer ones save one state per chunk and recompute the rest
MAX_SAVED_ELEMENTS = 2**26


def compute_dtype(x: Tensor) -> torch.dtype:
    """Type of intermediate results and sums: fp64 for fp64 inputs, fp32 for all others."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def matmul_dtype(x: Tensor) -> torch.dtype:
    """Type of matrix products of x: autocast's type where autocast is on, else x's own."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if on else x.dtype


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    split_sizes: list[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Root-mean-square norm over the last axis, or separately over each of its `split_sizes`.

    x [..., e], weight [e] or None; split_sizes add up to e. Computes in compute_dtype(x). Returns
    [..., e] in `dtype`, by default the type of x.
    """
    x_compute = x.to(compute_dtype(x))
    splits = [x_compute] if split_sizes is None else x_compute.split(split_sizes, -1)
    normed = [s * torch.rsqrt(s.square().mean(-1, keepdim=True) + eps) for s in splits]
    result = normed[0] if split_sizes is None else torch.cat(normed, -1)
    return (result if weight is None else result * weight).to(dtype or x.dtype)


def loss_statistics(logits: Tensor, labels: Tensor) -> Tensor:
    """Statistics of a vocabulary shard from which ranks combine the cross entropy.

    logits [t, v]; labels [t] relative to this shard, outside [0, v) where another shard holds the
    label. Returns [3, t] in compute_dtype(logits): the label's logit (0 where another shard holds
    it), the largest logit, and the sum of exp(logit - largest).
    """
    logits = logits.to(compute_dtype(logits))
    is_local = (labels >= 0) & (labels < logits.shape[1])
    label_logits = logits.gather(1, (labels * is_local)[:, None]).squeeze(1)
    max_logits = logits.amax(1)
    sum_exp = (logits - max_logits[:, None]).exp_().sum(1)
    return torch.stack([label_logits.masked_fill(~is_local, 0.0), max_logits, sum_exp])


def loss_gradient(
    logits: Tensor, labels: Tensor, log_sums: Tensor, grad_loss: Tensor, grad_log_sum: Tensor
) -> Tensor:
    """Gradient of logits [t, v] in their type: (dloss + dlog_sum) softmax - dloss onehot.

    The other arguments are [t]: labels as in loss_statistics; log_sums of the whole vocabulary. A
    backend may overwrite the logits with the result.
    """
    grad = (
        (logits.to(log_sums.dtype) - log_sums[:, None])
        .exp_()
        .mul_((grad_loss + grad_log_sum)[:, None])
    )
    is_local = (labels >= 0) & (labels < logits.shape[1])
    grad.scatter_add_(1, (labels * is_local)[:, None], (-grad_loss * is_local)[:, None])
    return grad.to(logits.dtype)


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, doc_starts: Tensor | None = None
) -> Tensor:
    """Depthwise causal convolution followed by SiLU.

    x [b, l, d], weight [d, k] with the newest tap last, bias [d]; doc_starts [b, l] bool marks the
    first token of a document: taps never read across it. Computes in compute_dtype(x). Returns
    [b, l, d] in the type of x.
    """
    length = x.shape[1]
    taps = weight.shape[1]
    dtype = x.dtype
    x, weight, bias = (t.to(compute_dtype(x)) for t in (x, weight, bias))
    out = bias + weight[:, -1] * x
    visible = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    for lag in range(1, min(taps, length)):
        past = F.pad(x[:, :-lag], (0, 0, lag, 0))
        if doc_starts is not None:
            # the input `lag` tokens ago is visible while no later token starts a document
            starts = F.pad(doc_starts[:, : length - lag + 1], (lag - 1, 0))
            visible = visible & ~starts
            past = past * visible.unsqueeze(-1)
        out = out + weight[:, -1 - lag] * past
    return F.silu(out).to(dtype)


class LinearRecurrence(torch.autograd.Function):
    """h_t = a_t * h_(t-1) + x_t along axis 0; the backward costs linear time and memory."""

    @staticmethod
    def forward(ctx: FunctionCtx, a: Tensor, x: Tensor, h0: Tensor) -> Tensor:
        """a, x [l, ...], h0 [...] the state before t = 0; returns every h [l, ...]."""
        h = torch.empty_like(x)
        state = h0
        for t in range(x.shape[0]):
            state = torch.addcmul(x[t], a[t], state, out=h[t])
        ctx.save_for_backward(a, h, h0)
        return h

    @staticmethod
    def backward(ctx: FunctionCtx, grad_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Adjoint: g_t = dh_t + a_(t+1) g_(t+1); dx = g, da_t = g_t h_(t-1), dh0 = a_0 g_0."""
        a, h, h0 = ctx.saved_tensors  # type: ignore[attr-defined]
        g = torch.empty_like(grad_h)
        g[-1] = grad_h[-1]
        for t in range(grad_h.shape[0] - 2, -1, -1):
            torch.addcmul(grad_h[t], a[t + 1], g[t + 1], out=g[t])
        grad_a = torch.empty_like(g)
        torch.mul(g[1:], h[:-1], out=grad_a[1:])
        torch.mul(g[0], h0, out=grad_a[0])
        return grad_a, g, a[0] * g[0]


def _scan_chunk(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state_mask: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Scan a time-first chunk: u, dt [l, b, d]; B, C [l, b, n]; state_mask [l, b]; state [b, d, n].

    state_mask is 0 where the state is reset, else 1.
    """
    decay = torch.exp(dt.unsqueeze(-1) * A)
    if state_mask is not None:
        decay = decay * state_mask[:, :, None, None]
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
    """Gated selective state space scan (arXiv 2312.00752, section 3).

    dt_t = softplus(dt_t + dt_bias); h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t (zero-order hold for
    A, Euler for B); y_t = (<h_t, C_t> + D u_t) SiLU(z_t).
    u, dt, z [b, l, d]; A [d, n]; B, C [b, l, n]; D, dt_bias [d]. doc_starts [b, l] bool: the state,
    which must be finite, is reset before such a token. state [b, d, n]: before the first token,
    zeros when None. Computes in compute_dtype(u). Returns y [b, l, d] in the type of u, and the
    state after the last token in compute_dtype(u).
    """
    with torch.autocast(u.device.type, enabled=False):
        dtype = compute_dtype(u)
        u_, dt_, A, B, C, D, dt_bias = (x.to(dtype) for x in (u, dt, A, B, C, D, dt_bias))
        dt_ = F.softplus(dt_ + dt_bias)
        state_mask = None if doc_starts is None else (~doc_starts).to(dtype)
        if state is None:
            state = u_.new_zeros(u.shape[0], u.shape[2], A.shape[1])
        chunk_length = max(1, CHUNK_ELEMENTS // state.numel())
        recompute = u.shape[1] * state.numel() > MAX_SAVED_ELEMENTS and torch.is_grad_enabled()
        chunks = [x.transpose(0, 1).split(chunk_length) for x in (u_, dt_, B, C)]
        state_masks = [None] * len(chunks[0])
        if state_mask is not None:
            state_masks = state_mask.transpose(0, 1).split(chunk_length)
        outputs = []
        for u_c, dt_c, B_c, C_c, mask_c in zip(*chunks, state_masks, strict=True):
            if recompute:
                y, state = checkpoint(
                    _scan_chunk, u_c, dt_c, A, B_c, C_c, mask_c, state, use_reentrant=False
                )
            else:
                y, state = _scan_chunk(u_c, dt_c, A, B_c, C_c, mask_c, state)
            outputs.append(y)
        y = torch.cat(outputs).transpose(0, 1) + D * u_
        return (y * F.silu(z.to(dtype))).to(u.dtype), state
