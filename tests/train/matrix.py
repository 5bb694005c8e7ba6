"""Rows of the matrix of layouts and engines, and their training (tests/train/test_matrix.py)."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.stream.loader import split_batch
from launch.simulation.cuda_on_cpu import cuda_on_cpu
from model.config import Recompute
from model.flops import parameter_shapes
from model.kernels import REFERENCE
from model.parallel.build import build_model
from model.parameters import has_weight_decay, shard_spec
from model.sharding import unshard
from tests.compose import demo
from tests.tiny import TINY, model_of
from train.config import EngineKind, Optim, Precision
from train.distributed import Ranks, context_ranks, data_parallel_group, init_distributed
from train.engines.build import build_engine

OPTIM = Optim(1e-3, 0.9, 0.95, 1e-8, 0.1, clip_norm=0.8, z_loss=0.0)
# sequences of each update: not divisible by the ranks, fewer than the ranks
BATCHES = (5, 3, 1, 9, 2)
RATES = (1e-2, 1e-2, 5e-3, 2e-3, 1e-2)
LENGTH = 16
# sequences of a micro-batch that takes any batch at once; such rows recompute activations
FULL_BATCH = 16
ENGINES = [*((EngineKind.deepspeed, stage) for stage in range(4)), (EngineKind.megatron, 1)]


@dataclass(frozen=True)
class Row:
    """A layout, engine and precision."""

    tp: int
    dp: int
    stage: int
    micro_batch: int  # sequences
    precision: Precision
    sequence_parallel: bool = False
    engine: EngineKind = EngineKind.deepspeed
    cp: int = 1

    @property
    def world_size(self) -> int:
        return self.tp * self.dp * self.cp

    @property
    def recompute(self) -> Recompute:
        return Recompute.full if self.micro_batch == FULL_BATCH else Recompute.none

    def __str__(self) -> str:
        recompute = "-recompute" * (self.recompute is Recompute.full)
        layout = (
            f"tp{self.tp}-dp{self.dp}"
            + f"-cp{self.cp}" * (self.cp > 1)
            + "-sequence" * self.sequence_parallel
        )
        engine = f"zero{self.stage}" if self.engine is EngineKind.deepspeed else self.engine.value
        return f"{layout}-{engine}-micro{self.micro_batch}{recompute}-{self.precision.value}"


def rows_of(world_size: int) -> list[Row]:
    """Every layout and engine.

    Context parallelism on up to 8 ranks, one micro-batch per rank on up to 4.
    """
    rows = []
    for tp, cp, dp in product((1, 2, 4), (1, 2), (1, 2, 4)):
        if tp * cp * dp != world_size or (world_size > 8 and cp > 1):
            continue
        # sequences of a micro-batch, so that the fullest rank has at least three micro-batches
        micro_batch = 1 if dp == 4 else 2
        micro_batches = [(micro_batch, Precision.fp32), (micro_batch, Precision.bf16)]
        if world_size <= 4:
            micro_batches.append((FULL_BATCH, Precision.fp32))
        rows += [
            Row(tp, dp, stage, size, precision, sequence_parallel, engine, cp)
            for sequence_parallel in ((False, True) if tp > 1 else (False,))
            for engine, stage in ENGINES
            for size, precision in micro_batches
        ]
    return rows


def batch_of(step: int) -> tuple[Tensor, Tensor]:
    """Tokens [b, l + 1] and doc_starts [b, l] of an update."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, TINY.vocab_size, (BATCHES[step], LENGTH + 1), generator=generator)
    return tokens, torch.rand(BATCHES[step], LENGTH, generator=generator) < 0.1


def loss_of(
    model: Any,
    tokens: Tensor,
    doc_starts: Tensor,
    precision: Precision,
    local_chunk: Callable[[Tensor], Tensor] = torch.clone,
) -> Tensor:
    """Loss in nats, summed over the tokens, or over this rank's chunk of them."""
    with torch.autocast(
        tokens.device.type, torch.bfloat16, enabled=precision is Precision.bf16, cache_enabled=False
    ):
        losses, _ = model(
            local_chunk(tokens[:, :-1]), local_chunk(tokens[:, 1:]), local_chunk(doc_starts)
        )
    return losses.sum()


def train_one_rank(precision: Precision) -> dict[str, Any]:
    """Train with torch only; return the curve, and weights and moments after every update."""
    model = model_of(TINY)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p], "weight_decay": OPTIM.weight_decay * has_weight_decay(name)}
        for name, p in named.items()
    ]
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps)
    result: dict[str, Any] = {"curve": []}
    for step, rate in enumerate(RATES):
        tokens, doc_starts = batch_of(step)
        adamw.zero_grad()
        loss = loss_of(model, tokens, doc_starts, precision) / doc_starts.numel()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIM.clip_norm)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
        result["curve"].append([float(loss.detach()), float(norm)])
        result[step] = {("param", name): p.detach().clone() for name, p in named.items()}
        result[step] |= {
            (k, n): adamw.state[p][k].clone()
            for n, p in named.items()
            for k in ("exp_avg", "exp_avg_sq")
        }
    return result


def train_rows(root: Path, rows: list[Row], device: str = "cpu") -> None:
    """Train one rank of all rows of a layout, which share the process groups."""
    shim = cuda_on_cpu if device == "cpu" else nullcontext
    with init_distributed(device, rows[0].tp, rows[0].cp) as ranks:
        for row in rows:
            with shim() if row.engine is EngineKind.megatron else nullcontext():
                torch.save(train_row(row, ranks), root / f"{row}-{ranks.rank}.pt")


def train_row(row: Row, ranks: Ranks) -> dict[str, Any]:
    """Train one rank of a row as the training loop does; return the curve and its tensor shards."""
    parallel = replace(
        demo().parallel,
        engine=row.engine,
        zero_stage=row.stage,
        tensor_parallel=row.tp,
        context_parallel=row.cp,
        # so small in stage 3 that it frees weights after their use and gathers them again
        bucket_elements=1000 if row.stage == 3 else 5000,
    )
    model = build_model(
        TINY,
        REFERENCE,
        0,
        ranks.device,
        tp_rank=ranks.tp_rank,
        tp_size=ranks.tp_size,
        sequence_parallel=row.sequence_parallel,
        recompute=row.recompute,
    )
    context = context_ranks() if row.cp > 1 else None
    model.set_context(context)
    local_chunk = torch.clone if context is None else context.local_chunk
    engine = build_engine(model, OPTIM, parallel, row.precision, ranks)
    result: dict[str, Any] = {"curve": []}
    for step, rate in enumerate(RATES):
        tokens, doc_starts = batch_of(step)
        total = torch.zeros((), device=ranks.device)
        micro_batches = split_batch(
            len(tokens),
            ranks.dp_rank,
            ranks.dp_size,
            row.micro_batch,
            engine.needs_equal_micro_batches,
        )
        for index, (low, high) in enumerate(micro_batches):
            sequences = slice(low, high) if low < high else slice(0, 1)
            loss = loss_of(
                model,
                tokens[sequences].to(ranks.device),
                doc_starts[sequences].to(ranks.device),
                row.precision,
                local_chunk,
            )
            loss = loss * ((low < high) / doc_starts.numel())
            engine.backward(loss, last=index == len(micro_batches) - 1)
            total += loss.detach()
        torch.distributed.all_reduce(total, group=data_parallel_group())
        norm, skipped = engine.clip_and_step(rate)
        assert not skipped
        result["curve"].append([float(total), norm])
        result[step] = [
            (shard.kind, shard.name, shard.tp_rank, shard.start, tensor.cpu().clone())
            for shard, tensor in engine.state_shards()
        ]
    return result


def assemble(results: list[dict[str, Any]], row: Row, step: int) -> dict[tuple[str, str], Tensor]:
    """Assemble full tensors from the shards of all ranks; every element has exactly one owner."""
    shards: dict[tuple[str, str], dict[tuple[int, int], Tensor]] = {}
    for kind, name, tp_rank, start, tensor in (
        shard for result in results for shard in result[step]
    ):
        by_position = shards.setdefault((kind, name), {})
        assert (tp_rank, start) not in by_position, f"{name} is owned twice"
        by_position[tp_rank, start] = tensor
    full_tensors = {}
    for (kind, name), by_position in shards.items():
        tp_tensors = [
            torch.cat([by_position[key] for key in sorted(by_position) if key[0] == tp_rank])
            for tp_rank in sorted({key[0] for key in by_position})
        ]
        shape = local_shape(name, len(tp_tensors))
        full_tensors[kind, name] = unshard(name, [tensor.view(shape) for tensor in tp_tensors])
    return full_tensors


def local_shape(name: str, tp_size: int) -> list[int]:
    """Shape of a parameter on one tensor-parallel rank."""
    shape, spec = parameter_shapes(TINY)[name], shard_spec(name)
    return [
        n // tp_size if spec is not None and dim == spec.dim else n for dim, n in enumerate(shape)
    ]
