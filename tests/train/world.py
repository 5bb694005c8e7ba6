"""Short runs over a made-up corpus on one and two ranks, in many layouts: what tests of the world
compare.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from core.run import newest
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
def standing(run: RunConfig) -> Iterator[Ranks]:
    """A rank of a run's layout; megatron-core's optimizer takes it for one with a GPU."""
    shim = cuda_on_cpu if run.parallel.engine is EngineKind.megatron else nullcontext
    with (
        init_distributed(
            "cpu", run.parallel.tensor_parallel, run.parallel.context_parallel
        ) as ranks,
        shim(),
    ):
        yield ranks


def train(run: RunConfig) -> None:
    """A whole run, or the rest of it."""
    run.run.folder.mkdir(parents=True, exist_ok=True)
    with standing(run) as ranks:
        watchdog = Watchdog(run.run.folder, ranks.rank, ranks.world_size, run.health.hang_seconds)
        build_trainer(
            run, open_per_node(run.data), ranks, {}, watchdog, StopRequest(None, 0.0)
        ).run()


def train_from(root: Path, source: str, run: RunConfig) -> None:
    """Go on from another run's second checkpoint, as after a kill: ramp, context edge and decay are
    still to come.
    """
    if os.environ.get("RANK", "0") == "0":
        second = list(newest(root / source / "checkpoints"))[-2]
        shutil.copytree(second, run.run.files.checkpoints / second.name)
    train(run)


def reshard(root: Path, source: str, run: RunConfig) -> None:
    """Load another layout's newest checkpoint and save it as this one's, without a step."""
    if os.environ.get("RANK", "0") == "0":
        newest_one = next(newest(root / source / "checkpoints"))
        shutil.copytree(newest_one, run.run.files.checkpoints / newest_one.name)
    with standing(run) as ranks:
        watchdog = Watchdog(run.run.folder, ranks.rank, ranks.world_size, run.health.hang_seconds)
        trainer = build_trainer(
            run, open_per_node(run.data), ranks, {}, watchdog, StopRequest(None, 0.0)
        )
        trainer.state.step += 1
        trainer.checkpoints.save_and_wait(trainer.state, trainer.engine)


def gradients(root: Path, tensor_parallel: int, name: str) -> None:
    """One backward pass without an engine; every rank saves the gradients it holds."""
    tokens = torch.randint(0, TINY.vocab_size, (3, 40), generator=torch.Generator().manual_seed(1))
    doc_starts = torch.rand(3, 39, generator=torch.Generator().manual_seed(2)) < 0.1
    with init_distributed("cpu", tensor_parallel) as ranks:
        model = build_model(
            TINY, REFERENCE, 0, ranks.device, tp_rank=ranks.tp_rank, tp_size=ranks.tp_size
        )
        losses, log_sums = model(tokens[:, :-1], tokens[:, 1:], doc_starts)
        loss = losses.mean() + 1e-2 * log_sums.square().mean()
        loss.backward()
        held = {key: parameter.grad for key, parameter in model.named_parameters()}
        torch.save({"loss": loss.detach(), **held}, root / f"{name}-{ranks.tp_rank}.pt")


def engine(run: RunConfig, stage: int, sequence: bool = False) -> RunConfig:
    """The same run by another engine, or with the residual stream cut along the sequence."""
    return laid_out(run, zero_stage=stage, sequence_parallel=sequence)


def megatron(
    run: RunConfig, sequence: bool = False, recompute: Recompute = Recompute.none
) -> RunConfig:
    """The same run by megatron-core's optimizer, with buckets that end inside the model."""
    return laid_out(
        run,
        engine=EngineKind.megatron,
        bucket_elements=3000,
        recompute=recompute,
        sequence_parallel=sequence,
    )


def run_all(folder: Path) -> None:
    """All runs, in two processes but for those on one rank."""
    make_corpus(folder / "data")
    gradients(folder, 1, "gradients-tp1")
    train(config(folder, "dp1"))
    jobs = [
        (gradients, (folder, 2, "gradients-tp2")),
        (train, (config(folder, "dp2"),)),
        (train, (config(folder, "tp2", tensor_parallel=2),)),
        (train, (config(folder, "cp2", context_parallel=2),)),
        (train_from, (folder, "dp2", config(folder, "dp2-resumed"))),
        (
            train_from,
            (
                folder,
                "dp1",
                engine(config(folder, "dp1-to-tp2", tensor_parallel=2), 1, sequence=True),
            ),
        ),
        (train_from, (folder, "dp2", engine(config(folder, "dp2-to-zero0"), 0))),
        (train_from, (folder, "dp2-to-zero0", engine(config(folder, "zero0-to-zero3"), 3))),
        (train_from, (folder, "zero0-to-zero3", engine(config(folder, "zero3-to-zero2"), 2))),
        (train, (megatron(config(folder, "megatron"), recompute=Recompute.full),)),
        (
            train,
            (
                megatron(
                    config(folder, "megatron-cp2", context_parallel=2),
                    recompute=Recompute.selective,
                ),
            ),
        ),
        (
            train_from,
            (folder, "dp2", megatron(config(folder, "dp2-to-megatron", 2), True, Recompute.full)),
        ),
        (train_from, (folder, "dp2-to-megatron", engine(config(folder, "megatron-to-zero2"), 2))),
        (reshard, (folder, "zero0-to-zero3", engine(config(folder, "zero3-as-zero0"), 0))),
        (reshard, (folder, "megatron", engine(config(folder, "megatron-as-zero3"), 3))),
        (reshard, (folder, "zero0-to-zero3", megatron(config(folder, "zero3-as-megatron")))),
        (reshard, (folder, "zero3-to-zero2", engine(config(folder, "zero2-as-zero3"), 3))),
        (reshard, (folder, "tp2", config(folder, "tp2-as-dp2"))),
        (reshard, (folder, "dp1", config(folder, "dp1-as-tp2", tensor_parallel=2))),
        (reshard, (folder, "dp1-to-tp2", config(folder, "sequence-as-dp2"))),
    ]
    run_ranks(2, jobs)
    train_from(folder, "tp2", config(folder, "tp2-to-dp1"))
    reshard(folder, "dp2", config(folder, "dp2-as-dp1"))


def records(root: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]


def final(root: Path, name: str) -> CheckpointReader:
    return CheckpointReader(next(newest(root / name / "checkpoints")))


def curve(root: Path, name: str, like: str | None = None) -> torch.Tensor:
    """Loss, norm and rate of every step, or of the steps that run `like` has."""
    first = records(root, like or name)[0]["step"]
    return torch.tensor(
        [[r["loss"], r["grad_norm"], r["lr"]] for r in records(root, name) if r["step"] >= first]
    )
