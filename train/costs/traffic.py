"""What a step sends between ranks, and which part of the optimizer each holds, from the config
alone. Torch-free.

Payloads are bytes of the tensor that is reduced, or of the whole that is gathered.
tests/train/test_traffic.py counts the collectives of real steps and finds these numbers exactly,
except for the weights that ZeRO-3 gathers, of which this is an upper bound; launch/dryrun.py counts
them at full size.
"""

from dataclasses import dataclass

from model.config import Recompute
from train.config import EngineKind, RunConfig
from train.engines.partition import (
    buckets,
    flats,
    gathers,
    persistent,
    product_bytes,
    to_owners,
    wide,
)

# times (n - 1) / n of the payload, by a ring of n ranks
SENT = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "reduce": 1}


@dataclass(frozen=True)
class Payload:
    """What one kind of collective carries in a step, all its calls together."""

    what: str
    # tensor, context, replicas, optimizer or world (see launch/simulation/collectives.py)
    group: str
    operation: str
    size: float  # bytes
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends for it, by ring algorithms."""
        return SENT[self.operation] * (self.ranks - 1) / self.ranks * self.size


def payloads(
    config: RunConfig, ranks: int, sequences: float, micro_batches: int, seq_len: int
) -> list[Payload]:
    """Collectives of a step in which a rank's forward passes see `sequences` in some micro-batches.

    The world: one sum of losses and wishes. See of_replicas, of_tensor and of_context for the
    others.
    """
    world = 8 * (2 * len(config.data.sources) + 3 + ranks)
    found = [
        *of_replicas(config, ranks, micro_batches),
        *of_tensor(config, sequences * seq_len / config.parallel.context_parallel, micro_batches),
        *of_context(config, sequences),
        Payload("losses", "world", "all_reduce", world, ranks),
    ]
    return [payload for payload in found if payload.ranks > 1 and payload.size]


def of_replicas(config: RunConfig, ranks: int, micro_batches: int) -> list[Payload]:
    """Gradients summed and weights gathered, all fp32.

    Stage 0 sums gradients once; DeepSpeed's stages 1 and 2 do, small parts at all ranks and large
    ones at their owner, stage 2 in every micro-batch, and gather the updated weights. Stage 3
    scatters gradients and gathers weights, at most gathers() times, in every micro-batch, small
    weights only after the update; a run's first two micro-batches gather more. megatron-core
    scatters the gradient once and gathers weights in their own type, bucket by bucket with their
    padding, and sums its norm over all ranks.
    """
    stage, groups = config.parallel.zero_stage, flats(config, ranks)
    replicas = groups[0].replicas
    if config.parallel.engine is EngineKind.megatron:
        cut = buckets(config, ranks)
        return [
            Payload(
                "gradients",
                "replicas",
                "reduce_scatter",
                sum(4 * bucket.size for bucket in cut),
                replicas,
            ),
            Payload(
                "weights",
                "replicas",
                "all_gather",
                sum(bucket.width * bucket.size for bucket in cut),
                replicas,
            ),
            Payload("norm", "optimizer", "all_reduce", 4, ranks),
        ]
    elements = sum(flat.elements for flat in groups)
    gradients = 4 * elements * (micro_batches if stage > 1 else 1)
    whole = 4 * sum(flat.part for flat in groups) * replicas
    owners = stage > 0 and to_owners(elements, replicas, config.parallel.bucket_elements)
    reduction, weights = "reduce" if owners else "all_reduce", whole if stage else 0
    if stage == 3:
        kept = sum(4 * flat.part for flat in groups if persistent(config, flat.elements)) * replicas
        reduction, gradients = "reduce_scatter", micro_batches * whole
        weights = micro_batches * gathers(config) * (whole - kept) + kept
    return [
        Payload("gradients", "replicas", reduction, gradients, replicas),
        Payload("norm and overflow", "replicas", "all_reduce", norm(config), replicas),
        Payload("weights", "replicas", "all_gather", weights, replicas),
    ]


def of_tensor(config: RunConfig, tokens: float, micro_batches: int) -> list[Payload]:
    """What tensor-parallel ranks sum, per token of theirs.

    Per layer x_proj's output and its gradient, the former again where the backward computes the
    layer again, out_proj's output and in_proj's input's gradient; the embedding's rows in its
    weight's type; three values of the loss and its input's gradient. Under sequence parallelism
    sums of out_proj and in_proj become scatters, with gathers on the other side of them and once
    more in the backward; embedding and last norm are gathered; norms' weights are summed in every
    micro-batch.
    """
    c, p, recompute = config.model, config.parallel, config.compute.recompute
    width = product_bytes(config)
    again = recompute is not Recompute.none
    selected, residual = width * (c.dt_rank + 2 * c.d_state), width * c.d_model
    rows = c.d_model * (wide(config, "embedding.weight") if p.engine is EngineKind.megatron else 4)
    sums = c.n_layer * selected * (2 + again) + rows + 12 + residual
    gathers = scatters = norms = 0
    if p.sequence_parallel:
        gathers = c.n_layer * residual * (3 + (recompute is Recompute.full)) + rows + residual
        scatters = c.n_layer * residual * 2
        norms = micro_batches * (c.n_layer + 1) * 4 * c.d_model
    else:
        sums += c.n_layer * residual * 2
    whole = {
        "all_reduce": tokens * sums + norms,
        "all_gather": tokens * gathers,
        "reduce_scatter": tokens * scatters,
    }
    found = [
        Payload("tensor parallel", "tensor", kind, size, p.tensor_parallel)
        for kind, size in whole.items()
    ]
    scalars = 0 if p.engine is EngineKind.megatron else norm(config) if p.zero_stage else 4
    return [
        *found,
        Payload("norm and overflow", "tensor", "all_reduce", scalars, p.tensor_parallel),
    ]


def norm(config: RunConfig) -> int:
    """Bytes of DeepSpeed's gradient norm and overflow, 4 each and in stage 3 8 each."""
    return {0: 0, 3: 16}.get(config.parallel.zero_stage, 8)


def of_context(config: RunConfig, sequences: float) -> list[Payload]:
    """Taps and states of every layer: gathered in forward and recompute, gradients summed."""
    c, p, recompute = config.model, config.parallel, config.compute.recompute
    width = product_bytes(config)
    piece = c.d_inner / p.tensor_parallel * ((c.d_state + 1) * 4 + (c.d_conv - 1) * width)
    pieces = p.context_parallel * sequences * c.n_layer * piece
    times = 1 if recompute is Recompute.none else 2
    return [
        Payload("context parallel", "context", "all_gather", times * pieces, p.context_parallel),
        Payload("context parallel", "context", "all_reduce", pieces, p.context_parallel),
    ]


def by_kind(found: list[Payload]) -> dict[tuple[str, str], float]:
    """Bytes of every (group, operation)."""
    sizes: dict[tuple[str, str], float] = {}
    for payload in found:
        key = (payload.group, payload.operation)
        sizes[key] = sizes.get(key, 0.0) + payload.size
    return sizes
