"""Falcon's kind of vocabulary: byte-level BPE that keeps punctuation apart and cuts numbers into
threes.

Order of the pre-tokenizer: runs of punctuation, then GPT-2's byte-level split, then runs of digits,
then threes. Ids 0-10 are Falcon's document marks and id 11 ends a document; there is no begin
token.
"""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from core.errors import InputError
from core.files import sha256_of

TRAINING_VERSION = 1  # raised with what a trained vocabulary follows from
EOS_TOKEN = "<|endoftext|>"
MARKS = (
    *(
        ">>TITLE<<",
        ">>ABSTRACT<<",
        ">>INTRODUCTION<<",
        ">>SUMMARY<<",
        ">>COMMENT<<",
        ">>ANSWER<<",
        ">>QUESTION<<",
    ),
    *(">>DOMAIN<<", ">>PREFIX<<", ">>SUFFIX<<", ">>MIDDLE<<"),
)
SPECIAL_TOKENS = (*MARKS, EOS_TOKEN)
EOS = len(MARKS)  # 11
FILE = "tokenizer.json"

TRANSFORMERS_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": EOS_TOKEN,
    "pad_token": EOS_TOKEN,
    "additional_special_tokens": list(MARKS),
    "add_prefix_space": False,
    "padding_side": "left",
    # Falcon's own file says true, which deletes the space before punctuation: decode(encode("a ,
    # b")) would lose text.
    "clean_up_tokenization_spaces": False,
    "model_input_names": ["input_ids", "attention_mask"],
}


def load(path: Path, sha256: str | None = None) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`.

    Raises InputError when the file is missing or no tokenizer, has another hash than `sha256`, or
    another end token.
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
    except Exception as error:  # the library raises nothing more precise
        raise InputError(
            f"{path} is no tokenizer.json ({error}): set data.tokenizer.path to one"
        ) from error
    if tokenizer.token_to_id(EOS_TOKEN) != EOS:
        raise InputError(
            f"{path} gives {EOS_TOKEN} the id {tokenizer.token_to_id(EOS_TOKEN)}, not {EOS}: "
            "set data.tokenizer.path to a vocabulary of Falcon's layout"
        )
    return tokenizer


def untrained() -> Tokenizer:
    """An empty vocabulary with Falcon's pre-tokenizer."""
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
    """Train a vocabulary and write it to the folder `out` for us and for transformers'
    AutoTokenizer.

    The same texts in the same order give the same file. Raises InputError when the texts are too
    few for `vocab_size`.
    """
    tokenizer = untrained()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        # all 256 bytes, so that no text is unknown
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise InputError(
            f"the text gave a vocabulary of {tokenizer.get_vocab_size()}, not {vocab_size}: set "
            "data.tokenizer.vocab_size to between 268 (12 marks and 256 bytes) and that, or add "
            "text"
        )
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / FILE))
    write_transformers_files(out)
    return tokenizer


def size_of(tokenizer: Tokenizer) -> int:
    """Rows that an embedding needs for a vocabulary: the highest id and one."""
    return 1 + int(max(tokenizer.get_vocab().values()))


def adopt(path: Path, sha256: str | None, vocab_size: int, out: Path) -> Tokenizer:
    """Copy an existing tokenizer.json, byte for byte, into the folder `out`, checked as `load`
    does.

    Raises InputError when it has more than `vocab_size` ids.
    """
    tokenizer = load(path, sha256)
    if (size := size_of(tokenizer)) > vocab_size:
        raise InputError(
            f"{path} has {size} ids: set data.tokenizer.vocab_size, now {vocab_size}, to {size} "
            "or more"
        )
    out.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(path, out / FILE)
    write_transformers_files(out)
    return tokenizer


def write_transformers_files(out: Path) -> None:
    """The two small files that make the folder readable as PreTrainedTokenizerFast."""
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
    """Bytes of text that each id stands for, int64 [vocab]; 0 for special tokens."""
    lengths = np.zeros(size_of(tokenizer), dtype=np.int64)
    special = {id for id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    for token, id in tokenizer.get_vocab().items():
        if id not in special:
            lengths[id] = len(token)  # the byte-level alphabet writes one character per byte
    return lengths
