"""One step of a run at full size on a machine that could not hold a layer of it.

The real model, megatron-core's real layers and groups, and the real engine run on fake tensors,
which have shapes and no memory, in a process group that pretends to be of any size and passes
nothing on. What a rank would hold is read from the engine, and what it would send is counted as it
asks for it. What needs values cannot be seen: losses, norms (a scalar that is read is 1), time.
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
from launch.simulation.collectives import Collectives, Count
from launch.simulation.cuda_on_cpu import cuda_on_cpu
from model.kernels import CPU
from model.mamba import FalconMamba
from model.parallel.build import build_meta_model, set_tp_attributes
from train.config import EngineKind, Precision, RunConfig
from train.distributed import Ranks, context_ranks, init_model_parallel
from train.engines.build import build_engine
from train.engines.protocol import Engine
from train.schedule import Schedule, StepSchedule
from train.step_stats import reduce_step_stats

logger = logging.getLogger(__name__)

TENSOR = torch.tensor  # its own: cuda_on_cpu puts another in its place
# micro-batches of a run, in which DeepSpeed's stage 3 learns the order of modules and gathers more
LEARNING = 2


@dataclass
class DryRunResult:
    """What one rank held and asked for."""

    rank: int
    step_schedule: StepSchedule  # the step
    micro_batches: list[int]  # sequences of each
    owned: int  # elements of master weights that this rank updates, padding aside
    # collectives by (group, operation): of the start, with what is learned in it,
    start: dict[tuple[str, str], Count]
    step: dict[tuple[str, str], Count]  # and of the step


def fullest(config: RunConfig) -> int:
    """Where a step that reads most tokens begins: the first of a stage, or after the ramp."""
    schedule = Schedule(config.schedule, config.optim.lr, config.data)
    begins = [0, *(end for end, _, _ in schedule.stages[:-1])]
    places = [
        *begins,
        *(max(begin, min(config.schedule.ramp_tokens, schedule.total - 1)) for begin in begins),
    ]
    return max(places, key=lambda place: schedule.at(place).tokens)


def micro_batches(
    config: RunConfig, step_schedule: StepSchedule, rank: int, ranks: int
) -> list[int]:
    """Sequences per micro-batch of data-parallel rank `rank`; an empty micro-batch has one."""
    most = config.parallel.micro_batch_tokens // step_schedule.seq_len
    cuts = split_batch(step_schedule.batch, rank, ranks, most, equal=config.parallel.zero_stage > 1)
    return [max(1, high - low) for low, high in cuts]


def before_the_last(sizes: list[int], engine: EngineKind) -> list[tuple[int, int]]:
    """Micro-batches as (size, times): equal sizes merged, megatron-core's first apart (gathers)."""
    apart = int(engine is EngineKind.megatron)
    return [*((size, 1) for size in sizes[:-1][:apart]), *Counter(sizes[apart:-1]).items()]


def dry_run(config: RunConfig, world: int) -> DryRunResult:
    """Build the run on a rank of `world`, and take a step.

    It is one of the last replica, which holds the padding and most sequences, and the first of its
    tensor-parallel group, which writes what all of the group hold alike.
    """
    step_schedule = Schedule(config.schedule, config.optim.lr, config.data).at(fullest(config))
    fake = FakeTensorMode()
    cuda = cuda_on_cpu if config.parallel.engine is EngineKind.megatron else nullcontext
    with fake_world(config, world) as ranks, Collectives() as collectives:
        sizes = micro_batches(config, step_schedule, ranks.dp_rank, ranks.dp_size)
        with fake, FakeScalars(), FakeDataPtr(), cuda():
            model = _fake_model(config, ranks)
            engine = build_engine(
                model, config.optim, config.parallel, config.compute.precision, ranks
            )
            with skip_order_check() if config.parallel.zero_stage == 3 else nullcontext():
                for _ in range(LEARNING if config.parallel.zero_stage == 3 else 0):
                    _micro_batch(config, model, engine, step_schedule, sizes[0], last=False)
            start, collectives.counts = collectives.counts, {}
            for size, times in before_the_last(sizes, config.parallel.engine):
                collectives.times = times
                _micro_batch(config, model, engine, step_schedule, size, last=False)
            collectives.times = 1
            _micro_batch(config, model, engine, step_schedule, sizes[-1], last=True)
        sources = len(config.data.sources)
        reduce_step_stats(
            ranks, torch.zeros(2, sources, dtype=torch.float64), 0.0, False, False, False
        )
        with fake, FakeScalars(), FakeDataPtr(), cuda():
            engine.clip_and_step(step_schedule.lr)
            step, collectives.counts = collectives.counts, {}
            owned = sum(
                tensor.numel() for shard, tensor in engine.state_shards() if shard.kind == "param"
            )
    return DryRunResult(ranks.rank, step_schedule, sizes, owned, start, step)


@contextmanager
def fake_world(config: RunConfig, world: int) -> Iterator[Ranks]:
    """Be the rank of dry_run among `world` that are not there."""
    from megatron.core import parallel_state

    # the import makes the backend known
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
    dist.init_process_group(
        "fake", store=FakeStore(), rank=world - config.parallel.tensor_parallel, world_size=world
    )
    try:
        with (
            NoOpCoalesced(),
            patch("torch.distributed.all_gather_object", without_fake_mode(dist.all_gather_object)),
        ):
            yield init_model_parallel(
                torch.device("cpu"),
                config.parallel.tensor_parallel,
                config.parallel.context_parallel,
            )
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def without_fake_mode(gather: Callable[..., None]) -> Callable[..., None]:
    """Gather objects with real bytes; in a simulated world every rank returns this one's."""

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
    # where DeepSpeed moves it, which is where it is: torch cannot swap parameters that a fake mode
    # remembers
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
    begun = time.perf_counter()
    # around the backward too: megatron-core's own functions carry autocast over on GPUs alone
    with torch.autocast(
        "cpu",
        torch.bfloat16,
        enabled=config.compute.precision is Precision.bf16,
        cache_enabled=False,
    ):
        losses, _ = model(ids, ids, doc_starts)
        engine.backward(losses.sum() / step_schedule.tokens, last)
    logger.info(f"a micro-batch tried in {time.perf_counter() - begun:.0f} s")


@contextmanager
def skip_order_check() -> Iterator[None]:
    """Within it the lists of numbers that DeepSpeed's stage 3 compares between ranks are equal.

    They are the orders of modules and parameters, and every rank runs the same ones. Rank 0 would
    broadcast a list's length and then the list; both are counted, but nobody is there to say them,
    and fake tensors hold no numbers.
    """
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    def broadcast(numbers: list[int]) -> None:
        for size in (1, len(numbers)):
            dist.broadcast(torch.empty(size, dtype=torch.int64), src=0)

    compare = coordinator.assert_ints_same_as_other_ranks
    coordinator.assert_ints_same_as_other_ranks = broadcast
    try:
        yield
    finally:
        coordinator.assert_ints_same_as_other_ranks = compare


class NoOpCoalesced(TorchDispatchMode):
    """Skips coalesced collectives of fake tensors; torch itself answers all others."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """See class."""
        if function.namespace == "c10d" and "tensor_coalesced" in function.__name__:
            return FakeWork().boxed()
        return function(*args, **(kwargs or {}))


class FakeScalars(TorchDispatchMode):
    """A value that is read from a fake tensor is 1, or false."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """See class."""
        if function is torch.ops.aten._local_scalar_dense.default and isinstance(
            args[0], FakeTensor
        ):
            return 1.0 if args[0].is_floating_point() else 0
        return function(*args, **(kwargs or {}))


class FakeDataPtr(TorchFunctionMode):
    """Gives fake tensors address 0 (DeepSpeed checks alignment); torch.tensor gets numbers."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """See class."""
        if function is TENSOR:  # which would look for a number in the memory of each
            args = tree_map_only(FakeTensor, Tensor.item, args)
        return 0 if function is Tensor.data_ptr else function(*args, **(kwargs or {}))
