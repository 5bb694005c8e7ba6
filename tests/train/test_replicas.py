"""Replicas whose weights or updates differ are named, with every engine."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

from launch.simulation.cuda_on_cpu import cuda_on_cpu
from model.kernels import REFERENCE
from model.parallel.build import build_model
from model.parameters import shard_spec
from tests.compose import demo
from tests.distributed import run_ranks
from tests.tiny import TINY
from tests.train.matrix import OPTIM, batch_of, loss_of
from train.config import EngineKind, Precision
from train.distributed import Ranks, init_distributed
from train.engines.build import build_engine
from train.engines.protocol import Engine
from train.resilience.replicas import ReplicaCheck

RATE = 1e-2
DEEPSPEED, MEGATRON = EngineKind.deepspeed, EngineKind.megatron
Tamper = Callable[[Ranks, Any, Engine], float]  # returns the rate that this rank updates with


def step(check: ReplicaCheck, tamper: Tamper, number: int) -> tuple[list[int], list[int]]:
    """Run one step with its checks: ranks with other weights, and with another update."""
    tokens, doc_starts = batch_of(4)
    mine = slice(check.ranks.dp_rank, None, check.ranks.dp_size)
    loss = loss_of(check.model, tokens[mine], doc_starts[mine], Precision.fp32)
    check.engine.backward(loss / doc_starts.numel(), last=True)
    rate = tamper(check.ranks, check.model, check.engine)
    weights = check.diverged_weights()
    with check.sampling(number) as rows:
        norm, skipped = check.engine.clip_and_step(rate)
    assert not skipped and sum(row.shape[1] for row in rows) > 1000
    return weights, check.diverged_updates(rows, RATE, number + 1, [norm])


def honest(ranks: Ranks, model: Any, engine: Engine) -> float:
    """A rank as it should be."""
    return RATE


def flipped_weight(ranks: Ranks, model: Any, engine: Engine) -> float:
    """Rank 1 has another bit in a weight that every rank holds, also with ZeRO-3."""
    if ranks.rank == 1:
        weight = model.layers[0].norm.weight
        weight.data.view(torch.int32 if weight.element_size() == 4 else torch.int16)[3] ^= 1 << 9
    return RATE


def other_rate(ranks: Ranks, model: Any, engine: Engine) -> float:
    """Rank 1 updates with a rate 3 % higher."""
    return RATE * (1 + 0.03 * (ranks.rank == 1))


def other_decay(ranks: Ranks, model: Any, engine: Engine) -> float:
    """Rank 1 has another weight decay."""
    for group in engine.optimizer.param_groups:
        if ranks.rank == 1 and group["weight_decay"] > 0:
            group["weight_decay"] *= 3
            group["wd_mult"] = 3.0  # megatron-core's
    return RATE


def faulty_arithmetic(ranks: Ranks, model: Any, engine: Engine) -> float:
    """Rank 1 updates its weights and then gets one of seven wrong by 1 %."""

    def disturb(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.view(-1)[::7] *= 1.01

    if ranks.rank == 1:
        engine.optimizer.register_step_post_hook(disturb)
    return RATE


def other_copy_of_a_norm(ranks: Ranks, model: Any, engine: Engine) -> float:
    """Tensor-parallel rank 1 has another copy of whole tensors, and of their masters."""
    for name, weight in model.named_parameters():
        if ranks.tp_rank == 1 and shard_spec(name) is None:
            weight.data += 1.0
    return RATE


def tampered(tensor_parallel: int) -> None:
    """Every engine of a layout of two ranks with every tampering of rank 1."""
    stages = [(DEEPSPEED, 0), (DEEPSPEED, 1), (DEEPSPEED, 2), (DEEPSPEED, 3), (MEGATRON, 1)]
    with init_distributed("cpu", tensor_parallel) as ranks:
        for kind, stage in stages:
            # of two replicas that differ, either can be the wrong one
            either = [0, 1] if stage in (0, 3) else [1]
            expected: list[tuple[Tamper, list[int], list[int]]] = [
                (honest, [], []),
                (flipped_weight, either, []),
                (other_rate, [], [1]),
                (other_decay, [], [1]),
                (faulty_arithmetic, [], [1]),
            ]
            if tensor_parallel == 2:
                expected.append((other_copy_of_a_norm, either, []))
            for tamper, weights, updates in expected:
                with cuda_on_cpu() if kind is MEGATRON else nullcontext():
                    check = built(kind, stage, ranks)
                    assert step(check, honest, 0) == ([], [])
                    found = step(check, tamper, 1)
                where = f"{kind.value} {stage}, TP {tensor_parallel}, {tamper.__name__}"
                assert found == (weights, updates), f"{where}: {found}"


def built(kind: EngineKind, stage: int, ranks: Ranks) -> ReplicaCheck:
    """A tiny model with an engine and its check; ZeRO-3 shards all but the norms and biases."""
    parallel = replace(
        demo().parallel,
        engine=kind,
        zero_stage=stage,
        tensor_parallel=ranks.tp_size,
        bucket_elements=100_000 if stage == 3 else 5000,
    )
    model = build_model(
        TINY, REFERENCE, 0, ranks.device, tp_rank=ranks.tp_rank, tp_size=ranks.tp_size
    )
    engine = build_engine(model, OPTIM, parallel, Precision.fp32, ranks)
    return ReplicaCheck(model, engine, OPTIM, ranks)


@pytest.mark.fault(
    "a replica is updated differently",
    "the rank is named at the next check, with every engine: all restart",
)
def test_a_replica_with_other_weights_or_another_update_is_named(measured: Any) -> None:
    run_ranks(2, [(tampered, (1,)), (tampered, (2,))])
    measured("45 of 45 named, 0 of 10 honest runs: 5 engines, TP 1 and 2")
