"""Decoders of the generation benchmark: ours, transformers' FalconMamba and a Llama of its size."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from data.tokenizer import EOS
from model.config import Backend, ModelConfig
from model.flops import parameter_count
from model.hf import hf_config
from model.kernels import load as load_kernels
from model.parallel.build import build_model

# prompt, number of tokens, callback after each token
Decoder = Callable[[list[int], int, Callable[[], None]], None]


def falcon_mamba(config: ModelConfig, device: torch.device) -> Decoder:
    """Our recurrent decoding, with random initial weights."""
    model = build_model(config, load_kernels(Backend.auto, device.type), 0, device).eval()
    if device.type == "cuda":
        model.bfloat16()

    def decode(prompt: list[int], count: int, on_token: Callable[[], None]) -> None:
        for _ in model.stream([prompt], count, compiled=True):
            on_token()

    return decode


def hf_falcon_mamba(config: ModelConfig, device: torch.device) -> Decoder:
    """transformers' generate with its FalconMamba."""
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    model = FalconMambaForCausalLM(FalconMambaConfig(**hf_config(config, EOS, "float32")))
    return _generate_with(model, device)


def hf_llama(config: ModelConfig, device: torch.device) -> Decoder:
    """transformers' generate with a Llama of the same size."""
    from transformers import LlamaForCausalLM

    return _generate_with(LlamaForCausalLM(llama_config(config)), device)


def llama_config(config: ModelConfig) -> Any:
    """LlamaConfig with the same width, vocabulary and about the same number of parameters.

    A layer has 4 e^2 parameters of attention and 8 e^2 of gated MLP (intermediate size 8/3 e).
    """
    from transformers import LlamaConfig

    width = config.d_model
    layer_parameters = parameter_count(config) - 2 * config.vocab_size * width
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_hidden_layers=max(1, round(layer_parameters / (12 * width * width))),
        num_attention_heads=max(1, width // 128),
        max_position_embeddings=1 << 20,
        tie_word_embeddings=False,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )


def _generate_with(model: Any, device: torch.device) -> Decoder:
    """Greedy decoding with transformers' generate, without a stop at end-of-text."""
    from transformers import StoppingCriteria, StoppingCriteriaList
    from transformers.utils import logging

    logging.set_verbosity_error()  # every model warns that the fused kernels are absent
    model = model.to(device).eval()
    if device.type == "cuda":
        model.bfloat16()
    model.generation_config.eos_token_id = None

    class TokenCallback(StoppingCriteria):
        """Calls on_token after each token and never stops."""

        def __init__(self, on_token: Callable[[], None]) -> None:
            self.on_token = on_token

        def __call__(self, ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
            self.on_token()
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    def decode(prompt: list[int], count: int, on_token: Callable[[], None]) -> None:
        ids = torch.tensor([prompt], device=device)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            stopping_criteria=StoppingCriteriaList([TokenCallback(on_token)]),
            max_new_tokens=count,
            do_sample=False,
            pad_token_id=EOS,
        )

    return decode
