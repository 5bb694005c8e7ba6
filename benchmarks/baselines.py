"""One way to drive what generation is measured of: ours, transformers' FalconMamba and a Llama of
its size.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from data.tokenizer import EOS
from model.config import Backend, ModelConfig
from model.flops import parameter_count
from model.hf import hf_config
from model.kernels import load as kernels_of
from model.parallel.build import build_model

# prompt, count, what is called after each token
Decoder = Callable[[list[int], int, Callable[[], None]], None]


def ours(config: ModelConfig, device: torch.device) -> Decoder:
    """Our recurrent decoding, with initial weights."""
    model = build_model(config, kernels_of(Backend.auto, device.type), 0, device).eval()
    if device.type == "cuda":
        model.bfloat16()

    def decode(prompt: list[int], count: int, watch: Callable[[], None]) -> None:
        for _ in model.stream([prompt], count, compiled=True):
            watch()

    return decode


def falcon(config: ModelConfig, device: torch.device) -> Decoder:
    """transformers' generate for FalconMamba."""
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    return _decoder(
        FalconMambaForCausalLM(FalconMambaConfig(**hf_config(config, EOS, "float32"))), device
    )


def llama(config: ModelConfig, device: torch.device) -> Decoder:
    """transformers' generate for a Llama-shaped transformer."""
    from transformers import LlamaForCausalLM

    return _decoder(LlamaForCausalLM(llama_config(config)), device)


def llama_config(config: ModelConfig) -> Any:
    """LlamaConfig of the same width, vocabulary and, by its number of layers, parameters.

    A layer has 4 e^2 of attention and 8 e^2 of gated MLP (inside 8/3 e).
    """
    from transformers import LlamaConfig

    width = config.d_model
    inside = parameter_count(config) - 2 * config.vocab_size * width
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=max(1, round(inside / (12 * width * width))),
        num_attention_heads=max(1, width // 128),
        max_position_embeddings=1 << 20,
        tie_word_embeddings=False,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )


def _decoder(model: Any, device: torch.device) -> Decoder:
    """Greedy generate of transformers, which never stops early."""
    from transformers import StoppingCriteria, StoppingCriteriaList
    from transformers.utils import logging

    logging.set_verbosity_error()  # it says at every model that the fused kernels are absent
    model = model.to(device).eval()
    if device.type == "cuda":
        model.bfloat16()
    model.generation_config.eos_token_id = None

    class Watched(StoppingCriteria):
        def __init__(self, watch: Callable[[], None]) -> None:
            self.watch = watch

        def __call__(self, ids: Tensor, scores: Any, **named: Any) -> Tensor:
            self.watch()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def decode(prompt: list[int], count: int, watch: Callable[[], None]) -> None:
        ids = torch.tensor([prompt], device=device)
        settings = {"max_new_tokens": count, "do_sample": False, "pad_token_id": EOS}
        watched = StoppingCriteriaList([Watched(watch)])
        model.generate(
            ids, attention_mask=torch.ones_like(ids), stopping_criteria=watched, **settings
        )

    return decode
