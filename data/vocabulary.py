"""What training needs to know of any tokenizer: its end token and the bytes behind its ids.

Two kinds can encode every text and are accepted: byte-level vocabularies (GPT-2, GPT-NeoX, Falcon,
Llama 3, Qwen) and those with byte fallback (Llama 2, Mistral, Gemma).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from core.errors import InputError
from core.records import DamagedRecord, read_typed

TOKENIZER_CONFIG = "tokenizer_config.json"
# names of end tokens, for a tokenizer.json without tokenizer_config.json
END_TOKENS = (
    "<|endoftext|>",  # GPT-2, GPT-NeoX, Falcon, Qwen
    "</s>",  # Llama 2, Mistral
    "<|end_of_text|>",  # Llama 3
    "<eos>",  # Gemma
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek
)
BYTE_TOKENS = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPACE = "\u2581"  # sentencepiece's


def end_token(path: Path, tokenizer: Tokenizer, setting: str | None = None) -> str:
    """The token that ends a document, for the tokenizer.json at `path`.

    It is `setting`, else the eos_token of tokenizer_config.json beside the file, else the only
    special token with a known name. Raises InputError if that is no special token, or none or
    several fit.
    """
    special = special_tokens(tokenizer)
    config = path.with_name(TOKENIZER_CONFIG)
    named = content_of(read_config(config).get("eos_token"))
    token, origin = (setting, "data.tokenizer.eos_token") if setting else (named, str(config))
    if token is None:
        known = [name for name in END_TOKENS if name in special]
        if len(known) == 1:
            return known[0]
        raise InputError(
            f"{path} does not say which token ends a document: set data.tokenizer.eos_token to "
            f"one of {', '.join((known or special)[:20]) or 'its special tokens; it has none'}"
        )
    if token not in special:
        raise InputError(
            f"{origin} names the end token {token}, which is no special token of {path}: set "
            f"data.tokenizer.eos_token to one of {', '.join(special[:20]) or '(it has none)'}"
        )
    return token


def end_id(path: Path, tokenizer: Tokenizer) -> int:
    """Id of the token that ends a document, for the tokenizer.json at `path`."""
    end = tokenizer.token_to_id(end_token(path, tokenizer))
    assert end is not None  # a special token
    return end


def special_tokens(tokenizer: Tokenizer) -> list[str]:
    """Special tokens in the order of their ids."""
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    return [token.content for _, token in added if token.special]


def read_config(path: Path) -> dict[str, Any]:
    """A tokenizer_config.json; empty if there is none. Raises InputError if it is invalid."""
    try:
        return read_typed(path, dict[str, Any])
    except FileNotFoundError:
        return {}
    except (DamagedRecord, OSError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise InputError(f"{path} is not a JSON object: mend or remove it ({reason})") from error


def content_of(token: Any) -> str | None:
    """Text of a token in tokenizer_config.json, where it is a string or {"content": string}."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) and token else None


def required_vocab_size(tokenizer: Tokenizer) -> int:
    """Embedding rows that a tokenizer needs: its highest id plus one."""
    return 1 + int(max(tokenizer.get_vocab().values()))


def decoder_types(tokenizer: Tokenizer) -> set[str]:
    """Types of a tokenizer's decoders, such as ByteLevel."""
    decoder = json.loads(tokenizer.to_str())["decoder"] or {}
    return {each["type"] for each in decoder.get("decoders", [decoder]) if "type" in each}


def check_trainable(path: Path, tokenizer: Tokenizer, eos_token: str) -> None:
    """Raise InputError if a text may lose characters, or hold the end token before its end."""
    types = decoder_types(tokenizer)
    missing = [token for token in BYTE_TOKENS if tokenizer.token_to_id(token) is None]
    if "ByteLevel" not in types and ("ByteFallback" not in types or missing):
        raise InputError(
            f"{path} is neither byte-level nor has byte fallback for all 256 bytes, so it loses "
            "characters: set data.tokenizer.path to one that is, or to null to train one"
        )
    plain = Tokenizer.from_str(tokenizer.to_str())
    plain.encode_special_tokens = True
    eos = tokenizer.token_to_id(eos_token)
    for text in (eos_token, f"a {eos_token} b"):
        if eos in plain.encode(text, add_special_tokens=False).ids:
            raise InputError(
                f"{path} encodes the text {text!r} with its end token, which would cut documents: "
                "set data.tokenizer.eos_token to another special token"
            )


def byte_lengths(tokenizer: Tokenizer, eos: int) -> NDArray[np.int64]:
    """Bytes of text per id [vocab]; summed over documents, the bytes of their decoded text.

    Special tokens have 0. Where the tokenizer puts a space before every text, `eos` has -1.
    """
    lengths = np.zeros(required_vocab_size(tokenizer), dtype=np.int64)
    added = tokenizer.get_added_tokens_decoder()
    types = decoder_types(tokenizer)
    byte_tokens = set(BYTE_TOKENS) if "ByteFallback" in types else set()
    for token, id in tokenizer.get_vocab().items():
        if id in added:
            lengths[id] = 0 if added[id].special else len(token.encode())
        elif "ByteLevel" in types:
            lengths[id] = len(token)  # the byte-level alphabet has one character per byte
        else:
            lengths[id] = 1 if token in byte_tokens else len(token.replace(SPACE, " ").encode())
    if "ByteFallback" in types:
        first = tokenizer.encode("a", add_special_tokens=False).ids
        lengths[eos] = 1 - lengths[first].sum()
    return lengths
