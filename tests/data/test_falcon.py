"""Falcon's vocabulary from a package: read, built, checked, and used by the data section of 7b."""

import io
import json
import struct
import tarfile
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import pytest
from tokenizers import pre_tokenizers

from core.errors import InputError
from core.files import sha256_of
from data import download
from data.config import Source, Stage
from data.pipeline import falcon
from data.prepare import prepare
from data.stream.manifests import NARROW, SPLITS, open_manifests, source_folder, tokenizer_path
from data.tokenizer import EOS, SPECIAL_TOKENS, load
from tests.commands import ROOT
from tests.compose import run_config


def sdist(folder: Path, ids: str) -> Path:
    """A source distribution with a small vocabulary in llama.cpp's format, a text and its ids."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())

    def text(word: str) -> bytes:
        return struct.pack("<Q", len(word.encode())) + word.encode()

    def texts(key: str, words: list[str]) -> bytes:
        head = struct.pack("<IIQ", falcon.ARRAY, falcon.TEXT, len(words))
        return text(key) + head + b"".join(map(text, words))

    values = [
        text("general.file_type") + struct.pack("<II", 4, 1),
        texts(falcon.TOKENS_KEY, [*SPECIAL_TOKENS, *letters, "ab"]),
        texts(falcon.MERGES_KEY, ["a b"]),
    ]
    content = falcon.MAGIC + struct.pack("<IQQ", 3, 0, len(values)) + b"".join(values)
    path = folder / falcon.SDIST
    with tarfile.open(path, "w:gz") as archive:
        for name, data in (
            ("../../outside", b""),
            (falcon.VOCABULARY, content),
            (falcon.TEXTS, b"abab" + falcon.SEPARATOR.encode()),
            (falcon.IDS, f"{ids}\n".encode()),
        ):
            member = tarfile.TarInfo(f"{falcon.RELEASE}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_a_vocabulary_is_built_from_a_package_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = len(SPECIAL_TOKENS) + 256
    path = sdist(tmp_path, f" {merged} {merged}")
    out = tmp_path / "out" / "tokenizer.json"
    tokenizer = replace(run_config("7b").data.tokenizer, path=str(out), url=str(path))
    with pytest.raises(InputError, match=f"has sha256 .*`{falcon.FETCH}` fetches the file"):
        download.fetch_tokenizer(tokenizer)
    assert not list((tmp_path / "out").iterdir())
    build = falcon.build
    monkeypatch.setattr(falcon, "build", lambda package, out: build(package, out, sha256_of(path)))
    assert "built from" in download.fetch_tokenizer(tokenizer)
    assert download.fetch_tokenizer(tokenizer).startswith("exists")
    assert load(out).encode("xab<|endoftext|>").ids[-1] == EOS
    assert not (tmp_path / "outside").exists() and len(list(out.parent.iterdir())) == 3
    wrong = sdist(tmp_path, " 1 2")
    with pytest.raises(InputError, match="'abab' has the ids"):
        build(wrong, tmp_path / "wrong.json", sha256_of(wrong))


def test_7b_prepares_real_text_with_the_real_vocabulary(tmp_path: Path) -> None:
    """65,024 ids, all texts of llama.cpp's test alike, and shards that decode to their text."""
    out = tmp_path / "falcon" / "tokenizer.json"
    data = run_config("7b", f"data.folder={tmp_path}/data", f"data.tokenizer.path={out}").data
    try:
        urlopen(Request(str(data.tokenizer.url), method="HEAD"), timeout=20).close()
    except (URLError, TimeoutError) as error:
        pytest.skip(f"the Python package index does not answer: {error}")
    assert "as pinned" not in download.fetch_tokenizer(data.tokenizer)
    assert out.stat().st_size == 4_612_922
    model = json.loads(out.read_text(encoding="utf-8"))["model"]
    assert (len(model["vocab"]), len(model["merges"])) == (65_024, 64_784)
    assert model["vocab"]["<|endoftext|>"] == EOS == 11
    raw = tmp_path / "raw"
    raw.mkdir()
    texts = [path.read_text() for path in sorted((ROOT / "docs" / "design").glob("*.md"))]
    rows = [json.dumps({"text": text, "id": str(number)}) for number, text in enumerate(texts)]
    (raw / "0.jsonl").write_text("\n".join(rows) + "\n")
    prose = Source("curated", str(raw), "Apache-2.0", 1.0, 1)
    only = [Stage("only", 8192, 2048, {"prose": 1.0})]
    data = replace(data, heldout_percent=20.0, workers=1, sources={"prose": prose}, stages=only)
    prepare(data)
    (manifest,) = open_manifests(data).values()
    assert manifest.dtype == NARROW and manifest.eos == EOS and manifest.vocab_size <= 65_024
    tokenizer = load(tokenizer_path(data))
    decoded = set()
    for file in manifest.files():
        ids = np.fromfile(source_folder(data, "prose") / file.name, manifest.dtype)
        documents = np.split(ids, np.flatnonzero(ids == EOS) + 1)[:-1]
        decoded |= {tokenizer.decode(document[:-1]) for document in documents}
    assert decoded == set(texts)
    total = sum(len(text.encode()) for text in decoded) / sum(map(manifest.tokens, SPLITS))
    assert 3 < total < 5  # bytes per token of English prose
