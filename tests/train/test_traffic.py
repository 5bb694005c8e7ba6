"""Collectives of real steps against the formula (with ZeRO-3 a bound) and against the dry run."""

import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from data.stream.manifests import open_manifests
from launch.simulation.collectives import CollectiveCounter
from launch.simulation.cuda_on_cpu import cuda_on_cpu
from launch.simulation.dry_run import (
    ZERO3_WARMUP_MICRO_BATCHES,
    dry_run,
    largest_step_start,
    micro_batch_sizes,
)
from model.config import Backend, Recompute
from model.flops import parameter_count
from tests.compose import laid_out
from tests.corpus import make_corpus
from tests.distributed import run_ranks
from tests.small import config
from train.build import build_trainer
from train.config import EngineKind, Precision, RunConfig
from train.costs.traffic import step_traffic, sum_by_collective
from train.distributed import init_distributed
from train.engines.partition import Bucket, FlatGroup, flat_groups, max_gathers, megatron_buckets
from train.resilience.replicas import COLUMNS, SAMPLES
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
# the first step, of one sequence; one with an odd batch of three; the fullest (None)
STEP_TOKENS = (0, 448, None)


def case_config(root: Path, name: str) -> RunConfig:
    run = config(root, name)
    # not the reference kernels, whose scan may recompute by its own choice
    return laid_out(run, kernels=Backend.cpu, **CASES[name])


def count(root: Path, name: str) -> None:
    """Count the collectives of some steps; write them and the elements that this rank owns."""
    run = case_config(root, name)
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
        trainer.state.step = 1  # whose replicas are not checked, as in most steps
        trainer.failure_policy.is_first_step = False
        # steps of one micro-batch each
        for _ in range(ZERO3_WARMUP_MICRO_BATCHES if run.parallel.zero_stage == 3 else 0):
            trainer._step(trainer.schedule.at(0), trainer.batches.read(0), 0.0)
        steps = []
        for token in (*STEP_TOKENS, None):
            token = largest_step_start(run) if token is None else token
            trainer.failure_policy.is_first_step = len(steps) == len(STEP_TOKENS)
            batches = trainer.batches.read(token)
            with CollectiveCounter() as collectives:
                trainer._step(trainer.schedule.at(token), batches, 0.0)
            counts = {
                "/".join(key): [count.calls, count.size]
                for key, count in collectives.counts.items()
            }
            steps.append(
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
        checked = steps.pop()["counts"]
        text = json.dumps({"steps": steps, "checked": checked, "owned": owned})
        (root / f"{name}-{os.environ['RANK']}.json").write_text(text)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traffic")
    make_corpus(folder / "data")
    run_ranks(2, [(count, (folder, name)) for name in CASES])
    return folder


def read_counts(root: Path, name: str, rank: int) -> dict[str, Any]:
    return json.loads((root / f"{name}-{rank}.json").read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", CASES)
def test_counted_bytes_equal_the_formula(root: Path, name: str) -> None:
    run = case_config(root, name)
    batches = set()
    for rank in (0, 1):
        for step in read_counts(root, name, rank)["steps"]:
            step_schedule = Schedule(run.schedule, run.optim.lr, run.data).at(step["token"])
            batches.add(step_schedule.batch)
            sizes = micro_batch_sizes(run, step_schedule, step["dp_rank"], step["dp_size"])
            traffic = step_traffic(run, 2, sum(sizes), len(sizes), step_schedule.seq_len)
            payloads = sum_by_collective(traffic)
            expected = {"/".join(key): size for key, size in payloads.items()}
            counted_sizes = {key: size for key, (_, size) in step["counts"].items()}
            if run.parallel.zero_stage == 3:  # weights near their next use are not gathered again
                gathered = counted_sizes.pop("replicas/all_gather")
                bound = expected.pop("replicas/all_gather")
                assert gathered <= bound <= 2 * gathered, (rank, step)
            assert counted_sizes == expected, (rank, step)
    assert {1, 3, 8} <= batches


@pytest.mark.parametrize("name", CASES)
def test_the_dry_run_sees_what_ranks_do(root: Path, name: str) -> None:
    """Calls and bytes of the last replica's fullest step, and the elements that it owns."""
    run = case_config(root, name)
    result = dry_run(run, 2)
    real = read_counts(root, name, result.rank)
    assert {"/".join(key): [c.calls, c.size] for key, c in result.step.items()} == real["steps"][
        -1
    ]["counts"]
    assert result.optimizer_elements == real["owned"]


@pytest.mark.parametrize("name", CASES)
def test_a_check_of_the_replicas_sends_a_sample(root: Path, name: str) -> None:
    """400 KB to the next rank, whatever the model, and some numbers to all."""
    real = read_counts(root, name, 0)
    usual, checked = real["steps"][-1]["counts"], real["checked"]
    sizes = {key: size - usual.get(key, [0, 0])[1] for key, (_, size) in checked.items()}
    sample = 8 * COLUMNS * 2 * SAMPLES
    assert sizes.pop("world/send") == sizes.pop("world/recv") == sample < 400_000
    assert 0 < sum(sizes.values()) < 400


@pytest.mark.parametrize("name", ["dp2", "dp2-megatron", "dp2-megatron-bf16-full", "cp2-megatron"])
def test_every_element_has_one_owner(root: Path, name: str) -> None:
    """Shards of both ranks have the formula's sizes and together are the model."""
    run = case_config(root, name)
    shards: Sequence[FlatGroup | Bucket] = (
        megatron_buckets(run, 2) if "megatron" in name else flat_groups(run, 2)
    )
    owned = [read_counts(root, name, rank)["owned"] for rank in (0, 1)]
    assert owned == [sum(shard.shard_numel(rank) for shard in shards) for rank in (0, 1)]
    assert sum(owned) == parameter_count(run.model)
    assert "megatron" not in name or len(shards) > 1


def test_shards_of_a_flat_group_by_hand() -> None:
    """13 elements over 4 replicas: shards of 4, the last with 1; over 8: of 2, the last empty."""
    assert FlatGroup(13, 4).padded_shard_numel == 4
    assert [FlatGroup(13, 4).shard_numel(rank) for rank in range(4)] == [4, 4, 4, 1]
    assert FlatGroup(13, 8).padded_shard_numel == 2
    assert [FlatGroup(13, 8).shard_numel(rank) for rank in range(8)] == [2, 2, 2, 2, 2, 2, 1, 0]


def test_shards_of_a_bucket_by_hand() -> None:
    """3 replicas, so the bucket's size is a multiple of 384; padding does not count."""
    bucket = Bucket(768, 2, ((0, 100), (128, 700)), 3)
    assert bucket.padded_shard_numel == 256
    assert [bucket.shard_numel(rank) for rank in range(3)] == [228, 256, 188]


def test_max_gathers_by_hand(root: Path) -> None:
    """Two; three with recompute where two layers exceed ten buckets."""
    times = {}
    for recompute in Recompute:
        for bucket in (20_000, 1):
            run = laid_out(
                case_config(root, "dp2-zero3"), bucket_elements=bucket, recompute=recompute
            )
            times[recompute, bucket] = max_gathers(run)
    assert [n for (_, bucket), n in times.items() if bucket > 1] == [2, 2, 2]
    assert [n for (_, bucket), n in times.items() if bucket == 1] == [2, 3, 3]
