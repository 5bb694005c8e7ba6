"""Falcon's tokenizer: byte-level BPE that splits off punctuation and groups digits in threes.

The pre-tokenizer splits runs of punctuation, then GPT-2's byte-level pattern, then runs of digits,
then groups of three digits. Ids 0-10 are Falcon's additional special tokens and id 11 ends a
document; there is no begin token.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from core.errors import InputError
from core.files import sha256_of

TRAINING_VERSION = 1  # raise with any change to a trained tokenizer
EOS_TOKEN = "<|endoftext|>"
ADDITIONAL_SPECIAL_TOKENS = (
    ">>TITLE<<",
    ">>ABSTRACT<<",
    ">>INTRODUCTION<<",
    ">>SUMMARY<<",
    ">>COMMENT<<",
    ">>ANSWER<<",
    ">>QUESTION<<",
    ">>DOMAIN<<",
    ">>PREFIX<<",
    ">>SUFFIX<<",
    ">>MIDDLE<<",
)
SPECIAL_TOKENS = (*ADDITIONAL_SPECIAL_TOKENS, EOS_TOKEN)
EOS = len(ADDITIONAL_SPECIAL_TOKENS)  # 11
FILE = "tokenizer.json"

TRANSFORMERS_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": EOS_TOKEN,
    "pad_token": EOS_TOKEN,
    "additional_special_tokens": list(ADDITIONAL_SPECIAL_TOKENS),
    "add_prefix_space": False,
    "padding_side": "left",
    # Falcon's file has true, which deletes the space before punctuation in decode(encode("a , b"))
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}


def load(path: Path, sha256: str | None = None) -> Tokenizer:
    """Load a `tokenizer.json`.

    Raises InputError if the file is missing or invalid, or if its hash or its end token differs.
    """
    if not path.is_file():
        raise InputError(
            f"no tokenizer at {path}: set data.tokenizer.path to a tokenizer.json, or to null to "
            "train one"
        )
    actual = sha256_of(path)
    if sha256 is not None and actual != sha256:
        raise InputError(
            f"{path} has sha256 {actual}, not {sha256}: set data.tokenizer.sha256 or use the "
            "right file"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises no more specific type
        raise InputError(
            f"{path} is not a valid tokenizer.json ({error}): set data.tokenizer.path to one"
        ) from error
    if tokenizer.token_to_id(EOS_TOKEN) != EOS:
        raise InputError(
            f"{path} gives {EOS_TOKEN} the id {tokenizer.token_to_id(EOS_TOKEN)}, not {EOS}: "
            "set data.tokenizer.path to a tokenizer with Falcon's special tokens"
        )
    return tokenizer


def untrained_tokenizer() -> Tokenizer:
    """A BPE tokenizer without vocabulary, with Falcon's pre-tokenizer."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train(texts: Iterable[str], vocab_size: int, out: Path) -> Tokenizer:
    """Train a tokenizer and write it to the folder `out`, which AutoTokenizer can load too.

    The same texts in the same order give the same file. Raises InputError if the texts are too few
    for `vocab_size`.
    """
    tokenizer = untrained_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        # all 256 bytes, so that every text can be encoded
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise InputError(
            f"training gave {tokenizer.get_vocab_size()} ids, not {vocab_size}: add text, or set "
            "data.tokenizer.vocab_size between 268 (12 special tokens, 256 bytes) and "
            f"{tokenizer.get_vocab_size()}"
        )
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / FILE))
    write_transformers_files(out)
    return tokenizer


def required_vocab_size(tokenizer: Tokenizer) -> int:
    """Embedding rows that a tokenizer needs: its highest id plus one."""
    return 1 + int(max(tokenizer.get_vocab().values()))


def copy_tokenizer(path: Path, sha256: str | None, vocab_size: int, out: Path) -> Tokenizer:
    """Check a tokenizer.json as `load` does and copy it into the folder `out`.

    Raises InputError if it has more than `vocab_size` ids.
    """
    tokenizer = load(path, sha256)
    num_ids = required_vocab_size(tokenizer)
    if num_ids > vocab_size:
        raise InputError(
            f"{path} has {num_ids} ids: set data.tokenizer.vocab_size, now {vocab_size}, to "
            f"{num_ids} or more"
        )
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, out / FILE)
    write_transformers_files(out)
    return tokenizer


def write_transformers_files(out: Path) -> None:
    """Write the two files that transformers needs to load PreTrainedTokenizerFast."""
    special = {
        key: TRANSFORMERS_CONFIG[key]
        for key in ("eos_token", "pad_token", "additional_special_tokens")
    }
    for name, content in (
        ("tokenizer_config.json", TRANSFORMERS_CONFIG),
        ("special_tokens_map.json", special),
    ):
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """Bytes of text per id, int64 [vocab]; 0 for special tokens."""
    lengths = np.zeros(required_vocab_size(tokenizer), dtype=np.int64)
    special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    for token, id in tokenizer.get_vocab().items():
        if id not in special:
            lengths[id] = len(token)  # the byte-level alphabet has one character per byte
    return lengths
