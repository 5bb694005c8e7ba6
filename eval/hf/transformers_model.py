"""An exported folder as transformers loads it, without the notices that the CPU path prints."""

from pathlib import Path
from typing import Any

import torch


def load_transformers_model(folder: Path) -> Any:
    """FalconMambaForCausalLM of a folder, in fp32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # it says at every load that the fused kernels are absent
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
