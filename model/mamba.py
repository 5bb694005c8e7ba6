"""Falcon Mamba: 64 times RMSNorm, Mamba-1 mixer, residual add; no attention, no MLP (arXiv
2410.05355).

Read top-down: FalconMamba, Block, Mixer. Axes: b batch, l sequence, e d_model, d d_inner, n
d_state, r dt_rank, k d_conv. What is unlike plain Mamba-1: weightless RMSNorms on dt (over r,
before dt_proj), B and C (over n). The modules hold mathematics alone; model/parallel/build.py puts
sharded linears in their place.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.config import ModelConfig, Recompute
from model.decode import LayerState, State
from model.generation import Generation
from model.kernels import REFERENCE, Kernels
from model.kernels.carry import conv_from_state, final_conv_state
from model.kernels.cross_entropy import VocabularyGroup, linear_cross_entropy
from model.kernels.reference import computing_type, product_type

# of torch.compile: gradients or not, batch of one or more, a piece of a chunk or more
COMPILED_VARIANTS = 32


class SequenceRanks(Protocol):
    """What a layer asks of ranks with its sequences' other pieces (model/parallel/context.py)."""

    def conv_state(self, x: Tensor, doc_starts: Tensor | None, behind: int) -> Tensor:
        """The `behind` inputs [b, behind, d] before this rank's x [b, l, d]."""

    @property
    def state(self) -> Callable[..., Tensor]:
        """The scan's state [b, d, n] before this rank's piece, of a scan and its arguments."""


class RMSNorm(nn.Module):
    """RMSNorm with a weight, computed in fp32; returns autocast's type for matrix products."""

    def __init__(self, size: int, eps: float, kernels: Kernels) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps
        self.kernels = kernels

    def forward(self, x: Tensor) -> Tensor:
        """x [..., size] -> [..., size]."""
        return self.kernels.rms_norm(x, self.weight, self.eps, dtype=product_type(x))


class Mixer(nn.Module):
    """Mamba-1 mixer with Falcon's norms: project, convolve, select, scan, gate, project."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        super().__init__()
        c = config
        self.kernels = kernels
        self.recompute = False  # what lies between in_proj and out_proj, in the backward
        # of the ranks that hold the other pieces of the sequence
        self.context: SequenceRanks | None = None
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
        """x [b, l, e], starts [b, l] bool or None -> [b, l, e]."""
        return self._mix(x, doc_starts, None, None)[0]

    def forward_chunk(
        self, x: Tensor, doc_starts: Tensor | None, state: LayerState | None
    ) -> tuple[Tensor, LayerState]:
        """As forward, from a state to the state after the last token."""
        conv_state, scan = state if state is not None else (None, None)
        y, u, last = self._mix(x, doc_starts, conv_state, scan)
        return y, LayerState(
            final_conv_state(u, doc_starts, conv_state, self.conv_weight.shape[1] - 1), last
        )

    def _mix(
        self, x: Tensor, doc_starts: Tensor | None, conv_state: Tensor | None, state: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The mixer's output, the convolution's input [b, l, d] and the scan's last state."""
        before, z = self.in_proj(x).chunk(2, dim=-1)
        if self.recompute and torch.is_grad_enabled():
            y, last = checkpoint(
                self._select, before, z, doc_starts, conv_state, state, use_reentrant=False
            )
        else:
            y, last = self._select(before, z, doc_starts, conv_state, state)
        return self.out_proj(y), before, last

    def _select(
        self,
        before: Tensor,
        z: Tensor,
        doc_starts: Tensor | None,
        conv_state: Tensor | None,
        state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Convolve, select, scan before and z [b, l, d] -> y [b, l, d], last state [b, d, n]."""
        if self.context is not None:
            conv_state = self.context.conv_state(before, doc_starts, self.conv_weight.shape[1] - 1)
        u = conv_from_state(
            self.kernels.causal_conv1d,
            before,
            self.conv_weight,
            self.conv_bias,
            doc_starts,
            conv_state,
        )
        selected = self.x_proj(u)
        if self.norms:
            selected = self.kernels.rms_norm(selected, None, self.norm_eps, self.split)
        dt, B, C = selected.split(self.split, dim=-1)
        A = -torch.exp(self.A_log.to(computing_type(self.A_log)))
        scan, inputs = (
            self.kernels.selective_scan,
            (u, self.dt_proj(dt), A, B, C, self.D, z, self.dt_bias, doc_starts),
        )
        if self.context is not None:
            state = self.context.state(scan, *inputs)
        return scan(*inputs, state)


class Block(nn.Module):
    """One layer: h + mixer(norm(h)); the residual stream h keeps its own (wide) type."""

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
        """As forward, from a state to the state after the last token."""
        y, state = self.mixer.forward_chunk(self.norm(h), doc_starts, state)
        return h + y, state


class FalconMamba(Generation, nn.Module):
    """Language model. Built empty (also on the meta device); model/init.py or weights fill it."""

    def __init__(self, config: ModelConfig, kernels: Kernels = REFERENCE) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        # blocks keep only their input for the backward and run their forward again
        self.recompute = False
        # of the ranks that hold the other pieces of the sequences
        self.context: SequenceRanks | None = None
        # of the ranks that the head is cut over
        self.vocabulary_group: VocabularyGroup | None = None
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, kernels) for _ in range(config.n_layer))
        self.final_norm = RMSNorm(config.d_model, config.norm_eps, kernels)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)

    def set_recompute(self, what: Recompute) -> None:
        """Choose what the backward computes again; gradients stay the same to the last bit."""
        self.recompute = what is Recompute.full
        for layer in self.layers:
            layer.mixer.recompute = what is Recompute.selective  # type: ignore[union-attr]

    def compile_blocks(self) -> None:
        """Have torch.compile make one piece of code for all blocks at the first call, or raise.

        For all shapes too (dynamic): a block that is computed again must find the code that it
        found before. With or without gradients, and a batch or sequence of one, need their own.
        Forward alone, for hooks stay outside.
        """
        for layer in self.layers:
            # torch's own types do not know the limit
            layer.forward = torch.compile(  # type: ignore[call-overload]
                layer.forward, dynamic=True, fullgraph=True, recompile_limit=COMPILED_VARIANTS
            )

    def set_context(self, context: SequenceRanks | None) -> None:
        """Treat tokens, targets and starts as this rank's pieces of sequences split over ranks."""
        self.context = context
        for layer in self.layers:
            layer.mixer.context = context  # type: ignore[union-attr]

    @contextmanager
    def whole_sequences(self) -> Iterator[None]:
        """Within it, every rank's sequences are whole."""
        context = self.context
        self.set_context(None)
        try:
            yield
        finally:
            self.set_context(context)

    def hidden(self, tokens: Tensor, doc_starts: Tensor | None = None) -> Tensor:
        """Normed final states. tokens [b, l] ids, starts [b, l] bool -> [b, l, e]."""
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
        """As hidden, for a piece of a sequence: from the state after the piece before it (None: the
        beginning).

        Chunks of any lengths, one token included, give what the whole sequence gives. Returns the
        states [b, l, e] and the state after the last token, of constant size.
        """
        h, after = self._embed(tokens), []
        before = [None] * len(self.layers) if state is None else state
        for layer, layer_state in zip(self.layers, before, strict=True):
            h, layer_state = layer.forward_chunk(h, doc_starts, layer_state)  # type: ignore[operator]
            after.append(layer_state)
        return self.final_norm(h), after

    def _embed(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        return h.to(computing_type(h))

    def logits(self, tokens: Tensor, doc_starts: Tensor | None = None) -> Tensor:
        """Next-token scores [b, l, vocab_size] of tokens [b, l]; if cut, this rank's columns."""
        return self.lm_head(self.hidden(tokens, doc_starts))

    def forward(
        self, tokens: Tensor, targets: Tensor, doc_starts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Cross entropy per token in nats and log of the softmax's sum, both [b, l], for targets
        [b, l].

        The second result is what a z-loss penalises (its square); it costs nothing while nobody
        asks its gradient.
        """
        hidden, labels = self.hidden(tokens, doc_starts).flatten(0, 1), targets.flatten()
        losses, log_sums = linear_cross_entropy(
            hidden, self.lm_head.weight, labels, self.kernels.loss_rows, self.vocabulary_group
        )
        return losses.view_as(targets), log_sums.view_as(targets)
