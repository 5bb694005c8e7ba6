"""The tokenizer of an export: its files, and the check that transformers reads them as we do."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from core.errors import InputError
from core.files import copy_file, write_json, write_text
from data.tokenizer import FILE, load
from data.vocabulary import TOKENIZER_CONFIG, content_of, end_id, read_config

SPECIAL_TOKENS_MAP = "special_tokens_map.json"
# unless it is told, llama.cpp puts a begin token before texts of vocabularies such as Llama 3's
ADDS_NOTHING = {"add_bos_token": False, "add_eos_token": False}
# spaces, digits, line breaks, composed and decomposed letters, four bytes, control characters
PROBES = (
    " The 12345 lamps,  not all\n\n\tfoo(bar);\nbaz\n",
    "na\u00efve e\u0301 \u4e2d\u6587 \U0001f600 \x00",
)


def token_ids(path: Path) -> tuple[int, int]:
    """Ids of the end token and the padding token of a prepared tokenizer.json."""
    tokenizer = load(path)
    eos = end_id(path, tokenizer)
    pad_token = content_of(read_config(path.with_name(TOKENIZER_CONFIG)).get("pad_token"))
    pad = None if pad_token is None else tokenizer.token_to_id(pad_token)
    return eos, eos if pad is None else int(pad)


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids of a text as in training: nothing is added."""
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


def write_tokenizer(path: Path, folder: Path) -> None:
    """Copy a prepared tokenizer.json and its files into an export.

    A tokenizer.json that adds tokens to a text, truncates or pads it is written without that, and
    tokenizer_config.json says so: the model was trained on the plain ids.
    """
    copy_file(path.with_name(SPECIAL_TOKENS_MAP), folder / SPECIAL_TOKENS_MAP)
    config = read_config(path.with_name(TOKENIZER_CONFIG))
    write_json(folder / TOKENIZER_CONFIG, config | ADDS_NOTHING, indent=2)
    content = json.loads(path.read_text(encoding="utf-8"))
    tokenizer = load(path)
    changes = {key: None for key in ("truncation", "padding") if content.get(key) is not None}
    if tokenizer.encode("a").ids != plain_ids(tokenizer, "a"):
        changes["post_processor"] = None
    if not changes:
        copy_file(path, folder / FILE)
        return
    text = json.dumps(content | changes, indent=2, ensure_ascii=False) + "\n"
    write_text(folder / FILE, text)


def check_tokenizer(path: Path, folder: Path, vocab_size: int) -> None:
    """Raise InputError if AutoTokenizer gives an export's texts other ids than our tokenizer."""
    from transformers import AutoTokenizer

    tokenizer, loaded = load(path), AutoTokenizer.from_pretrained(folder)
    problems = [
        f"it encodes {text!r} as {ids[:20]}, training as {expected[:20]}"
        for text in PROBES
        if (ids := loaded(text)["input_ids"]) != (expected := plain_ids(tokenizer, text))
    ]
    eos = end_id(path, tokenizer)
    if loaded.eos_token_id != eos:
        problems.append(f"its eos_token_id is {loaded.eos_token_id}, not {eos}")
    if (highest := max(loaded.get_vocab().values())) >= vocab_size:
        problems.append(f"it has ids up to {highest}, model.vocab_size is {vocab_size}")
    if problems:
        raise InputError(
            f"transformers reads the tokenizer in {folder} differently: {'; '.join(problems)}; "
            f"mend {path.with_name(TOKENIZER_CONFIG)} and export again"
        )
