"""Estimated memory of a rank, from the config alone. Torch-free."""

from dataclasses import dataclass

from core.errors import InputError
from model.config import SCAN_CHUNK, Recompute, loss_chunk
from model.flops import parameter_count
from train.config import EngineKind, RunConfig
from train.engines.partition import MAX_LIVE_BUCKETS, matmul_dtype_bytes, megatron_buckets

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one rank needs, by purpose."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        """Sum over all purposes."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers


def layer_activation_bytes(config: RunConfig) -> tuple[int, int]:
    """Bytes per token that a layer saves for the backward, and that it needs during its backward.

    Saved without recompute: the residual in fp32; in the matmul dtype the norm's output, x|z, the
    convolution's output, dt, the scan's output, and x_proj's output before and after its norms; in
    fp32 the scan's state once per chunk. Selective recompute saves the residual, the norm's output,
    x|z and the scan's output. Full recompute saves only the residual.

    During its backward a layer holds the recomputed activations, the gradients of the scan's output
    and of x|z, and the gradient of the residual. Sequence parallelism shards residual and norm over
    tensor-parallel ranks. Under context parallelism every chunk is scanned twice, and each scan
    saves states.
    """
    c, tp_size = config.model, config.parallel.tensor_parallel
    d_model = c.d_model // tp_size if config.parallel.sequence_parallel else c.d_model
    dtype_bytes = matmul_dtype_bytes(config)
    d_inner = c.d_inner // tp_size
    scans_twice = config.parallel.context_parallel > 1
    states = 4 * d_inner * c.d_state // SCAN_CHUNK
    x_proj = 2 * (c.dt_rank + 2 * c.d_state)
    all_saved = dtype_bytes * (5 * d_inner + x_proj + d_model) + states * (1 + scans_twice)
    saved = {
        Recompute.none: all_saved,
        Recompute.selective: dtype_bytes * (3 * d_inner + d_model),
        Recompute.full: 0,
    }[config.compute.recompute]
    # With two scans the peak is in the backward of the first, which runs last. Its three gradients
    # and the second's three exist; the second's output and states are freed. The gradient of the
    # first one's output, zeros, takes the memory of the second's output.
    gradients = dtype_bytes * 3 * d_inner
    if scans_twice:
        gradients = dtype_bytes * 6 * d_inner - states
    residual = 4 * d_model
    return residual + saved, all_saved - saved + gradients + residual


def layer_bytes_per_sequence(config: RunConfig) -> int:
    """Bytes that a layer saves, or needs in its backward, per sequence under context parallelism.

    Independent of the sequence's length. In fp32: the final state and the total dt of every chunk,
    and the state before this rank's chunk; in the matmul dtype: the convolution's last inputs.
    """
    c, p = config.model, config.parallel
    if p.context_parallel == 1:
        return 0
    dtype_bytes = matmul_dtype_bytes(config)
    states = p.context_parallel * (c.d_state + 1) + c.d_state
    return c.d_inner // p.tensor_parallel * (4 * states + 2 * dtype_bytes * (c.d_conv - 1))


def loss_bytes(config: RunConfig, tokens: int) -> int:
    """Bytes during the head's backward.

    A chunk of logits; the head's gradient of this chunk and of all chunks; the head cast to the
    matmul dtype where its own differs; input, output and gradient of the final norm.
    """
    c, tp_size = config.model, config.parallel.tensor_parallel
    dtype_bytes = matmul_dtype_bytes(config)
    casts_head = dtype_bytes == 2 and config.parallel.engine is EngineKind.deepspeed
    head = 4 + dtype_bytes + (dtype_bytes if casts_head else 0)
    vocab_size = c.vocab_size // tp_size
    logits = dtype_bytes * loss_chunk(tokens, c.d_model) * vocab_size
    return logits + head * vocab_size * c.d_model + (4 + 2 * dtype_bytes) * tokens * c.d_model


def estimate_memory(config: RunConfig, world_size: int) -> MemoryEstimate:
    """Memory of one of `world_size` ranks.

    Parameters and gradients are fp32 (with megatron-core see megatron_state_bytes). A replica is a
    data- or context-parallel rank. ZeRO-0 keeps all parameters, gradients and two moments on every
    replica; stage 1 shards AdamW's state and master weights over replicas, stage 2 gradients too,
    stage 3 parameters too.

    Activations are what the layers save of one micro-batch of the shortest sequences
    (layer_activation_bytes), and with DeepSpeed in bf16 the cast weights of the layers that are not
    recomputed. Buffers are DeepSpeed's reduction buckets, ZeRO-3's gathered parameters, and the
    larger of the loss and a layer's backward. Stage 0 copies the gradients after activations are
    freed. Stage 2 holds its buckets and a micro-batch's gradient shard from the loss's backward on,
    stages 1 and 3 from a step's first micro-batch on. For ZeRO-3's gathered parameters this is the
    maximum: its setting, and the largest weight besides.

    Within 5 % of what torch's allocator hands out on a CPU, on one rank and as one of two
    (tests/train/test_costs.py says what is not seen there).
    """
    c, p = config.model, config.parallel
    local_numel = parameter_count(c) // p.tensor_parallel
    shard_numel = local_numel // max(1, world_size // p.tensor_parallel)
    saved_per_token, backward_per_token = layer_activation_bytes(config)
    tokens = p.micro_batch_tokens // p.context_parallel
    sequences = p.micro_batch_tokens // min(stage.seq_len for stage in config.data.stages)
    activations = tokens * c.n_layer * saved_per_token
    layer = tokens * backward_per_token
    if config.compute.recompute is Recompute.none:
        activations += sequences * c.n_layer * layer_bytes_per_sequence(config)
    else:
        layer += sequences * layer_bytes_per_sequence(config)
    loss = loss_bytes(config, tokens)
    if p.engine is EngineKind.megatron:
        parameters, gradients, optimizer = megatron_state_bytes(config, world_size)
        return MemoryEstimate(parameters, gradients, optimizer, activations, max(loss, layer))
    if matmul_dtype_bytes(config) == 2:
        layers_numel = local_numel - 2 * c.vocab_size * c.d_model // p.tensor_parallel
        recomputes_all = config.compute.recompute is Recompute.full
        activations += 2 * layers_numel // (c.n_layer if recomputes_all else 1)
    bucket = 4 * min(p.bucket_elements, local_numel)
    head_numel = c.vocab_size * c.d_model // p.tensor_parallel
    gathered = 4 * min(MAX_LIVE_BUCKETS * p.bucket_elements + head_numel, local_numel)
    buffers = {
        0: max(loss, layer, 4 * local_numel - activations),
        1: 2 * bucket + max(loss, layer),
        2: max(loss, 2 * bucket + 4 * shard_numel + layer),
        3: bucket + max(loss, layer) + gathered,
    }
    return MemoryEstimate(
        parameters=4 * (shard_numel if p.zero_stage == 3 else local_numel),
        gradients=4 * (shard_numel if p.zero_stage >= 2 else local_numel),
        optimizer=12 * shard_numel if p.zero_stage else 8 * local_numel,
        activations=activations,
        buffers=buffers[p.zero_stage],
    )


def megatron_state_bytes(config: RunConfig, world_size: int) -> tuple[int, int, int]:
    """Bytes of parameters, gradients and optimizer with megatron-core's engine, with padding.

    Matmul weights are in the matmul dtype and have fp32 masters; the other parameters are fp32 and
    are their own masters. Gradients are fp32. Reduction and gather work in place in these buffers.
    """
    buckets = megatron_buckets(config, world_size)
    parameters = sum(bucket.dtype_bytes * bucket.numel for bucket in buckets)
    gradients = sum(4 * bucket.numel for bucket in buckets)
    optimizer = sum(
        (12 if bucket.dtype_bytes == 2 else 8) * bucket.padded_shard_numel for bucket in buckets
    )
    return parameters, gradients, optimizer


def headroom_bytes(config: RunConfig, device: str) -> int:
    """Bytes reserved for CUDA, NCCL and fragmentation on a GPU; 0 on a CPU."""
    return 0 if device == "cpu" else int(config.cluster.headroom_gib * GIB)


def check_memory(
    config: RunConfig, world_size: int, local_world_size: int, device: str, available: int
) -> None:
    """Raise InputError when this machine's ranks need more memory than their device has.

    `available` is in bytes. All `local_world_size` ranks share a CPU's memory; each rank has a GPU
    of its own, less the headroom.
    """
    estimate, headroom = estimate_memory(config, world_size), headroom_bytes(config, device)
    sharing = local_world_size if device == "cpu" else 1
    if estimate.total * sharing <= available - headroom:
        return
    reserved = f" less {headroom / GIB:g} of headroom" if headroom else ""
    who = f"{sharing} ranks need" if sharing > 1 else "a rank needs"
    memory = "this machine" if device == "cpu" else "its GPU"
    cluster = config.cluster
    raise InputError(
        f"{parameter_count(config.model) / 1e9:.2f}B parameters do not fit: {who} "
        f"{estimate.total * sharing / GIB:.1f} GiB, {memory} has {available / GIB:.1f} GiB"
        f"{reserved}: run +experiment=demo here, raise parallel.tensor_parallel, or use "
        f"{cluster.nodes} nodes of {cluster.ranks_per_node} ranks (python launch/plan.py)"
    )
