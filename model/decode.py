"""Decode one token at a time: the formulas of model/mamba.py at sequence length one.

Plain torch operations, since a fused kernel's launch does not pay for one token; A is precomputed.
tests/model/test_generation.py checks equality with FalconMamba.forward_chunk.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WARMUP_STEPS = 3  # before a CUDA graph is captured, so that libraries have allocated their buffers


class LayerState(NamedTuple):
    """Recurrent state of a layer; its size does not depend on the number of tokens."""

    conv_state: Tensor  # the conv's last inputs [b, k - 1, d]
    ssm_state: Tensor  # [b, d, n] fp32


State = list[LayerState]


class Decoder:
    """Computes next-token logits of a FalconMamba token by token and keeps the state.

    On a GPU the step is a CUDA graph, captured here: one launch per token. On a CPU, `compiled`
    uses torch.compile: steps are several times faster after half a minute of compilation.
    """

    def __init__(self, model: Any, state: State, *, compiled: bool = False) -> None:
        self.model = model
        self.A = [-torch.exp(mixer.A_log.detach().float()) for mixer in self._mixers()]
        self.conv_states = [layer.conv_state.clone() for layer in state]
        self.ssm_states = [layer.ssm_state.clone() for layer in state]
        self.step: Callable[..., tuple[Tensor, list[Tensor], list[Tensor]]] = self._step
        self.graph: torch.cuda.CUDAGraph | None = None
        if self.conv_states[0].is_cuda:
            self._capture()
        elif compiled:
            self.step = torch.compile(self._step, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Return the logits [b, v] that follow tokens [b], and update the state."""
        if self.graph is not None:
            self.tokens.copy_(tokens)
            self.graph.replay()
            return self.logits
        logits, self.conv_states, self.ssm_states = self.step(
            tokens, self.conv_states, self.ssm_states
        )
        return logits

    def _mixers(self) -> list[Any]:
        return [layer.mixer for layer in self.model.layers]

    def _step(
        self, tokens: Tensor, conv_states: list[Tensor], ssm_states: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return logits [b, v] and all layers' new states, [b, k - 1, d] and [b, d, n]."""
        h = self.model.embedding(tokens).float()
        new_conv_states: list[Tensor] = []
        new_ssm_states: list[Tensor] = []
        for layer, A, conv_state, ssm_state in zip(
            self.model.layers, self.A, conv_states, ssm_states, strict=True
        ):
            x = _norm(h, layer.norm.weight, layer.norm.eps).to(conv_state.dtype)
            y, conv_state, ssm_state = _mixer_step(layer.mixer, x, A, conv_state, ssm_state)
            h = h + y
            new_conv_states.append(conv_state)
            new_ssm_states.append(ssm_state)
        final_norm = self.model.final_norm
        lm_head = self.model.lm_head.weight
        logits = F.linear(_norm(h, final_norm.weight, final_norm.eps).to(lm_head.dtype), lm_head)
        return logits, new_conv_states, new_ssm_states

    @torch.no_grad()
    def _capture(self) -> None:
        """Capture an in-place step as a CUDA graph; the warmup steps leave the state unchanged."""
        device, batch = self.conv_states[0].device, self.conv_states[0].shape[0]
        self.tokens = torch.zeros(batch, dtype=torch.long, device=device)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARMUP_STEPS):
                self._step(self.tokens, self.conv_states, self.ssm_states)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.logits, conv_states, ssm_states = self._step(
                self.tokens, self.conv_states, self.ssm_states
            )
            states = (*self.conv_states, *self.ssm_states)
            for state, new_state in zip(states, (*conv_states, *ssm_states), strict=True):
                state.copy_(new_state)
        self.graph = graph


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm in fp32."""
    x = F.rms_norm(x.float(), x.shape[-1:], None, eps)
    return x if weight is None else x * weight


def _mixer_step(
    mixer: Any, x: Tensor, A: Tensor, conv_state: Tensor, ssm_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the mixer on x [b, e]; returns y [b, e] and both new states."""
    u, z = F.linear(x, mixer.in_proj.weight).chunk(2, dim=-1)
    window = torch.cat([conv_state, u.unsqueeze(1)], 1)
    u = F.silu((window * mixer.conv_weight.t()).sum(1) + mixer.conv_bias)
    dt, B, C = F.linear(u, mixer.x_proj.weight).split(mixer.split, dim=-1)
    if mixer.norms:
        dt, B, C = (_norm(x, None, mixer.norm_eps).to(u.dtype) for x in (dt, B, C))
    delta = F.softplus((F.linear(dt, mixer.dt_proj.weight) + mixer.dt_bias).float())
    ssm_state = torch.exp(delta.unsqueeze(-1) * A) * ssm_state + (delta * u).unsqueeze(
        -1
    ) * B.float().unsqueeze(1)
    y = (ssm_state @ C.float().unsqueeze(-1)).squeeze(-1) + mixer.D * u
    return F.linear((y * F.silu(z)).to(u.dtype), mixer.out_proj.weight), window[:, 1:], ssm_state
