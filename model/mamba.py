"""Falcon Mamba (arXiv 2410.05355): blocks of RMSNorm, Mamba-1 mixer and residual addition.

There is no attention and no MLP. Read from the bottom up: FalconMamba, Block, Mixer. Axes: b batch,
l sequence, e d_model, d d_inner, n d_state, r dt_rank, k d_conv. Unlike plain Mamba-1 it has
weightless RMSNorms on dt (over r, before dt_proj), B and C (over n). These modules know nothing of
ranks: model/parallel/build.py replaces their linears by sharded ones.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import Backend, ModelConfig, Recompute
from model.decode import LayerState, State
from model.generation import GenerationMixin
from model.init import initialize
from model.kernels import REFERENCE, Kernels, load
from model.kernels.carry import conv_from_state, final_conv_state
from model.kernels.cross_entropy import VocabParallelGroup, linear_cross_entropy
from model.kernels.reference import compute_dtype, matmul_dtype
from model.pretrained import PretrainedMixin

# compiled variants per block: with or without gradients, batch of one or more, sequence length
COMPILED_VARIANTS = 32


class ContextGroup(Protocol):
    """What a mixer needs of its context-parallel ranks (model/parallel/context.py)."""

    def previous_conv_state(self, x: Tensor, doc_starts: Tensor | None, width: int) -> Tensor:
        """Return the `width` inputs [b, width, d] that precede this rank's x [b, l, d]."""

    @property
    def initial_ssm_state(self) -> Callable[..., Tensor]:
        """Function of a scan and its arguments: the state [b, d, n] before this rank's chunk."""


class RMSNorm(nn.Module):
    """RMSNorm with a weight, computed in fp32; the result has autocast's dtype."""

    def __init__(self, size: int, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> [..., size]."""
        return self.kernels.rms_norm(x, self.weight, self.eps, dtype=matmul_dtype(self.weight))


class Mixer(nn.Module):
    """Mamba-1 mixer with Falcon's norms: in_proj, conv, x_proj, norms, dt_proj, scan, out_proj."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        c = config
        self.kernels = kernels
        self.recompute = False  # recompute everything between in_proj and out_proj in the backward
        # set if context-parallel ranks hold the other chunks of each sequence
        self.context: ContextGroup | None = None
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

    def forward(self, x: Tensor, doc_starts: Tensor | None) -> Tensor:
        """x [b, l, e], doc_starts [b, l] bool or None -> [b, l, e]."""
        return self._run(x, doc_starts, None, None)[0]

    def forward_chunk(
        self, x: Tensor, doc_starts: Tensor | None, state: LayerState | None
    ) -> tuple[Tensor, LayerState]:
        """Run forward from `state` (None: zeros); also return the state after the last token."""
        conv_state, ssm_state = state if state is not None else (None, None)
        y, conv_input, ssm_state = self._run(x, doc_starts, conv_state, ssm_state)
        width = self.conv_weight.shape[1] - 1
        conv_state = final_conv_state(conv_input, doc_starts, conv_state, width)
        return y, LayerState(conv_state, ssm_state)

    def _run(
        self,
        x: Tensor,
        doc_starts: Tensor | None,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the output [b, l, e], the conv's input [b, l, d] and the last state [b, d, n]."""
        conv_input, z = self.in_proj(x).chunk(2, dim=-1)
        inputs = (conv_input, z, doc_starts, conv_state, ssm_state)
        if self.recompute and torch.is_grad_enabled():
            y, ssm_state = checkpoint(self._conv_and_scan, *inputs, use_reentrant=False)
        else:
            y, ssm_state = self._conv_and_scan(*inputs)
        return self.out_proj(y), conv_input, ssm_state

    def _conv_and_scan(
        self,
        conv_input: Tensor,
        z: Tensor,
        doc_starts: Tensor | None,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """conv_input, z [b, l, d] -> gated scan output y [b, l, d], last state [b, d, n]."""
        if self.context is not None:
            width = self.conv_weight.shape[1] - 1
            conv_state = self.context.previous_conv_state(conv_input, doc_starts, width)
        u = conv_from_state(
            self.kernels.causal_conv1d,
            conv_input,
            self.conv_weight,
            self.conv_bias,
            doc_starts,
            conv_state,
        )
        projected = self.x_proj(u)
        if self.norms:
            projected = self.kernels.rms_norm(projected, None, self.norm_eps, self.split)
        dt, B, C = projected.split(self.split, dim=-1)
        A = -torch.exp(self.A_log.to(compute_dtype(self.A_log)))
        scan = self.kernels.selective_scan
        inputs = (u, self.dt_proj(dt), A, B, C, self.D, z, self.dt_bias, doc_starts)
        if self.context is not None:
            ssm_state = self.context.initial_ssm_state(scan, *inputs)
        return scan(*inputs, ssm_state)


class Block(nn.Module):
    """One layer: h + mixer(norm(h)). The residual stream h stays in fp32."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model, config.norm_eps, kernels)
        self.mixer = Mixer(config, kernels)

    def forward(self, h: Tensor, doc_starts: Tensor | None) -> Tensor:
        """h [b, l, e] -> [b, l, e]."""
        return h + self.mixer(self.norm(h), doc_starts)

    def forward_chunk(
        self, h: Tensor, doc_starts: Tensor | None, state: LayerState | None
    ) -> tuple[Tensor, LayerState]:
        """Run forward from `state` (None: zeros); also return the state after the last token."""
        y, state = self.mixer.forward_chunk(self.norm(h), doc_starts, state)
        return h + y, state


class FalconMamba(GenerationMixin, PretrainedMixin, nn.Module):
    """Language model: ids to logits, loss or more ids.

    Without `kernels` it takes the fastest ones of its device, also when it moves to another one.
    Parameters have their initial values of `seed`, unless they are on the meta device.
    """

    def __init__(
        self, config: ModelConfig, kernels: Kernels | None = None, *, seed: int = 0
    ) -> None:
        super().__init__()
        self.config = config
        self.follows_device = kernels is None
        kernels = kernels or REFERENCE
        self.kernels = kernels
        self.eos: int | None = None  # id that ends a document; from_pretrained reads it
        self.recompute = False  # blocks save only their input and recompute the rest
        # set if context-parallel ranks hold the other chunks of each sequence
        self.context: ContextGroup | None = None
        # set if lm_head is sharded over tensor-parallel ranks
        self.vocabulary_group: VocabParallelGroup | None = None
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.n_layer))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps, kernels)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.choose_kernels()
        if not self.lm_head.weight.is_meta:
            initialize(self, config, seed, lambda name, full: full)

    def choose_kernels(self) -> None:
        """Take the fastest kernels of the parameters' device, unless some were given."""
        device = self.lm_head.weight.device.type
        if not self.follows_device or device == "meta":
            return
        kernels = load(Backend.auto, device)
        for module in self.modules():
            if hasattr(module, "kernels"):
                module.kernels = kernels  # type: ignore[assignment]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FalconMamba":
        """Torch's way to move a module: .to(), .cuda() and .cpu() end here."""
        super()._apply(fn, recurse)
        self.choose_kernels()
        return self

    def set_recompute(self, recompute: Recompute) -> None:
        """Choose what the backward recomputes; gradients stay bit-identical."""
        self.recompute = recompute is Recompute.full
        for layer in self.layers:
            layer.mixer.recompute = recompute is Recompute.selective  # type: ignore[union-attr]

    def compile_blocks(self) -> None:
        """Compile the blocks' forward with torch.compile; graph breaks raise at the first call.

        All blocks share one compiled graph with dynamic shapes: a recomputed block must run the
        code of its first run. Only forward is compiled, so that hooks stay outside.
        """
        for layer in self.layers:
            # torch's type stubs lack recompile_limit
            layer.forward = torch.compile(  # type: ignore[call-overload]
                layer.forward, dynamic=True, fullgraph=True, recompile_limit=COMPILED_VARIANTS
            )

    def set_context(self, context: ContextGroup | None) -> None:
        """Treat tokens, targets and doc_starts as this rank's chunk of each sequence."""
        self.context = context
        for layer in self.layers:
            layer.mixer.context = context  # type: ignore[union-attr]

    @contextmanager
    def without_context_parallel(self) -> Iterator[None]:
        """Treat every rank's sequences as whole ones within the block, e.g. for validation."""
        context = self.context
        self.set_context(None)
        try:
            yield
        finally:
            self.set_context(context)

    def hidden(self, tokens: Tensor, doc_starts: Tensor | None = None) -> Tensor:
        """Final normed hidden states: tokens [b, l], doc_starts [b, l] bool -> [b, l, e]."""
        h = self._embed(tokens)
        for layer in self.layers:
            if self.recompute and torch.is_grad_enabled():
                h = checkpoint(layer, h, doc_starts, use_reentrant=False)
            else:
                h = layer(h, doc_starts)
        return self.final_norm(h)

    def forward_chunk(
        self, tokens: Tensor, state: State | None = None, doc_starts: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Hidden states [b, l, e] of a chunk that continues from `state` (None: sequence start).

        Also returns the state after the last token, whose size does not depend on l. Chunks of any
        lengths, down to one token, give what the whole sequence gives.
        """
        h = self._embed(tokens)
        states = [None] * len(self.layers) if state is None else state
        new_state = []
        for layer, layer_state in zip(self.layers, states, strict=True):
            h, layer_state = layer.forward_chunk(h, doc_starts, layer_state)  # type: ignore[operator]
            new_state.append(layer_state)
        return self.final_norm(h), new_state

    def _embed(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        return h.to(compute_dtype(h))

    def logits(self, tokens: Tensor, doc_starts: Tensor | None = None) -> Tensor:
        """Logits [b, l, vocab_size] of tokens [b, l]; this rank's columns if lm_head is sharded."""
        return self.lm_head(self.hidden(tokens, doc_starts))

    def loss(self, tokens: Tensor, targets: Tensor, doc_starts: Tensor | None = None) -> Tensor:
        """Mean cross entropy in nats; targets [b, l] are the ids that follow tokens [b, l]."""
        losses: Tensor = self(tokens, targets, doc_starts)[0]
        return losses.mean()

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, doc_starts: Tensor | None = None
    ) -> Any:
        """Logits [b, l, vocab_size] of tokens [b, l]; with targets [b, l], what a loss needs.

        That is the cross entropy in nats and the log-sum-exp of the logits, both [b, l], which
        never holds all logits at once. A z-loss penalises the square of the second; its gradient
        costs nothing unless used.
        """
        if targets is None:
            return self.logits(tokens, doc_starts)
        hidden = self.hidden(tokens, doc_starts).flatten(0, 1)
        labels = targets.flatten()
        losses, log_sums = linear_cross_entropy(
            hidden, self.lm_head.weight, labels, self.kernels.loss, self.vocabulary_group
        )
        return losses.view_as(targets), log_sums.view_as(targets)
