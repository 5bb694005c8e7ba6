"""Streamed generation."""

import pytest
import torch

from eval.generate import stream
from model.generation import GREEDY
from tests.tiny import TINY, model_of


def test_streaming_yields_complete_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """A two-byte character of two tokens is yielded once; end-of-text ends the stream."""
    from data.tokenizer import EOS, untrained_tokenizer

    tokenizer = untrained_tokenizer()
    # in the byte-level alphabet: a, e acute, newline
    byte_ids = {"a": 20, "\u00c3": 21, "\u00a9": 22, "\u010a": 23}

    class FakeTokenizer:
        def encode(self, text: str, add_special_tokens: bool) -> object:
            return type("Encoding", (), {"ids": [byte_ids["a"] for _ in text]})()

        def decode(self, ids: list[int]) -> str:
            letters = {index: letter for letter, index in byte_ids.items()}
            return str(tokenizer.decoder.decode([letters[i] for i in ids]))

    sequence = [20, 21, 22, 23, 20, EOS, 20]
    model = model_of(TINY)
    monkeypatch.setattr(model, "stream", lambda *arguments: (torch.tensor([i]) for i in sequence))
    texts = list(stream(model, FakeTokenizer(), EOS, "a", 7, GREEDY))  # type: ignore[arg-type]
    assert texts == ["a", "\u00e9", "\n", "a"]
