"""Text as it is generated."""

import pytest
import torch

from eval.generate import stream
from model.generation import GREEDY
from tests.tiny import TINY, model_of


def test_streaming_yields_whole_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A character of two bytes, one a token, appears when both are there; end-of-text ends the
    stream.
    """
    from data.tokenizer import EOS, untrained_tokenizer

    tokenizer = untrained_tokenizer()
    # in the byte-level alphabet: a, e acute, newline
    bytes_of = {"a": 20, "\u00c3": 21, "\u00a9": 22, "\u010a": 23}

    class Vocabulary:
        def encode(self, text: str, add_special_tokens: bool) -> object:
            return type("Encoding", (), {"ids": [bytes_of["a"] for _ in text]})()

        def decode(self, ids: list[int]) -> str:
            letters = {number: letter for letter, number in bytes_of.items()}
            return str(tokenizer.decoder.decode([letters[i] for i in ids]))

    sequence = [20, 21, 22, 23, 20, EOS, 20]
    model = model_of(TINY)
    monkeypatch.setattr(model, "stream", lambda *arguments: (torch.tensor([i]) for i in sequence))
    pieces = list(stream(model, Vocabulary(), "a", 7, GREEDY))  # type: ignore[arg-type]
    assert pieces == ["a", "\u00e9", "\n", "a"]
