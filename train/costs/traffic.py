"""Bytes that ranks send each other in a step, from the config alone. Torch-free.

A payload is the size of the tensor that is reduced, or of the full tensor that is gathered.
tests/train/test_traffic.py counts the collectives of real steps and finds exactly these numbers,
except for the weights that ZeRO-3 gathers: for these the estimate is an upper bound.
launch/dryrun.py counts the collectives at full size.
"""

from dataclasses import dataclass

from model.config import Recompute
from train.config import EngineKind, RunConfig
from train.engines.partition import (
    flat_groups,
    is_persistent,
    matmul_dtype_bytes,
    max_gathers,
    megatron_buckets,
    param_dtype_bytes,
    reduces_to_owner,
)

# a rank sends this times (n - 1) / n of the payload in a ring of n ranks
RING_FACTORS = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "reduce": 1}


@dataclass(frozen=True)
class CollectiveTraffic:
    """Payload of all calls of one kind of collective in a step."""

    name: str
    # tensor, context, replicas, optimizer or world (see launch/simulation/collectives.py)
    group: str
    operation: str
    payload_bytes: float
    group_size: int

    @property
    def sent_bytes(self) -> float:
        """Bytes that a rank sends, by ring algorithms."""
        n = self.group_size
        return RING_FACTORS[self.operation] * (n - 1) / n * self.payload_bytes


def step_traffic(
    config: RunConfig, world_size: int, sequences: float, micro_batches: int, seq_len: int
) -> list[CollectiveTraffic]:
    """Collectives of a step in which a rank runs `sequences` in `micro_batches` micro-batches.

    Besides those of each parallel dimension there is one all-reduce of losses and flags over the
    world (train/step_stats.py).
    """
    tokens = sequences * seq_len / config.parallel.context_parallel
    step_stats = 8 * (2 * len(config.data.sources) + 3 + world_size)
    traffic = [
        *data_parallel_traffic(config, world_size, micro_batches),
        *tensor_parallel_traffic(config, tokens, micro_batches),
        *context_parallel_traffic(config, sequences),
        CollectiveTraffic("losses", "world", "all_reduce", step_stats, world_size),
    ]
    return [entry for entry in traffic if entry.group_size > 1 and entry.payload_bytes]


def data_parallel_traffic(
    config: RunConfig, world_size: int, micro_batches: int
) -> list[CollectiveTraffic]:
    """Reduction of gradients and gather of weights over replicas.

    Stage 0 all-reduces fp32 gradients once. DeepSpeed's stages 1 and 2 reduce small shards to all
    ranks and large ones to their owner (stage 2 in every micro-batch), and gather the updated fp32
    weights. Stage 3 reduce-scatters gradients and gathers weights in every micro-batch, at most
    max_gathers() times; persistent weights are gathered only after the update. A run's first two
    micro-batches gather more. megatron-core reduce-scatters gradients once, gathers weights in
    their own dtype, both bucket by bucket with padding, and all-reduces its norm over all ranks.
    """
    if config.parallel.engine is EngineKind.megatron:
        return _megatron_data_parallel_traffic(config, world_size)
    stage, groups = config.parallel.zero_stage, flat_groups(config, world_size)
    replicas = groups[0].replicas
    numel = sum(group.numel for group in groups)
    padded_bytes = 4 * sum(group.padded_shard_numel for group in groups) * replicas
    gradients = 4 * numel * (micro_batches if stage > 1 else 1)
    weights = padded_bytes if stage else 0
    reduction = "all_reduce"
    if stage > 0 and reduces_to_owner(numel, replicas, config.parallel.bucket_elements):
        reduction = "reduce"
    if stage == 3:
        persistent_shards = [
            group.padded_shard_numel for group in groups if is_persistent(config, group.numel)
        ]
        persistent_bytes = 4 * sum(persistent_shards) * replicas
        reduction = "reduce_scatter"
        gradients = micro_batches * padded_bytes
        weights = micro_batches * max_gathers(config) * (padded_bytes - persistent_bytes)
        weights += persistent_bytes
    norm = norm_bytes(config)
    return [
        CollectiveTraffic("gradients", "replicas", reduction, gradients, replicas),
        CollectiveTraffic("norm and overflow", "replicas", "all_reduce", norm, replicas),
        CollectiveTraffic("weights", "replicas", "all_gather", weights, replicas),
    ]


def _megatron_data_parallel_traffic(config: RunConfig, world_size: int) -> list[CollectiveTraffic]:
    buckets = megatron_buckets(config, world_size)
    replicas = buckets[0].replicas
    gradients = sum(4 * bucket.numel for bucket in buckets)
    weights = sum(bucket.dtype_bytes * bucket.numel for bucket in buckets)
    return [
        CollectiveTraffic("gradients", "replicas", "reduce_scatter", gradients, replicas),
        CollectiveTraffic("weights", "replicas", "all_gather", weights, replicas),
        CollectiveTraffic("norm", "optimizer", "all_reduce", 4, world_size),
    ]


def tensor_parallel_traffic(
    config: RunConfig, tokens: float, micro_batches: int
) -> list[CollectiveTraffic]:
    """Activations and their gradients over tensor-parallel ranks, for `tokens` of their own.

    All-reduced per layer: x_proj's output (again in a recompute) and its gradient, out_proj's
    output, and the gradient of in_proj's input. Once: the embedding's output in its weight's dtype,
    three values per token of the loss, and the gradient of the loss's input.

    Under sequence parallelism the all-reduces of out_proj and in_proj become reduce-scatters, with
    all-gathers before in_proj, after out_proj's gradient and once more in in_proj's backward; the
    embedding's and the final norm's outputs are gathered; gradients of the norms' weights are
    all-reduced in every micro-batch.
    """
    c = config.model
    p = config.parallel
    recompute = config.compute.recompute
    dtype_bytes = matmul_dtype_bytes(config)
    x_proj = dtype_bytes * (c.dt_rank + 2 * c.d_state)
    hidden = dtype_bytes * c.d_model
    is_megatron = p.engine is EngineKind.megatron
    embedding = c.d_model * (param_dtype_bytes(config, "embedding.weight") if is_megatron else 4)
    x_proj_reductions = 2 if recompute is Recompute.none else 3
    all_reduce = c.n_layer * x_proj * x_proj_reductions + embedding + 12 + hidden
    all_gather = reduce_scatter = norm_weights = 0
    if p.sequence_parallel:
        gathers = 4 if recompute is Recompute.full else 3
        all_gather = c.n_layer * hidden * gathers + embedding + hidden
        reduce_scatter = c.n_layer * hidden * 2
        norm_weights = micro_batches * (c.n_layer + 1) * 4 * c.d_model
    else:
        all_reduce += c.n_layer * hidden * 2
    payloads = {
        "all_reduce": tokens * all_reduce + norm_weights,
        "all_gather": tokens * all_gather,
        "reduce_scatter": tokens * reduce_scatter,
    }
    traffic = [
        CollectiveTraffic("tensor parallel", "tensor", operation, size, p.tensor_parallel)
        for operation, size in payloads.items()
    ]
    norm = 4 if p.zero_stage == 0 else norm_bytes(config)
    if is_megatron:  # its norm is reduced over all ranks
        norm = 0
    traffic.append(
        CollectiveTraffic("norm and overflow", "tensor", "all_reduce", norm, p.tensor_parallel)
    )
    return traffic


def norm_bytes(config: RunConfig) -> int:
    """Bytes of DeepSpeed's gradient norm and overflow flag: 4 each, in stage 3 8 each."""
    return {0: 0, 3: 16}.get(config.parallel.zero_stage, 8)


def context_parallel_traffic(config: RunConfig, sequences: float) -> list[CollectiveTraffic]:
    """States of convolution and scan in every layer.

    All-gathered in the forward and in a recompute; their gradients are all-reduced.
    """
    c = config.model
    p = config.parallel
    recompute = config.compute.recompute
    conv_state = (c.d_conv - 1) * matmul_dtype_bytes(config)
    ssm_state = (c.d_state + 1) * 4
    chunk = c.d_inner / p.tensor_parallel * (ssm_state + conv_state)
    size = p.context_parallel * sequences * c.n_layer * chunk
    gathers = 1 if recompute is Recompute.none else 2
    return [
        CollectiveTraffic(
            "context parallel", "context", "all_gather", gathers * size, p.context_parallel
        ),
        CollectiveTraffic("context parallel", "context", "all_reduce", size, p.context_parallel),
    ]


def sum_by_collective(traffic: list[CollectiveTraffic]) -> dict[tuple[str, str], float]:
    """Payload bytes of every (group, operation)."""
    sizes: dict[tuple[str, str], float] = {}
    for entry in traffic:
        key = (entry.group, entry.operation)
        sizes[key] = sizes.get(key, 0.0) + entry.payload_bytes
    return sizes
