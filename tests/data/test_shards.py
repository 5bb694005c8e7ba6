"""Shards: reads across files; a wrong manifest or shard is refused with one clear error."""

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from core.errors import InputError
from data.config import DataConfig
from data.pipeline.shard import describe_shard
from data.stream.documents import document_ends
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
from tests.mutations import damage_json, edit_json, fresh_copy


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


def in_first(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda raw: raw["splits"]["train"][0].update(values)


TAMPERS: tuple[tuple[Callable[[Any], Any], str], ...] = (
    (lambda raw: raw.update(eos="x"), "is not a manifest .eos is 'x'"),
    (lambda raw: raw.update(eos=-1), "eos is -1"),
    (lambda raw: raw.update(eos=96), "eos 96 and vocab_size 96 cannot be"),
    (lambda raw: raw.update(eos=10), "train_0.ds ends with id 11, but .* has eos 10"),
    (lambda raw: raw.update(vocab_size="many"), "vocab_size is 'many'"),
    (lambda raw: raw.update(vocab_size=-1), "vocab_size is -1"),
    (lambda raw: raw.update(vocab_size=10**6), "bytes instead of"),
    (lambda raw: raw.update(recipe_sha256="0"), "recipe_sha256 is '0'"),
    (lambda raw: raw.update(splits=None), "splits is None"),
    (lambda raw: raw["splits"].pop("heldout") and None, "splits has train"),
    (lambda raw: raw["splits"].update(more=[]), "splits has train, heldout, more"),
    (lambda raw: raw["splits"]["train"].append(raw["splits"]["train"][0]), "train_0.ds twice"),
    (lambda raw: raw["splits"]["heldout"].append(raw["splits"]["train"][0]), "train_0.ds twice"),
    (lambda raw: [], r"is not a manifest \(it is \[\]"),
    (in_first(name=5), "splits.train.0.name is 5"),
    (in_first(name=""), "names '', which is outside"),
    (in_first(name=".."), "outside its folder"),
    (in_first(name="sub/train_0.ds"), "outside its folder"),
    (in_first(name="x" * 300), "cannot be read: .*too long"),
    (in_first(tokens=1923.0), "splits.train.0.tokens is 1923.0"),
    (in_first(tokens="1923"), "splits.train.0.tokens is '1923'"),
    (in_first(tokens=-3), "splits.train.0.tokens is -3"),
    (in_first(documents="x"), "splits.train.0.documents is 'x'"),
    (in_first(documents=0), "train_0.ds with 0 documents"),
    (in_first(documents=10**6), "train_0.ds with 1000000 documents"),
    (in_first(sha256=None), "splits.train.0.sha256 is None"),
    (in_first(sha256="0" * 63), "splits.train.0.sha256 is '000"),
)


@pytest.mark.parametrize(("tamper", "message"), TAMPERS, ids=[words for _, words in TAMPERS])
def test_a_tampered_manifest_is_refused(
    config: DataConfig, tamper: Callable[[Any], Any], message: str
) -> None:
    folder = source_folder(config, "prose")
    edit_json(
        folder / MANIFEST,
        lambda raw: changed if isinstance(changed := tamper(raw), list) else raw,
    )
    with pytest.raises(InputError, match=message) as raised:
        read_manifest(folder)
    assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


def test_every_mutation_of_a_manifest_is_refused_or_read_as_it_is(
    config: DataConfig, tmp_path: Path
) -> None:
    rng = random.Random(18)
    source, refused = source_folder(config, "prose"), 0
    for _ in range(200):
        folder = fresh_copy(source, tmp_path / "copy")
        what = damage_json(folder / MANIFEST, rng)
        try:
            manifest = read_manifest(folder)
        except InputError as error:
            assert str(folder) in str(error) and "\n" not in str(error), what
            refused += 1
        else:
            assert asdict(manifest) == {
                "versions": {},
                **json.loads((folder / MANIFEST).read_text()),
            }, what
    assert 100 < refused < 200


def test_another_end_token_than_the_tokenizers_is_refused(config: DataConfig) -> None:
    """Shards and manifest may agree on it all the same."""
    for name in config.sources:
        folder = source_folder(config, name)
        for file in read_manifest(folder).files():
            ids = np.fromfile(folder / file.name, NARROW)
            np.where(ids == 11, 10, ids).astype(NARROW).tofile(folder / file.name)
        edit_json(folder / MANIFEST, lambda raw: raw.update(eos=10))
    with pytest.raises(InputError, match="prose/manifest.json has eos 10, but .* ends .* with 11"):
        open_manifests(config)


def test_an_id_outside_the_vocabulary_is_named_where_it_is_read(config: DataConfig) -> None:
    folder = source_folder(config, "prose")
    manifest = read_manifest(folder)
    path = folder / manifest.splits["train"][0].name
    ids = np.fromfile(path, NARROW)
    ids[7] = 60_000
    ids.tofile(path)
    shards = Shards(folder, manifest, "train")
    assert len(shards.read(0, 7)) == 7
    with pytest.raises(InputError, match=f"{path.name} has id 60000 at token 7, its vocabulary"):
        shards.read(3, 20)
    path.write_bytes(b"")
    with pytest.raises(InputError, match=f"{path.name} cannot be read"):
        Shards(folder, manifest, "train").read(0, 5)


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


def swap_ends(ends: Any) -> bytes:
    """The index with its first documents longer, and as many documents and tokens."""
    return bytes(np.array([*ends[1:2], *ends[1:]], "<u8").tobytes())


@pytest.mark.parametrize(
    ("damage", "message", "is_seen_at_once"),
    [
        (lambda ends: b"", "its index says 0", True),
        (lambda ends: ends.tobytes()[:-3], "are no 64-bit numbers", True),
        (lambda ends: ends[:-1].tobytes(), "its index says", True),
        (swap_ends, "end tokens that are not where", False),
    ],
)
def test_a_damaged_index_is_named(
    config: DataConfig, damage: Callable[[Any], bytes], message: str, is_seen_at_once: bool
) -> None:
    folder = source_folder(config, "prose")
    manifest = read_manifest(folder)
    file = manifest.splits["train"][0]
    shard, index = folder / file.name, folder / f"{file.name}.index"
    ends = np.flatnonzero(np.fromfile(shard, manifest.dtype) == manifest.eos).astype("<u8") + 1
    index.write_bytes(ends.tobytes())
    assert describe_shard(shard, manifest.eos, manifest.vocab_size) == file
    assert document_ends(folder, file).tolist() == ends.tolist()
    index.write_bytes(damage(ends))
    with pytest.raises(ValueError, match=message):
        describe_shard(shard, manifest.eos, manifest.vocab_size)
    if is_seen_at_once:
        with pytest.raises(InputError, match="is not the index of"):
            document_ends(folder, file)
