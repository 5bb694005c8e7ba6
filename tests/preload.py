"""Everything slow to import, loaded once in the process that tests/supervisor.py forks its ranks
from.
"""

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
# what is here lives as long as the forks: their collections, which DeepSpeed asks for, pass it over
gc.collect()
gc.freeze()
__all__ = ["parallel_state", "tensor_parallel", "train"]
