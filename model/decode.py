"""One token through the whole model: what decoding repeats, without what a sequence needs.

The same formula as model/mamba.py at a length of one, with A and the convolution's transposed
weights prepared once: no kernel is launched for a single step. Equal to FalconMamba.forward_chunk
(tests/model/test_generation.py).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

WARMUP = 3  # steps before a CUDA graph is captured, so that libraries have allocated what they need


class LayerState(NamedTuple):
    """What a layer remembers of all tokens so far; its size does not depend on their number."""

    conv_state: Tensor  # the convolution's last inputs [b, k - 1, d]
    ssm_state: Tensor  # [b, d, n] fp32


State = list[LayerState]


class Decoder:
    """Next-token scores of a FalconMamba from one token and the state, which it keeps.

    compiled: torch.compile makes the step several times faster on a CPU and takes half a minute at
    first. On a GPU the step is a CUDA graph, captured here: one launch per token.
    """

    def __init__(self, model: Any, state: State, *, compiled: bool = False) -> None:
        self.model = model
        self.A = [-torch.exp(mixer.A_log.detach().float()) for mixer in self._mixers()]
        self.conv_state = [layer.conv_state.clone() for layer in state]
        self.ssm_states = [layer.ssm_state.clone() for layer in state]
        self.step: Callable[..., tuple[Tensor, list[Tensor], list[Tensor]]] = self._step
        self.graph: torch.cuda.CUDAGraph | None = None
        if self.conv_state[0].is_cuda:
            self._capture()
        elif compiled:
            self.step = torch.compile(self._step, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Scores [b, v] of what follows tokens [b]; the state moves on."""
        if self.graph is not None:
            self.tokens.copy_(tokens)
            self.graph.replay()
            return self.scores
        scores, self.conv_state, self.ssm_states = self.step(
            tokens, self.conv_state, self.ssm_states
        )
        return scores

    def _mixers(self) -> list[Any]:
        return [layer.mixer for layer in self.model.layers]

    def _step(
        self, tokens: Tensor, conv_state: list[Tensor], ssm_states: list[Tensor]
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """tokens [b], all taps [b, k - 1, d], scans [b, d, n] -> scores [b, v], both updated."""
        h = self.model.embedding(tokens).float()
        after: tuple[list[Tensor], list[Tensor]] = ([], [])
        for layer, A, tap, ssm_state in zip(
            self.model.layers, self.A, conv_state, ssm_states, strict=True
        ):
            x = _norm(h, layer.norm.weight, layer.norm.eps).to(tap.dtype)
            y, tap, ssm_state = _mix(layer.mixer, x, A, tap, ssm_state)
            h = h + y
            after[0].append(tap)
            after[1].append(ssm_state)
        final = self.model.final_norm
        head = self.model.lm_head.weight
        return F.linear(_norm(h, final.weight, final.eps).to(head.dtype), head), *after

    @torch.no_grad()
    def _capture(self) -> None:
        """Capture an in-place step as a CUDA graph; only warmup runs, which changes no state."""
        device, batch = self.conv_state[0].device, self.conv_state[0].shape[0]
        self.tokens = torch.zeros(batch, dtype=torch.long, device=device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARMUP):
                self._step(self.tokens, self.conv_state, self.ssm_states)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.scores, conv_state, ssm_states = self._step(
                self.tokens, self.conv_state, self.ssm_states
            )
            for mine, new in zip(
                (*self.conv_state, *self.ssm_states), (*conv_state, *ssm_states), strict=True
            ):
                mine.copy_(new)
        self.graph = graph


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm in fp32."""
    x = F.rms_norm(x.float(), x.shape[-1:], None, eps)
    return x if weight is None else x * weight


def _mix(
    mixer: Any, x: Tensor, A: Tensor, conv_state: Tensor, ssm_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The mixer at one step: x [b, e] -> [b, e], with the taps and the scan's state after it."""
    u, z = F.linear(x, mixer.in_proj.weight).chunk(2, dim=-1)
    window = torch.cat([conv_state, u.unsqueeze(1)], 1)
    u = F.silu((window * mixer.conv_weight.t()).sum(1) + mixer.conv_bias)
    dt, B, C = F.linear(u, mixer.x_proj.weight).split(mixer.split, dim=-1)
    if mixer.norms:
        dt, B, C = (_norm(part, None, mixer.norm_eps).to(u.dtype) for part in (dt, B, C))
    delta = F.softplus((F.linear(dt, mixer.dt_proj.weight) + mixer.dt_bias).float())
    ssm_state = torch.exp(delta.unsqueeze(-1) * A) * ssm_state + (delta * u).unsqueeze(
        -1
    ) * B.float().unsqueeze(1)
    y = (ssm_state @ C.float().unsqueeze(-1)).squeeze(-1) + mixer.D * u
    return F.linear((y * F.silu(z)).to(u.dtype), mixer.out_proj.weight), window[:, 1:], ssm_state
