"""Jobs that make the shards of a source, from clean documents or a Megatron corpus."""

from pathlib import Path
from typing import Any

from core.errors import InputError
from data import tokenizer, vocabulary
from data.config import DataConfig
from data.pipeline import megatron, shard
from data.pipeline.shard import CleanDocuments, ShardingSpec
from data.readers.listing import Listing
from data.stream.manifests import SPLITS, ShardFile, tokenizer_path


def shard_jobs(
    cfg: DataConfig, name: str, listing: Listing, clean: CleanDocuments | None, folder: Path
) -> list[Any]:
    """One job per task that writes shards to `folder`; without `clean`, from a Megatron corpus."""
    source = cfg.sources[name]
    tokenizer_file = tokenizer_path(cfg)
    ranks = range(source.tasks)
    if clean is not None:
        spec = ShardingSpec(
            clean, folder, tokenizer_file, cfg.seed, cfg.heldout_percent, source.tasks
        )
        return [(shard.shard_task, spec, rank) for rank in ranks]
    loaded = tokenizer.load(tokenizer_file)
    eos = vocabulary.end_id(tokenizer_file, loaded)
    vocab_size = vocabulary.required_vocab_size(loaded)
    corpus = megatron.MegatronCorpus(
        source.input, sorted(listing.files), folder, eos, vocab_size, source.tasks
    )
    return [(megatron.shard_task, corpus, cfg.heldout_percent, rank) for rank in ranks]


def group_by_split(
    cfg: DataConfig, name: str, files: list[ShardFile], cleaned: CleanDocuments | None
) -> dict[str, list[ShardFile]]:
    """Group shards by split; asserts that no document is missing.

    Raises InputError if a split is empty.
    """
    documents = sum(file.documents for file in files)
    if cleaned is not None:
        expected = cleaned.documents
        assert documents == expected, f"{name}: {documents} of {expected} documents in shards"
    splits = {split: [file for file in files if file.name.startswith(split)] for split in SPLITS}
    for split in SPLITS:
        if not splits[split]:
            raise InputError(
                f"source {name}: none of {documents} documents is in the {split} split; add "
                f"documents or set data.heldout_percent, now {cfg.heldout_percent}"
            )
    return splits
