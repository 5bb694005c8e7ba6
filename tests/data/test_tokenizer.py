"""The tokenizer: lossless, with Falcon's special tokens, and readable by transformers."""

import random
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from core.errors import InputError
from data import tokenizer
from data.config import TokenizerConfig
from data.vocabulary import byte_lengths, required_vocab_size

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "In 1998 the 12345678 lamps, all of them, went out.",
    "Größe: 3,5 µm",
] * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a trained tokenizer with 320 ids."""
    out = tmp_path_factory.mktemp("tokenizer")
    tokenizer.train(TEXTS, 320, out)
    return out


@pytest.fixture(scope="module")
def trained(folder: Path) -> Tokenizer:
    return tokenizer.load(folder / tokenizer.FILE)


def hard_texts() -> list[str]:
    """Characters of one to four bytes in UTF-8, spaces before punctuation, numbers, blank lines."""
    rng = random.Random(0)
    characters = "".join(
        chr(code) for code in [*range(0x800), *range(0x2000, 0x3100), *range(0x1F300, 0x1F700)]
    )
    mixed = ["".join(rng.choices(characters, k=200)) for _ in range(20)]
    return [
        characters,
        *mixed,
        "a , b . c ! don't do n't",
        "  \n\n\t x  ",
        "1 12 123 1234 12345 1,234.5",
        "",
    ]


def test_decoding_inverts_encoding(trained: Tokenizer) -> None:
    for text in hard_texts():
        assert trained.decode(trained.encode(text).ids, skip_special_tokens=False) == text


def test_every_byte_has_a_token(trained: Tokenizer) -> None:
    lengths = byte_lengths(trained, tokenizer.EOS)
    assert lengths.shape == (320,) and lengths[12:].min() == 1 and not lengths[:12].any()
    assert (lengths == 1).sum() == 256
    for text in hard_texts():
        assert lengths[trained.encode(text).ids].sum() == len(text.encode())


def test_ids_of_special_tokens(trained: Tokenizer) -> None:
    assert tokenizer.EOS == 11 and trained.token_to_id("<|endoftext|>") == 11
    assert [trained.token_to_id(token) for token in tokenizer.ADDITIONAL_SPECIAL_TOKENS] == list(
        range(11)
    )
    assert trained.id_to_token(0) == ">>TITLE<<" and trained.id_to_token(10) == ">>MIDDLE<<"
    assert 11 not in trained.encode("no end is added").ids


def test_digits_are_grouped_in_threes_and_punctuation_is_split_off() -> None:
    words = [
        word
        for word, _ in tokenizer.untrained_tokenizer().pre_tokenizer.pre_tokenize_str(
            "x12345678 (a, b)..."
        )
    ]
    assert words == ["x", "123", "456", "78", "Ġ", "(", "a", ",", "Ġb", ")..."]


def test_training_twice_gives_the_same_file(folder: Path, tmp_path: Path) -> None:
    tokenizer.train(iter(TEXTS), 320, tmp_path)
    assert (tmp_path / tokenizer.FILE).read_bytes() == (folder / tokenizer.FILE).read_bytes()


def test_transformers_reads_the_folder(folder: Path, trained: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(loaded, transformers.PreTrainedTokenizerFast)
    assert (loaded.eos_token_id, loaded.pad_token_id, loaded.bos_token) == (11, 11, None)
    assert loaded.padding_side == "left" and len(loaded) == 320
    for text in hard_texts():
        ids = loaded(text)["input_ids"]
        assert ids == trained.encode(text).ids and loaded.decode(ids) == text


def test_mistakes_name_their_fix(folder: Path, tmp_path: Path) -> None:
    file = folder / tokenizer.FILE
    with pytest.raises(InputError, match="set data.tokenizer.path"):
        tokenizer.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="set data.tokenizer.sha256"):
        tokenizer.load(file, "0" * 64)
    (tmp_path / "text.json").write_text("no tokenizer")
    with pytest.raises(InputError, match="is not a valid tokenizer.json"):
        tokenizer.load(tmp_path / "text.json")
    with pytest.raises(InputError, match="data.tokenizer.vocab_size"):
        tokenizer.train(["too little"], 5000, tmp_path / "small")


def test_ids_may_leave_gaps() -> None:
    """The required vocabulary size is the highest id plus one, not the number of tokens."""
    gaps = Tokenizer(models.WordLevel({"a": 0, "bcd": 11, "ef": 40}, unk_token="a"))
    assert (gaps.get_vocab_size(), required_vocab_size(gaps)) == (3, 41)
    assert byte_lengths(gaps, 0)[[0, 11, 40]].tolist() == [1, 3, 2]


def test_copy_tokenizer_copies_every_file(folder: Path, tmp_path: Path) -> None:
    size = required_vocab_size(tokenizer.load(folder / tokenizer.FILE))
    settings = TokenizerConfig(str(folder / tokenizer.FILE), None, size, 1)
    tokenizer.copy_tokenizer(settings, tmp_path / "copy")
    with pytest.raises(
        InputError, match=f"has {size} ids: set data.tokenizer.vocab_size, now {size - 1}"
    ):
        tokenizer.copy_tokenizer(replace(settings, vocab_size=size - 1), tmp_path / "other")
    names = {path.name for path in folder.iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    for name in names:
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()
