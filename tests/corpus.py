"""Synthetic token shards with structure to learn, for tests that need no tokenizer training."""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models

from core.files import sha256_of
from data.config import DataConfig, Source, Stage, TokenizerConfig
from data.stream.manifests import (
    NARROW,
    SPLITS,
    Manifest,
    ShardFile,
    source_folder,
    tokenizer_path,
    write_manifest,
)
from data.tokenizer import EOS, EOS_TOKEN, SPECIAL_TOKENS

SOURCES = ("prose", "sums")
BLOCK = 64


def corpus_config(folder: Path, vocab_size: int = 96) -> DataConfig:
    """Config of three short stages over two sources, with contexts 16 and 32 and two mixtures."""
    return DataConfig(
        folder=str(folder),
        seed=5,
        block_tokens=BLOCK,
        heldout_percent=10.0,
        reset_state=True,
        workers=1,
        tokenizer=TokenizerConfig(None, None, vocab_size, 1),
        sources={name: Source("curated", "raw", "CC0-1.0", 4.0, 1) for name in SOURCES},
        stages=[
            Stage("short", 20 * BLOCK, 16, {"prose": 3, "sums": 1}),
            Stage("long", 20 * BLOCK, 32, {"prose": 1, "sums": 1}),
            Stage("decay", 12 * BLOCK, 32, {"prose": 1, "sums": 3}),
        ],
    )


def make_corpus(folder: Path, vocab_size: int = 96, tokens: int = 60 * BLOCK + 6) -> DataConfig:
    """Write shards, manifests and, if missing, a tokenizer; returns the config that reads them."""
    config = corpus_config(folder, vocab_size)
    if not tokenizer_path(config).is_file():
        tokenizer_path(config).parent.mkdir(parents=True)
        words = [
            *SPECIAL_TOKENS,
            *(f"word{index}" for index in range(len(SPECIAL_TOKENS), vocab_size)),
        ]
        tokenizer = Tokenizer(
            models.WordLevel({word: index for index, word in enumerate(words)}, EOS_TOKEN)
        )
        tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
        tokenizer.save(str(tokenizer_path(config)))
    for source_index, name in enumerate(SOURCES):
        folder = source_folder(config, name)
        folder.mkdir(parents=True)
        splits: dict[str, list[ShardFile]] = {split: [] for split in SPLITS}
        for shard_index in range(2 * len(SPLITS)):
            split = SPLITS[shard_index // 2]
            path = folder / f"{split}_{shard_index % 2}.ds"
            shard = _write_shard(path, source_index, shard_index, tokens // 2, vocab_size)
            splits[split].append(shard)
        manifest = Manifest(
            source=name,
            licence="CC0-1.0",
            recipe="curated",
            recipe_sha256="0" * 64,
            tokenizer_sha256=sha256_of(tokenizer_path(config)),
            eos=EOS,
            vocab_size=vocab_size,
            splits=splits,
        )
        write_manifest(folder, manifest)
    return config


def _write_shard(
    path: Path, source_index: int, shard_index: int, tokens: int, vocab_size: int
) -> ShardFile:
    """Write documents that count upwards by `source_index` + 1, each ended by eos."""
    random = np.random.default_rng([source_index, shard_index, tokens])
    ids: list[int] = []
    while len(ids) < tokens:
        start = random.integers(12, vocab_size)
        steps = np.arange(random.integers(3, 30)) * (source_index + 1)
        ids += (12 + (start + steps) % (vocab_size - 12)).tolist() + [EOS]
    ids = ids[: tokens - 1] + [EOS]
    path.write_bytes(np.array(ids, dtype=NARROW).tobytes())
    return ShardFile(path.name, tokens, ids.count(EOS), sha256_of(path))
