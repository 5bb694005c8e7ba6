"""What llama.cpp makes of an export, found without llama.cpp and without network.

llama.cpp reads GGUF files, which its converter (convert_hf_to_gguf.py) writes. The converter knows
a vocabulary by the hash of the ids that it gives one text; `llama_cpp.json` has that text and the
known hashes with their names, from the release CONVERTER (MIT). A test compares it with the
release, and `benchmarks/serving.py` runs the converter.
"""

import json
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from model.config import ModelConfig

CONVERTER = "llama-cpp-python 0.3.36"
TABLE = Path(__file__).with_name("llama_cpp.json")
EXPANSION = 2  # d_inner / d_model of any model that the converter accepts


@cache
def table() -> dict[str, Any]:
    """The converter's `probe`, a text, and its `pre_tokenizers`, names by hash."""
    content: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))
    return content


def probe_hash(tokenizer: Tokenizer) -> str:
    """The converter's hash of a tokenizer: of the plain ids of its text, written as a list."""
    ids = tokenizer.encode(table()["probe"], add_special_tokens=False).ids
    return sha256(str(ids).encode()).hexdigest()


def pre_tokenizer(tokenizer: Tokenizer) -> str | None:
    """llama.cpp's name of a tokenizer's way of splitting texts; None if its converter has none."""
    name: str | None = table()["pre_tokenizers"].get(probe_hash(tokenizer))
    return name


def obstacles(config: ModelConfig, tokenizer: Tokenizer) -> list[str]:
    """Why llama.cpp's converter refuses an export of the model; empty if it takes it."""
    found = []
    if pre_tokenizer(tokenizer) is None:
        found.append(
            f"its converter ({CONVERTER}) does not know this vocabulary (hash "
            f'{probe_hash(tokenizer)[:12]}): "BPE pre-tokenizer was not recognized"'
        )
    if config.d_inner != EXPANSION * config.d_model:
        found.append(
            f"its converter needs d_inner = {EXPANSION} x d_model, not {config.d_inner} with "
            f"{config.d_model}"
        )
    return found


def eps_difference(config: ModelConfig) -> str | None:
    """What llama.cpp computes differently: it has one eps for all norms. None if nothing."""
    if config.mixer_norm_eps == config.norm_eps:
        return None
    return (
        f"llama.cpp has one eps: it takes {config.norm_eps:g} for the norms of B, C and dt too, "
        f"which have {config.mixer_norm_eps:g} here, so its logits differ slightly"
    )


def log_lines(config: ModelConfig, tokenizer: Tokenizer) -> list[str]:
    """What the log of an export says about llama.cpp."""
    if found := obstacles(config, tokenizer):
        return [f"llama.cpp cannot read this export: {reason}" for reason in found]
    difference = eps_difference(config)
    known = f"llama.cpp's converter knows the vocabulary as {pre_tokenizer(tokenizer)!r}"
    return [known, difference] if difference else [known]
