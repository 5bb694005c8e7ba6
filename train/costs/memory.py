"""What a run needs of memory, from its config alone. Torch-free."""

from dataclasses import dataclass, fields

from core.errors import InputError
from model.config import SCAN_CHUNK, Recompute, loss_chunk
from model.flops import parameter_count
from train.config import EngineKind, RunConfig
from train.engines.partition import LIVE_BUCKETS, buckets, product_bytes

GIB = 2**30


@dataclass(frozen=True)
class Needs:
    """Bytes that one rank needs, by what they hold."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    buffers: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers


def kept_by_a_layer(config: RunConfig) -> tuple[int, int]:
    """Bytes per token that a layer keeps for the backward, and that the one in its backward holds
    besides.

    The residual in fp32; in the products' type its norm, x|z, the convolution's output, dt, the
    scan's output, and x_proj's before and after its norms; in fp32 the scan's states once a chunk.
    Selective recompute keeps the residual, its norm, x|z and the scan's output, full recompute the
    residual alone. In its backward a layer has what it computed again, the gradients of its scan's
    output and of x|z, and the residual's. Sequence parallelism cuts residual and norm over
    tensor-parallel ranks. Under context parallelism a piece is scanned twice, and each scan keeps
    states.
    """
    c, tp = config.model, config.parallel.tensor_parallel
    d_model = c.d_model // tp if config.parallel.sequence_parallel else c.d_model
    width = product_bytes(config)
    inner = c.d_inner // tp
    again = config.parallel.context_parallel > 1
    states = 4 * inner * c.d_state // SCAN_CHUNK
    whole = width * (5 * inner + 2 * (c.dt_rank + 2 * c.d_state) + d_model) + states * (1 + again)
    kept = {
        Recompute.none: whole,
        Recompute.selective: width * (3 * inner + d_model),
        Recompute.full: 0,
    }
    # the first scan goes backward last: the second's three gradients are there, its output and
    # states are gone; the first one's are three as well, and that of its output, zeros, is in the
    # place of the second's output
    gradients = 6 * width * inner - states if again else 3 * width * inner
    recompute = config.compute.recompute
    return 4 * d_model + kept[recompute], whole - kept[recompute] + gradients + 4 * d_model


def kept_of_a_sequence(config: RunConfig) -> int:
    """Bytes that a layer keeps, or holds in its backward, of a sequence that several ranks hold,
    whatever its length.

    In fp32 what all pieces end with, the time that passes in them, and the state before the own
    one; the rows that the convolution takes apart.
    """
    c, p = config.model, config.parallel
    if p.context_parallel == 1:
        return 0
    width = product_bytes(config)
    states = p.context_parallel * (c.d_state + 1) + c.d_state
    return c.d_inner // p.tensor_parallel * (4 * states + 2 * width * (c.d_conv - 1))


def held_by_the_loss(config: RunConfig, tokens: int) -> int:
    """Bytes while the head is in its backward: a chunk of logits, its gradient of the head beside
    that of all chunks, the head cast where it is not in the products' type, and the final norm's
    input, output and gradient.
    """
    c, tp = config.model, config.parallel.tensor_parallel
    width = product_bytes(config)
    head = (
        4 + width + (width if width == 2 and config.parallel.engine is EngineKind.deepspeed else 0)
    )
    vocab = c.vocab_size // tp
    logits = width * loss_chunk(tokens, c.d_model) * vocab
    return logits + head * vocab * c.d_model + (4 + 2 * width) * tokens * c.d_model


def needs(config: RunConfig, ranks: int) -> Needs:
    """Memory of one of `ranks` ranks.

    Parameters and gradients are fp32, but see state_of_megatron. Every replica (a data- or
    context-parallel rank) holds all of them and two moments (ZeRO-0); AdamW's state and master
    weights are cut over replicas (1), gradients too (2), parameters too (3). Activations are what
    one micro-batch keeps (kept_by_a_layer) of the shortest sequences, and with DeepSpeed in bf16
    the cast weights of layers that are not computed again. Buffers are DeepSpeed's reduction
    buckets, ZeRO-3's whole parameters, and what the loss or a layer in its backward holds,
    whichever is more. Stage 0 copies the gradients when activations are gone; stage 2 has its
    buckets and a micro-batch's own part of them from the loss's backward on, stages 1 and 3 from a
    step's first micro-batch on. Within 5 % of what torch's allocator hands out on a CPU, on one
    rank and as one of two (tests/train/test_costs.py says what is not seen there). What ZeRO-3
    gathers counts at its most: what it is told to hold, and the largest weight besides.
    """
    c, tp, stage = config.model, config.parallel.tensor_parallel, config.parallel.zero_stage
    per_rank = parameter_count(c) // tp
    cut = per_rank // max(1, ranks // tp)
    kept, passing = kept_by_a_layer(config)
    tokens = config.parallel.micro_batch_tokens // config.parallel.context_parallel
    sequences = config.parallel.micro_batch_tokens // min(
        part.seq_len for part in config.data.stages
    )
    loss, layer, activations = (
        held_by_the_loss(config, tokens),
        tokens * passing,
        tokens * c.n_layer * kept,
    )
    if config.compute.recompute is Recompute.none:
        activations += sequences * c.n_layer * kept_of_a_sequence(config)
    else:
        layer += sequences * kept_of_a_sequence(config)
    if config.parallel.engine is EngineKind.megatron:
        return Needs(
            *state_of_megatron(config, ranks), activations=activations, buffers=max(loss, layer)
        )
    if product_bytes(config) == 2:
        layers = per_rank - 2 * c.vocab_size * c.d_model // tp
        activations += (
            2 * layers // (c.n_layer if config.compute.recompute is Recompute.full else 1)
        )
    bucket, head = (
        4 * min(config.parallel.bucket_elements, per_rank),
        c.vocab_size * c.d_model // tp,
    )
    buffers = {
        0: max(loss, layer, 4 * per_rank - activations),
        1: 2 * bucket + max(loss, layer),
        2: max(loss, 2 * bucket + 4 * cut + layer),
        3: bucket
        + max(loss, layer)
        + 4 * min(LIVE_BUCKETS * config.parallel.bucket_elements + head, per_rank),
    }
    return Needs(
        parameters=4 * (cut if stage == 3 else per_rank),
        gradients=4 * (cut if stage >= 2 else per_rank),
        optimizer=12 * cut if stage else 8 * per_rank,
        activations=activations,
        buffers=buffers[stage],
    )


def state_of_megatron(config: RunConfig, ranks: int) -> tuple[int, int, int]:
    """Bytes of parameters, gradients and optimizer with megatron-core's engine, padding too.

    Parameters are in the products' type where products take them; such ones have fp32 masters, the
    others are their own. Gradients are fp32. Both lie in buffers that are reduced and gathered in
    place, without buckets besides.
    """
    cut = buckets(config, ranks)
    parameters = sum(bucket.width * bucket.size for bucket in cut)
    optimizer = sum((12 if bucket.width == 2 else 8) * bucket.part for bucket in cut)
    return parameters, sum(4 * bucket.size for bucket in cut), optimizer


def headroom(config: RunConfig, device: str) -> int:
    """Bytes of a device that a run must leave to CUDA, NCCL and the allocator: none on a CPU."""
    return 0 if device == "cpu" else int(config.cluster.headroom_gib * GIB)


def check_memory(
    config: RunConfig, ranks: int, ranks_here: int, device: str, available: int
) -> None:
    """Raise InputError when the ranks of this machine need more than the `available` bytes of their
    device.

    `ranks_here` ranks share the memory of a CPU; a GPU serves one, and some of it is headroom.
    """
    need, kept = needs(config, ranks), headroom(config, device)
    sharing = ranks_here if device == "cpu" else 1
    if need.total * sharing <= available - kept:
        return
    reserved = f" less {kept / GIB:g} of headroom" if kept else ""
    count = f"{sharing} ranks of this machine need" if sharing > 1 else "a rank needs"
    parts = ", ".join(
        f"{field.name} {getattr(need, field.name) / GIB:.1f}" for field in fields(need)
    )
    raise InputError(
        f"{parameter_count(config.model) / 1e9:.2f}B parameters do not fit here: {count} "
        f"{need.total * sharing / GIB:.1f} GiB (of one rank: {parts}), the {device} has "
        f"{available / GIB:.1f} GiB{reserved}. Run +experiment=demo here, a larger "
        f"parallel.tensor_parallel, or {config.run.name} on the machines of its cluster config "
        f"({config.cluster.nodes} nodes of {config.cluster.ranks_per_node} ranks; see `python "
        "launch/plan.py`)"
    )
