"""Falcon Mamba: 64 times RMSNorm, Mamba-1 mixer, residual add; no attention, no MLP (arXiv 2410.05355).

Read top-down: FalconMamba, Block, Mixer. Axes: b batch, l sequence, e d_model, d d_inner, n d_state, r dt_rank,
k d_conv. What is unlike plain Mamba-1: weightless RMSNorms on dt (over r, before dt_proj), B and C (over n).
The modules hold mathematics alone; model/parallel.py puts sharded linears in their place.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig
from model.kernels import REFERENCE, Kernels
from model.kernels.cross_entropy import linear_cross_entropy
from model.kernels.reference import computing_type, rms_norm


class RMSNorm(nn.Module):
    """RMSNorm with a weight, computed in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> [..., size]."""
        return rms_norm(x, self.weight, self.eps)


class Mixer(nn.Module):
    """Mamba-1 mixer with Falcon's norms: project, convolve, select, scan, gate, project."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        c = config
        self.kernels = kernels
        self.norms = c.mixer_norms
        self.norm_eps = c.mixer_norm_eps
        self.split = [c.dt_rank, c.d_state, c.d_state]
        self.in_proj = nn.Linear(c.d_model, 2 * c.d_inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(c.d_inner, c.d_conv))
        self.conv_bias = nn.Parameter(torch.empty(c.d_inner))
        self.x_proj = nn.Linear(c.d_inner, c.dt_rank + 2 * c.d_state, bias=False)
        self.dt_proj = nn.Linear(c.dt_rank, c.d_inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(c.d_inner))
        self.A_log = nn.Parameter(torch.empty(c.d_inner, c.d_state))
        self.D = nn.Parameter(torch.empty(c.d_inner))
        self.out_proj = nn.Linear(c.d_inner, c.d_model, bias=False)

    def forward(self, x: Tensor, starts: Tensor | None) -> Tensor:
        """x [b, l, e], starts [b, l] bool or None -> [b, l, e]."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        u = self.kernels.causal_conv1d(u, self.conv_weight, self.conv_bias, starts)
        dt, B, C = self.x_proj(u).split(self.split, dim=-1)
        if self.norms:
            dt, B, C = (rms_norm(part, None, self.norm_eps) for part in (dt, B, C))
        A = -torch.exp(self.A_log.to(computing_type(self.A_log)))
        y, _ = self.kernels.selective_scan(u, self.dt_proj(dt), A, B, C, self.D, z, self.dt_bias, starts)
        return self.out_proj(y)


class Block(nn.Module):
    """One layer: h + mixer(norm(h)); the residual stream h keeps its own (wide) type."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer = Mixer(config, kernels)

    def forward(self, h: Tensor, starts: Tensor | None) -> Tensor:
        """h [b, l, e] -> [b, l, e]."""
        return h + self.mixer(self.norm(h), starts)


class FalconMamba(nn.Module):
    """The language model. Built empty (also on the meta device); model/init.py or weights fill it."""

    def __init__(self, config: ModelConfig, kernels: Kernels = REFERENCE) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # blocks keep only their input for the backward and run their forward again
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.n_layer))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.linear_cross_entropy = linear_cross_entropy

    def hidden(self, tokens: Tensor, starts: Tensor | None = None) -> Tensor:
        """Normed final states. tokens [b, l] ids, starts [b, l] bool -> [b, l, e]."""
        h = self.embedding(tokens)
        h = h.to(computing_type(h))
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                h = checkpoint(layer, h, starts, use_reentrant=False)
            else:
                h = layer(h, starts)
        return self.final_norm(h)

    def logits(self, tokens: Tensor, starts: Tensor | None = None) -> Tensor:
        """Next-token scores [b, l, vocab_size] of tokens [b, l]; under tensor parallelism this rank's columns."""
        return self.lm_head(self.hidden(tokens, starts))

    def forward(self, tokens: Tensor, targets: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cross entropy per token in nats and log of the softmax's sum, both [b, l], for targets [b, l].

        The second result is what a z-loss penalises (its square); it costs nothing while nobody asks its gradient.
        """
        hidden = self.hidden(tokens, starts).flatten(0, 1)
        losses, log_sums = self.linear_cross_entropy(hidden, self.lm_head, targets.flatten())
        return losses.view_as(targets), log_sums.view_as(targets)
