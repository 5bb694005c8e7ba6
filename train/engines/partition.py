"""How engines shard parameters over replicas, and how often ZeRO-3 gathers weights. Torch-free.

Everything follows from the config. The engines take their settings from here, and so do the
estimates of memory and traffic (train/costs/).

ZeRO-3 gathers a module's weights when the module starts and frees them when it ends, unless their
next use is near. Small parameters stay unsharded.
"""

from dataclasses import dataclass
from math import lcm, prod

from model.config import Recompute
from model.flops import parameter_shapes
from model.parameters import has_weight_decay, is_matmul_weight, shard_spec
from train.config import Precision, RunConfig

# DeepSpeed's ZeRO-3 defaults at buckets of 1e8 elements, here in proportion to the bucket, so that
# small models are sharded too
PERSISTENCE_DIVISOR = 1000  # parameters of up to bucket / 1000 elements are never sharded
# in elements of the modules that run before a weight's next use; within it the weight stays
MAX_REUSE_BUCKETS = 10
# gathered parameters at once: with 1e8 elements a 7B's head and one layer, 1.6 GB in fp32
MAX_LIVE_BUCKETS = 4
ALIGNMENT = 2  # elements to which DeepSpeed's stages 1 and 2 align a rank's shard
# stages 1 and 2 reduce to owners if a rank's shard has at least a quarter of a bucket
REDUCE_TO_OWNER_DIVISOR = 4


def is_persistent(config: RunConfig, numel: int) -> bool:
    """Whether ZeRO-3 leaves a parameter unsharded, gathered only after an update."""
    return numel <= config.parallel.bucket_elements // PERSISTENCE_DIVISOR


def max_gathers(config: RunConfig) -> int:
    """Upper bound on ZeRO-3's gathers of a weight per micro-batch, from a run's third one on.

    DeepSpeed learns the module order in the first two. A weight is gathered for the forward, for
    the backward, and for a recomputed layer once more unless that layer's backward is near: at most
    two layers of weights later. In the last layers, whose backward is near their forward, it is
    gathered once.
    """
    layer_numel = sum(local_numel(config).values()) // config.model.n_layer
    is_near = 2 * layer_numel < MAX_REUSE_BUCKETS * config.parallel.bucket_elements
    return 2 if is_near or config.compute.recompute is Recompute.none else 3


@dataclass(frozen=True)
class FlatGroup:
    """Parameters flattened one after another and sharded evenly over replicas."""

    numel: int
    replicas: int
    alignment: int = ALIGNMENT

    @property
    def padded_shard_numel(self) -> int:
        """Elements of a replica's shard: all, padded to alignment x replicas, over replicas."""
        unit = self.alignment * self.replicas
        return -(-self.numel // unit) * self.alignment

    def shard_numel(self, replica: int) -> int:
        """Elements of a replica's shard without the padding, which is at the group's end."""
        size = self.padded_shard_numel
        return max(0, min(size, self.numel - replica * size))


def local_numel(config: RunConfig) -> dict[str, int]:
    """Elements of every parameter on one tensor-parallel rank."""
    tp_size = config.parallel.tensor_parallel
    shapes = parameter_shapes(config.model)
    return {
        name: prod(shape) // (tp_size if shard_spec(name) is not None else 1)
        for name, shape in shapes.items()
    }


def flat_groups(config: RunConfig, world_size: int) -> list[FlatGroup]:
    """DeepSpeed's flat groups on one tensor-parallel rank: with and without weight decay.

    Stage 3 shards every parameter by itself.
    """
    sizes = local_numel(config)
    replicas = world_size // config.parallel.tensor_parallel
    if config.parallel.zero_stage == 3:
        return [FlatGroup(numel, replicas, alignment=1) for numel in sizes.values()]
    groups = {True: 0, False: 0}
    for name, numel in sizes.items():
        groups[has_weight_decay(name)] += numel
    return [FlatGroup(groups[has_decay], replicas) for has_decay in (True, False)]


@dataclass(frozen=True)
class Bucket:
    """One bucket of megatron-core's buffer for parameters of one dtype, sharded over replicas."""

    numel: int  # with padding
    dtype_bytes: int  # of a weight
    ranges: tuple[tuple[int, int], ...]  # of its parameters; between them is padding
    replicas: int

    @property
    def padded_shard_numel(self) -> int:
        """Elements of a replica's shard."""
        return self.numel // self.replicas

    def shard_numel(self, replica: int) -> int:
        """Elements of a replica's shard without padding."""
        low, high = replica * self.padded_shard_numel, (replica + 1) * self.padded_shard_numel
        return sum(max(0, min(high, end) - max(low, start)) for start, end in self.ranges)


def megatron_buckets(config: RunConfig, world_size: int) -> list[Bucket]:
    """megatron-core's buckets: a buffer per dtype, from the model's last parameter to its first.

    A parameter starts at a multiple of 64 elements. A bucket ends with the parameter that fills it,
    at a multiple of 128 and of the replicas (core/distributed/param_and_grad_buffer.py of
    megatron-core 0.16.1).
    """
    replicas = world_size // config.parallel.tensor_parallel
    unit = lcm(replicas, 128)
    buckets = []
    for dtype_bytes in (2, 4):
        ranges: list[tuple[int, int]] = []
        sizes = [
            (name, numel)
            for name, numel in local_numel(config).items()
            if param_dtype_bytes(config, name) == dtype_bytes
        ]
        for name, numel in reversed(sizes):
            start = -(-ranges[-1][1] // 64) * 64 if ranges else 0
            end = start + numel
            ranges.append((start, end))
            if end >= config.parallel.bucket_elements or name == sizes[0][0]:
                padded = -(-end // unit) * unit
                buckets.append(Bucket(padded, dtype_bytes, tuple(ranges), replicas))
                ranges = []
    return buckets


def param_dtype_bytes(config: RunConfig, name: str) -> int:
    """Bytes per element of a megatron-core parameter: matmul weights in the run's precision."""
    return matmul_dtype_bytes(config) if is_matmul_weight(name) else 4


def matmul_dtype_bytes(config: RunConfig) -> int:
    """Bytes per element of matmul operands."""
    return 2 if config.compute.precision is Precision.bf16 else 4


def reduces_to_owner(numel: int, replicas: int, bucket: int) -> bool:
    """Whether DeepSpeed's stages 1 and 2 reduce each gradient shard to the rank that owns it.

    This sends half as much. Otherwise they all-reduce whole buckets: fewer messages, which is
    better where shards are small.
    """
    return numel // replicas >= bucket // REDUCE_TO_OWNER_DIVISOR
