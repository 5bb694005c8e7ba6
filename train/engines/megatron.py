"""megatron-core's DistributedDataParallel and DistributedOptimizer as an Engine: ZeRO-1 on GPUs.

With bf16, matrices are bf16 with fp32 masters on the rank that owns them; A_log, D, dt_bias, norms
and the convolution stay fp32. Gradients accumulate in fp32 and are reduce-scattered bucket by
bucket during the backward; weights are gathered during the next forward. 6 bytes per parameter on
every rank (2 weights, 4 gradients), 12 sharded over replicas.

megatron-core 0.16.1 allocates on CUDA only: tests and the dry run use
launch/simulation/cuda_on_cpu.py.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core import optimizer as optimizers
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import Module

from model.checkpoint import CheckpointReader, TensorShard
from model.mamba import FalconMamba
from model.parameters import has_weight_decay, is_matmul_weight
from train.config import Optim, Precision
from train.distributed import Ranks
from train.engines.protocol import (
    MOMENTS,
    ParamShard,
    Weights,
    fill_state,
    load_tensor_shards,
    tensor_shards,
)


class MegatronEngine:
    """An Engine with bf16 matrices where the precision is bf16.

    Initial weights are then rounded to bf16 once, masters included; masters from a checkpoint are
    not rounded. megatron-core does not check that the gradient norm is finite, so this class does.
    """

    weights = Weights.SHADOWED
    needs_equal_micro_batches = False

    def __init__(
        self, model: FalconMamba, config: Optim, ranks: Ranks, precision: Precision, bucket: int
    ) -> None:
        self.model = model
        self.ranks = ranks
        self.config = config
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        if precision is Precision.bf16:
            for name, parameter in model.named_parameters():
                if is_matmul_weight(name):
                    parameter.data = parameter.data.bfloat16()
        # DistributedDataParallel requires a transformer's config and reads only these fields
        transformer_config = TransformerConfig(
            num_layers=model.config.n_layer,
            hidden_size=model.config.d_model,
            num_attention_heads=ranks.tp_size,
            tensor_model_parallel_size=ranks.tp_size,
            context_parallel_size=ranks.cp_size,
            # sums gradients over ranks instead of averaging
            calculate_per_token_loss=True,
        )
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            use_distributed_optimizer=True,
            bucket_size=bucket,
        )
        self.ddp = DistributedDataParallel(transformer_config, ddp_config, model)
        # megatron-core hooks modules inside blocks, where every hook breaks torch.compile's graph;
        # and the loss reads the head's weight without calling its module
        self.ddp.disable_forward_pre_hook(param_sync=False)
        for module in (model.embedding, *model.layers, model.final_norm):
            module.register_forward_pre_hook(self._wait_for_weights)
        # Transformer Engine's or Apex's Adam, used if installed, stores its update count elsewhere
        # than torch's AdamW, into whose state checkpoints are loaded
        optimizers.USING_PYTORCH_OPTIMIZER = True
        no_weight_decay = ParamWithNamePredicate(
            name="no_weight_decay",
            fn=lambda parameter, name: not has_weight_decay(name.removeprefix("module.")),
        )
        chained: Any = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=0.0,
                min_lr=0.0,
                weight_decay=config.weight_decay,
                adam_beta1=config.beta1,
                adam_beta2=config.beta2,
                adam_eps=config.eps,
                bf16=True,  # no loss scaling
                params_dtype=torch.bfloat16,
                use_distributed_optimizer=True,
                overlap_param_gather=True,
                clip_grad=config.clip_norm,
            ),
            [self.ddp],
            config_overrides={ParamKey(with_name_predicate=no_weight_decay): {"wd_mult": 0.0}},
            use_gloo_process_groups=False,
        )
        (self.zero,) = getattr(chained, "chained_optimizers", [chained])
        self.optimizer: torch.optim.Optimizer = self.zero.optimizer
        self.ddp.zero_grad_buffer()
        self._fill_state(updates=0)

    def backward(self, loss: Tensor, last: bool) -> None:
        """See Engine."""
        with nullcontext() if last else self.ddp.no_sync():
            loss.backward()
        if last:
            self.ddp.finish_grad_sync()

    def clip_and_step(self, lr: float) -> tuple[float, bool]:
        """See Engine."""
        self.zero.prepare_grads()
        norm = float(self.zero.get_grad_norm())
        is_finite = norm < float("inf")
        if is_finite:
            for group in self.zero.param_groups:
                group["lr"] = lr
                group["weight_decay"] = self.config.weight_decay * group["wd_mult"]
            clip_grad_by_total_norm_fp32(self.zero.get_parameters(), self.config.clip_norm, norm)
            self.zero.step_with_ready_grads()
        self.skip_step()
        return norm if is_finite else float("inf"), not is_finite

    def skip_step(self) -> None:
        """See Engine."""
        self.ddp.zero_grad_buffer()
        self.zero.zero_grad()

    def state_shards(self) -> Iterator[tuple[TensorShard, Tensor]]:
        """See Engine. Weights are gathered later, during the next forward."""
        return tensor_shards(self._param_shards(), self.model, self.ranks)

    def load(self, reader: CheckpointReader, updates: int) -> None:
        """See Engine."""
        self._fill_state(updates)
        load_tensor_shards(self._param_shards(), self.model, reader, self.ranks)
        self.zero._copy_main_params_to_model_params()
        self.ddp.start_param_sync(force_sync=True)

    def _wait_for_weights(self, module: Module, _: Any) -> None:
        """Wait for the gather of a module's weights; for the final norm, of the head's too."""
        head = self.model.lm_head.parameters() if module is self.model.final_norm else ()
        for parameter in (*module.parameters(), *head):
            self.ddp.param_to_bucket_group[parameter].finish_param_sync()

    def _fill_state(self, updates: int) -> None:
        """Create AdamW's state per master: megatron-core's loading shares one update count."""
        for group in self.zero.param_groups:
            for master in group["params"]:
                fill_state(self.zero.optimizer, master, updates)

    def _param_shards(self) -> Iterator[ParamShard]:
        """Pair masters with parameters by the lists that the optimizer updates.

        Its map from parameters to masters (model_param_group_index_map) is wrong for a group that
        has bf16 and fp32 parameters.
        """
        zero = self.zero
        parameters = (*zero.model_fp32_groups, *zero.model_float16_groups)
        masters = (*zero.shard_fp32_groups, *zero.shard_fp32_from_float16_groups)
        for group, group_masters in zip(parameters, masters, strict=True):
            for parameter, master in zip(group, group_masters, strict=True):
                state = zero.optimizer.state[master]
                start = zero._get_model_param_range_map(parameter)["param"].start
                yield ParamShard(
                    self.names[id(parameter)],
                    start,
                    master.data,
                    {kind: state[kind] for kind in MOMENTS},
                )
