"""Tokenizers: train Falcon's kind, or copy any `tokenizer.json` with the files of transformers.

Falcon's is byte-level BPE: the pre-tokenizer splits runs of punctuation, then GPT-2's byte-level
pattern, then runs of digits, then groups of three digits. Ids 0-10 are Falcon's additional special
tokens and id 11 ends a document; there is no begin token.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from core.errors import InputError
from core.files import copy_file, make_folder, sha256_of, write_json, write_text
from data import vocabulary
from data.config import TokenizerConfig
from data.vocabulary import TOKENIZER_CONFIG, required_vocab_size

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
EOS = len(ADDITIONAL_SPECIAL_TOKENS)  # 11, in Falcon's tokenizer and those trained here
FILE = "tokenizer.json"
# keys of a tokenizer_config.json that name a begin token or code, which training never used
DROPPED = ("bos_token", "add_bos_token", "add_eos_token", "auto_map", "tokenizer_file")


def load(path: Path, sha256: str | None = None) -> Tokenizer:
    """Load a `tokenizer.json` without the truncation and padding that it may ask for.

    Raises InputError if the file is missing or invalid, or if its hash differs.
    """
    if not path.is_file():
        raise InputError(
            f"no tokenizer at {path}: set data.tokenizer.path to a tokenizer.json (`python "
            "data/download.py tokenizer=falcon` builds Falcon's), or to null to train one"
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
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def describe(path: Path) -> str:
    """Number of ids, end token and hash of a tokenizer.json, as text."""
    tokenizer = load(path)
    end = vocabulary.end_token(path, tokenizer)
    return (
        f"{tokenizer.get_vocab_size():,} ids, documents end with {end} "
        f"({tokenizer.token_to_id(end)}), {sha256_of(path)[:12]}"
    )


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
    make_folder(out)
    write_text(out / FILE, tokenizer.to_str(pretty=True))
    write_transformers_files(out, tokenizer, EOS_TOKEN)
    return tokenizer


def load_for_training(settings: TokenizerConfig) -> tuple[Tokenizer, str]:
    """Load the tokenizer.json at `settings.path`; return it and its end token.

    Raises InputError as `load` does, if it has more than `settings.vocab_size` ids, or if it cannot
    be trained on.
    """
    path = Path(str(settings.path))
    tokenizer = load(path, settings.sha256)
    num_ids = required_vocab_size(tokenizer)
    if num_ids > settings.vocab_size:
        raise InputError(
            f"{path} has {num_ids} ids: set data.tokenizer.vocab_size, now {settings.vocab_size}, "
            f"to {num_ids} or more"
        )
    eos_token = vocabulary.end_token(path, tokenizer, settings.eos_token)
    vocabulary.check_trainable(path, tokenizer, eos_token)
    return tokenizer, eos_token


def copy_tokenizer(settings: TokenizerConfig, out: Path) -> Tokenizer:
    """Check a tokenizer.json as `load_for_training` does and copy it into the folder `out`."""
    tokenizer, eos_token = load_for_training(settings)
    path = Path(str(settings.path))
    make_folder(out)
    copy_file(path, out / FILE)
    own = vocabulary.read_config(path.with_name(TOKENIZER_CONFIG))
    write_transformers_files(out, tokenizer, eos_token, own)
    return tokenizer


def write_transformers_files(
    out: Path, tokenizer: Tokenizer, eos_token: str, own: dict[str, Any] | None = None
) -> None:
    """Write the two files that transformers needs to load PreTrainedTokenizerFast.

    `own` is the tokenizer's own tokenizer_config.json, whose other keys are kept.
    """
    config = own_config(tokenizer, eos_token, own) if own else new_config(tokenizer, eos_token)
    names = ("eos_token", "pad_token", "unk_token", "additional_special_tokens")
    special = {key: config[key] for key in names if config.get(key)}
    for name, content in ((TOKENIZER_CONFIG, config), ("special_tokens_map.json", special)):
        write_json(out / name, content, indent=2)


def new_config(tokenizer: Tokenizer, eos_token: str) -> dict[str, Any]:
    """tokenizer_config.json of a tokenizer that has none."""
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    others = [token.content for _, token in added if token.special and token.content != eos_token]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos_token,
        "pad_token": eos_token,
        "additional_special_tokens": others,
        **prefix_space(tokenizer),
        "padding_side": "left",
        # Falcon's file has true, which deletes the space before punctuation in
        # decode(encode("a , b"))
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }


def own_config(tokenizer: Tokenizer, eos_token: str, own: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's own tokenizer_config.json, changed to load as the run used the tokenizer.

    No text gets a begin token, documents end with `eos_token`, and transformers reads
    tokenizer.json instead of building a tokenizer of the class that the file names.
    """
    kept = {key: value for key, value in own.items() if key not in DROPPED}
    pad_token = vocabulary.content_of(own.get("pad_token"))
    known = pad_token is not None and tokenizer.token_to_id(pad_token) is not None
    decided = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos_token,
        "pad_token": pad_token if known else eos_token,
        **prefix_space(tokenizer),
        "clean_up_tokenization_spaces": False,
    }
    config = kept | decided
    config.setdefault("padding_side", "left")
    return config


def prefix_space(tokenizer: Tokenizer) -> dict[str, bool]:
    """The pre-tokenizer's add_prefix_space, which transformers would set to false; {} if none."""
    state = json.loads(tokenizer.to_str())["pre_tokenizer"] or {}
    parts = state.get("pretokenizers", [state])
    values = [part["add_prefix_space"] for part in parts if "add_prefix_space" in part]
    return {"add_prefix_space": values[0]} if values else {}
