"""One training step at full size on fake tensors in a fake process group.

The real model, megatron-core's layers and groups, and the real engine run on tensors that have
shapes but no memory, in a process group of any size that transfers nothing. The engine reports what
a rank holds; collectives are counted as they are called. Values are unknown: losses, norms (a
scalar read from a fake tensor is 1) and times.
"""

import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import FakeWork
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from data.stream.loader import split_batch
from launch.simulation.collectives import CollectiveCounter, Count
from launch.simulation.cuda_on_cpu import cuda_on_cpu
from model.kernels import CPU
from model.mamba import FalconMamba
from model.parallel.build import build_meta_model, set_tp_attributes
from train.config import EngineKind, Precision, RunConfig
from train.distributed import Ranks, context_ranks, parallel_groups
from train.engines.build import build_engine
from train.engines.protocol import Engine
from train.schedule import Schedule, StepSchedule
from train.step_stats import reduce_step_stats

logger = logging.getLogger(__name__)

REAL_TENSOR = torch.tensor  # cuda_on_cpu replaces torch.tensor
# first micro-batches of a run: DeepSpeed's stage 3 learns the module order and gathers more
ZERO3_WARMUP_MICRO_BATCHES = 2


@dataclass
class DryRunResult:
    """What one rank held and sent."""

    rank: int
    step_schedule: StepSchedule
    micro_batches: list[int]  # sequences of each
    optimizer_elements: int  # master weights that this rank updates, without padding
    # collectives by (group, operation), of the start (including ZeRO-3's warmup) and of the step
    start: dict[tuple[str, str], Count]
    step: dict[tuple[str, str], Count]


def largest_step_start(config: RunConfig) -> int:
    """Token count at which the step with most tokens starts: in a stage, or after the ramp."""
    schedule = Schedule(config.schedule, config.optim.lr, config.data)
    stage_starts = [0, *(end for end, _, _ in schedule.stages[:-1])]
    ramp_end = min(config.schedule.ramp_tokens, schedule.total - 1)
    candidates = [*stage_starts, *(max(start, ramp_end) for start in stage_starts)]
    return max(candidates, key=lambda token: schedule.at(token).tokens)


def micro_batch_sizes(
    config: RunConfig, step_schedule: StepSchedule, rank: int, ranks: int
) -> list[int]:
    """Sequences per micro-batch of data-parallel rank `rank`; an empty micro-batch counts 1."""
    max_size = config.parallel.micro_batch_tokens // step_schedule.seq_len
    ranges = split_batch(
        step_schedule.batch, rank, ranks, max_size, equal=config.parallel.zero_stage > 1
    )
    return [max(1, end - start) for start, end in ranges]


def merge_equal_sizes(sizes: list[int], engine: EngineKind) -> list[tuple[int, int]]:
    """(size, count) of all micro-batches but the last.

    megatron-core's first one stays separate, since it gathers the weights.
    """
    separate = int(engine is EngineKind.megatron)
    return [*((size, 1) for size in sizes[:-1][:separate]), *Counter(sizes[separate:-1]).items()]


def dry_run(config: RunConfig, world: int) -> DryRunResult:
    """Build the run on one of `world` ranks and take one step.

    The rank is in the last replica, which has the padding and the most sequences, and is the first
    of its tensor-parallel group, which saves the replicated tensors.
    """
    step_schedule = Schedule(config.schedule, config.optim.lr, config.data).at(
        largest_step_start(config)
    )
    fake = FakeTensorMode()
    cuda = cuda_on_cpu if config.parallel.engine is EngineKind.megatron else nullcontext
    with fake_distributed(config, world) as ranks, CollectiveCounter() as collectives:
        sizes = micro_batch_sizes(config, step_schedule, ranks.dp_rank, ranks.dp_size)
        with fake, FakeScalars(), FakeDataPtr(), cuda():
            model = _fake_model(config, ranks)
            engine = build_engine(
                model, config.optim, config.parallel, config.compute.precision, ranks
            )
            with skip_order_check() if config.parallel.zero_stage == 3 else nullcontext():
                for _ in range(
                    ZERO3_WARMUP_MICRO_BATCHES if config.parallel.zero_stage == 3 else 0
                ):
                    _micro_batch(config, model, engine, step_schedule, sizes[0], last=False)
            start = collectives.reset()
            for size, count in merge_equal_sizes(sizes, config.parallel.engine):
                collectives.multiplier = count
                _micro_batch(config, model, engine, step_schedule, size, last=False)
            collectives.multiplier = 1
            _micro_batch(config, model, engine, step_schedule, sizes[-1], last=True)
        sources = len(config.data.sources)
        reduce_step_stats(
            ranks, torch.zeros(2, sources, dtype=torch.float64), 0.0, False, False, False
        )
        with fake, FakeScalars(), FakeDataPtr(), cuda():
            engine.clip_and_step(step_schedule.lr)
            step = collectives.reset()
            optimizer_elements = sum(
                tensor.numel() for shard, tensor in engine.state_shards() if shard.kind == "param"
            )
    return DryRunResult(ranks.rank, step_schedule, sizes, optimizer_elements, start, step)


@contextmanager
def fake_distributed(config: RunConfig, world: int) -> Iterator[Ranks]:
    """Initialize a fake process group of `world` ranks, in the position of dry_run's rank."""
    # the import registers the backend
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.setdefault("LOCAL_RANK", "0")  # read by DeepSpeed
    dist.init_process_group(
        "fake", store=FakeStore(), rank=world - config.parallel.tensor_parallel, world_size=world
    )
    try:
        with (
            NoOpCoalesced(),
            patch("torch.distributed.all_gather_object", without_fake_mode(dist.all_gather_object)),
        ):
            parallel = config.parallel
            with parallel_groups(
                "cpu", parallel.tensor_parallel, parallel.context_parallel
            ) as ranks:
                yield ranks
    finally:
        dist.destroy_process_group()


def without_fake_mode(gather: Callable[..., None]) -> Callable[..., None]:
    """Wrap all_gather_object to use real tensors; every fake rank returns this rank's object."""

    def gather_objects(*args: Any, **kwargs: Any) -> None:
        with unset_fake_temporarily():
            gather(*args, **kwargs)

    return gather_objects


def _fake_model(config: RunConfig, ranks: Ranks) -> FalconMamba:
    model = build_meta_model(
        config.model,
        CPU,
        ranks.tp_size,
        config.parallel.sequence_parallel,
        config.compute.recompute,
    )
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(torch.empty(parameter.shape)))
    set_tp_attributes(model, ranks.tp_size)
    if ranks.cp_size > 1:
        model.set_context(context_ranks())
    # DeepSpeed moves the model to the device it is on; torch cannot swap parameters of a fake mode
    model.to = lambda *_, **__: model  # type: ignore[method-assign]
    return model


def _micro_batch(
    config: RunConfig,
    model: FalconMamba,
    engine: Engine,
    step_schedule: StepSchedule,
    size: int,
    last: bool,
) -> None:
    ids = torch.empty(
        size, step_schedule.seq_len // config.parallel.context_parallel, dtype=torch.int64
    )
    doc_starts = torch.empty_like(ids, dtype=torch.bool) if config.data.reset_state else None
    started_at = time.perf_counter()
    # includes the backward: megatron-core's functions restore autocast there only on GPUs
    with torch.autocast(
        "cpu",
        torch.bfloat16,
        enabled=config.compute.precision is Precision.bf16,
        cache_enabled=False,
    ):
        losses, _ = model(ids, ids, doc_starts)
        engine.backward(losses.sum() / step_schedule.tokens, last)
    logger.info(f"simulated a micro-batch in {time.perf_counter() - started_at:.0f} s")


@contextmanager
def skip_order_check() -> Iterator[None]:
    """Skip DeepSpeed stage 3's comparison of module and parameter order between ranks.

    Fake tensors have no values to compare. The two broadcasts of the check, a list's length and the
    list, are still counted.
    """
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    def broadcast(numbers: list[int]) -> None:
        for size in (1, len(numbers)):
            dist.broadcast(torch.empty(size, dtype=torch.int64), src=0)

    original = coordinator.assert_ints_same_as_other_ranks
    coordinator.assert_ints_same_as_other_ranks = broadcast
    try:
        yield
    finally:
        coordinator.assert_ints_same_as_other_ranks = original


class NoOpCoalesced(TorchDispatchMode):
    """Skips coalesced collectives, which torch does not implement for fake tensors."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "c10d" and "tensor_coalesced" in function.__name__:
            return FakeWork().boxed()
        return function(*args, **(kwargs or {}))


class FakeScalars(TorchDispatchMode):
    """Reading a scalar from a fake tensor gives 1.0, or 0 for integers and booleans."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and isinstance(
            args[0], FakeTensor
        ):
            return 1.0 if args[0].is_floating_point() else 0
        return function(*args, **(kwargs or {}))


class FakeDataPtr(TorchFunctionMode):
    """Fake tensors have data_ptr 0 (DeepSpeed checks alignment); torch.tensor of them works."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is REAL_TENSOR:  # torch.tensor reads the memory of scalar tensors
            args = tree_map_only(FakeTensor, Tensor.item, args)
        return 0 if function is Tensor.data_ptr else function(*args, **(kwargs or {}))
