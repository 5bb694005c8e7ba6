"""What a run needs of memory, from its config alone. Torch-free."""

from dataclasses import dataclass, fields

from data.config import InputError
from model.config import LOSS_CHUNK, SCAN_CHUNK, Recompute
from model.flops import parameter_count
from train.config import EngineKind, Precision, RunConfig
from train.traffic import buckets

GIB = 2**30
LIVE_BUCKETS = 4  # whole parameters that ZeRO-3 holds at once: of 1e8 elements a 7B's head and a layer, 1.6 GB of fp32


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
    """Bytes per token that a layer keeps for the backward, and that the one in its backward holds besides.

    The residual in fp32; in the products' type its norm, x|z, the convolution's output, dt, the scan's output, and
    x_proj's before and after its norms; in fp32 the scan's states once a chunk. Selective recompute keeps the residual,
    its norm, x|z and the scan's output, full recompute the residual alone. In its backward a layer has what it computed
    again, the gradients of its scan's output and of x|z, and the residual's. Sequence parallelism cuts residual and
    norm over tensor-parallel ranks.
    """
    c, tp = config.model, config.parallel.tensor_parallel
    d_model = c.d_model // tp if config.parallel.sequence_parallel else c.d_model
    width = 2 if config.parallel.precision is Precision.bf16 else 4
    inner = c.d_inner // tp
    whole = width * (5 * inner + 2 * (c.dt_rank + 2 * c.d_state) + d_model) + 4 * inner * c.d_state // SCAN_CHUNK
    kept = {Recompute.none: whole, Recompute.selective: width * (3 * inner + d_model), Recompute.full: 0}
    recompute = config.parallel.recompute
    return 4 * d_model + kept[recompute], whole - kept[recompute] + 3 * width * inner + 4 * d_model


def held_by_the_loss(config: RunConfig, tokens: int) -> int:
    """Bytes while the head is in its backward: a chunk of logits, its gradient of the head beside that of all chunks,
    and the final norm's input, output and gradient."""
    c, tp = config.model, config.parallel.tensor_parallel
    width = 2 if config.parallel.precision is Precision.bf16 else 4
    vocab = c.vocab_size // tp
    return width * LOSS_CHUNK * vocab + (4 + width) * vocab * c.d_model + (4 + 2 * width) * tokens * c.d_model


def needs(config: RunConfig, ranks: int) -> Needs:
    """Memory of one of `ranks` ranks.

    Parameters and gradients are fp32, but see state_of_megatron. Every replica (a data- or context-parallel rank) holds
    all of them and two moments (ZeRO-0); AdamW's state and master weights are cut over replicas (1), gradients too (2),
    parameters too (3). Activations are what one micro-batch keeps (kept_by_a_layer), and with DeepSpeed in bf16 the
    cast weights of layers that are not computed again. Buffers are two of DeepSpeed's reduction buckets, ZeRO-3's whole
    parameters, and what the loss or a layer in its backward holds, whichever is more. Stage 0 copies the gradients when
    activations are gone. Within 5 % of what torch's allocator hands out on a CPU (tests/train/test_plan.py).
    """
    c, tp, stage = config.model, config.parallel.tensor_parallel, config.parallel.zero_stage
    per_rank = parameter_count(c) // tp
    cut = per_rank // max(1, ranks // tp)
    kept, passing = kept_by_a_layer(config)
    tokens = config.parallel.micro_batch_tokens // config.parallel.context_parallel
    activations = tokens * c.n_layer * kept
    working = max(held_by_the_loss(config, tokens), tokens * passing)
    if config.parallel.engine is EngineKind.megatron:
        return Needs(*state_of_megatron(config, ranks), activations=activations, buffers=working)
    if config.parallel.precision is Precision.bf16:
        activations += 2 * per_rank // (c.n_layer if config.parallel.recompute is Recompute.full else 1)
    if stage == 0:
        working = max(working, 4 * per_rank - activations)
    reduction = 8 * min(config.parallel.bucket_elements, per_rank) if stage else 0
    return Needs(
        parameters=4 * (cut if stage == 3 else per_rank),
        gradients=4 * (cut if stage >= 2 else per_rank),
        optimizer=12 * cut if stage else 8 * per_rank,
        activations=activations,
        buffers=reduction
        + working
        + (4 * min(LIVE_BUCKETS * config.parallel.bucket_elements, per_rank) if stage == 3 else 0),
    )


def state_of_megatron(config: RunConfig, ranks: int) -> tuple[int, int, int]:
    """Bytes of parameters, gradients and optimizer with megatron-core's engine, padding too.

    Parameters are in the products' type where products take them; such ones have fp32 masters, the others are their
    own. Gradients are fp32. Both lie in buffers that are reduced and gathered in place, without buckets besides.
    """
    cut = buckets(config, ranks)
    parameters = sum(bucket.width * bucket.size for bucket in cut)
    optimizer = sum((12 if bucket.width == 2 else 8) * bucket.part for bucket in cut)
    return parameters, sum(4 * bucket.size for bucket in cut), optimizer


def headroom(config: RunConfig, device: str) -> int:
    """Bytes of a device that a run must leave to CUDA, NCCL and the allocator: none on a CPU."""
    return 0 if device == "cpu" else int(config.cluster.headroom_gib * GIB)


def check_memory(config: RunConfig, ranks: int, ranks_here: int, device: str, available: int) -> None:
    """Raise InputError when the ranks of this machine need more than the `available` bytes of their device.

    `ranks_here` ranks share the memory of a CPU; a GPU serves one, and some of it is headroom.
    """
    need, kept = needs(config, ranks), headroom(config, device)
    sharing = ranks_here if device == "cpu" else 1
    if need.total * sharing <= available - kept:
        return
    reserved = f" less {kept / GIB:g} of headroom" if kept else ""
    count = f"{sharing} ranks of this machine need" if sharing > 1 else "a rank needs"
    parts = ", ".join(f"{field.name} {getattr(need, field.name) / GIB:.1f}" for field in fields(need))
    raise InputError(
        f"{parameter_count(config.model) / 1e9:.2f}B parameters do not fit here: {count} "
        f"{need.total * sharing / GIB:.1f} GiB (of one rank: {parts}), "
        f"the {device} has {available / GIB:.1f} GiB{reserved}. "
        f"Run +experiment=demo here, a larger parallel.tensor_parallel, or {config.run.name} on the machines of its "
        f"cluster config ({config.cluster.nodes} nodes of {config.cluster.ranks_per_node} ranks; see "
        "`python launch/plan.py`)"
    )
