"""Generate text from a model and stream it to the terminal.

The model is a run, a checkpoint or a FalconMamba folder of transformers, in each case with its own
tokenizer; or the newest checkpoint of an experiment's run. prompt= takes a text as it is;
generate.prompt= is a value of Hydra's, in which brackets and commas need quotation marks.

examples:
  python eval/generate.py checkpoint=runs/demo prompt="def main():"
  python eval/generate.py checkpoint=/models/falcon-mamba-7b generate.new_tokens=200
  python eval/generate.py +experiment=demo generate.prompt="import os"
  python eval/generate.py +experiment=demo generate.new_tokens=200 generate.sampling.temperature=0
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)
from core.entry import explain_missing_extras

explain_missing_extras()

from tokenizers import Tokenizer

from core.command import command
from core.run import Run
from data.tokenizer import load as load_tokenizer
from data.vocabulary import end_id
from eval.config import GenerateConfig
from eval.model_source import best_device, load_any
from eval.short_keys import expand_short_keys
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


@dataclass
class GenerationConfig:
    """Config sections of eval/generate.py."""

    run: Run
    generate: GenerateConfig


def generate(config: GenerationConfig) -> None:
    """Print the configured prompt and stream its continuation."""
    settings = config.generate
    model, path = load_any(config.run, best_device())
    tokenizer = load_tokenizer(path)
    end = end_id(path, tokenizer)
    print(settings.prompt, end="", flush=True)
    for text in stream(
        model, tokenizer, end, settings.prompt, settings.new_tokens, settings.sampling
    ):
        print(text, end="", flush=True)
    print(flush=True)


main = command(GenerationConfig)(generate)

if __name__ == "__main__":
    sys.argv[1:] = expand_short_keys(sys.argv[1:])
    main()
