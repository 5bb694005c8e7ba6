"""What the start of a run asks of the file system about its shards: once per node, however many
ranks it has.
"""

import builtins
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

from core.errors import InputError
from data.stream.manifests import DTYPE, SPLITS, ShardFile, read_manifest, write_manifest
from tests.corpus import SOURCES, make_corpus
from tests.distributed import run_ranks
from tests.small import config
from train.build import build_trainer
from train.config import RunConfig
from train.distributed import init_distributed
from train.resilience.config import VerifyShards
from train.resilience.datacheck import open_per_node
from train.resilience.stop_request import StopRequest
from train.resilience.watchdog import Watchdog

RANKS, SHARDS, TOKENS = 8, 20_000, 66
CALLS = {
    builtins: ["open"],
    io: ["open"],
    os: ["stat", "lstat", "open", "listdir", "scandir", "readlink", "access"],
}


@contextmanager
def asked(about: Path) -> Iterator[list[str]]:
    """Paths in a folder that this process asks the file system about, a line for each call."""
    paths: list[str] = []

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *arguments: Any, **named: Any) -> Any:
            if isinstance(path, str | os.PathLike) and Path(path).is_relative_to(about):
                paths.append(str(path))
            return function(path, *arguments, **named)

        return call

    with ExitStack() as stack:
        for module, names in CALLS.items():
            for name in names:
                stack.enter_context(patch.object(module, name, noting(getattr(module, name))))
        yield paths


def start(run: RunConfig, broken: Path, other: Path) -> None:
    """Build the trainer as a run does, and take no step; then open data sets that are refused."""
    with init_distributed("cpu", 1) as ranks:
        with asked(Path(run.data.folder)) as paths:
            watchdog = Watchdog(
                run.run.folder, ranks.rank, ranks.world_size, run.health.hang_seconds
            )
            build_trainer(run, open_per_node(run.data), ranks, {}, watchdog, StopRequest(None, 0.0))
        with pytest.raises(InputError, match=r"shard .*train_1\.ds is missing"):
            open_per_node(replace(run.data, folder=str(broken)))
        second_node = ranks.rank >= RANKS // 2  # which has another data set in the same place
        if second_node:
            os.environ["LOCAL_RANK"] = str(ranks.rank - RANKS // 2)
        with pytest.raises(InputError, match="has other manifests in .* than the first node"):
            open_per_node(replace(run.data, folder=str(other)) if second_node else run.data)
    shards = sum(path.endswith(".ds") for path in paths)
    counts = {"shards": shards, "others": len(paths) - shards}
    (run.run.folder / f"{ranks.rank}.json").write_text(json.dumps(counts))


def many_shards(folder: Path) -> None:
    """Manifests of SHARDS files in all, which take no room."""
    for source in SOURCES:
        home = folder / "shards" / source
        manifest = read_manifest(home)
        count = SHARDS // len(SOURCES) // len(SPLITS)
        for split in SPLITS:
            files = [
                ShardFile(f"many_{split}_{number}.ds", TOKENS, 1, f"{source}{split}{number}")
                for number in range(count)
            ]
            for file in files:
                with (home / file.name).open("wb") as empty:
                    empty.truncate(TOKENS * DTYPE.itemsize)
            manifest.splits[split] = files
        write_manifest(home, manifest)


def test_a_start_looks_at_every_shard_once_per_node(tmp_path: Path) -> None:
    """20,000 shards and 8 ranks: one look at a shard by one rank, none by the others. What one rank
    refuses, all refuse.
    """
    run = config(tmp_path, "run")
    run.health = replace(run.health, verify_shards=VerifyShards.never)
    run.run.folder.mkdir()
    broken, other = tmp_path / "broken", tmp_path / "other"
    for folder in (tmp_path / "data", broken, other):
        make_corpus(folder)
    many_shards(tmp_path / "data")
    (broken / "shards" / SOURCES[0] / "train_1.ds").unlink()
    run_ranks(RANKS, [(start, (run, broken, other))])
    first, *others = [
        json.loads((run.run.folder / f"{rank}.json").read_text()) for rank in range(RANKS)
    ]
    assert first["shards"] == SHARDS and first["others"] < 20
    assert others == [{"shards": 0, "others": 0}] * (RANKS - 1)
