"""Token shards made up in a second, with structure to learn: for tests of everything behind the
tokenizer.
"""

from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models

from core.files import sha256_of
from data.config import DataConfig, Source, Stage, TokenizerConfig
from data.stream.manifests import (
    DTYPE,
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
    """Three short stages over two sources: contexts 16 and 32, and a decay stage with another
    mixture.
    """
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
    """Write shards, manifests and, where there is no tokenizer, a stand-in; returns the config that
    reads them.
    """
    config = corpus_config(folder, vocab_size)
    if not tokenizer_path(config).is_file():
        tokenizer_path(config).parent.mkdir(parents=True)
        words = [
            *SPECIAL_TOKENS,
            *(f"word{number}" for number in range(len(SPECIAL_TOKENS), vocab_size)),
        ]
        stand_in = Tokenizer(
            models.WordLevel({word: number for number, word in enumerate(words)}, EOS_TOKEN)
        )
        stand_in.add_special_tokens(list(SPECIAL_TOKENS))
        stand_in.save(str(tokenizer_path(config)))
    for number, name in enumerate(SOURCES):
        home = source_folder(config, name)
        home.mkdir(parents=True)
        splits = {}
        for place, split in enumerate(SPLITS):
            splits[split] = [
                _shard(
                    home, f"{split}_{part}.ds", number, part + 2 * place, tokens // 2, vocab_size
                )
                for part in (0, 1)
            ]
        manifest = Manifest(
            name,
            "CC0-1.0",
            "curated",
            "0" * 64,
            sha256_of(tokenizer_path(config)),
            EOS,
            vocab_size,
            splits,
        )
        write_manifest(home, manifest)
    return config


def _shard(
    home: Path, name: str, source: int, part: int, tokens: int, vocab_size: int
) -> ShardFile:
    """Documents that count upwards by a step of their source's, each ended by eos."""
    random = np.random.default_rng([source, part, tokens])
    ids: list[int] = []
    while len(ids) < tokens:
        start, length = random.integers(12, vocab_size), random.integers(3, 30)
        ids += [int(12 + (start + (source + 1) * i) % (vocab_size - 12)) for i in range(length)] + [
            EOS
        ]
    ids = ids[: tokens - 1] + [EOS]
    (home / name).write_bytes(np.array(ids, dtype=DTYPE).tobytes())
    return ShardFile(name, tokens, ids.count(EOS), sha256_of(home / name))
