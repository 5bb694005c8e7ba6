"""Shards: reads across files; a wrong manifest or shard is refused with one clear error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import InputError
from data.config import DataConfig
from data.stream.manifests import (
    MANIFEST,
    NARROW,
    open_manifests,
    read_manifest,
    source_folder,
    tokenizer_path,
)
from data.stream.shards import Shards
from tests.corpus import make_corpus


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    return make_corpus(tmp_path)


def test_reads_cross_file_boundaries(config: DataConfig) -> None:
    folder = source_folder(config, "prose")
    manifest = read_manifest(folder)
    shards = Shards(folder, manifest, "train")
    tokens = np.concatenate(
        [np.fromfile(folder / file.name, dtype=NARROW) for file in manifest.splits["train"]]
    )
    assert shards.tokens == len(tokens) == manifest.tokens("train")
    boundary = manifest.splits["train"][0].tokens
    for start, count in (
        (0, 5),
        (boundary - 3, 7),
        (boundary, 4),
        (len(tokens) - 2, 2),
        (0, len(tokens)),
    ):
        assert np.array_equal(shards.read(start, count), tokens[start : start + count])


def set_in_first_shard(raw: dict[str, Any], key: str, value: object) -> None:
    raw["splits"]["train"][0][key] = value


@pytest.mark.parametrize(
    ("corrupt", "message"),
    [
        (lambda raw: set_in_first_shard(raw, "name", "../../../secret.ds"), "outside its folder"),
        (lambda raw: set_in_first_shard(raw, "name", "/etc/passwd"), "outside its folder"),
        (lambda raw: set_in_first_shard(raw, "name", "gone.ds"), "is missing"),
        (lambda raw: set_in_first_shard(raw, "tokens", 3), "instead of 6"),
        (lambda raw: raw.pop("splits"), "not a manifest"),
        (lambda raw: set_in_first_shard(raw, "extra", 1), "not a manifest"),
    ],
)
def test_a_wrong_manifest_is_refused(
    config: DataConfig, corrupt: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = source_folder(config, "prose") / MANIFEST
    raw = json.loads(path.read_text())
    corrupt(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError, match=message):
        open_manifests(config)


def test_a_truncated_shard_is_refused(config: DataConfig) -> None:
    shard = source_folder(config, "sums") / "train_1.ds"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(InputError, match=r"train_1.ds has \d+ bytes instead of"):
        open_manifests(config)


def test_another_tokenizer_is_refused(config: DataConfig) -> None:
    tokenizer_path(config).write_text('{"other": 1}')
    with pytest.raises(InputError, match="another tokenizer"):
        open_manifests(config)


def test_ids_beyond_the_vocabulary_are_refused(config: DataConfig) -> None:
    config.tokenizer.vocab_size = 50
    with pytest.raises(InputError, match="ids up to 95, but data.tokenizer.vocab_size is 50"):
        open_manifests(config)


def test_missing_data_names_the_command(config: DataConfig) -> None:
    (source_folder(config, "prose") / MANIFEST).unlink()
    with pytest.raises(InputError, match=r"data/prepare.py"):
        open_manifests(config)
