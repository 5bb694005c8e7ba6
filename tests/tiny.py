"""A tiny model; all sizes differ, so that a swapped axis is detected."""

import torch

from model.config import ModelConfig
from model.kernels import REFERENCE
from model.kernels.interface import Kernels
from model.mamba import FalconMamba
from model.parallel.build import build_model

TINY = ModelConfig(
    vocab_size=96,
    d_model=24,
    n_layer=2,
    d_inner=48,
    d_state=6,
    d_conv=4,
    dt_rank=5,
    norm_eps=1e-5,
    mixer_norm_eps=1e-6,
    mixer_norms=True,
    embedding_std=0.02,
    dt_min=1e-3,
    dt_max=0.1,
    dt_floor=1e-4,
)


def model_of(
    config: ModelConfig, seed: int = 0, kernels: Kernels = REFERENCE, device: str = "cpu"
) -> FalconMamba:
    """A newly initialised model."""
    return build_model(config, kernels, seed, torch.device(device))
