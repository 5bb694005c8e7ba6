"""Small tokenizers of the three kinds in use: GPT-NeoX's, Llama 2's and Qwen's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

TEXTS = [
    "def add(a, b):\n    return (a + b);\n\n\nIn 1998 the 12345 lamps, all of them, went out.\n",
    "The river runs past the stone house.\nGr\u00f6\u00dfe: 3,5 \u00b5m, na\u00efve caf\u00e9\n",
] * 20
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# of Qwen 2 and, but for the digits, of Llama 3: punctuation takes the line breaks after it
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def neox() -> tuple[Tokenizer, dict[str, Any] | None]:
    """GPT-NeoX: the end token has id 0, runs of spaces are added tokens; no config beside it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken(" " * count, normalized=True) for count in range(8, 1, -1)])
    return tokenizer, None


def llama() -> tuple[Tokenizer, dict[str, Any] | None]:
    """Llama 2: byte fallback, a space before every text, and a template that adds <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    # words as sentencepiece trains on them; no line break and few letters, so that bytes are used
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "removed"),
            pre_tokenizers.Split(Regex("\u2581[^\u2581]*"), "isolated"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=["<unk>", "<s>", "</s>", *BYTES],
        limit_alphabet=60,
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    raw = json.loads(tokenizer.to_str())
    raw["pre_tokenizer"] = None
    raw["added_tokens"] = raw["added_tokens"][:3]
    raw["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": {"__type": "AddedToken", "content": "<s>", "normalized": False},
        "eos_token": {"__type": "AddedToken", "content": "</s>", "normalized": False},
        "unk_token": {"__type": "AddedToken", "content": "<unk>", "normalized": False},
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "model_max_length": 4096,
        "pad_token": None,
        "tokenizer_class": "LlamaTokenizer",
    }
    return tokenizer, config


def qwen() -> tuple[Tokenizer, dict[str, Any] | None]:
    """Qwen: special tokens after more than 65,536 others, and an added token that is not one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    raw = json.loads(tokenizer.to_str())
    vocab = raw["model"]["vocab"]
    used = sorted(vocab, key=vocab.__getitem__)[256:]
    fillers = (f"filler{index}" for index in range(66_000 - len(vocab)))
    # merged tokens get ids above 65,535
    raw["model"]["vocab"] = {
        token: index for index, token in enumerate([*list(vocab)[:256], *fillers, *used])
    }
    tokenizer = Tokenizer.from_str(json.dumps(raw))
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.add_tokens(["<tool_call>"])
    config = {
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": "{{ messages }}",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|im_end|>",
        "model_max_length": 32768,
        "tokenizer_class": "Qwen2Tokenizer",
    }
    return tokenizer, config


KINDS: dict[str, Callable[[], tuple[Tokenizer, dict[str, Any] | None]]] = {
    "neox": neox,
    "llama": llama,
    "qwen": qwen,
}
END_IDS = {"neox": 0, "llama": 2, "qwen": 66_000}


def write_vocabulary(kind: str, folder: Path) -> Path:
    """Write a tokenizer.json, and tokenizer_config.json if the kind has one; returns the first."""
    tokenizer, config = KINDS[kind]()
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"
