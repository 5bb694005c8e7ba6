"""How engines cut parameters over replicas, and how often ZeRO-3 gathers weights, from the
config alone. Torch-free.

The engines take their settings from here, and so do the estimators of memory and traffic.

Stage 3 gathers a module's weights where the module begins and frees them where it ends, unless
their next use is near; small ones stay whole.
"""

from dataclasses import dataclass
from math import lcm, prod

from model.config import Recompute
from model.flops import parameter_shapes
from model.parameters import has_weight_decay, is_matmul_weight, shard_spec
from train.config import Precision, RunConfig

# DeepSpeed's own settings for buckets of 1e8 elements, in proportion to the bucket so that small
# models are cut as well
PERSISTENT_PARTS = 1000  # up to this part of a bucket a parameter stays whole on every rank
# of elements of modules that begin before a weight's next use, from which on it is not near
REUSE_BUCKETS = 10
# whole parameters that ZeRO-3 holds at once: of 1e8 elements a 7B's head and a layer, 1.6 GB of
# fp32
LIVE_BUCKETS = 4
ALIGNMENT = 2  # elements that DeepSpeed's stages 1 and 2 align the part of a rank to
LARGE = 4  # parts of a bucket from which on a sum of its own is worth while


def persistent(config: RunConfig, elements: int) -> bool:
    """Whether every rank keeps so small a parameter whole, gathered only after an update."""
    return elements <= config.parallel.bucket_elements // PERSISTENT_PARTS


def gathers(config: RunConfig) -> int:
    """The most times that ZeRO-3 gathers a weight in a micro-batch, from a run's third on: in the
    first two DeepSpeed learns the order.

    Once for the forward and once for the backward. A layer that is computed again is gathered for
    that too, unless its backward, at most two layers of weights later, is near. It is once where
    the backward is near the forward, as it is in the last layers.
    """
    layer = sum(elements_of(config).values()) // config.model.n_layer
    near = 2 * layer < REUSE_BUCKETS * config.parallel.bucket_elements
    return 2 if near or config.compute.recompute is Recompute.none else 3


@dataclass(frozen=True)
class Flat:
    """Parameters flattened one after another and cut evenly over replicas."""

    elements: int
    replicas: int
    alignment: int = ALIGNMENT

    @property
    def part(self) -> int:
        """Elements of a rank's part: all, padded to alignment x replicas, divided by replicas."""
        unit = self.alignment * self.replicas
        return -(-self.elements // unit) * self.alignment

    def owned(self, rank: int) -> int:
        """Elements of a replica's part that are no padding; the padding lies at the end."""
        return max(0, min(self.part, self.elements - rank * self.part))


def elements_of(config: RunConfig) -> dict[str, int]:
    """Every parameter's elements on one tensor-parallel rank."""
    tp = config.parallel.tensor_parallel
    shapes = parameter_shapes(config.model)
    return {
        name: prod(shape) // (tp if shard_spec(name) is not None else 1)
        for name, shape in shapes.items()
    }


def flats(config: RunConfig, ranks: int) -> list[Flat]:
    """What is cut on one tensor-parallel rank: the optimizer's two groups, what decays and what
    does not.

    Stage 3 cuts every parameter by itself.
    """
    elements, replicas = elements_of(config), ranks // config.parallel.tensor_parallel
    if config.parallel.zero_stage == 3:
        return [Flat(count, replicas, alignment=1) for count in elements.values()]
    groups = {True: 0, False: 0}
    for name, count in elements.items():
        groups[has_weight_decay(name)] += count
    return [Flat(groups[decayed], replicas) for decayed in (True, False)]


@dataclass(frozen=True)
class Bucket:
    """One part of megatron-core's buffer for parameters of one type, cut evenly over replicas."""

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
    """How megatron-core lays parameters out: one buffer per type, from the model's last parameter
    to its first.

    A parameter begins at a multiple of 64 elements; a bucket ends with the parameter that fills it,
    at a multiple of 128 and of the replicas (core/distributed/param_and_grad_buffer.py of
    megatron-core 0.16.1).
    """
    replicas = ranks // config.parallel.tensor_parallel
    unit, found = lcm(replicas, 128), []
    for width in (2, 4):
        ranges: list[tuple[int, int]] = []
        named = [
            (name, count)
            for name, count in elements_of(config).items()
            if wide(config, name) == width
        ]
        for name, count in reversed(named):
            start = -(-ranges[-1][1] // 64) * 64 if ranges else 0
            ranges.append((start, start + count))
            if ranges[-1][1] >= config.parallel.bucket_elements or name == named[0][0]:
                found.append(
                    Bucket(-(-ranges[-1][1] // unit) * unit, width, tuple(ranges), replicas)
                )
                ranges = []
    return found


def wide(config: RunConfig, name: str) -> int:
    """Bytes per element of a megatron-core parameter: matrices in the products' type, else fp32."""
    return product_bytes(config) if is_matmul_weight(name) else 4


def product_bytes(config: RunConfig) -> int:
    """Bytes of an element of the type that products are taken in."""
    return 2 if config.compute.precision is Precision.bf16 else 4


def to_owners(elements: int, replicas: int, bucket: int) -> bool:
    """Whether DeepSpeed's stages 1 and 2 sum each rank's part of a gradient at that rank, which
    sends half as much.

    Otherwise they sum whole buckets at all ranks: fewer messages, which is better where parts are
    small.
    """
    return elements // replicas >= bucket // LARGE
