"""Generate token ids from prompts, recurrently: each token costs constant time and memory.

Prompts are read in chunks that carry the state, so any length fits. A batch is padded on the left;
the state is reset where each prompt starts, so a row's result does not depend on other rows.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from core.errors import InputError
from model.config import Sampling
from model.decode import Decoder, State

PREFILL_TOKENS = 4096  # per chunk over all rows; bounds the activation memory of a prompt
GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=0)
PAD_ID = 0  # left padding; any id works, since the state is reset after it
Prompts = Sequence[Sequence[int]] | Tensor


class GenerationMixin:
    """Methods of FalconMamba that generate."""

    embedding: nn.Module
    lm_head: nn.Linear
    forward_chunk: Callable[..., tuple[Tensor, State]]

    @torch.no_grad()
    def generate(
        self,
        prompts: Prompts,
        count: int = 128,
        sampling: Sampling = GREEDY,
        *,
        stop: int | None = None,
    ) -> Tensor:
        """Return the next `count` ids [b, count] of prompts: lists of any lengths, or ids [b, l].

        A row that reached the id `stop` is filled up with it; fewer ids if all rows reached it.
        """
        columns: list[Tensor] = []
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=self.lm_head.weight.device)
        for tokens in self.stream(prompts, count, sampling):
            if stop is not None:
                tokens = tokens.masked_fill(ended, stop)
                ended |= tokens == stop
            columns.append(tokens)
            if ended.all():
                break
        return torch.stack(columns, 1)

    @torch.no_grad()
    def stream(
        self, prompts: Prompts, count: int, sampling: Sampling = GREEDY, *, compiled: bool = False
    ) -> Iterator[Tensor]:
        """Yield the next token [b] of every prompt, `count` times.

        `compiled` speeds up long texts on a CPU; see Decoder.
        """
        hidden, state = self.prefill(prompts)
        generator = torch.Generator(hidden.device).manual_seed(sampling.seed)
        tokens = sample(self.lm_head(hidden.to(self.lm_head.weight.dtype)), sampling, generator)
        yield tokens
        if count == 1:
            return  # the prompt's logits gave it: no graph to capture and nothing to compile
        decoder = Decoder(self, state, compiled=compiled)
        for _ in range(count - 1):
            tokens = sample(decoder(tokens), sampling, generator)
            yield tokens

    @torch.no_grad()
    def prefill(self, prompts: Prompts) -> tuple[Tensor, State]:
        """Read prompts of any lengths; return last hidden states [b, e] and layers' states."""
        device = self.lm_head.weight.device
        if isinstance(prompts, Tensor):
            prompts = prompts.tolist()
        if not prompts or isinstance(prompts[0], int):
            raise InputError("prompts are a list of lists of ids, or a tensor [b, l]: [[5, 6, 7]]")
        longest = max(len(prompt) for prompt in prompts)
        if min(len(prompt) for prompt in prompts) < 1:
            raise InputError("a prompt is empty: give it at least the end-of-text token")
        step = max(1, PREFILL_TOKENS // len(prompts))
        first = torch.tensor([[longest - len(prompt)] for prompt in prompts], device=device)
        state: State | None = None
        for low in range(0, longest, step):
            high = min(low + step, longest)
            rows = [_window(prompt, longest, low, high) for prompt in prompts]
            padded = any(longest - len(prompt) >= max(low, 1) for prompt in prompts)
            doc_starts = torch.arange(low, high, device=device) == first if padded else None
            hidden, state = self.forward_chunk(torch.tensor(rows, device=device), state, doc_starts)
        assert state is not None
        return hidden[:, -1], state


def _window(prompt: Sequence[int], longest: int, low: int, high: int) -> list[int]:
    """Return ids [low, high) of a prompt that is left-padded to length `longest`."""
    pad = longest - len(prompt)
    return [PAD_ID] * max(0, min(high, pad) - low) + list(
        prompt[max(0, low - pad) : max(0, high - pad)]
    )


def sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Sample next tokens [b] from logits [b, v]; temperature 0 takes the most likely one.

    top_k keeps the k most likely (0: all), top_p the fewest whose probability reaches p (nucleus
    sampling, arXiv 1904.09751).
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        excluded = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        logits = logits.masked_fill(excluded.scatter(1, order, excluded), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
