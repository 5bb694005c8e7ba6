"""Shards: reading across files, and every way a manifest can be wrong is one clear error."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import InputError
from data.config import DataConfig
from data.stream.manifests import (
    DTYPE,
    MANIFEST,
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


def test_reads_across_files(config: DataConfig) -> None:
    folder = source_folder(config, "prose")
    manifest = read_manifest(folder)
    shards = Shards(folder, manifest, "train")
    whole = np.concatenate(
        [np.fromfile(folder / file.name, dtype=DTYPE) for file in manifest.splits["train"]]
    )
    assert shards.tokens == len(whole) == manifest.tokens("train")
    border = manifest.splits["train"][0].tokens
    for start, count in (
        (0, 5),
        (border - 3, 7),
        (border, 4),
        (len(whole) - 2, 2),
        (0, len(whole)),
    ):
        assert np.array_equal(shards.read(start, count), whole[start : start + count])


def change(raw: dict[str, Any], key: str, value: object) -> None:
    raw["splits"]["train"][0][key] = value


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda raw: change(raw, "name", "../../../secret.ds"), "outside its folder"),
        (lambda raw: change(raw, "name", "/etc/passwd"), "outside its folder"),
        (lambda raw: change(raw, "name", "gone.ds"), "is missing"),
        (lambda raw: change(raw, "tokens", 3), "instead of 6"),
        (lambda raw: raw.pop("splits"), "not a manifest"),
        (lambda raw: change(raw, "extra", 1), "not a manifest"),
    ],
)
def test_a_wrong_manifest_is_refused(
    config: DataConfig, spoil: Callable[[dict[str, Any]], None], says: str
) -> None:
    path = source_folder(config, "prose") / MANIFEST
    raw = json.loads(path.read_text())
    spoil(raw)
    path.write_text(json.dumps(raw))
    with pytest.raises(InputError, match=says):
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
    with pytest.raises(InputError, match="ids up to 95, data.tokenizer.vocab_size is 50"):
        open_manifests(config)


def test_missing_data_names_the_command(config: DataConfig) -> None:
    (source_folder(config, "prose") / MANIFEST).unlink()
    with pytest.raises(InputError, match=r"data/prepare.py"):
        open_manifests(config)
