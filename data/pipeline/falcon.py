"""Falcon's own vocabulary, which Falcon Mamba shares, from a package of the Python package index.

The source distribution of llama-cpp-python holds llama.cpp's copy of the vocabulary with texts and
their ids. Three of its files are read after its hash is checked; nothing in it is executed. The
reader of llama.cpp's format is here because the package `gguf`
would be one more dependency for its 30 lines.
"""

import struct
import tarfile
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from core.errors import InputError
from core.files import make_folder, sha256_of, write_text
from data.tokenizer import (
    EOS_TOKEN,
    SPECIAL_TOKENS,
    untrained_tokenizer,
    write_transformers_files,
)

RELEASE = "llama_cpp_python-0.3.36"
SDIST = f"{RELEASE}.tar.gz"
SDIST_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
VOCABULARY = "vendor/llama.cpp/models/ggml-vocab-falcon.gguf"
# texts of llama.cpp's test, and a line of ids for each
TEXTS, IDS, SEPARATOR = f"{VOCABULARY}.inp", f"{VOCABULARY}.out", "\n__ggml_vocab_test__\n"
TOKENS_KEY, MERGES_KEY = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"
MAGIC = b"GGUF"
# struct's code of each type of a GGUF value; the other two are texts and arrays
NUMBERS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
TEXT, ARRAY = 8, 9
FETCH = "pip download --no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36"


def build(sdist: Path, out: Path, sha256: str = SDIST_SHA256) -> None:
    """Write Falcon's tokenizer.json to `out`, with the files of transformers beside it.

    Raises InputError if the source distribution has another hash, or if an id of its texts differs.
    """
    if (actual := sha256_of(sdist)) != sha256:
        raise InputError(f"{sdist} has sha256 {actual}, not {sha256}")
    content = read_members(sdist, (VOCABULARY, TEXTS, IDS))
    values = read_gguf(content[VOCABULARY])
    tokenizer = from_lists(values[TOKENS_KEY], values[MERGES_KEY])
    texts = content[TEXTS].decode().split(SEPARATOR)
    lines = content[IDS].decode().split("\n")
    for text, line in zip(texts, lines, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if ids != [int(word) for word in line.split()]:
            raise InputError(
                f"{text!r} has the ids {ids}, llama.cpp's are {line}: install the versions of "
                "constraints.txt"
            )
    make_folder(out.parent)
    write_transformers_files(out.parent, tokenizer, EOS_TOKEN)
    write_text(out, tokenizer.to_str(pretty=True))


def read_members(sdist: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """Contents of files of a source distribution, by their names without its folder."""
    content: dict[str, bytes] = {}
    with tarfile.open(sdist) as archive:
        for member in archive:
            name = member.name.removeprefix(f"{RELEASE}/")
            if name in names and (file := archive.extractfile(member)) is not None:
                content[name] = file.read()
            if len(content) == len(names):
                break
    return content


def from_lists(tokens: list[str], merges: list[str]) -> Tokenizer:
    """The tokenizer of Falcon's kind with these tokens, by id, and merges such as "a b"."""
    tokenizer = untrained_tokenizer()
    pairs = [(left, right) for left, _, right in (merge.partition(" ") for merge in merges)]
    vocabulary = {token: id for id, token in enumerate(tokens)}
    tokenizer.model = models.BPE(vocab=vocabulary, merges=pairs)
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    tokenizer.add_special_tokens(special)
    return tokenizer


def read_gguf(content: bytes) -> dict[str, Any]:
    """The keys and values at the begin of a GGUF file, versions 2 and 3."""
    position = len(MAGIC)

    def number(code: str) -> Any:
        nonlocal position
        (value,) = struct.unpack_from(f"<{code}", content, position)
        position += struct.calcsize(f"<{code}")
        return value

    def text() -> str:
        nonlocal position
        size = number("Q")
        position += size
        return content[position - size : position].decode()

    def value(kind: int) -> Any:
        if kind == ARRAY:
            inner, count = number("I"), number("Q")
            return [value(inner) for _ in range(count)]
        return text() if kind == TEXT else number(NUMBERS[kind])

    assert content.startswith(MAGIC) and number("I") in (2, 3)
    _tensors, count = number("Q"), number("Q")
    return {text(): value(number("I")) for _ in range(count)}
