"""Corpora written by megatron-core become shards with the same documents."""

from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import InputError
from data import tokenizer
from data.config import DataConfig, Source, Stage, TokenizerConfig
from data.prepare import prepare
from data.stream.documents import Documents
from data.stream.manifests import SPLITS, open_manifests, source_folder
from data.tokenizer import EOS


def write_pair(prefix: Path, documents: list[list[list[int]]], dtype: type) -> None:
    """Write `.bin` and `.idx` of documents [sequence [id]], as tools/preprocess_data.py does."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        for sequence in document:
            builder.add_item(torch.tensor(sequence))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def config(root: Path) -> DataConfig:
    tokenizer.train(["a river and a stone"] * 3, 275, root / "vocabulary")
    return DataConfig(
        folder=str(root / "data"),
        seed=3,
        block_tokens=16,
        heldout_percent=30.0,
        reset_state=True,
        workers=1,
        tokenizer=TokenizerConfig(str(root / "vocabulary" / tokenizer.FILE), None, 300, 1),
        sources={"web": Source("megatron", str(root / "raw"), "CC0-1.0", 1.0, 2)},
        stages=[Stage("only", 16, 16, {"web": 1.0})],
    )


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_every_document_is_in_a_shard(
    tmp_path: Path, dtype: type, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    texts = [random.integers(12, 270, random.integers(1, 30)).tolist() for _ in range(60)]
    (tmp_path / "raw").mkdir()
    plain = [[text] for text in texts[:20]]
    with_eos = [[[*text, EOS]] for text in texts[20:40]]
    # two sequences per document, as with --split-sentences
    split = [[text[:3], text[3:]] if len(text) > 3 else [text] for text in texts[40:]]
    for name, documents in (("a", plain), ("b", with_eos), ("c", split)):
        write_pair(tmp_path / "raw" / name, documents, dtype)
    cfg = config(tmp_path)
    prepare(cfg)
    manifest = open_manifests(cfg)["web"]
    sharded = []
    for name in SPLITS:
        documents = Documents(source_folder(cfg, "web"), manifest, name)
        assert len(documents) > 5
        sharded += [documents.ids(number).tolist() for number in range(len(documents))]
    assert sorted(sharded) == sorted([*text, EOS] for text in texts)
    assert "web           Megatron index" in capsys.readouterr().out
    prepare(cfg)
    assert "web: reused" in capsys.readouterr().out


def test_invalid_corpora_are_refused(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    raw = tmp_path / "raw"
    raw.mkdir()
    with pytest.raises(InputError, match=r"has no .idx files: set data.sources"):
        prepare(cfg)
    (raw / "a.idx").write_bytes(b"something else, long enough to be a header of an index")
    with pytest.raises(InputError, match=r"has a.idx without a.bin"):
        prepare(cfg)
    (raw / "a.bin").write_bytes(b"")
    with pytest.raises(InputError, match="is not a Megatron index of version 1"):
        prepare(cfg)
    write_pair(raw / "a", [[[12, 13, 290]]], np.uint16)
    with pytest.raises(InputError, match="document 0 has id 290, the tokenizer has 2"):
        prepare(cfg)
    write_pair(raw / "a", [[[12, -5, 13]]], np.int32)
    with pytest.raises(InputError, match="document 0 has id -5, the tokenizer has 2"):
        prepare(cfg)
    write_pair(raw / "a", [[[12, 13, 14]]], np.uint16)
    (raw / "a.bin").write_bytes((raw / "a.bin").read_bytes()[:-2])
    with pytest.raises(InputError, match="is truncated inside document 0: download it again"):
        prepare(cfg)
