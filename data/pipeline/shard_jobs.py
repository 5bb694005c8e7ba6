"""The tasks that make the shards of a source, whatever it is made of."""

from pathlib import Path
from typing import Any

from data import tokenizer
from data.config import DataConfig
from data.pipeline import megatron, shard
from data.pipeline.fingerprints import Listing
from data.pipeline.shard import Clean, Sharding
from data.stream.manifests import tokenizer_path


def shard_jobs(
    cfg: DataConfig, name: str, listing: Listing, clean: Clean | None, place: Path
) -> list[Any]:
    """One job per task, writing to `place`: from clean documents, or from a tokenized corpus."""
    source, file = cfg.sources[name], tokenizer_path(cfg)
    if clean is not None:
        job = Sharding(clean, place, file, cfg.seed, cfg.heldout_percent, source.tasks)
        return [(shard.shard_task, job, rank) for rank in range(source.tasks)]
    size = tokenizer.size_of(tokenizer.load(file))
    corpus = megatron.Corpus(source.input, sorted(listing[1]), place, size, source.tasks)
    return [
        (megatron.shard_task, corpus, cfg.heldout_percent, rank) for rank in range(source.tasks)
    ]
