"""DeepSpeed's ZeRO 1, 2 and 3: AdamW's state, then gradients, then parameters cut over
data-parallel ranks.

Stages 2 and 3 reduce in every micro-batch and stage 3 gathers weights in it, so all ranks need
equally many of them. Parameters are fp32 in all stages, and products bf16 by autocast: DeepSpeed's
bf16 mode would round A_log and D too.
"""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from model.checkpoint import CheckpointReader, TensorShard
from model.mamba import FalconMamba
from train.config import Optim
from train.distributed import Mpu, Ranks
from train.engines.partition import LIVE_BUCKETS, PERSISTENT_PARTS, REUSE_BUCKETS, to_owners
from train.engines.protocol import (
    MOMENTS,
    Fragment,
    Weights,
    adamw,
    fill_state,
    load_tensor_shards,
    tensor_shards,
)


class DeepSpeedEngine:
    """DeepSpeed behind the Engine protocol.

    A parameter's ranges that a rank owns are read from DeepSpeed's own links, by parameter name.
    """

    def __init__(
        self, model: FalconMamba, config: Optim, ranks: Ranks, stage: int, bucket: int
    ) -> None:
        deepspeed = _deepspeed(ranks.device.type)
        self.ranks, self.model, self.stage = ranks, model, stage
        self.weights = Weights.SHADOWED if stage < 3 else Weights.SHARDED
        self.needs_equal_micro_batches = stage > 1
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        optimizer = adamw(model, config)
        elements = sum(parameter.numel() for parameter in model.parameters())
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # asked for, and used for nothing but its own log
            "gradient_clipping": config.clip_norm,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": stage,
                "reduce_bucket_size": min(
                    bucket, elements
                ),  # it allocates all of it, whatever the model
                "allgather_bucket_size": bucket,
                "use_multi_rank_bucket_allreduce": not to_owners(elements, ranks.replicas, bucket),
                "overlap_comm": ranks.device.type == "cuda",
                "stage3_prefetch_bucket_size": bucket,
                "stage3_max_live_parameters": LIVE_BUCKETS * bucket,
                "stage3_max_reuse_distance": REUSE_BUCKETS * bucket,
                "stage3_param_persistence_threshold": bucket // PERSISTENT_PARTS,
            },
        }
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, mpu=Mpu(), dist_init_required=False
        )
        self.zero = self.engine.optimizer
        self._fill_state(updates=0)

    def backward(self, loss: Tensor, last: bool) -> None:
        """See Engine. DeepSpeed averages over data-parallel ranks; the factor makes a sum."""
        # its own forward would: it tells apart one backward and the next
        self.zero.clear_backward_seen_flag()
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.ranks.replicas, scale_wrt_gas=False)

    def clip_and_step(self, lr: float) -> tuple[float, bool]:
        """See Engine. A norm that is not finite skips the update of weights and moments."""
        for group in self.zero.param_groups:
            group["lr"] = lr
        self.engine.step()
        return float("inf") if self.zero.overflow else float(
            self.engine.get_global_grad_norm()
        ), self.zero.overflow

    def skip_step(self) -> None:
        """See Engine. Gradients made infinite take DeepSpeed's own way of skipping an update."""
        for gradients in self.zero.averaged_gradients.values():
            for gradient in gradients or ():
                # not stage 3's padding, which is never written anew
                gradient.masked_fill_(gradient != 0, float("inf"))
        self.engine.step()
        assert self.zero.overflow

    def state_shards(self) -> Iterator[tuple[TensorShard, Tensor]]:
        """See Engine."""
        return tensor_shards(self._fragments(), self.model, self.ranks)

    def load(self, reader: CheckpointReader, updates: int) -> None:
        """See Engine."""
        self._fill_state(updates)
        load_tensor_shards(self._fragments(), reader, self.ranks)
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for index, masters in enumerate(self._masters()):
            self.zero.fp16_partitioned_groups_flat[index].data.copy_(masters.data)
            self.zero._unflatten_partitioned_parameters(index)
        if self.zero.persistent_parameters:  # small ones, which every rank keeps whole
            self.zero.persistent_parameters[0].partition(
                self.zero.persistent_parameters, has_been_updated=False
            )
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def _masters(self) -> list[Tensor]:
        """The flat fp32 weights that this rank owns."""
        zero = self.zero
        return (
            zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else zero.single_partition_of_fp32_groups
        )

    def _fill_state(self, updates: int) -> None:
        for flat in self._masters():
            fill_state(self.zero.optimizer, flat, updates)

    def _fragments(self) -> Iterator[Fragment]:
        return self._fragments_of_parameters() if self.stage == 3 else self._fragments_of_groups()

    def _fragments_of_groups(self) -> Iterator[Fragment]:
        """Stages 1 and 2 cut flat groups of parameters, and link each parameter to its part of
        them.

        Its own links to the moments are made after the first group's update and lack those of the
        other groups.
        """
        for group, flat in zip(self.zero.bit16_groups, self._masters(), strict=True):
            state = self.zero.optimizer.state[flat]
            for parameter in group:
                link = parameter._hp_mapping
                if link is not None:
                    at = link.hp_fragment_address
                    moments = {kind: state[kind].narrow(0, at.start, at.numel) for kind in MOMENTS}
                    name, start = self.names[id(parameter)], link.lp_fragment_address.start
                    yield Fragment(name, start, link.hp_fragment.data, moments)

    def _fragments_of_parameters(self) -> Iterator[Fragment]:
        """Stage 3 cuts every parameter into equal parts; the last are padded or only padding."""
        for group, flat in zip(self.zero.fp16_groups, self._masters(), strict=True):
            state = self.zero.optimizer.state[flat]
            for parameter in group:
                _, offset, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
                start = length * self.ranks.replica
                numel = min(length, parameter.ds_numel - start)
                if numel > 0:
                    moments = {kind: state[kind].narrow(0, offset, numel) for kind in MOMENTS}
                    master = flat.data.narrow(0, offset, numel)
                    yield Fragment(self.names[id(parameter)], start, master, moments)


def _deepspeed(device: str) -> Any:
    """DeepSpeed, quiet, and without the shared-memory collective that g++ compiles for minutes."""
    import logging
    import os

    os.environ["DS_ACCELERATOR"] = device  # it would guess, and warn that it did
    # as its own launcher sets; without it, stage 3 on CPUs starts numactl for every reduction
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))

    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # a killed compile leaves a lock file on which every later run hangs for ever; setting the whole
    # table also spares the probing of every op, which runs compilers
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    return deepspeed
