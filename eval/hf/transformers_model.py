"""Load an exported folder with transformers, without the notices that its CPU path prints."""

from pathlib import Path
from typing import Any

import torch


def load_transformers_model(folder: Path) -> Any:
    """Load FalconMambaForCausalLM from a folder, in fp32."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # every load warns that the fused kernels are absent
    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
