"""Generate text from a run's newest checkpoint and stream it to the terminal.

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
from data.tokenizer import load as load_tokenizer
from data.vocabulary import end_id
from eval.config import EvaluationConfig
from eval.model_source import best_device, find_checkpoint, load_model
from model.config import Sampling
from model.mamba import FalconMamba

INCOMPLETE = "\ufffd"  # the decoder's output for an incomplete UTF-8 character


def stream(
    model: FalconMamba,
    tokenizer: Tokenizer,
    eos: int,
    prompt: str,
    max_new_tokens: int,
    sampling: Sampling,
) -> Iterator[str]:
    """Yield the continuation of a prompt up to end-of-text, in complete characters."""
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False).ids or [eos]
    ids = prompt_ids[-1:]  # some decoders drop the space before the first id
    yielded = tokenizer.decode(ids)
    for tokens in model.stream([prompt_ids], max_new_tokens, sampling):
        token = int(tokens)
        if token == eos:
            break
        ids.append(token)
        text = tokenizer.decode(ids)
        if text.endswith(INCOMPLETE):
            continue
        yield text[len(yielded) :]
        yielded = text
        if text.endswith("\n"):  # a finished line need not be decoded again
            ids = [token]
            yielded = tokenizer.decode(ids)


def generate(config: EvaluationConfig) -> None:
    """Print the configured prompt and stream its continuation."""
    model = load_model(find_checkpoint(config), best_device())
    path = tokenizer_path(config.data)
    tokenizer = load_tokenizer(path)
    print(config.generate.prompt, end="", flush=True)
    for text in stream(
        model,
        tokenizer,
        end_id(path, tokenizer),
        config.generate.prompt,
        config.generate.new_tokens,
        config.generate.sampling,
    ):
        print(text, end="", flush=True)
    print(flush=True)


main = command(EvaluationConfig)(generate)

if __name__ == "__main__":
    main()
