"""What crosses between ranks, counted: the formula's bytes exactly (with ZeRO-3 at most), and what
the dry run sees without a world.
"""

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data.stream.manifests import open_manifests
from launch.simulation.collectives import Collectives
from launch.simulation.cuda_on_cpu import cuda_on_cpu
from launch.simulation.dry_run import LEARNING, dry_run, fullest, micro_batches
from model.config import Backend, Recompute
from model.flops import parameter_count
from tests.compose import laid_out
from tests.corpus import make_corpus
from tests.distributed import run_ranks
from tests.small import config
from train.build import build_trainer
from train.config import EngineKind, Precision, RunConfig
from train.costs.traffic import by_kind, payloads
from train.distributed import init_distributed
from train.engines.partition import Bucket, Flat, buckets, flats, gathers
from train.resilience.stop_request import StopRequest
from train.resilience.watchdog import Watchdog
from train.schedule import Schedule

CASES: dict[str, dict[str, Any]] = {
    "dp2": {},
    "dp2-bf16-full": {"precision": Precision.bf16, "recompute": Recompute.full},
    "dp2-owners": {"bucket_elements": 10_000},
    "dp2-zero2-owners": {"zero_stage": 2, "bucket_elements": 10_000},
    "dp2-zero0": {"zero_stage": 0},
    "dp2-zero2": {"zero_stage": 2},
    "dp2-zero3": {"zero_stage": 3},  # buckets so large that all weights stay whole
    "dp2-zero3-cut": {"zero_stage": 3, "bucket_elements": 60_000},  # all but the smallest are cut
    # and gathered again for the backward
    "dp2-zero3-twice": {"zero_stage": 3, "bucket_elements": 1000},
    "dp2-zero3-bf16-full": {
        "zero_stage": 3,
        "bucket_elements": 100,
        "precision": Precision.bf16,
        "recompute": Recompute.full,
    },
    "dp2-zero3-selective": {
        "zero_stage": 3,
        "bucket_elements": 2500,
        "recompute": Recompute.selective,
    },
    "tp2-zero0-bf16": {"tensor_parallel": 2, "zero_stage": 0, "precision": Precision.bf16},
    "tp2-sp": {"tensor_parallel": 2, "sequence_parallel": True},
    "tp2-sp-bf16-full": {
        "tensor_parallel": 2,
        "sequence_parallel": True,
        "precision": Precision.bf16,
        "recompute": Recompute.full,
    },
    "tp2-sp-selective": {
        "tensor_parallel": 2,
        "sequence_parallel": True,
        "recompute": Recompute.selective,
    },
    "tp2": {"tensor_parallel": 2},
    "tp2-full": {"tensor_parallel": 2, "recompute": Recompute.full},
    "cp2": {"context_parallel": 2},
    "cp2-bf16-selective": {
        "context_parallel": 2,
        "precision": Precision.bf16,
        "recompute": Recompute.selective,
    },
    "dp2-megatron": {"engine": EngineKind.megatron, "bucket_elements": 3000},
    "dp2-megatron-bf16-full": {
        "engine": EngineKind.megatron,
        "bucket_elements": 3000,
        "precision": Precision.bf16,
        "recompute": Recompute.full,
    },
    "tp2-megatron-bf16": {
        "engine": EngineKind.megatron,
        "tensor_parallel": 2,
        "precision": Precision.bf16,
    },
    "tp2-sp-megatron-bf16-selective": {
        "engine": EngineKind.megatron,
        "tensor_parallel": 2,
        "sequence_parallel": True,
        "precision": Precision.bf16,
        "recompute": Recompute.selective,
    },
    "cp2-megatron": {"engine": EngineKind.megatron, "context_parallel": 2, "bucket_elements": 3000},
}
STEPS = (0, 448, None)  # the first, whose batch is one sequence; an odd one of three; the fullest


def run_of(root: Path, name: str) -> RunConfig:
    run = config(root, name)
    # the reference's scan may choose its own recomputation, the kernels of a run do not
    return laid_out(run, kernels=Backend.cpu, **CASES[name])


def count(root: Path, name: str) -> None:
    """Take some steps of a run and write what each asked of other ranks, and what this rank
    owns.
    """
    run = run_of(root, name)
    run.run.folder.mkdir(parents=True, exist_ok=True)
    shim = cuda_on_cpu if run.parallel.engine is EngineKind.megatron else nullcontext
    with (
        init_distributed(
            "cpu", run.parallel.tensor_parallel, run.parallel.context_parallel
        ) as ranks,
        shim(),
    ):
        watchdog = Watchdog(run.run.folder, ranks.rank, ranks.world_size, run.health.hang_seconds)
        trainer = build_trainer(
            run, open_manifests(run.data), ranks, {}, watchdog, StopRequest(None, 0.0)
        )
        for _ in range(LEARNING if run.parallel.zero_stage == 3 else 0):  # of one micro-batch each
            trainer._step(trainer.schedule.at(0), trainer.batches.read(0), 0.0)
        seen = []
        for token in STEPS:
            token = fullest(run) if token is None else token
            batches = trainer.batches.read(token)
            with Collectives() as collectives:
                trainer._step(trainer.schedule.at(token), batches, 0.0)
            counts = {
                "/".join(key): [count.calls, count.size]
                for key, count in collectives.counts.items()
            }
            seen.append(
                {
                    "token": token,
                    "dp_rank": ranks.dp_rank,
                    "dp_size": ranks.dp_size,
                    "counts": counts,
                }
            )
        owned = sum(
            tensor.numel()
            for shard, tensor in trainer.engine.state_shards()
            if shard.kind == "param"
        )
        text = json.dumps({"steps": seen, "owned": owned})
        (root / f"{name}-{os.environ['RANK']}.json").write_text(text)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traffic")
    make_corpus(folder / "data")
    run_ranks(2, [(count, (folder, name)) for name in CASES])
    return folder


def counted(root: Path, name: str, rank: int) -> dict[str, Any]:
    return json.loads((root / f"{name}-{rank}.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_counted_bytes_equal_the_formula(root: Path, name: str) -> None:
    run = run_of(root, name)
    batches = set()
    for rank in (0, 1):
        for step in counted(root, name, rank)["steps"]:
            now = Schedule(run.schedule, run.optim.lr, run.data).at(step["token"])
            batches.add(now.batch)
            micro = micro_batches(run, now, step["dp_rank"], step["dp_size"])
            sizes = by_kind(payloads(run, 2, sum(micro), len(micro), now.seq_len))
            expected = {"/".join(key): size for key, size in sizes.items()}
            counted_sizes = {key: size for key, (_, size) in step["counts"].items()}
            if run.parallel.zero_stage == 3:  # a bound: weights may be near their next use
                gathered = counted_sizes.pop("replicas/all_gather")
                bound = expected.pop("replicas/all_gather")
                assert gathered <= bound <= 2 * gathered, (rank, now)
            assert counted_sizes == expected, (rank, now)
    assert {1, 3, 8} <= batches


@pytest.mark.parametrize("name", CASES)
def test_the_dry_run_sees_what_ranks_do(root: Path, name: str) -> None:
    """Calls and bytes of the fullest step of the last replica, and the elements that it owns."""
    run = run_of(root, name)
    seen = dry_run(run, 2)
    real = counted(root, name, seen.rank)
    assert {"/".join(key): [c.calls, c.size] for key, c in seen.step.items()} == real["steps"][-1][
        "counts"
    ]
    assert seen.owned == real["owned"]


@pytest.mark.parametrize("name", ["dp2", "dp2-megatron", "dp2-megatron-bf16-full", "cp2-megatron"])
def test_every_element_has_one_owner(root: Path, name: str) -> None:
    """Parts on both ranks are those of the formula; the two together are the model."""
    run = run_of(root, name)
    cuts: Sequence[Flat | Bucket] = buckets(run, 2) if "megatron" in name else flats(run, 2)
    owned = [counted(root, name, rank)["owned"] for rank in (0, 1)]
    assert owned == [sum(cut.owned(rank) for cut in cuts) for rank in (0, 1)]
    assert sum(owned) == parameter_count(run.model) and ("megatron" not in name or len(cuts) > 1)


def test_parts_by_hand() -> None:
    """13 elements over 4 replicas: 16 in parts of 4; over 8, parts of 2, the last of which is
    padding alone.
    """
    assert [Flat(13, 4).owned(rank) for rank in range(4)] == [4, 4, 4, 1] and Flat(13, 4).part == 4
    assert [Flat(13, 8).owned(rank) for rank in range(8)] == [2, 2, 2, 2, 2, 2, 1, 0] and Flat(
        13, 8
    ).part == 2


def test_buckets_by_hand() -> None:
    """Of 3 replicas, so that a bucket ends at a multiple of 384: what a part holds beside
    padding.
    """
    bucket = Bucket(768, 2, ((0, 100), (128, 700)), 3)
    assert bucket.part == 256 and [bucket.owned(rank) for rank in range(3)] == [228, 256, 188]


def test_gathers_by_hand(root: Path) -> None:
    """For the forward and the backward, and for what is computed again where a layer's end is not
    near its beginning: ten buckets that hold less than two layers.
    """
    found = {}
    for recompute in Recompute:
        for bucket in (20_000, 1):
            run = run_of(root, "dp2-zero3")
            parallel = replace(run.parallel, bucket_elements=bucket)
            compute = replace(run.compute, recompute=recompute)
            found[recompute, bucket] = gathers(replace(run, parallel=parallel, compute=compute))
    assert [times for (_, bucket), times in found.items() if bucket > 1] == [2, 2, 2]
    assert [times for (_, bucket), times in found.items() if bucket == 1] == [2, 3, 3]
