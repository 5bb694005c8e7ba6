"""Generate text from a run's newest checkpoint, streamed to the terminal.

examples:
  python eval/generate.py +experiment=demo generate.prompt="import os"
  python eval/generate.py +experiment=demo generate.new_tokens=200 generate.sampling.temperature=0
"""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras

explain_missing_extras()

from tokenizers import Tokenizer

from core.command import command
from data.stream.manifests import tokenizer_path
from data.tokenizer import EOS
from data.tokenizer import load as load_tokenizer
from eval.config import EvaluationConfig
from eval.subject import best_device, find_checkpoint, load_model
from model.config import Sampling
from model.mamba import FalconMamba

UNFINISHED = "\ufffd"  # what decoding gives for bytes of a character that is not complete yet


def stream(
    model: FalconMamba, tokenizer: Tokenizer, prompt: str, count: int, sampling: Sampling
) -> Iterator[str]:
    """Yield text after a prompt up to end-of-text, in pieces of complete characters."""
    ids: list[int] = []
    shown = ""
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids or [EOS]
    for tokens in model.stream([prompt_ids], count, sampling):
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
    model = load_model(config, find_checkpoint(config), best_device())
    tokenizer = load_tokenizer(tokenizer_path(config.data))
    print(config.generate.prompt, end="", flush=True)
    for piece in stream(
        model,
        tokenizer,
        config.generate.prompt,
        config.generate.new_tokens,
        config.generate.sampling,
    ):
        print(piece, end="", flush=True)
    print(flush=True)


main = command(EvaluationConfig)(show)

if __name__ == "__main__":
    main()
