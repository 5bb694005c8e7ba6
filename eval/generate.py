"""Generate text from a run's newest checkpoint, streamed to the terminal.

Decoding is recurrent: a token costs the same time and memory whatever came before it. A prompt is read in chunks with
the state carried, so that any length fits. Prompts of a batch are aligned on the right; where one begins, convolution
and scan forget the padding before it, so that a row's result is the one it gets alone.

examples:
  python eval/generate.py +experiment=demo eval.prompt="import os"
  python eval/generate.py +experiment=demo eval.new_tokens=200 eval.sampling.temperature=0
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from tokenizers import Tokenizer
from torch import Tensor

from core.command import command
from core.errors import InputError
from data.loader import tokenizer_path
from data.tokenizer import EOS
from data.tokenizer import load as load_tokenizer
from eval import checkpoint
from eval.config import EvaluationConfig, Sampling
from eval.decode import Decoder
from model.mamba import FalconMamba, State

PREFILL_TOKENS = 4096  # of a chunk, all rows together: its activations are the memory of a prompt of any length
UNFINISHED = "\ufffd"  # what decoding gives for bytes of a character that is not complete yet
GREEDY = Sampling(temperature=0.0, top_k=0, top_p=1.0, seed=0)


@torch.no_grad()
def prefill(model: FalconMamba, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, State]:
    """Read prompts of any lengths. Returns the final states [b, e] behind them and the layers' states."""
    device = model.embedding.weight.device
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
        starts = torch.arange(low, high, device=device) == first if padded else None
        hidden, state = model.extend(torch.tensor(rows, device=device), state, starts)
    assert state is not None
    return hidden[:, -1], state


def _window(prompt: Sequence[int], longest: int, low: int, high: int) -> list[int]:
    """Places [low, high) of a prompt that ends at `longest`, with end-of-text before it."""
    pad = longest - len(prompt)
    return [EOS] * max(0, min(high, pad) - low) + list(prompt[max(0, low - pad) : max(0, high - pad)])


@torch.no_grad()
def generate(
    model: FalconMamba,
    prompts: Sequence[Sequence[int]],
    count: int,
    sampling: Sampling = GREEDY,
    *,
    compiled: bool = False,
) -> Iterator[Tensor]:
    """Yield `count` times the next token [b] of every prompt; the caller stops when it has enough.

    compiled is for long texts on a CPU: see Decoder.
    """
    hidden, state = prefill(model, prompts)
    generator = torch.Generator(hidden.device).manual_seed(sampling.seed)
    tokens = choose(model.lm_head(hidden.to(model.lm_head.weight.dtype)), sampling, generator)
    yield tokens
    decoder = Decoder(model, state, compiled=compiled)
    for _ in range(count - 1):
        tokens = choose(decoder(tokens), sampling, generator)
        yield tokens


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """Next tokens [b] of logits [b, v]: the most likely one at temperature 0, else drawn.

    top_k keeps the k most likely (0: all), top_p the fewest whose probability reaches p (arXiv 1904.09751).
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[:, -1:], -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        behind = probabilities.cumsum(-1) - probabilities >= sampling.top_p
        logits = logits.masked_fill(behind.scatter(1, order, behind), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)


def stream(model: FalconMamba, tokenizer: Tokenizer, prompt: str, count: int, sampling: Sampling) -> Iterator[str]:
    """Pieces of text after a prompt, as soon as their characters are complete, up to end-of-text."""
    ids: list[int] = []
    shown = ""
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids or [EOS]
    for tokens in generate(model, [prompt_ids], count, sampling):
        token = int(tokens)
        if token == EOS:
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        if text.endswith(UNFINISHED):
            continue
        yield text[len(shown) :]
        shown = text
        if text.endswith("\n"):  # what is behind needs no decoding again
            ids, shown = [], ""


def show(config: EvaluationConfig) -> None:
    """Stream a continuation of the configured prompt."""
    model = checkpoint.load(config, checkpoint.find(config), checkpoint.best_device())
    tokenizer = load_tokenizer(tokenizer_path(config.data))
    print(config.eval.prompt, end="", flush=True)
    for piece in stream(model, tokenizer, config.eval.prompt, config.eval.new_tokens, config.eval.sampling):
        print(piece, end="", flush=True)
    print(flush=True)


main = command(EvaluationConfig)(show)

if __name__ == "__main__":
    main()
