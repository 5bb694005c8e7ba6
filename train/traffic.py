"""What a step sends between ranks, and which part of the optimizer each holds, from the config alone. Torch-free.

Payloads are bytes of the tensor that is reduced, or of the whole that is gathered. tests/train/test_traffic.py counts
the collectives of real steps and finds these numbers exactly; launch/dryrun.py counts them at full size.
"""

from dataclasses import dataclass
from math import prod

from model.config import Recompute
from model.flops import parameter_shapes
from model.rules import cut_of, decays
from train.config import Precision, RunConfig

ALIGNMENT = 2  # elements that DeepSpeed aligns the part of a rank to
SENT = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1}  # times (n - 1) / n of the payload, by a ring of n ranks


@dataclass(frozen=True)
class Flat:
    """Parameters of one optimizer group, flattened one after another and cut evenly over replicas."""

    elements: int
    replicas: int

    @property
    def part(self) -> int:
        """Elements of a rank's part: the group's, filled up to a multiple of ALIGNMENT x replicas, over replicas."""
        unit = ALIGNMENT * self.replicas
        return -(-self.elements // unit) * ALIGNMENT

    def owned(self, rank: int) -> int:
        """Elements of a replica's part that are no padding; the padding lies at the end."""
        return max(0, min(self.part, self.elements - rank * self.part))


def flats(config: RunConfig, ranks: int) -> list[Flat]:
    """The optimizer's two groups on one tensor-parallel rank: what decays, and what does not."""
    tp = config.parallel.tensor_parallel
    elements = {True: 0, False: 0}
    for name, shape in parameter_shapes(config.model).items():
        elements[decays(name)] += prod(shape) // (tp if cut_of(name) is not None else 1)
    return [Flat(elements[decayed], ranks // tp) for decayed in (True, False)]


@dataclass(frozen=True)
class Payload:
    """What one kind of collective carries in a step, all its calls together."""

    what: str
    group: str  # tensor, context, replicas or world
    operation: str
    size: float  # bytes
    ranks: int

    @property
    def sent(self) -> float:
        """Bytes that a rank sends for it, by ring algorithms."""
        return SENT[self.operation] * (self.ranks - 1) / self.ranks * self.size


def payloads(config: RunConfig, ranks: int, sequences: float, seq_len: int) -> list[Payload]:
    """Collectives of a step in which a rank's forward passes see `sequences`, its group's context ranks a piece each.

    Replicas: DeepSpeed's ZeRO-1 all-reduces whole gradient buckets, although a rank keeps its part alone, and gathers
    the updated weights, both fp32; once more 4 bytes each for norm and overflow. Tensor: per token and layer the sums
    of x_proj and out_proj forward, of x_proj's gradient and in_proj's input's backward, and x_proj's again where the
    backward computes the layer again; the embedding's in fp32; the loss' three values and its input's gradient.
    Context: taps and states of every layer are gathered, their gradients summed. World: one sum of losses and wishes.
    """
    c, p = config.model, config.parallel
    tp, cp = p.tensor_parallel, p.context_parallel
    width = 2 if p.precision is Precision.bf16 else 4
    again = 1 if p.recompute is Recompute.none else 2
    tokens = sequences * seq_len / cp
    selected = c.dt_rank + 2 * c.d_state
    layer = width * ((again + 1) * selected + 2 * c.d_model)
    sums = tokens * (c.n_layer * layer + 4 * c.d_model + 12 + width * c.d_model)
    piece = c.d_inner / tp * ((c.d_state + 1) * 4 + (c.d_conv - 1) * width)
    pieces = cp * sequences * c.n_layer * piece
    groups = flats(config, ranks)
    replicas = ranks // tp
    world = 8 * (2 * len(config.data.sources) + 3 + ranks)
    found = [
        Payload("gradients", "replicas", "all_reduce", 4 * sum(flat.elements for flat in groups), replicas),
        Payload("norm and overflow", "replicas", "all_reduce", 8, replicas),
        Payload("weights", "replicas", "all_gather", 4 * sum(flat.part for flat in groups) * replicas, replicas),
        Payload("tensor parallel", "tensor", "all_reduce", sums, tp),
        Payload("norm and overflow", "tensor", "all_reduce", 8, tp),
        Payload("context parallel", "context", "all_gather", again * pieces, cp),
        Payload("context parallel", "context", "all_reduce", pieces, cp),
        Payload("losses", "world", "all_reduce", world, ranks),
    ]
    return [payload for payload in found if payload.ranks > 1]


def by_kind(found: list[Payload]) -> dict[tuple[str, str], float]:
    """Bytes of every (group, operation)."""
    sizes: dict[tuple[str, str], float] = {}
    for payload in found:
        key = (payload.group, payload.operation)
        sizes[key] = sizes.get(key, 0.0) + payload.size
    return sizes
