"""DeepSpeed's ZeRO 1, 2 and 3 as an Engine.

Data-parallel ranks shard AdamW's state, from stage 2 on gradients, in stage 3 parameters. Stages 2
and 3 reduce gradients in every micro-batch and stage 3 gathers weights in it, so all ranks must run
equally many. Parameters are fp32 and matmuls bf16 by autocast: DeepSpeed's bf16 mode would round
A_log and D too.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from model.checkpoint import CheckpointReader, TensorShard
from model.mamba import FalconMamba
from train.config import Optim
from train.distributed import Mpu, Ranks
from train.engines.partition import (
    MAX_LIVE_BUCKETS,
    MAX_REUSE_BUCKETS,
    PERSISTENCE_DIVISOR,
    reduces_to_owner,
)
from train.engines.protocol import (
    MOMENTS,
    ParamShard,
    Weights,
    adamw,
    fill_state,
    load_tensor_shards,
    tensor_shards,
)


class DeepSpeedEngine:
    """An Engine; DeepSpeed's own links tell which ranges of a parameter a rank owns."""

    def __init__(
        self, model: FalconMamba, config: Optim, ranks: Ranks, stage: int, bucket: int
    ) -> None:
        deepspeed = _import_deepspeed(ranks.device.type)
        self.ranks = ranks
        self.model = model
        self.stage = stage
        self.weights = Weights.SHADOWED if stage < 3 else Weights.SHARDED
        self.needs_equal_micro_batches = stage > 1
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        optimizer = adamw(model, config)
        numel = sum(parameter.numel() for parameter in model.parameters())
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # required, but only DeepSpeed's log uses it
            "gradient_clipping": config.clip_norm,
            "zero_allow_untested_optimizer": True,
            "zero_optimization": {
                "stage": stage,
                # allocated in full, however small the model is
                "reduce_bucket_size": min(bucket, numel),
                "allgather_bucket_size": bucket,
                "use_multi_rank_bucket_allreduce": not reduces_to_owner(
                    numel, ranks.num_replicas, bucket
                ),
                "overlap_comm": ranks.device.type == "cuda",
                "stage3_prefetch_bucket_size": bucket,
                "stage3_max_live_parameters": MAX_LIVE_BUCKETS * bucket,
                "stage3_max_reuse_distance": MAX_REUSE_BUCKETS * bucket,
                "stage3_param_persistence_threshold": bucket // PERSISTENCE_DIVISOR,
            },
        }
        self.engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, mpu=Mpu(), dist_init_required=False
        )
        self.zero = self.engine.optimizer
        self.optimizer: torch.optim.Optimizer = optimizer
        self._fill_state(updates=0)

    def backward(self, loss: Tensor, last: bool) -> None:
        """See Engine. DeepSpeed averages over data-parallel ranks; the factor makes it a sum."""
        # DeepSpeed's forward, which we do not call, would clear the flag between backward passes
        self.zero.clear_backward_seen_flag()
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.ranks.num_replicas, scale_wrt_gas=False)

    def clip_and_step(self, lr: float) -> tuple[float, bool]:
        """See Engine."""
        for group in self.zero.param_groups:
            group["lr"] = lr
        self.engine.step()
        if self.zero.overflow:
            return float("inf"), True
        return float(self.engine.get_global_grad_norm()), False

    def skip_step(self) -> None:
        """See Engine. Infinite gradients make DeepSpeed skip the update itself."""
        for gradients in self.zero.averaged_gradients.values():
            for gradient in gradients or ():
                # leaves stage 3's padding at zero: nothing would reset it
                gradient.masked_fill_(gradient != 0, float("inf"))
        self.engine.step()
        assert self.zero.overflow

    def state_shards(self) -> Iterator[tuple[TensorShard, Tensor]]:
        """See Engine."""
        return tensor_shards(self._param_shards(), self.model, self.ranks)

    def load(self, reader: CheckpointReader, updates: int) -> None:
        """See Engine."""
        self._fill_state(updates)
        load_tensor_shards(self._param_shards(), self.model, reader, self.ranks)
        if self.stage < 3:
            self.zero.update_lp_params()
            return
        for index, masters in enumerate(self._masters()):
            self.zero.fp16_partitioned_groups_flat[index].data.copy_(masters.data)
            self.zero._unflatten_partitioned_parameters(index)
        if self.zero.persistent_parameters:  # never sharded: every rank needs all of them
            self.zero.persistent_parameters[0].partition(
                self.zero.persistent_parameters, has_been_updated=False
            )
            self.zero.persistent_parameters[0].all_gather(self.zero.persistent_parameters)

    def _masters(self) -> list[Tensor]:
        """Flat fp32 master weights that this rank owns."""
        zero = self.zero
        return (
            zero.fp32_partitioned_groups_flat
            if self.stage == 3
            else zero.single_partition_of_fp32_groups
        )

    def _fill_state(self, updates: int) -> None:
        for flat in self._masters():
            fill_state(self.zero.optimizer, flat, updates)

    def _param_shards(self) -> Iterator[ParamShard]:
        return self._stage_3_shards() if self.stage == 3 else self._flat_group_shards()

    def _flat_group_shards(self) -> Iterator[ParamShard]:
        """Stages 1 and 2 shard flat groups of parameters and link parameters to their ranges.

        DeepSpeed links moments after the first group's update only, so those of the other groups
        have no links; the moments are read from the flat state instead.
        """
        for group, flat in zip(self.zero.bit16_groups, self._masters(), strict=True):
            state = self.zero.optimizer.state[flat]
            for parameter in group:
                link = parameter._hp_mapping
                if link is not None:
                    address = link.hp_fragment_address
                    moments = {
                        kind: state[kind].narrow(0, address.start, address.numel)
                        for kind in MOMENTS
                    }
                    name, start = self.names[id(parameter)], link.lp_fragment_address.start
                    yield ParamShard(name, start, link.hp_fragment.data, moments)

    def _stage_3_shards(self) -> Iterator[ParamShard]:
        """Stage 3 shards every parameter evenly; the last shards are padded or only padding."""
        for group, flat in zip(self.zero.fp16_groups, self._masters(), strict=True):
            state = self.zero.optimizer.state[flat]
            for parameter in group:
                _, offset, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
                start = length * self.ranks.replica_rank
                numel = min(length, parameter.ds_numel - start)
                if numel > 0:
                    moments = {kind: state[kind].narrow(0, offset, numel) for kind in MOMENTS}
                    master = flat.data.narrow(0, offset, numel)
                    yield ParamShard(self.names[id(parameter)], start, master, moments)


def _import_deepspeed(device: str) -> Any:
    """Import DeepSpeed, without its log and the shared-memory op that g++ compiles for minutes."""
    import logging
    import os

    os.environ["DS_ACCELERATOR"] = device  # else it guesses, with a warning
    # DeepSpeed's launcher sets this; without it stage 3 on CPUs runs numactl for every reduction
    os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))

    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # A killed compile leaves a lock file on which every later run hangs. Setting the whole table
    # also skips DeepSpeed's probing of every op, which runs compilers.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    return deepspeed
