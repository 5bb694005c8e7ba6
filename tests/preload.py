"""Slow imports, loaded once in the process from which test ranks are forked."""

import gc

import torch
from megatron.core import parallel_state, tensor_parallel

import train.run_context
import train.trainer
from tests.compose import demo
from train.engines.deepspeed import _import_deepspeed

torch.set_num_threads(1)
_import_deepspeed("cpu")
demo()
# DeepSpeed calls gc.collect(); frozen objects are skipped
gc.collect()
gc.freeze()
__all__ = ["parallel_state", "tensor_parallel", "train"]
