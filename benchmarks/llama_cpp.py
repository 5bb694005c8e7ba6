"""Tokens and logits of llama.cpp: `python -m benchmarks.llama_cpp GGUF OUT`, for `serving`.

Reads {"texts": [...], "ids": [...]} from stdin and writes {"texts": ids of each text, "bos", "eos",
"add_bos", "ends"} as JSON to stdout and the logits [len(ids), vocabulary] to OUT. Needs the package
cyllama, a small third party's build of llama.cpp, on PYTHONPATH: hence a process of its own.
"""

import json
import sys
from typing import Any

import numpy as np
from cyllama.llama import llama_cpp


class Model(llama_cpp.LlamaModel):
    """cyllama's model; its context asks the model for a size that only the vocabulary has."""

    @property
    def n_vocab(self) -> int:
        """Ids of the vocabulary, padding included."""
        return int(self.get_vocab().n_vocab)


def last_logits(model: Model, ids: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Logits [vocabulary] after a text; a context of its own, since cyllama keeps the state."""
    context = llama_cpp.LlamaContext(model, verbose=False)
    batch = llama_cpp.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1, verbose=False)
    batch.set_batch(ids, 0, False)
    context.decode(batch)
    return np.array(context.get_logits(), np.float32)


def main(gguf: str, out: str) -> None:
    """Read texts and ids, write llama.cpp's ids and logits."""
    llama_cpp.disable_logging()
    asked = json.load(sys.stdin)
    model = Model(path_model=gguf, verbose=False)
    vocabulary = model.get_vocab()
    texts = [vocabulary.tokenize(text, True, True) for text in asked["texts"]]
    ids = asked["ids"]
    np.save(out, np.stack([last_logits(model, ids[: end + 1]) for end in range(len(ids))]))
    eos = vocabulary.token_eos()
    answer = {
        "texts": texts,
        "bos": vocabulary.token_bos(),
        "eos": eos,
        "add_bos": vocabulary.get_add_bos(),
        "ends": vocabulary.is_eog(eos),
    }
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main(*sys.argv[1:])
