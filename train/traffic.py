"""What a step sends between ranks, and which part of the optimizer each holds, from the config alone. Torch-free.

Payloads are bytes of the tensor that is reduced, or of the whole that is gathered. tests/train/test_traffic.py counts
the collectives of real steps and finds these numbers exactly; launch/dryrun.py counts them at full size.
"""

from dataclasses import dataclass
from math import lcm, prod

from model.config import Recompute
from model.flops import parameter_shapes
from model.parameters import cut_of, decays, in_products
from train.config import EngineKind, Precision, RunConfig
from train.zero3 import gathered, persistent

ALIGNMENT = 2  # elements that DeepSpeed's stages 1 and 2 align the part of a rank to
LARGE = 4  # parts of a bucket from which on a sum of its own is worth while
# times (n - 1) / n of the payload, by a ring of n ranks
SENT = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "reduce": 1}


@dataclass(frozen=True)
class Flat:
    """Parameters flattened one after another and cut evenly over replicas."""

    elements: int
    replicas: int
    alignment: int = ALIGNMENT

    @property
    def part(self) -> int:
        """Elements of a rank's part: all of them, filled up to a multiple of alignment x replicas, over replicas."""
        unit = self.alignment * self.replicas
        return -(-self.elements // unit) * self.alignment

    def owned(self, rank: int) -> int:
        """Elements of a replica's part that are no padding; the padding lies at the end."""
        return max(0, min(self.part, self.elements - rank * self.part))


def elements_of(config: RunConfig) -> dict[str, int]:
    """Every parameter's elements on one tensor-parallel rank."""
    tp = config.parallel.tensor_parallel
    shapes = parameter_shapes(config.model)
    return {name: prod(shape) // (tp if cut_of(name) is not None else 1) for name, shape in shapes.items()}


def flats(config: RunConfig, ranks: int) -> list[Flat]:
    """What is cut on one tensor-parallel rank: the optimizer's two groups, what decays and what does not.

    Stage 3 cuts every parameter by itself.
    """
    elements, replicas = elements_of(config), ranks // config.parallel.tensor_parallel
    if config.parallel.zero_stage == 3:
        return [Flat(count, replicas, alignment=1) for count in elements.values()]
    groups = {True: 0, False: 0}
    for name, count in elements.items():
        groups[decays(name)] += count
    return [Flat(groups[decayed], replicas) for decayed in (True, False)]


@dataclass(frozen=True)
class Bucket:
    """Some of megatron-core's parameters of one type, in one part of a buffer, which is cut evenly over replicas."""

    size: int  # elements, padding too
    width: int  # bytes of a weight
    ranges: tuple[tuple[int, int], ...]  # where its parameters lie; between them is padding
    replicas: int

    @property
    def part(self) -> int:
        """Elements of a rank's part."""
        return self.size // self.replicas

    def owned(self, rank: int) -> int:
        """Elements of a replica's part that are no padding."""
        low, high = rank * self.part, (rank + 1) * self.part
        return sum(max(0, min(high, end) - max(low, start)) for start, end in self.ranges)


def buckets(config: RunConfig, ranks: int) -> list[Bucket]:
    """How megatron-core lays parameters out: one buffer per type, from the model's last parameter to its first.

    A parameter begins at a multiple of 64 elements; a bucket ends with the parameter that fills it, at a multiple of
    128 and of the replicas (core/distributed/param_and_grad_buffer.py of megatron-core 0.16.1).
    """
    replicas = ranks // config.parallel.tensor_parallel
    unit, found = lcm(replicas, 128), []
    for width in (2, 4):
        ranges: list[tuple[int, int]] = []
        named = [(name, count) for name, count in elements_of(config).items() if wide(config, name) == width]
        for name, count in reversed(named):
            start = -(-ranges[-1][1] // 64) * 64 if ranges else 0
            ranges.append((start, start + count))
            if ranges[-1][1] >= config.parallel.bucket_elements or name == named[0][0]:
                found.append(Bucket(-(-ranges[-1][1] // unit) * unit, width, tuple(ranges), replicas))
                ranges = []
    return found


def wide(config: RunConfig, name: str) -> int:
    """Bytes of an element of a parameter with megatron-core: matrices are in the products' type, others in fp32."""
    return 2 if config.parallel.precision is Precision.bf16 and in_products(name) else 4


def to_owners(elements: int, replicas: int, bucket: int) -> bool:
    """Whether DeepSpeed's stages 1 and 2 sum each rank's part of a gradient at that rank, which sends half as much.

    Otherwise they sum whole buckets at all ranks: fewer messages, which is better where parts are small.
    """
    return elements // replicas >= bucket // LARGE


@dataclass(frozen=True)
class Payload:
    """What one kind of collective carries in a step, all its calls together."""

    what: str
    group: str  # tensor, context, replicas, optimizer or world (see train/collectives.py)
    operation: str
    size: float  # bytes
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends for it, by ring algorithms."""
        return SENT[self.operation] * (self.ranks - 1) / self.ranks * self.size


def payloads(config: RunConfig, ranks: int, sequences: float, micro_batches: int, seq_len: int) -> list[Payload]:
    """Collectives of a step in which a rank's forward passes see `sequences` in some micro-batches.

    The world: one sum of losses and wishes. See of_replicas, of_tensor and of_context for the others.
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

    Stage 0 sums gradients once; DeepSpeed's stages 1 and 2 do, small parts at all ranks and large ones at their owner,
    stage 2 in every micro-batch, and gather the updated weights. Stage 3 scatters gradients and gathers weights in
    every micro-batch (zero3.py), small weights after the update alone; a run's first two micro-batches gather more.
    megatron-core scatters the gradient once and gathers weights in their own type, bucket by bucket with their padding,
    and sums its norm over all ranks.
    """
    stage, groups = config.parallel.zero_stage, flats(config, ranks)
    replicas = groups[0].replicas
    if config.parallel.engine is EngineKind.megatron:
        cut = buckets(config, ranks)
        return [
            Payload("gradients", "replicas", "reduce_scatter", sum(4 * bucket.size for bucket in cut), replicas),
            Payload("weights", "replicas", "all_gather", sum(bucket.width * bucket.size for bucket in cut), replicas),
            Payload("norm", "optimizer", "all_reduce", 4, ranks),
        ]
    elements = sum(flat.elements for flat in groups)
    gradients = 4 * elements * (micro_batches if stage > 1 else 1)
    whole = 4 * sum(flat.part for flat in groups) * replicas
    owners = stage > 0 and to_owners(elements, replicas, config.parallel.bucket_elements)
    reduction, weights = "reduce" if owners else "all_reduce", whole if stage else 0
    if stage == 3:
        kept = sum(flat.part * replicas for flat in groups if persistent(config, flat.elements))
        reduction, gradients = "reduce_scatter", micro_batches * whole
        weights = 4 * (micro_batches * gathered(config, elements_of(config), replicas) + kept)
    return [
        Payload("gradients", "replicas", reduction, gradients, replicas),
        Payload("norm and overflow", "replicas", "all_reduce", norm(config), replicas),
        Payload("weights", "replicas", "all_gather", weights, replicas),
    ]


def of_tensor(config: RunConfig, tokens: float, micro_batches: int) -> list[Payload]:
    """What tensor-parallel ranks sum, per token of theirs.

    Per layer x_proj's output and its gradient, the former again where the backward computes the layer again, out_proj's
    output and in_proj's input's gradient; the embedding's rows in its weight's type; three values of the loss and its
    input's gradient. Under sequence parallelism sums of out_proj and in_proj become scatters, with gathers on the other
    side of them and once more in the backward; embedding and last norm are gathered; norms' weights are summed in
    every micro-batch.
    """
    c, p = config.model, config.parallel
    width = 2 if p.precision is Precision.bf16 else 4
    again = p.recompute is not Recompute.none
    selected, residual = width * (c.dt_rank + 2 * c.d_state), width * c.d_model
    rows = c.d_model * (wide(config, "embedding.weight") if p.engine is EngineKind.megatron else 4)
    sums = c.n_layer * selected * (2 + again) + rows + 12 + residual
    gathers = scatters = norms = 0
    if p.sequence_parallel:
        gathers = c.n_layer * residual * (3 + (p.recompute is Recompute.full)) + rows + residual
        scatters = c.n_layer * residual * 2
        norms = micro_batches * (c.n_layer + 1) * 4 * c.d_model
    else:
        sums += c.n_layer * residual * 2
    whole = {"all_reduce": tokens * sums + norms, "all_gather": tokens * gathers, "reduce_scatter": tokens * scatters}
    found = [Payload("tensor parallel", "tensor", kind, size, p.tensor_parallel) for kind, size in whole.items()]
    scalars = 0 if p.engine is EngineKind.megatron else norm(config) if p.zero_stage else 4
    return [*found, Payload("norm and overflow", "tensor", "all_reduce", scalars, p.tensor_parallel)]


def norm(config: RunConfig) -> int:
    """Bytes of DeepSpeed's gradient norm and overflow, 4 each and in stage 3 8 each."""
    return {0: 0, 3: 16}.get(config.parallel.zero_stage, 8)


def of_context(config: RunConfig, sequences: float) -> list[Payload]:
    """Taps and states of every layer, gathered in the forward and when it is computed again; their gradients summed."""
    c, p = config.model, config.parallel
    width = 2 if p.precision is Precision.bf16 else 4
    piece = c.d_inner / p.tensor_parallel * ((c.d_state + 1) * 4 + (c.d_conv - 1) * width)
    pieces = p.context_parallel * sequences * c.n_layer * piece
    times = 1 if p.recompute is Recompute.none else 2
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
