"""The vocabulary: nothing is lost, Falcon's layout, and readable by transformers."""

import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models

from core.errors import InputError
from data import tokenizer

TEXTS = [
    "def add(a, b):\n    return a + b\n",
    "In 1998 the 12345678 lamps, all of them, went out.",
    "Größe: 3,5 µm",
] * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained vocabulary of 320 ids."""
    out = tmp_path_factory.mktemp("tokenizer")
    tokenizer.train(TEXTS, 320, out)
    return out


@pytest.fixture(scope="module")
def trained(folder: Path) -> Tokenizer:
    """The same, loaded."""
    return tokenizer.load(folder / tokenizer.FILE)


def hard_texts() -> list[str]:
    """Every character that takes one to four bytes in UTF-8, spaces before punctuation, numbers,
    blank lines.
    """
    dice = random.Random(0)
    every = "".join(
        chr(code) for code in [*range(0x800), *range(0x2000, 0x3100), *range(0x1F300, 0x1F700)]
    )
    mixed = ["".join(dice.choices(every, k=200)) for _ in range(20)]
    return [
        every,
        *mixed,
        "a , b . c ! don't do n't",
        "  \n\n\t x  ",
        "1 12 123 1234 12345 1,234.5",
        "",
    ]


def test_decoding_returns_every_text(trained: Tokenizer) -> None:
    for text in hard_texts():
        assert trained.decode(trained.encode(text).ids, skip_special_tokens=False) == text


def test_every_byte_has_a_token_of_its_own(trained: Tokenizer) -> None:
    lengths = tokenizer.byte_lengths(trained)
    assert lengths.shape == (320,) and lengths[12:].min() == 1 and not lengths[:12].any()
    assert (lengths == 1).sum() == 256
    for text in hard_texts():
        assert lengths[trained.encode(text).ids].sum() == len(text.encode())


def test_ids_of_marks_and_end(trained: Tokenizer) -> None:
    assert tokenizer.EOS == 11 and trained.token_to_id("<|endoftext|>") == 11
    assert [trained.token_to_id(mark) for mark in tokenizer.MARKS] == list(range(11))
    assert trained.id_to_token(0) == ">>TITLE<<" and trained.id_to_token(10) == ">>MIDDLE<<"
    assert 11 not in trained.encode("no end is added").ids


def test_numbers_are_cut_into_threes_and_punctuation_stands_alone() -> None:
    words = [
        word
        for word, _ in tokenizer.untrained().pre_tokenizer.pre_tokenize_str("x12345678 (a, b)...")
    ]
    assert words == ["x", "123", "456", "78", "Ġ", "(", "a", ",", "Ġb", ")..."]


def test_training_twice_gives_the_same_file(folder: Path, tmp_path: Path) -> None:
    tokenizer.train(iter(TEXTS), 320, tmp_path)
    assert (tmp_path / tokenizer.FILE).read_bytes() == (folder / tokenizer.FILE).read_bytes()


def test_transformers_reads_the_folder(folder: Path, trained: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(theirs, transformers.PreTrainedTokenizerFast)
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.bos_token) == (11, 11, None)
    assert theirs.padding_side == "left" and len(theirs) == 320
    for text in hard_texts():
        ids = theirs(text)["input_ids"]
        assert ids == trained.encode(text).ids and theirs.decode(ids) == text


def test_mistakes_name_their_fix(folder: Path, tmp_path: Path) -> None:
    file = folder / tokenizer.FILE
    with pytest.raises(InputError, match="set data.tokenizer.path"):
        tokenizer.load(tmp_path / "none.json")
    with pytest.raises(InputError, match="set data.tokenizer.sha256"):
        tokenizer.load(file, "0" * 64)
    (tmp_path / "text.json").write_text("no tokenizer")
    with pytest.raises(InputError, match="is no tokenizer.json"):
        tokenizer.load(tmp_path / "text.json")
    with pytest.raises(InputError, match="data.tokenizer.vocab_size"):
        tokenizer.train(["too little"], 5000, tmp_path / "small")


def test_another_layout_is_refused(tmp_path: Path) -> None:
    other = tokenizer.untrained()
    other.add_special_tokens([tokenizer.EOS_TOKEN])
    other.save(str(tmp_path / "other.json"))
    with pytest.raises(InputError, match="Falcon's layout"):
        tokenizer.load(tmp_path / "other.json")


def test_ids_may_leave_gaps() -> None:
    """The size is what an embedding needs: the highest id counts, not the number of tokens."""
    gaps = Tokenizer(models.WordLevel({"a": 0, "bcd": 11, "ef": 40}, unk_token="a"))
    assert (gaps.get_vocab_size(), tokenizer.size_of(gaps)) == (3, 41)
    assert tokenizer.byte_lengths(gaps)[[0, 11, 40]].tolist() == [1, 3, 2]


def test_adopting_copies_the_file(folder: Path, tmp_path: Path) -> None:
    size = tokenizer.size_of(tokenizer.load(folder / tokenizer.FILE))
    tokenizer.adopt(folder / tokenizer.FILE, None, size, tmp_path / "copy")
    with pytest.raises(
        InputError, match=f"has {size} ids: set data.tokenizer.vocab_size, now {size - 1}"
    ):
        tokenizer.adopt(folder / tokenizer.FILE, None, size - 1, tmp_path / "other")
    names = {path.name for path in folder.iterdir()}
    assert names == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"}
    for name in names:
        assert (tmp_path / "copy" / name).read_bytes() == (folder / name).read_bytes()
