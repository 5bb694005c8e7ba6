"""A start reads the metadata of every data shard once per node, however many ranks it has."""

import builtins
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from core.errors import InputError
from data.stream.manifests import NARROW, SPLITS, ShardFile, read_manifest, write_manifest
from tests.corpus import EOS, SOURCES, make_corpus
from tests.distributed import run_ranks
from tests.small import config
from train.build import build_trainer
from train.config import RunConfig
from train.distributed import init_distributed
from train.resilience.config import VerifyShards
from train.resilience.datacheck import open_per_node
from train.resilience.stop_request import StopRequest
from train.resilience.watchdog import Watchdog

RANKS = 8
SHARDS = 20_000
TOKENS = 66
CALLS = {
    builtins: ["open"],
    io: ["open"],
    os: ["stat", "lstat", "open", "listdir", "scandir", "readlink", "access"],
}


@contextmanager
def record_calls(folder: Path) -> Iterator[list[str]]:
    """Record the path of every file system call of this process in a folder."""
    paths: list[str] = []

    def recording(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **kwargs: Any) -> Any:
            if isinstance(path, str | os.PathLike) and Path(path).is_relative_to(folder):
                paths.append(str(path))
            return function(path, *args, **kwargs)

        return call

    with ExitStack() as stack:
        for module, names in CALLS.items():
            for name in names:
                stack.enter_context(patch.object(module, name, recording(getattr(module, name))))
        yield paths


def start(run: RunConfig, broken: Path, other: Path) -> None:
    """Build the trainer without a step; then open data sets that are refused."""
    with init_distributed("cpu", 1) as ranks:
        with record_calls(Path(run.data.folder)) as paths:
            watchdog = Watchdog(
                run.run.folder, ranks.rank, ranks.world_size, run.health.hang_seconds
            )
            build_trainer(run, open_per_node(run.data), ranks, {}, watchdog, StopRequest(None, 0.0))
        with pytest.raises(InputError, match=r"shard .*train_1\.ds is missing"):
            open_per_node(replace(run.data, folder=str(broken)))
        second_node = ranks.rank >= RANKS // 2  # with another data set at the same path
        if second_node:
            os.environ["LOCAL_RANK"] = str(ranks.rank - RANKS // 2)
        with pytest.raises(InputError, match="has other manifests in .* than rank 0"):
            open_per_node(replace(run.data, folder=str(other)) if second_node else run.data)
    shards = sum(path.endswith(".ds") for path in paths)
    counts = {"shards": shards, "others": len(paths) - shards}
    (run.run.folder / f"{ranks.rank}.json").write_text(json.dumps(counts))


def fake_hash(*of: object) -> str:
    return hashlib.sha256(str(of).encode()).hexdigest()


def write_many_shards(folder: Path) -> None:
    """Write manifests of SHARDS sparse files in all."""
    for source in SOURCES:
        source_dir = folder / "shards" / source
        manifest = read_manifest(source_dir)
        count = SHARDS // len(SOURCES) // len(SPLITS)
        for split in SPLITS:
            files = [
                ShardFile(f"many_{split}_{number}.ds", TOKENS, 1, fake_hash(source, split, number))
                for number in range(count)
            ]
            for file in files:
                with (source_dir / file.name).open("wb") as empty:
                    empty.truncate((TOKENS - 1) * NARROW.itemsize)
                    empty.seek(0, io.SEEK_END)
                    empty.write(np.array([EOS], NARROW).tobytes())
            manifest.splits[split] = files
        write_manifest(source_dir, manifest)


def test_a_start_reads_every_shard_once_per_node(tmp_path: Path) -> None:
    """Of 8 ranks one makes a call per shard, the others none; an error is raised on all ranks."""
    run = config(tmp_path, "run")
    run.health = replace(run.health, verify_shards=VerifyShards.never)
    run.run.folder.mkdir()
    broken, other = tmp_path / "broken", tmp_path / "other"
    for folder in (tmp_path / "data", broken, other):
        make_corpus(folder)
    write_many_shards(tmp_path / "data")
    (broken / "shards" / SOURCES[0] / "train_1.ds").unlink()
    run_ranks(RANKS, [(start, (run, broken, other))])
    first, *others = [
        json.loads((run.run.folder / f"{rank}.json").read_text()) for rank in range(RANKS)
    ]
    # the end of one shard per source and split is read
    assert first["shards"] == SHARDS + len(SOURCES) * len(SPLITS) and first["others"] < 30
    # twice the times of the manifests
    assert others == [{"shards": 0, "others": 2 * len(SOURCES)}] * (RANKS - 1)
