"""Tokenizing in pieces and batches gives the ids of the whole text."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from datatrove.data import Document
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data import tokenizer
from data.pipeline.shard import CleanDocuments, ShardingSpec, batches, encode, pieces_of, shard_task
from data.stream.manifests import NARROW
from data.tokenizer import EOS, EOS_TOKEN

ALPHABET = st.sampled_from(
    [
        "a",
        "river",
        "7",
        "12345",
        ".",
        "...",
        "<|endoftext|>",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\t",
        "\xe9",
        "\u4e2d",
        "\r\n",
    ]
)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    # white space is frequent, so that runs of it become tokens
    texts = ["a river\n\n\n\nriver   12345.\n \n\triver\n\n\n\n"] * 3
    trained = tokenizer.train(texts, 280, tmp_path_factory.mktemp("v"))
    trained.encode_special_tokens = True
    return trained


@settings(max_examples=300)
@given(st.lists(ALPHABET, max_size=60).map("".join), st.integers(1, 40))
def test_pieces_tokenize_like_the_whole_text(vocabulary: Tokenizer, text: str, size: int) -> None:
    pieces = pieces_of(vocabulary, text, size)
    assert "".join(pieces) == text
    whole = vocabulary.encode(text, add_special_tokens=False).ids
    assert [
        id for piece in pieces for id in vocabulary.encode(piece, add_special_tokens=False).ids
    ] == whole


def test_long_text_is_split_near_the_size(vocabulary: Tokenizer) -> None:
    text = "".join(f"line {i} of the text\n" for i in range(1000))
    pieces = pieces_of(vocabulary, text, 500)
    assert max(map(len, pieces)) <= 500 and len(pieces) < 50
    assert pieces_of(vocabulary, "x" * 1000, 10) == ["x" * 1000]


def test_documents_have_one_end_token(vocabulary: Tokenizer) -> None:
    texts = ["a river", f"a {EOS_TOKEN} b", "", "river\n" * 50]
    for text, ids in zip(texts, encode(vocabulary, EOS, NARROW, texts), strict=True):
        assert ids[-1] == EOS and (ids == EOS).sum() == 1
        assert vocabulary.decode(ids[:-1].tolist(), skip_special_tokens=False) == text


def test_batches_are_bounded_by_size() -> None:
    documents = [Document(text="x" * n, id=str(n)) for n in (10, 10, 500, 1, 1, 1, 90, 90)]
    result = list(batches(documents, 100))
    assert [document for batch in result for document in batch] == documents
    assert [sum(len(d.text) for d in batch) for batch in result] == [520, 183] or len(result) > 2


def test_the_seed_decides_the_order_inside_a_shard(tmp_path: Path, vocabulary: Tokenizer) -> None:
    vocabulary.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "clean").mkdir()
    rows = [{"text": f"river {i}", "id": str(i), "group": str(i)} for i in range(200)]
    with gzip.open(tmp_path / "clean" / "00000.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    clean = CleanDocuments(tmp_path / "clean", ["00000.jsonl.gz"], len(rows))
    shards = {}
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        files = shard_task(
            ShardingSpec(clean, tmp_path / name, tmp_path / "tokenizer.json", seed, 20.0, 1), 0
        )
        assert sum(file["documents"] for file in files) == 200
        shards[name] = {
            file["name"]: (tmp_path / name / file["name"]).read_bytes() for file in files
        }
        assert not list((tmp_path / name).glob("*.part"))
    assert shards["a"] == shards["b"] != shards["c"]
    lengths = [len(content) for content in shards["a"].values()]
    assert lengths == [len(content) for content in shards["c"].values()]
    ids = np.frombuffer(shards["a"]["train_00000.ds"], dtype="<u2")
    texts = [
        vocabulary.decode(document[document != EOS].tolist())
        for document in np.split(ids, np.flatnonzero(ids == EOS)[:-1] + 1)
    ]
    assert texts != sorted(texts, key=lambda text: int(text.split()[1])) and len(set(texts)) == len(
        texts
    )
