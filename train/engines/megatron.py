"""megatron-core's DistributedDataParallel and DistributedOptimizer: ZeRO-1 on GPUs, with bf16
weights where it pays.

Matrices are bf16 and their masters fp32 on the rank that owns them; A_log, D, dt_bias, norms and
the convolution stay fp32. Gradients add up in fp32 and are reduce-scattered, bucket by bucket,
while the backward goes on; weights are gathered while the next forward goes on. 6 bytes per
parameter on every rank (2 weights, 4 gradients), 12 over ranks.

megatron-core 0.16.1 allocates on CUDA alone: tests run this on gloo behind
launch/simulation/cuda_on_cpu.py, as the dry run does.
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
    Fragment,
    Weights,
    fill_state,
    load_tensor_shards,
    tensor_shards,
)


class MegatronEngine:
    """megatron-core behind the Engine protocol.

    With bf16 the initial weights are rounded to it once, masters included; a checkpoint's masters
    are taken as they are. Its own optimizer never looks whether a gradient is finite, so that is
    done here.
    """

    weights = Weights.SHADOWED
    needs_equal_micro_batches = False

    def __init__(
        self, model: FalconMamba, config: Optim, ranks: Ranks, precision: Precision, bucket: int
    ) -> None:
        self.model, self.ranks, self.config = model, ranks, config
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        if precision is Precision.bf16:
            for name, parameter in model.named_parameters():
                if is_matmul_weight(name):
                    parameter.data = parameter.data.bfloat16()
        # DistributedDataParallel asks for a transformer's config, of which it reads these alone
        shape = TransformerConfig(
            num_layers=model.config.n_layer,
            hidden_size=model.config.d_model,
            num_attention_heads=ranks.tp_size,
            tensor_model_parallel_size=ranks.tp_size,
            context_parallel_size=ranks.cp_size,
            # gradients are summed over ranks: losses carry the weights
            calculate_per_token_loss=True,
        )
        overlapped = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            use_distributed_optimizer=True,
            bucket_size=bucket,
        )
        self.ddp = DistributedDataParallel(shape, overlapped, model)
        # its own hooks stand inside of blocks, where torch.compile would break off at each, and the
        # loss reads the head's weight without a call of its module
        self.ddp.disable_forward_pre_hook(param_sync=False)
        for module in (model.embedding, *model.layers, model.final_norm):
            module.register_forward_pre_hook(self._wait_for_weights)
        # where Transformer Engine or Apex is installed it would take their Adam, which counts
        # updates elsewhere than torch's, into whose state checkpoints are loaded
        optimizers.USING_PYTORCH_OPTIMIZER = True
        undecayed = ParamWithNamePredicate(
            name="undecayed", fn=lambda parameter, name: not has_weight_decay(_own(name))
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
                bf16=True,  # which means here: no loss scaling
                params_dtype=torch.bfloat16,
                use_distributed_optimizer=True,
                overlap_param_gather=True,
                clip_grad=config.clip_norm,
            ),
            [self.ddp],
            config_overrides={ParamKey(with_name_predicate=undecayed): {"wd_mult": 0.0}},
            use_gloo_process_groups=False,
        )
        (self.zero,) = getattr(chained, "chained_optimizers", [chained])
        self.ddp.zero_grad_buffer()
        self._fill_state(updates=0)

    def backward(self, loss: Tensor, last: bool) -> None:
        """See Engine."""
        with nullcontext() if last else self.ddp.no_sync():
            loss.backward()
        if last:
            self.ddp.finish_grad_sync()

    def clip_and_step(self, lr: float) -> tuple[float, bool]:
        """See Engine. A norm that is not finite skips the update of weights and moments."""
        self.zero.prepare_grads()
        norm = float(self.zero.get_grad_norm())
        finite = norm < float("inf")
        if finite:
            for group in self.zero.param_groups:
                group["lr"], group["weight_decay"] = lr, self.config.weight_decay * group["wd_mult"]
            clip_grad_by_total_norm_fp32(self.zero.get_parameters(), self.config.clip_norm, norm)
            self.zero.step_with_ready_grads()
        self.skip_step()
        return norm if finite else float("inf"), not finite

    def skip_step(self) -> None:
        """See Engine."""
        self.ddp.zero_grad_buffer()
        self.zero.zero_grad()

    def state_shards(self) -> Iterator[tuple[TensorShard, Tensor]]:
        """See Engine. Gathers all weights first: the overlapped gather waits for a forward."""
        self.ddp.start_param_sync(force_sync=True)
        return tensor_shards(self._fragments(), self.model, self.ranks)

    def load(self, reader: CheckpointReader, updates: int) -> None:
        """See Engine."""
        self._fill_state(updates)
        load_tensor_shards(self._fragments(), reader, self.ranks)
        self.zero._copy_main_params_to_model_params()
        self.ddp.start_param_sync(force_sync=True)

    def _wait_for_weights(self, module: Module, _: Any) -> None:
        """Wait for the weights that the module reads; for the final norm, the head's too."""
        head = self.model.lm_head.parameters() if module is self.model.final_norm else ()
        for parameter in (*module.parameters(), *head):
            self.ddp.param_to_bucket_group[parameter].finish_param_sync()

    def _fill_state(self, updates: int) -> None:
        """Fill every master's own state: megatron-core's loading shares one update count."""
        for group in self.zero.param_groups:
            for master in group["params"]:
                fill_state(self.zero.optimizer, master, updates)

    def _fragments(self) -> Iterator[Fragment]:
        """Each master beside its parameter, from the lists that the optimizer updates by.

        Its map from parameters to masters (model_param_group_index_map) is wrong for a group with
        bf16 and fp32.
        """
        zero = self.zero
        parameters = (*zero.model_fp32_groups, *zero.model_float16_groups)
        masters = (*zero.shard_fp32_groups, *zero.shard_fp32_from_float16_groups)
        for group, group_masters in zip(parameters, masters, strict=True):
            for parameter, master in zip(group, group_masters, strict=True):
                state = zero.optimizer.state[master]
                start = zero._get_model_param_range_map(parameter)["param"].start
                yield Fragment(
                    self.names[id(parameter)],
                    start,
                    master.data,
                    {kind: state[kind] for kind in MOMENTS},
                )


def _own(name: str) -> str:
    """A parameter's name without the wrapper's."""
    return name.removeprefix("module.")
