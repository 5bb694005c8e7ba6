"""Short runs over a made-up corpus on one and two ranks in many layouts, for tests to compare."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from core.run import iter_checkpoints
from launch.simulation.cuda_on_cpu import cuda_on_cpu
from model.checkpoint import CheckpointReader
from model.config import Recompute
from model.kernels import REFERENCE
from model.parallel.build import build_model
from tests.compose import laid_out
from tests.corpus import make_corpus
from tests.distributed import run_ranks
from tests.small import config
from tests.tiny import TINY
from train.build import build_trainer
from train.config import EngineKind, RunConfig
from train.distributed import Ranks, init_distributed
from train.resilience.datacheck import open_per_node
from train.resilience.stop_request import StopRequest
from train.resilience.watchdog import Watchdog


@contextmanager
def init_ranks(run: RunConfig) -> Iterator[Ranks]:
    """Set up process groups of a run's layout, with CUDA's calls on CPU for megatron-core."""
    shim = cuda_on_cpu if run.parallel.engine is EngineKind.megatron else nullcontext
    with (
        init_distributed(
            "cpu", run.parallel.tensor_parallel, run.parallel.context_parallel
        ) as ranks,
        shim(),
    ):
        yield ranks


def train(run: RunConfig) -> None:
    """Train a run to its end, from its newest checkpoint if it has one."""
    run.run.folder.mkdir(parents=True, exist_ok=True)
    with init_ranks(run) as ranks:
        watchdog = Watchdog(run.run.folder, ranks.rank, ranks.world_size, run.health.hang_seconds)
        build_trainer(
            run, open_per_node(run.data), ranks, {}, watchdog, StopRequest(None, 0.0)
        ).run()


def train_from(root: Path, source: str, run: RunConfig) -> None:
    """Train from another run's second checkpoint: ramp, context change and decay still follow."""
    if os.environ.get("RANK", "0") == "0":
        second = list(iter_checkpoints(root / source / "checkpoints"))[-2]
        shutil.copytree(second, run.run.files.checkpoints / second.name)
    train(run)


def reshard(root: Path, source: str, run: RunConfig) -> None:
    """Load another layout's newest checkpoint and save it in this layout, without a step."""
    if os.environ.get("RANK", "0") == "0":
        checkpoint = next(iter_checkpoints(root / source / "checkpoints"))
        shutil.copytree(checkpoint, run.run.files.checkpoints / checkpoint.name)
    with init_ranks(run) as ranks:
        watchdog = Watchdog(run.run.folder, ranks.rank, ranks.world_size, run.health.hang_seconds)
        trainer = build_trainer(
            run, open_per_node(run.data), ranks, {}, watchdog, StopRequest(None, 0.0)
        )
        trainer.state.step += 1
        trainer.checkpoints.save_and_wait(trainer.state, trainer.engine)


def save_gradients(root: Path, tensor_parallel: int, name: str) -> None:
    """Run one backward pass without an engine; every rank saves its gradients."""
    tokens = torch.randint(0, TINY.vocab_size, (3, 40), generator=torch.Generator().manual_seed(1))
    doc_starts = torch.rand(3, 39, generator=torch.Generator().manual_seed(2)) < 0.1
    with init_distributed("cpu", tensor_parallel) as ranks:
        model = build_model(
            TINY, REFERENCE, 0, ranks.device, tp_rank=ranks.tp_rank, tp_size=ranks.tp_size
        )
        losses, log_sums = model(tokens[:, :-1], tokens[:, 1:], doc_starts)
        loss = losses.mean() + 1e-2 * log_sums.square().mean()
        loss.backward()
        gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
        torch.save({"loss": loss.detach(), **gradients}, root / f"{name}-{ranks.tp_rank}.pt")


def with_zero_stage(run: RunConfig, stage: int, sequence_parallel: bool = False) -> RunConfig:
    return laid_out(run, zero_stage=stage, sequence_parallel=sequence_parallel)


def with_megatron(
    run: RunConfig, sequence_parallel: bool = False, recompute: Recompute = Recompute.none
) -> RunConfig:
    """Use megatron-core's engine with several buckets."""
    return laid_out(
        run,
        engine=EngineKind.megatron,
        bucket_elements=3000,
        recompute=recompute,
        sequence_parallel=sequence_parallel,
    )


def run_all(folder: Path) -> None:
    """Train all runs: those on two ranks in one pair of processes, the others here."""
    make_corpus(folder / "data")
    save_gradients(folder, 1, "gradients-tp1")
    train(config(folder, "dp1"))
    jobs = [
        (save_gradients, (folder, 2, "gradients-tp2")),
        (train, (config(folder, "dp2"),)),
        (train, (config(folder, "tp2", tensor_parallel=2),)),
        (train, (config(folder, "cp2", context_parallel=2),)),
        (train_from, (folder, "dp2", config(folder, "dp2-resumed"))),
        (
            train_from,
            (
                folder,
                "dp1",
                with_zero_stage(
                    config(folder, "dp1-to-tp2", tensor_parallel=2), 1, sequence_parallel=True
                ),
            ),
        ),
        (train_from, (folder, "dp2", with_zero_stage(config(folder, "dp2-to-zero0"), 0))),
        (
            train_from,
            (folder, "dp2-to-zero0", with_zero_stage(config(folder, "zero0-to-zero3"), 3)),
        ),
        (
            train_from,
            (folder, "zero0-to-zero3", with_zero_stage(config(folder, "zero3-to-zero2"), 2)),
        ),
        (train, (with_megatron(config(folder, "megatron"), recompute=Recompute.full),)),
        (
            train,
            (
                with_megatron(
                    config(folder, "megatron-cp2", context_parallel=2),
                    recompute=Recompute.selective,
                ),
            ),
        ),
        (
            train_from,
            (
                folder,
                "dp2",
                with_megatron(config(folder, "dp2-to-megatron", 2), True, Recompute.full),
            ),
        ),
        (
            train_from,
            (folder, "dp2-to-megatron", with_zero_stage(config(folder, "megatron-to-zero2"), 2)),
        ),
        (reshard, (folder, "zero0-to-zero3", with_zero_stage(config(folder, "zero3-as-zero0"), 0))),
        (reshard, (folder, "megatron", with_zero_stage(config(folder, "megatron-as-zero3"), 3))),
        (reshard, (folder, "zero0-to-zero3", with_megatron(config(folder, "zero3-as-megatron")))),
        (reshard, (folder, "zero3-to-zero2", with_zero_stage(config(folder, "zero2-as-zero3"), 3))),
        (reshard, (folder, "tp2", config(folder, "tp2-as-dp2"))),
        (reshard, (folder, "dp1", config(folder, "dp1-as-tp2", tensor_parallel=2))),
        (reshard, (folder, "dp1-to-tp2", config(folder, "sequence-as-dp2"))),
    ]
    run_ranks(2, jobs)
    train_from(folder, "tp2", config(folder, "tp2-to-dp1"))
    reshard(folder, "dp2", config(folder, "dp2-as-dp1"))


def records(root: Path, name: str) -> list[dict[str, Any]]:
    """The records of steps."""
    lines = (root / name / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "initial_validation" not in record]


def final_checkpoint(root: Path, name: str) -> CheckpointReader:
    return CheckpointReader(next(iter_checkpoints(root / name / "checkpoints")))


def curve(root: Path, name: str, like: str | None = None) -> torch.Tensor:
    """Loss, gradient norm and rate of every step, or of the steps that run `like` has."""
    first = records(root, like or name)[0]["step"]
    return torch.tensor(
        [[r["loss"], r["grad_norm"], r["lr"]] for r in records(root, name) if r["step"] >= first]
    )
